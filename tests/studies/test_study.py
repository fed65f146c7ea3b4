"""Studies: their plans and published numbers, how cells are run and told of, and the tables made of them."""

import contextlib
import io
import json
import math
import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from helpers import ROOT
from helpers.command import complaint
from torch.utils.tensorboard import SummaryWriter

from ldlm.cli import main as cli
from ldlm.plots import loss_curves, side_by_side
from ldlm.studies import scheduler as study_room
from ldlm.studies.plan import SCALES, Cell, find_study, plan
from ldlm.studies.run import Slot, claim
from ldlm.studies.scheduler import make_slots
from ldlm.studies.summary import COLUMNS, figures, markdown, measure, noise, verdicts

STUDIES = sorted(path.stem for path in (Path(str(cli.CONFIGS)) / "studies").glob("*.yaml"))

# --- the shipped studies

# As the paper prints them: generative perplexity, MAUVE, entropy.
TABLE_1 = {
    "Reconstruction loss": [
        ("ce", 156.3, 2.6, 15.1, 1.4, 4.21, 0.01),
        ("base", 98.5, 1.9, 81.7, 3.5, 4.23, 0.01),
        ("ce-mse", 124.8, 2.4, 64.9, 5.6, 4.25, 0.01),
    ],
    "Token encoder (CE loss)": [
        ("ce", 156.3, 2.6, 15.1, 1.4, 4.21, 0.01),
        ("shallow", 190.4, 3.4, 3.9, 0.8, 4.18, 0.00),
        ("scratch", 272.4, 8.0, 3.0, 0.4, 4.24, 0.01),
    ],
    "Warm-up (uniform timesteps)": [
        ("warmup-0", 403.1, 10.8, 0.4, 0.1, 3.11, 0.01),
        ("warmup-5k", 274.7, 6.9, 4.3, 0.6, 4.28, 0.00),
        ("uniform", 171.9, 2.2, 11.8, 1.9, 4.24, 0.00),
        ("warmup-25k", 125.3, 3.1, 53.6, 2.5, 4.25, 0.01),
        ("warmup-50k", 116.7, 3.3, 67.0, 3.2, 4.24, 0.01),
        ("warmup-100k", 119.4, 2.5, 68.8, 2.7, 4.25, 0.01),
    ],
    "Timestep sampling": [
        ("uniform", 171.9, 2.2, 11.8, 1.9, 4.24, 0.01),
        ("base", 98.5, 1.9, 81.7, 3.5, 4.23, 0.01),
    ],
    "Decoder noise": [
        ("sigma-0.1", 702.2, 31.5, 0.6, 0.1, 3.58, 0.03),
        ("sigma-0.5", 288.9, 5.4, 3.3, 0.2, 4.23, 0.01),
        ("base", 98.5, 1.9, 81.7, 3.5, 4.23, 0.01),
        ("sigma-2", 74.2, 1.0, 87.3, 0.7, 4.24, 0.01),
        ("sigma-3", 66.3, 0.8, 89.1, 3.1, 4.25, 0.01),
        ("sigma-4", 38.1, 0.6, 0.4, 0.1, 2.19, 0.01),
    ],
}
TABLE_2 = {
    "Latent space": [
        ("embeddings-scratch", 570.1, 15.4, 0.8, 0.1, 4.26, 0.01),
        ("embeddings", 299.2, 3.4, 1.6, 0.2, 4.26, 0.00),
        ("tencdm", 149.7, 1.8, 36.6, 5.9, 4.28, 0.00),
        ("cosmos", 98.5, 1.8, 53.4, 4.8, 4.19, 0.01),
        ("ldlm", 66.3, 0.8, 89.1, 3.1, 4.25, 0.01),
    ],
}
# The appendix's have diversity, too, between MAUVE and entropy.
TABLE_4 = {
    "TEncDM-like": [
        ("tencdm-1", 158.4, 1.3, 25.5, 4.4, 54.7, 0.4, 4.26, 0.01),
        ("tencdm-2", 156.5, 2.2, 33.3, 3.4, 54.7, 0.4, 4.27, 0.00),
        ("tencdm-3", 149.7, 1.8, 36.6, 5.9, 55.4, 0.3, 4.28, 0.00),
        ("tencdm-4", 154.4, 1.8, 37.6, 5.1, 56.6, 0.4, 4.27, 0.00),
    ],
    "COSMOS-like": [
        ("cosmos-1", 137.6, 0.7, 9.6, 1.5, 50.0, 0.2, 4.11, 0.01),
        ("cosmos-2", 105.3, 2.1, 48.1, 4.2, 50.4, 0.3, 4.17, 0.01),
        ("cosmos-3", 98.5, 1.8, 53.4, 4.8, 51.0, 0.4, 4.19, 0.01),
        ("cosmos-4", 116.1, 1.6, 37.7, 2.0, 53.3, 0.3, 4.15, 0.01),
    ],
    "LDLM": [
        ("ldlm-1", 54.5, 0.8, 88.1, 0.9, 52.1, 0.5, 4.24, 0.00),
        ("ldlm-2", 72.7, 0.4, 87.2, 1.8, 53.8, 0.2, 4.26, 0.01),
        ("ldlm-3", 66.3, 0.8, 89.1, 3.1, 52.9, 0.3, 4.25, 0.01),
        ("ldlm-4", 63.8, 0.6, 82.5, 2.6, 51.7, 0.3, 4.24, 0.00),
    ],
}
TABLE_5 = {
    "Token decoder": [
        ("joint", 66.3, 0.8, 89.1, 3.1, 52.9, 0.3, 4.25, 0.01),
        ("decoder-1", 81.3, 1.2, 85.9, 2.2, 52.0, 0.3, 4.26, 0.00),
        ("decoder-2", 68.7, 0.6, 87.2, 2.9, 52.0, 0.2, 4.24, 0.00),
        ("decoder-3", 67.0, 0.8, 86.6, 2.5, 51.4, 0.4, 4.22, 0.00),
        ("decoder-6", 65.1, 0.5, 86.2, 1.0, 51.9, 0.1, 4.23, 0.00),
        ("decoder-linear",),
    ],
}
TABLE_6 = {
    "Pre-trained encoder": [
        ("gpt2", 66.3, 0.8, 89.1, 3.1, 52.9, 0.3, 4.25, 0.01),
        ("bert", 86.0, 0.3, 93.6, 6.3, 47.8, 0.2, 4.29, 0.00),
    ],
}
TABLE_7 = {
    "Latent encoder": [
        ("perceiver", 66.3, 0.8, 89.1, 3.1, 52.9, 0.3, 4.25, 0.01),
        ("self-attention", 94.7, 1.4, 91.9, 0.4, 49.6, 0.4, 4.21, 0.00),
    ],
}
LATENTS = {"Latent vectors a row": [("all",), ("half",), ("quarter",)]}
PUBLISHED = {
    "table1": TABLE_1,
    "table2": TABLE_2,
    "table4": TABLE_4,
    "table5": TABLE_5,
    "table6": TABLE_6,
    "table7": TABLE_7,
    "latents": LATENTS,
}


def test_every_shipped_study_is_known_here():
    assert sorted(PUBLISHED) == STUDIES


@pytest.mark.parametrize("name", STUDIES)
def test_a_study_prints_the_papers_numbers_in_the_papers_order(name):
    found = {}
    for title, rows in find_study(name)["tables"].items():
        found[title] = []
        for row in rows.values():
            numbers = [row[metric] for metric in ("perplexity", "mauve", "diversity", "entropy") if metric in row]
            found[title].append((row["cell"], *(value for pair in numbers for value in pair)))
    assert found == PUBLISHED[name]


@pytest.mark.parametrize("name", [name for name in STUDIES if name != "latents"])
def test_a_studys_real_texts_are_the_papers(name):
    assert find_study(name)["real"] == {"perplexity": [25.7, 0.4], "mauve": [100, 0], "entropy": [4.27, 0.0]}


def scales(name: str) -> list[str]:
    return list(find_study(name)["base"])


@pytest.mark.parametrize(("name", "scale"), [(name, scale) for name in STUDIES for scale in scales(name)])
def test_every_cell_of_a_study_can_be_planned_and_is_in_a_row_or_needed(tmp_path, name, scale):
    study = find_study(name)
    cells = plan(study, scale, 2, tmp_path / "out", tmp_path / "work", [])
    assert [(cell.name, cell.seed) for cell in cells] == [(one, seed) for seed in (0, 1) for one in study["cells"]]
    shown = {row["cell"] for rows in study["tables"].values() for row in rows.values()}
    needed = {cell.needs.name for cell in cells if cell.needs}
    assert {cell.name for cell in cells} == shown | needed
    assert {cell.name for cell in cells if cell.fit_only} == needed - shown
    for cell in cells:
        assert cell.needs is None or cell.needs.seed == cell.seed
        assert [command[0] for command in cell.commands[1:]] == ([] if cell.fit_only else ["predict", "evaluate"])
        assert cell.commands[0][0] in ("fit", "fit-decoder")
        words = cell.commands[0]
        assert words[words.index("--seed_everything") + 1] == str(cell.seed)
        named = {words[i + 1] for i, word in enumerate(words) if word == "--config"}
        assert set(cell.settings()["configs"]) == named
    assert len({cell.result for cell in cells}) == len({cell.work for cell in cells}) == len(cells)


def test_the_papers_scale_draws_five_times_a_thousand_texts_and_scores_them_by_gpt2_large(tmp_path):
    cell = plan(find_study("table1"), "paper", 1, tmp_path, tmp_path, [])[0]
    fit, predict, evaluate = cell.commands
    assert fit[:3] == ("fit", "--config", "owt128")
    assert predict[predict.index("--data.validation_rows") + 1] == "1000"
    seeds = evaluate.index("--seeds")
    assert evaluate[seeds + 1 : seeds + 6] == ("0", "1", "2", "3", "4")
    told = {"-n": "1000", "--scorer": "gpt2-large", "--protocol": "mdlm", "--reference": "WORK/real.jsonl"}
    assert {option: evaluate[evaluate.index(option) + 1] for option in told} == told


def configuration(cell: Cell, scale: str) -> dict[str, Any]:
    """What the cell's training would run with, from the real command."""
    words = [word.replace("WORK", "work").replace("FROM", "from") for word in cell.commands[0]]
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), pytest.raises(SystemExit) as stop:
        cli.main([*words, "--print_config"])
    assert stop.value.code in (0, None), (cell.name, scale)
    return yaml.safe_load(printed.getvalue())


def test_the_cells_with_options_of_their_own_are_words_that_the_command_takes(tmp_path):
    seen = set()
    for name in STUDIES:
        study = find_study(name)
        for cell in plan(study, "laptop", 1, tmp_path, tmp_path, []) if "laptop" in study["base"] else []:
            about = study["cells"][cell.name]
            key = (about.get("command"), tuple(about.get("laptop", ())), "from" in about)
            if key == (None, (), False) or key in seen:
                continue
            seen.add(key)
            found = configuration(cell, "laptop")
            logger = found["trainer"]["logger"]["init_args"]
            assert (logger["save_dir"], logger["name"], logger["version"]) == ("work", "fit", "")
            for option in about.get("laptop", ()):
                path, _, value = option.removeprefix("--").partition("=")
                node: Any = found
                for part in path.split("."):
                    node = node[part]
                wanted = yaml.safe_load(value)
                if isinstance(wanted, str):  # a class, by its name alone
                    assert node.endswith(f".{wanted}")
                else:
                    assert node == pytest.approx(float(value) if isinstance(node, float) else wanted)
            if cell.needs:
                kept = found["stage"]["checkpoint"] if cell.commands[0][0] == "fit-decoder" else found["latents"]
                assert kept == "from/fit/checkpoints/last.ckpt"
    assert len(seen) > 10


@pytest.mark.slow
@pytest.mark.parametrize(("name", "scale"), [(name, scale) for name in STUDIES for scale in scales(name)])
def test_every_command_of_a_study_is_one_that_ldlm_takes(tmp_path, name, scale, monkeypatch):
    for cell in plan(find_study(name), scale, 1, tmp_path, tmp_path, []):
        assert configuration(cell, scale)["seed_everything"] == 0


def test_the_scoring_of_a_cell_is_words_that_evaluate_takes(tmp_path, monkeypatch):
    given = []
    monkeypatch.setattr("ldlm.evaluation.evaluate.write_scores", given.append)
    for scale, texts, draws in (("laptop", 256, 2), ("paper", 1000, 5)):
        cli.main(list(plan(find_study("table2"), scale, 1, tmp_path, tmp_path, [])[0].commands[2]))
        options = given.pop()
        assert (options.num_samples, options.seeds, options.scorer) == (texts, list(range(draws)), SCALES[scale].scorer)
        assert (options.source, options.output) == (["WORK/fit/checkpoints/last.ckpt"], "WORK/scores.json")


# --- running one, with somebody else doing the work

PERPLEXITY = {"a": [100.0, 110.0], "b": [50.0, 54.0], "c": [20.0, 22.0], "d": [30.0, 31.0]}
SMALL = {
    "published": "nowhere",
    "base": {"laptop": []},
    "cells": {
        "a": {"laptop": ["--model.sigma_dec=2"]},
        "b": {"configs": ["mine.yaml"]},
        "first": {"fit_only": True},
        "c": {"from": {"cell": "first", "option": "--latents"}},
        "d": {"from": {"cell": "first", "option": "--latents"}},
    },
    "tables": {
        "Block": {
            "row a": {"cell": "a", "perplexity": [100.0, 1.0]},
            "row b": {"cell": "b", "perplexity": [50.0, 1.0]},
            "row c": {"cell": "c"},
            "row d": {"cell": "d"},
        }
    },
    "curves": {"run a": "a"},
}


def scores(values: list[float]) -> dict[str, Any]:
    """What ldlm evaluate writes, of which the study reads a part."""
    of = {"mean": sum(values) / len(values), "std": None, "per_seed": values, "interval_95": [0.0, 1.0]}
    rest = {
        "entropy": {"per_seed": [4.0, 4.2]},
        "diversity": {"per_seed": [0.5, 0.6]},
        "mauve": {"per_seed": [0.8, 0.9]},
    }
    return {
        "perplexity": of,
        **rest,
        "texts": 256,
        "reference": {"perplexity": {"mean": 25.0}, "entropy": {"mean": 4.3}},
    }


class FakeSlot(Slot):
    """Writes the files that the commands would write."""

    def __init__(self, hub: "Hub", failed: set[str]) -> None:
        super().__init__({"OMP_NUM_THREADS": "1"}, hub.told.append, failed)
        self.hub = hub

    def run(self, words, log, locks):
        assert words[:4] == [sys.executable, "-P", "-m", "ldlm"]
        command = words[4:]
        work = Path(log.name).parent
        cell, seed = re.fullmatch(r"(.+)-seed(\d+)", work.name).groups()
        with self.hub.lock:
            self.hub.calls.append((cell, int(seed), command))
        last = work / "fit" / "checkpoints" / "last.ckpt"
        if command[0] == "fit":
            assert command[command.index("--trainer.logger.save_dir") + 1] == str(work)
            if "--latents" in command:
                assert Path(command[command.index("--latents") + 1]).is_file()
            last.parent.mkdir(parents=True, exist_ok=True)
            if cell in self.hub.killed:
                last.write_text("half")
                return -9
            time.sleep(self.hub.seconds)
            with SummaryWriter(str(work / "fit")) as writer:
                for step in range(3):
                    writer.add_scalar("train/diffusion", 1.0 / (step + 1), step)
                    writer.add_scalar("train/latent_std", 0.5 * step, step)
                writer.add_scalar("validation/accuracy", 0.75, 3)
            last.write_text("whole")
        elif command[0] == "predict":
            assert last.read_text() == "whole"
            Path(command[command.index("--output") + 1]).write_text('{"text": "real"}\n')
        else:
            if cell in self.hub.broken:
                log.write("ldlm: the sky fell\n")
                return 2
            assert (work / "real.jsonl").is_file()
            Path(command[command.index("--output") + 1]).write_text(json.dumps(scores(PERPLEXITY[cell])))
        return 0


class Hub:
    """What the fake slots share."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, int, list[str]]] = []
        self.told: list[str] = []
        self.lock = threading.Lock()
        self.killed: set[str] = set()
        self.broken: set[str] = set()
        self.seconds = 0.0
        self.slots = 2

    def fits(self) -> list[str]:
        return sorted(cell for cell, _, command in self.calls if command[0] == "fit")


@pytest.fixture
def hub(tmp_path, monkeypatch) -> Hub:
    monkeypatch.chdir(tmp_path)
    hub = Hub()
    monkeypatch.setattr(
        study_room, "make_slots", lambda *_: (lambda failed: [FakeSlot(hub, failed) for _ in range(hub.slots)])(set())
    )
    Path("small.yaml").write_text(yaml.safe_dump(SMALL, sort_keys=False))
    Path("mine.yaml").write_text("# Mine.\nmodel: {sigma_dec: 3.0}\n")
    return hub


STUDY = ("study", "small.yaml", "--scale", "laptop", "--output", "out", "--work", "work")
OUT = Path("out/small-laptop")


def result(name: str) -> dict[str, Any]:
    return json.loads((OUT / f"{name}-seed0.json").read_text())


def test_a_study_leaves_a_json_a_cell_a_table_and_figures_and_runs_nothing_twice(hub):
    cli.main(list(STUDY))
    assert sorted(path.name for path in OUT.iterdir()) == sorted(
        [f"{name}-seed0.json" for name in "abcd"] + ["table.md", "figure.png", "figure.pdf", "curves.png", "curves.pdf"]
    )
    assert hub.fits() == ["a", "b", "c", "d", "first"]
    assert [command[0] for cell, _, command in hub.calls if cell == "a"] == ["fit", "predict", "evaluate"]
    assert [command[0] for cell, _, command in hub.calls if cell == "first"] == ["fit"]
    found = result("a")
    assert found["scores"]["perplexity"]["per_seed"] == [100.0, 110.0]
    assert found["validation"] == {"validation/accuracy": 0.75}
    assert found["curves"]["diffusion"] == [[0, 1.0], [1, 0.5], [2, 0.33333]]
    assert found["curves"]["latent_std"] == [[0, 0.0], [1, 0.5], [2, 1.0]]
    assert (found["cell"], found["seed"], found["threads"]) == ("a", 0, "1")
    assert set(found["seconds"]) == {"fit", "predict", "evaluate"}
    assert "--model.sigma_dec=2" in found["settings"]["commands"][0]
    assert set(found["settings"]["configs"]) == {"quickstart", "laptop"}
    assert set(result("b")["settings"]["configs"]) == {"quickstart", "laptop", "mine.yaml"}
    before = {path: path.read_bytes() for path in OUT.glob("*.json")}
    hub.calls.clear()
    cli.main(list(STUDY))
    assert hub.calls == []
    assert {path: path.read_bytes() for path in OUT.glob("*.json")} == before


def test_a_killed_training_is_told_of_and_goes_on_from_its_last_checkpoint(hub, capsys):
    hub.killed = {"b"}
    with pytest.raises(SystemExit) as stop:
        cli.main([*STUDY, "--only", "b"])
    assert stop.value.code == 1
    assert "b, seed 0 failed: fit ended with status -9 (silent); see" in capsys.readouterr().err.replace("\n", " ")
    assert list(OUT.glob("*.json")) == []
    hub.killed = set()
    cli.main([*STUDY, "--only", "b"])
    (_, _, first), (_, _, again) = [call for call in hub.calls if call[2][0] == "fit"]
    assert "--ckpt_path" not in first
    assert again == [*first, "--ckpt_path", "work/small-laptop/b-seed0/fit/checkpoints/last.ckpt"]
    assert result("b")["scores"]["perplexity"]["per_seed"] == [50.0, 54.0]


def test_a_cell_that_fails_is_reported_with_its_last_line_and_the_others_finish(hub, capsys):
    hub.broken = {"a", "c"}
    with pytest.raises(SystemExit) as stop:
        cli.main(list(STUDY))
    assert stop.value.code == 1
    said = capsys.readouterr().err
    for name in "ac":
        assert f"{name}, seed 0 failed: evaluate ended with status 2 (ldlm: the sky fell); see" in said
    assert sorted(path.name for path in OUT.glob("*.json")) == ["b-seed0.json", "d-seed0.json"]
    table = (OUT / "table.md").read_text()
    assert "* a, seed 0 failed: evaluate ended with status 2" in table
    assert re.search(r"^\| row a \|.*not run", table, re.M)
    # What had been trained is not trained again.
    hub.broken, hub.calls = set(), []
    cli.main(list(STUDY))
    assert [call[2][0] for call in hub.calls if call[0] == "a"] == ["predict", "evaluate"]
    assert hub.fits() == []


def test_cells_that_start_from_another_train_it_once_even_side_by_side(hub):
    hub.seconds = 0.3
    cli.main([*STUDY, "--only", "c", "d"])
    assert hub.fits() == ["c", "d", "first"]
    assert next(cell for cell, _, command in hub.calls if command[0] == "fit") == "first"
    for name in "cd":
        (command,) = [command for cell, _, command in hub.calls if cell == name and command[0] == "fit"]
        assert command[command.index("--latents") + 1] == "work/small-laptop/first-seed0/fit/checkpoints/last.ckpt"
    assert not (OUT / "first-seed0.json").exists()


def test_more_seeds_are_more_cells_and_those_there_are_stay(hub):
    cli.main([*STUDY, "--only", "a"])
    cli.main([*STUDY, "--only", "a", "--seeds", "2"])
    assert [(cell, seed) for cell, seed, command in hub.calls if command[0] == "fit"] == [("a", 0), ("a", 1)]
    for seed in (0, 1):
        settings = json.loads((OUT / f"a-seed{seed}.json").read_text())["settings"]
        assert f"--seed_everything {seed} " in settings["commands"][0]
    cli.main([*STUDY, "--only", "a"])  # with one seed asked for, the table still has both
    assert re.search(r"^\| row a \|.*\| 2 \|", (OUT / "table.md").read_text(), re.M)


@pytest.mark.parametrize("change", ["overlay", "config", "option"])
def test_a_finished_cell_is_not_overwritten_by_one_with_other_settings(hub, capsys, change):
    cli.main([*STUDY, "--only", "a", "b"])
    before = {path: path.read_bytes() for path in OUT.glob("*.json")}
    words = list(STUDY)
    if change == "overlay":
        Path("mine.yaml").write_text("# Mine.\nmodel: {sigma_dec: 4.0}\n")
    elif change == "config":
        words += ["--config", "loss-ce"]
    else:
        other = yaml.safe_load(Path("small.yaml").read_text())
        other["cells"]["a"]["laptop"] = ["--model.sigma_dec=5"]
        Path("small.yaml").write_text(yaml.safe_dump(other, sort_keys=False))
    hub.calls.clear()
    said = complaint(capsys, *words)
    assert "run with other settings" in said
    assert "finished cells are not overwritten: give another --output and --work, or remove the file" in said
    assert hub.calls == []
    assert {path: path.read_bytes() for path in OUT.glob("*.json")} == before


def test_a_half_trained_cell_does_not_go_on_with_other_settings(hub, capsys):
    hub.killed = {"b"}
    with pytest.raises(SystemExit):
        cli.main([*STUDY, "--only", "b"])
    Path("mine.yaml").write_text("# Mine.\nmodel: {sigma_dec: 4.0}\n")
    hub.killed, hub.calls = set(), []
    with pytest.raises(SystemExit) as stop:
        cli.main([*STUDY, "--only", "b"])
    assert stop.value.code == 1
    assert hub.calls == []
    assert "run with other settings" in capsys.readouterr().err


def test_two_studies_do_not_write_one_cell(hub, capsys):
    folder = Path("work/small-laptop/a-seed0")
    folder.mkdir(parents=True)
    holds = "import fcntl, sys; f = open(sys.argv[1], 'w'); fcntl.flock(f, fcntl.LOCK_EX); print('held'); input()"
    other = subprocess.Popen(
        [sys.executable, "-u", "-c", holds, str(folder / "cell.lock")], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert other.stdout.readline() == b"held\n"
    try:
        said = complaint(capsys, *STUDY)
        assert "a-seed0 is being written by another ldlm study: wait for it, or give another --work" in said
        assert hub.calls == []
    finally:
        other.communicate(b"\n")
    cli.main([*STUDY, "--only", "a"])  # the system has freed it
    assert result("a")["cell"] == "a"


INTERRUPTED = """
import sys
from pathlib import Path
from ldlm.cli import main as cli
from ldlm.studies import scheduler
from ldlm.studies.run import Slot

class Sleeps(Slot):
    def run(self, words, log, locks):
        code = "import os,sys,time; open(sys.argv[1], 'a').write(f'{os.getpid()}\\\\n'); time.sleep(100)"
        return super().run([sys.executable, "-c", code, "pids"], log, locks)

scheduler.make_slots = lambda *_: [Sleeps(dict(PATH=""), print, set()) for _ in range(3)]
cli.main(sys.argv[1:])
"""


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


@pytest.mark.parametrize(("signum", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_an_interrupted_study_leaves_no_process_no_result_and_no_lock(hub, signum, status):
    words = [sys.executable, "-c", INTERRUPTED, *STUDY, "--only", "a", "c", "d"]  # c and d both wait for one training
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    running = subprocess.Popen(words, env=environment, stderr=subprocess.PIPE)
    pids = Path("pids")
    end = time.monotonic() + 60
    while not (pids.is_file() and len(pids.read_text().split()) == 2) and time.monotonic() < end:
        time.sleep(0.05)
    running.send_signal(signum)
    running.communicate(timeout=30)
    assert running.returncode == status
    started = [int(pid) for pid in pids.read_text().split()]
    assert len(started) == 2  # a, and what c and d start from; nothing was started on the way out
    assert not any(alive(pid) for pid in started)
    assert list(OUT.glob("*.json")) == []
    for name in ("a", "c", "d"):
        os.close(claim(Path(f"work/small-laptop/{name}-seed0/cell.lock"), wait=False))
    assert list(Path("work").rglob("*.tmp")) == []
    cli.main([*STUDY, "--only", "a", "c", "d"])  # the same command goes on
    assert sorted(path.name for path in OUT.glob("*.json")) == [f"{name}-seed0.json" for name in "acd"]


def test_modules_imported_for_a_study_are_imported_by_its_commands(hub, monkeypatch):
    seen = []

    class Listens(Slot):
        def run(self, words, log, locks):
            seen.append(words)
            return 1

    monkeypatch.setattr(
        study_room, "make_slots", lambda jobs, threads, tell, imports: [Listens({}, tell, set(), imports)]
    )
    Path("my_part.py").write_text("")
    with pytest.raises(SystemExit):
        cli.main(["--import", "my_part", *STUDY, "--only", "a"])
    assert seen[0][4:7] == ["--import", "my_part", "fit"]
    with pytest.raises(SystemExit):
        cli.main([*STUDY, "--only", "a"])
    assert seen[1][4] == "fit"


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["study", "tabel1", "--scale", "laptop"], "there is no study 'tabel1'; did you mean 'table1'"),
        (["study", "none.yaml", "--scale", "laptop"], "there is no study 'none.yaml'"),
        (["study", "table1", "--scale", "desktop"], "argument --scale: invalid choice: 'desktop'"),
        (["study", "table1"], "the following arguments are required: --scale"),
        (["study", "table6", "--scale", "laptop"], "this study has no laptop scale; it has paper"),
        ([*STUDY, "--only", "aa"], "--only aa: the study has no such cell; .*'?a'?"),
        (["study", "table1", "--scale", "laptop", "--only", "warmup-5"], "no such cell; did you mean 'warmup-5k'"),
        ([*STUDY, "--config", "loss-cee"], "--config loss-cee: there is no such file and no such recipe; .*'loss-ce'"),
        ([*STUDY, "--seeds", "0"], "--seeds 0 must be at least 1"),
        ([*STUDY, "--jobs", "0"], "--jobs 0 must be at least 1"),
        ([*STUDY, "--sede", "1"], "no option --sede; did you mean '--seeds'"),
        (["study", "bare.yaml", "--scale", "laptop"], "bare.yaml is no study: it needs base, cells and tables"),
        (["study", "lacks.yaml", "--scale", "laptop"], "lacks.yaml names a cell it lacks, 'z'; there are a"),
        (["study", "twins.yaml", "--scale", "laptop"], "two cells whose files would have one name: A, a"),
    ],
    ids=lambda value: " ".join(value)[:60] if isinstance(value, list) else "",
)
def test_what_is_wrong_with_a_study_is_said_in_one_sentence_with_status_2(hub, capsys, words, told):
    Path("bare.yaml").write_text("cells: {}\n")
    small: dict[str, Any] = {"base": {"laptop": []}, "cells": {"a": {}}, "tables": {"T": {"r": {"cell": "z"}}}}
    Path("lacks.yaml").write_text(yaml.safe_dump(small))
    small |= {"cells": {"a": {}, "A": {}}, "tables": {"T": {"r": {"cell": "a"}}}}
    Path("twins.yaml").write_text(yaml.safe_dump(small))
    said = complaint(capsys, *words)
    assert re.search(told, said), said
    assert hub.calls == []


# --- slots


def test_without_gpus_there_is_a_slot_for_every_so_many_cores(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)))
    for jobs, threads, count, each in [(None, None, 8, "1"), (None, 3, 2, "3"), (5, 2, 5, "2"), (None, 16, 1, "16")]:
        slots = make_slots(jobs, threads, print)
        assert [slot.environment["OMP_NUM_THREADS"] for slot in slots] == [each] * count


@pytest.mark.parametrize(
    ("visible", "jobs", "wanted"),
    [
        (None, None, ["0", "1", "2", "3"]),
        (None, 2, ["0", "1"]),
        ("2,5", None, ["2", "5"]),
        ("GPU-aa,GPU-bb,GPU-cc", 2, ["GPU-aa", "GPU-bb"]),
    ],
)
def test_with_gpus_there_is_a_slot_a_device_that_is_visible(monkeypatch, visible, jobs, wanted):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert [slot.environment["CUDA_VISIBLE_DEVICES"] for slot in make_slots(jobs, None, print)] == wanted


# --- tables


def made(cell: str, perplexities: list[float], seed: int = 0, mauve: list[float] | None = None) -> dict[str, Any]:
    """A cell's result with these numbers, a draw of texts each."""
    found = {"perplexity": {"per_seed": perplexities}}
    if mauve:
        found["mauve"] = {"per_seed": mauve}
    return {
        "cell": cell,
        "seed": seed,
        "settings": {"commands": [f"ldlm fit {cell}"]},
        "seconds": {"fit": 120.0, "predict": 30.0, "evaluate": 30.0},
        "versions": {"ldlm": "0", "torch": "2"},
        "device": "x CPU",
        "threads": "1",
        "validation": {"validation/accuracy": 0.9},
        "scores": found,
        "curves": {"diffusion": [[0, 1.0], [5, 0.5]], "reconstruction": [[0, 2.0]], "latent_std": []},
    }


def test_a_measure_is_the_mean_over_draws_and_its_deviation_over_them_with_one_seed():
    value = measure([made("a", [90.0, 110.0, 100.0])], "perplexity")
    assert value == (100.0, 10.0, 1)
    assert measure([made("a", [90.0], mauve=[0.5, 0.7])], "mauve") == pytest.approx((60.0, math.sqrt(200.0), 1))
    assert measure([made("a", [90.0])], "perplexity") == (90.0, 0.0, 1)
    assert measure([made("a", [90.0])], "mauve") is None
    assert measure([made("a", [90.0])], "accuracy") == pytest.approx((90.0, 0.0, 1))
    assert measure([], "perplexity") is None
    assert measure([made("a", [None, 80.0])], "perplexity") == (80.0, 0.0, 1)  # no text of a draw could be scored


def test_with_two_seeds_the_deviation_is_over_their_means():
    value = measure([made("a", [90.0, 110.0]), made("a", [80.0, 84.0], seed=1)], "perplexity")
    assert value == pytest.approx((91.0, 18.0 / math.sqrt(2), 2))


def test_the_noise_is_the_root_mean_square_of_relative_deviations_over_seeds_where_there_are_any():
    one, other = [made("a", [90.0, 110.0])], [made("b", [10.0, 10.0])]
    relative = math.sqrt(200.0) / 100
    assert noise({"a": one, "b": other}, "perplexity") == pytest.approx((math.sqrt(relative**2 / 2), False))
    several = [made("b", [10.0, 10.0]), made("b", [12.0, 12.0], seed=1)]
    assert noise({"a": one, "b": several}, "perplexity") == pytest.approx((math.sqrt(2.0) / 11, True))
    assert noise({}, "perplexity") == (0.0, False)


def judged(here: dict[str, list[float]], paper: dict[str, list[float]]) -> list[tuple[str, str]]:
    """(order, verdict) of each line, for cells with these draws of perplexity and the paper's [mean, deviation]."""
    rows = {name: {"cell": name, "perplexity": pair} for name, pair in paper.items()}
    lines = verdicts({"tables": {"T": rows}}, [made(name, draws) for name, draws in here.items()])
    cut = [[part.strip() for part in line.strip("|").split("|")] for line in lines]
    assert all(len(parts) == 6 and parts[0] == "T" for parts in cut)
    return [(parts[2], parts[5].strip("*")) for parts in cut]


def test_a_verdict_says_whether_the_order_came_out_is_reversed_or_drowns_in_the_noise():
    # All cells deviate by 1 % of their mean, so two differ from 2 · 0.01 · √(x² + y²) on.
    def near(mean: float) -> list[float]:
        return [mean - 0.01 * mean / math.sqrt(2), mean + 0.01 * mean / math.sqrt(2)]

    paper = {"one": [50.0, 1.0], "two": [60.0, 1.0]}
    # 2 · 0.01 · √(100² + 102.8²) = 2.868 > 2.8;  with 103: 2.871 < 3
    assert judged({"one": near(100), "two": near(103.0)}, paper) == [("one better than two", "came out")]
    assert judged({"one": near(100), "two": near(102.8)}, paper) == [("one better than two", "within the noise")]
    assert judged({"one": near(103), "two": near(100.0)}, paper) == [("one better than two", "reversed")]
    turned = {"one": [60.0, 1.0], "two": [50.0, 1.0]}
    assert judged({"one": near(103), "two": near(100.0)}, turned) == [("two better than one", "came out")]


@pytest.mark.parametrize(
    ("here", "word"),
    [
        ({"varied": (40.0, 4.0), "flat": (5.0, 2.0)}, "came out"),  # flat has half of the real texts' entropy
        ({"varied": (5.0, 2.0), "flat": (40.0, 4.0)}, "reversed"),
        ({"varied": (40.0, 4.0), "flat": (60.0, 3.2)}, "came out"),  # neither has collapsed, and 40 is below 60
        ({"varied": (40.0, 4.0), "flat": (5.0, 3.2)}, "reversed"),
        ({"varied": (5.0, 2.0), "flat": (3.0, 1.0)}, "both collapsed"),
    ],
)
def test_a_low_perplexity_of_collapsed_texts_counts_as_worse(here, word):
    results = []
    for cell, (perplexity, entropy) in here.items():
        results.append(made(cell, [perplexity] * 2))
        results[-1]["scores"] |= {"entropy": {"per_seed": [entropy]}, "reference": {"entropy": {"mean": 4.3}}}
    rows = {
        "3": {"cell": "varied", "perplexity": [66.3, 0.8], "entropy": [4.25, 0.01]},
        "4": {"cell": "flat", "perplexity": [38.1, 0.6], "entropy": [2.19, 0.01]},
    }
    (line,) = verdicts({"real": {"entropy": [4.27, 0.0]}, "tables": {"T": rows}}, results)
    assert "| 3 better than 4 |" in line
    assert line.endswith(f"**{word}** |")


def test_an_order_of_mauve_that_the_paper_does_not_settle_stays_out_though_one_row_collapsed():
    rows = {  # Table 1's sigma_dec 0.1 and 4
        "0.1": {"cell": "a", "mauve": [0.6, 0.1], "entropy": [3.58, 0.03]},
        "4": {"cell": "b", "mauve": [0.4, 0.1], "entropy": [2.19, 0.01]},
    }
    results = [made("a", [700.0], mauve=[0.01]), made("b", [40.0], mauve=[0.01])]
    assert verdicts({"real": {"entropy": [4.27, 0.0]}, "tables": {"T": rows}}, results) == []


def test_pairs_that_the_papers_own_deviations_do_not_settle_are_left_out():
    here = {"one": [10.0, 10.0], "two": [20.0, 20.0], "three": [30.0, 30.0]}
    # |50 - 60| against 2·√(3² + 4²) = 10: settled; |60 - 69| against 2·√(4² + 3²) = 10: not.
    paper = {"one": [50.0, 3.0], "two": [60.0, 4.0], "three": [69.0, 3.0]}
    assert judged(here, paper) == [("one better than two", "came out"), ("one better than three", "came out")]
    assert judged({"one": here["one"]}, paper) == []
    rows = {"T": {"x": {"cell": "one"}, "y": {"cell": "two", "perplexity": [1.0, 0.1]}}}
    assert verdicts({"tables": rows}, [made("one", [1.0]), made("two", [2.0])]) == []


def tables_of(page: str) -> list[list[list[str]]]:
    """The Markdown tables of a page, as rows of cells."""
    blocks = re.findall(r"(?:^\|.*\n)+", page, re.M)
    return [[[cell.strip() for cell in row.strip().removeprefix("|").removesuffix("|").split("|")]
             for row in block.splitlines()] for block in blocks]  # fmt: skip


def test_the_markdown_is_a_table_with_as_many_columns_in_every_row(hub):
    hub.broken = {"d"}
    with pytest.raises(SystemExit):
        cli.main(list(STUDY))
    first, second = tables_of((OUT / "table.md").read_text())
    for table in (first, second):
        assert {len(row) for row in table} == {len(table[0])}
        assert all(re.fullmatch(r"-+:?", cell) for cell in table[1])
    headings = first[0]
    assert headings[1:6] == [heading for heading, *_ in COLUMNS.values()]
    shown = {row[0]: dict(zip(headings, row, strict=True)) for row in first[2:]}
    assert list(shown) == ["real texts", "**Block**", "row a", "row b", "row c", "row d"]
    assert shown["row a"]["gen. PPL ↓"] == "105.0 ± 7.1"  # of 100 and 110
    assert shown["row a"]["MAUVE ↑"] == "85.0 ± 7.1"  # of 0.8 and 0.9, times 100
    assert shown["row a"]["entropy ↑"] == "4.10 ± 0.14"
    assert shown["row a"]["reconstruction ↑"] == "75.0"
    assert (shown["row a"]["seeds"], shown["row d"]["seeds"]) == ("1 (2 draws)", "not run")
    assert shown["row a"]["paper's gen. PPL ↓"] == "100 ± 1"
    assert shown["row c"]["paper's gen. PPL ↓"] == ""
    assert (shown["real texts"]["gen. PPL ↓"], shown["real texts"]["entropy ↑"]) == ("25.0", "4.30")
    assert [row[2:] for row in second[2:]] == [["row b better than row a", "100, 50", "105.0, 52.0", "**came out**"]]


def test_the_page_names_each_command_and_whether_deviations_are_over_seeds():
    rows = {"r": {"cell": "a", "perplexity": [1.0, 0.1]}, "s": {"cell": "b", "perplexity": [9.0, 0.1]}}
    study = {"tables": {"T": rows}}
    results = [made("a", [90.0, 110.0]), made("b", [50.0, 52.0])]
    page = markdown(study, "mine-laptop", results, {})
    assert page.startswith("`mine-laptop`: mean ± standard deviation over training seeds, or over draws of texts where")
    assert "is over draws of texts only; another training seed would add to it" in page
    assert "* a, seed 0: 3.0 min (2.0 of training) on x CPU, threads: 1; ldlm 0, torch 2; `ldlm fit a`" in page
    results += [made("a", [100.0], seed=1), made("b", [50.0], seed=1)]
    page = markdown(study, "mine-laptop", results, {})
    assert "is over training seeds" in page
    assert page.count("; `ldlm fit ") == 4


def test_the_figure_has_the_points_of_both_sides_and_none_where_there_is_no_number():
    study = {"tables": {"T": {"r": {"cell": "a", "perplexity": [98.5, 1.9]}, "s": {"cell": "b"}}}, "curves": {"R": "a"}}
    found = figures(study, [made("a", [90.0, 110.0])])
    left, right = found["figure"].axes
    drawn = [[line.get_xydata().tolist() for line in axes.lines if line.get_marker() == "o"] for axes in (left, right)]
    assert drawn == [[[[100.0, 1.0]]], [[[98.5, 1.0]]]]
    assert [text.get_text() for text in left.get_yticklabels()] == ["T:", "r", "s"]
    diffusion, reconstruction, deviation = found["curves"].axes
    assert [line.get_xydata().tolist() for line in diffusion.lines] == [[[0.0, 1.0], [5.0, 0.5]]]
    assert [line.get_xydata().tolist() for line in reconstruction.lines] == [[[0.0, 2.0]]]
    assert list(deviation.lines) == []
    assert diffusion.get_legend_handles_labels()[1] == ["R"]
    assert "curves" not in figures({"tables": study["tables"]}, [made("a", [90.0])])


def test_two_panels_share_their_rows_and_not_their_numbers():
    here, paper = [None, (3.0, 0.5), None], [None, (300.0, 20.0), (40.0, 0.0)]
    left, right = side_by_side(["Head:", "one", "two"], here, paper, "what", ("ours", "theirs")).axes
    bars = [[bar.get_segments()[0].tolist() for bar in axes.collections] for axes in (left, right)]
    np.testing.assert_allclose(bars[0], [[[2.5, 1], [3.5, 1]]])
    np.testing.assert_allclose(bars[1], [[[280.0, 1], [320.0, 1]], [[40.0, 2], [40.0, 2]]])
    assert [axes.get_title() for axes in (left, right)] == ["ours", "theirs"]
    assert [axes.get_xscale() for axes in (left, right)] == ["log", "log"]
    assert left.get_ylim() == (2.5, -0.5)  # the first row is on top
    bold = [text.get_text() for text in left.get_yticklabels() if text.get_fontweight() == "bold"]
    assert bold == ["Head:"]


def test_a_run_without_points_has_no_curve():
    (axes,) = loss_curves({"one": {"loss": [[0, 1.0], [2, 0.5]]}, "two": {}}, {"loss": "loss (nats)"}).axes
    assert [line.get_label() for line in axes.lines] == ["one"]
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("optimizer step s", "loss (nats)")
