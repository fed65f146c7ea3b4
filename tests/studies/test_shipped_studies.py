"""The shipped studies: the paper's published numbers, and commands that ldlm takes."""

import contextlib
import io
from pathlib import Path
from typing import Any

import pytest
import yaml

from ldlm.cli import main as cli
from ldlm.studies.plan import SCALES, Cell, find_study, plan

STUDIES = sorted(path.stem for path in (Path(str(cli.CONFIGS)) / "studies").glob("*.yaml"))

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
