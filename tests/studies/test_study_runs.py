"""A study at work: cells are run once, resumed, reported and never overwritten."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from helpers import ROOT
from helpers.command import complaint
from helpers.studies import OUT, STUDY, result

from ldlm.cli import main as cli
from ldlm.studies import scheduler as study_room
from ldlm.studies.run import Slot, claim
from ldlm.studies.scheduler import make_slots


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
