"""`ldlm evaluate` over several sources and numbers of calls: its JSON, its figures, its report."""

import json
import math
import re
import shlex
import warnings

import pytest
import torch
from helpers.command import evaluate, evaluation_folder
from helpers.tiny import LENGTH, make_model, make_task, make_tokenizer, make_trainer
from matplotlib.image import imread

from ldlm.evaluation import evaluate as sweep
from ldlm.evaluation.latent_space import pack
from ldlm.evaluation.tables import draw, labels, published
from ldlm.metrics.generative_perplexity import GenerativePerplexity
from ldlm.metrics.scorer import load_scorer
from ldlm.model import LDLM

SAMPLING = ["-n", "12", "--batch_size", "5", "--temperature", "1", "--protocol", "plain"]
VARIES = ("seconds", "seconds_per_text", "command")  # from run to run


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sweep")
    lines = evaluation_folder(folder, words=6)
    make_model(seed=1, tokenizer=make_tokenizer()).save_pretrained(folder / "other")
    (folder / "samples.jsonl").write_text("\n".join(lines[10:30]))
    return folder


@pytest.fixture
def here(home, monkeypatch):
    monkeypatch.chdir(home)
    return home


def steady(value):
    """Without what differs between two runs of one command."""
    if isinstance(value, dict):
        return {key: steady(item) for key, item in value.items() if key not in VARIES}
    return [steady(item) for item in value] if isinstance(value, list) else value


def test_each_run_of_a_sweep_is_what_one_evaluation_writes(here, monkeypatch, capsys):
    loads: list[str] = []
    for name in ("load_scorer", "load_model"):
        real = getattr(sweep, name)
        monkeypatch.setattr(
            sweep, name, lambda source, *more, real=real, **named: loads.append(source) or real(source, *more, **named)
        )
    result = evaluate("model", "samples.jsonl", "other", "--nfe", "3,5", *SAMPLING, "--reference", "real.jsonl")
    assert sorted(loads) == ["./scorer", "model", "other"]
    found = [(run["source"]["name"], (run["sampling"] or {}).get("nfe")) for run in result["runs"]]
    assert found == [("model", 3), ("model", 5), ("samples.jsonl", None), ("other", 3), ("other", 5)]
    printed = capsys.readouterr().out
    assert "12, 20 texts a set" in printed
    for run in result["runs"]:
        assert f"{run['perplexity']['mean']:.4g}" in printed
    for place, words in ((1, ["model", "--nfe", "5"]), (2, ["samples.jsonl"])):
        alone = evaluate(*words, *SAMPLING, "--reference", "real.jsonl")
        run = result["runs"][place]
        assert steady(alone["runs"]) == steady([run])
        # With one run its entries stand at the top as well, where they stood before there were several.
        for name in (
            "source",
            "perplexity",
            "entropy",
            "diversity",
            "mauve",
            "reference",
            "protocol",
            "scorer",
            "sampling",
        ):
            assert steady(alone[name]) == steady(run[name])
        assert alone["reference"] == result["runs"][place]["reference"]
    assert "perplexity" not in result
    assert result["reference"] == result["runs"][0]["reference"]


def test_time_per_text_is_that_of_sampling_alone(here):
    sampling = evaluate("model", "--nfe", "4", "--seeds", "0", "1", *SAMPLING)["sampling"]
    assert sampling["seconds_per_text"] == pytest.approx(sampling["seconds"] / 24, rel=0.05, abs=1e-4)
    assert 0 < sampling["seconds"] < 60


def test_memorisation_is_counted_for_samples_and_for_real_text(here):
    result = evaluate("samples.jsonl", "--protocol", "plain", "--training", "real.jsonl", "--reference", "real.jsonl")
    assert result["memorisation"]["mean"] == result["reference"]["memorisation"]["mean"] == 1
    samples = [json.loads(line)["text"] for line in (here / "samples.jsonl").read_text().splitlines()]
    (here / "half.txt").write_text("\n\n".join(samples[:6]))
    split = [text.split() for text in samples]
    grams = [[tuple(words[i : i + 4]) for i in range(len(words) - 3)] for words in split]
    known = {gram for each in grams[:6] for gram in each}
    found = [gram in known for each in grams for gram in each]
    want = sum(found) / len(found)
    got = evaluate("samples.jsonl", "--protocol", "plain", "--training", "half.txt")["memorisation"]["mean"]
    assert got == pytest.approx(want)
    assert 0.1 < want < 0.9


def test_measurements_and_figures_are_written_and_the_page_stands_alone(here):
    more = ["--measure", "--figures", "figures", "--report", "report.html", "--published", "lm1b"]
    result = evaluate("model", "--nfe", "2,3", *SAMPLING, "--reference", "real.jsonl", *more)
    found = result["measurements"]["model"]
    model, scorer = LDLM.from_pretrained("model"), load_scorer("./scorer")
    texts = [json.loads(line)["text"] for line in (here / "real.jsonl").read_text().splitlines()][:12]
    rows = pack(model, texts, 12, found["framed"])
    assert found["rows"] == len(rows)
    with torch.no_grad():
        again = model.decode(model.encode(rows))
    perplexity = GenerativePerplexity(scorer, "plain")
    perplexity.update(model.to_text(again))
    path = found["interpolation"]["perplexity"]
    assert path[0] == pytest.approx(perplexity.compute().item(), rel=1e-6)
    assert path[-1] == pytest.approx(path[0], rel=1e-6)
    assert found["reconstruction"]["accuracy"][0] == pytest.approx((again == rows).double().mean().item())
    names = ["frontier", "interpolation", "loss_over_time", "reconstruction", "spectrum"]
    assert sorted(path.name for path in (here / "figures").iterdir()) == [
        f"{name}{suffix}" for name in names for suffix in (".pdf", ".png")
    ]
    for name in names:
        assert imread(here / "figures" / f"{name}.png").std() > 0.01
        assert (here / "figures" / f"{name}.pdf").read_bytes().startswith(b"%PDF")
    page = (here / "report.html").read_text(encoding="utf-8")
    assert page.count("data:image/png;base64,") >= len(names)
    assert f"{LENGTH}" in page


def test_what_is_sampled_in_bfloat16_is_measured_so_and_nearly_the_same(here):
    words = ["model", "--nfe", "3", *SAMPLING, "--reference", "real.jsonl", "--measure"]
    full, half = (evaluate(*words, "--precision", precision) for precision in ("32", "bf16"))
    assert half["sampling"]["precision"] == "bf16"
    wanted, found = (torch.tensor(run["measurements"]["model"]["loss_over_time"]["loss"]) for run in (full, half))
    assert not torch.equal(found, wanted)
    torch.testing.assert_close(found, wanted, rtol=0.02, atol=0)


def test_checkpoints_of_one_name_stay_apart_in_all_that_is_written_and_no_folder_of_the_machine_is_told(here, capsys):
    sources = [str(here / "runs/a/checkpoints/last.ckpt"), "runs/b/checkpoints/last.ckpt"]
    for seed, source in enumerate(sources):
        task, trainer = make_task(seed=seed, tokenizer=make_tokenizer()), make_trainer(here, [])
        trainer.strategy.connect(task)
        trainer.save_checkpoint(source, weights_only=True)
    more = ["--nfe", "2", *SAMPLING, "--reference", str(here / "real.jsonl"), "--measure"]
    result = evaluate(*sources, *more, f"--figures={here}/drawn", "--report", "out/page.html")
    names = ["a/checkpoints/last.ckpt", "b/checkpoints/last.ckpt"]
    assert [run["source"]["name"] for run in result["runs"]] == list(result["measurements"]) == names
    printed = capsys.readouterr().out
    for source, name, run in zip(sources, names, result["runs"], strict=True):
        alone = evaluate(source, *more)
        assert alone["runs"][0]["source"]["name"] == "last.ckpt"
        assert steady(alone["measurements"]["last.ckpt"]) == steady(result["measurements"][name])
        assert alone["perplexity"] == run["perplexity"]
        assert name in printed
    assert sorted(path.stem for path in (here / "drawn").glob("loss*.png")) == ["loss_over_time-1", "loss_over_time-2"]
    figures = draw({run["source"]["name"]: [run] for run in result["runs"]}, result)
    assert [figures[f"loss_over_time-{number}"].get_suptitle() for number in (1, 2)] == names
    assert set(names) < {text.get_text() for text in figures["frontier"].legends[0].get_texts()}
    page = (here / "out/page.html").read_text(encoding="utf-8")
    assert page.count("<figcaption>") == 6
    for name in names:
        assert f'<th scope="row">{name}</th>' in page
    command = shlex.split(result["command"])
    assert command[:4] == ["ldlm", "evaluate", "a/checkpoints/last.ckpt", "runs/b/checkpoints/last.ckpt"]
    written = (here / "out/scores.json").read_text() + json.dumps(result) + page
    assert str(here) not in written
    assert here.name not in written


@pytest.mark.parametrize(
    ("names", "told"),
    [
        (["/x/runs/a/last.ckpt", "/x/runs/b/last.ckpt"], ["a/last.ckpt", "b/last.ckpt"]),
        (["/x/runs/1/a/last.ckpt", "/x/runs/2/a/last.ckpt"], ["1/a/last.ckpt", "2/a/last.ckpt"]),
        (["a/1/last.ckpt", "a/2/last.ckpt", "b/1/last.ckpt"], ["a/1/last.ckpt", "2/last.ckpt", "b/1/last.ckpt"]),
        (["last.ckpt", "b/last.ckpt", "/last.ckpt"], ["last.ckpt", "b/last.ckpt", "/last.ckpt"]),
        (["/x/only.ckpt"], ["only.ckpt"]),
        (["runs/model/", "./other/model", "model"], ["runs/model", "other/model", "model"]),
    ],
)
def test_labels_are_the_shortest_ends_of_paths_that_differ(names, told):
    assert labels(names) == told


def test_a_report_shows_texts_of_every_source_and_a_narrow_table_still_says_whose_numbers_they_are(here, capsys):
    evaluate("model", "samples.jsonl", "--nfe", "2,3", "--report", "out/page.html", *SAMPLING)
    samples = (here / "out/page.html").read_text(encoding="utf-8").partition("<h2>Samples</h2>")[2]
    titles = re.findall("<h3>(.*?)</h3>", samples)
    assert titles == ["model", "samples.jsonl"]
    first = json.loads((here / "samples.jsonl").read_text().splitlines()[0])["text"]
    assert first in samples.partition("<h3>samples.jsonl</h3>")[2]
    assert first not in samples.partition("<h3>samples.jsonl</h3>")[0]
    assert "samples.jsonl" in capsys.readouterr().out


def test_that_mauve_says_little_of_few_texts_is_said_once(here, capsys):
    more = ["--reference", "real.jsonl", "--report", "out/page.html", *SAMPLING]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        result = evaluate("model", "samples.jsonl", "--nfe", "2,3", "--seeds", "0", "1", *more)
    told = "MAUVE of under 500 texts says little"
    assert [run["mauve"]["warning"] for run in result["runs"]] == [told] * 3
    printed = capsys.readouterr()
    assert " ".join(printed.out.split()).count(told) == 1
    assert "MAUVE" not in printed.err
    page = (here / "out/page.html").read_text(encoding="utf-8")
    assert page.partition("<h2>Scores</h2>")[2].partition("<table>")[0].count(told) == 1


def test_published_rows_are_the_papers_and_say_so(here):
    result = evaluate("samples.jsonl", "--protocol", "plain", "--published", "owt")
    assert all(row["published_elsewhere"] and "2605.07933" in row["where"] for row in result["published"])
    rows = {(row["name"], row["nfe"]): row for row in result["published"]}
    assert len(rows) == 1 + 9 * 8
    # Typed from the paper's Tables 8 and 9.
    ours = rows["LDLM, the paper's", 128]
    assert [ours[name]["mean"] for name in ("perplexity", "mauve", "diversity", "entropy")] == [41.6, 0.317, 0.31, 5.53]
    assert [ours[name]["std"] for name in ("perplexity", "mauve", "diversity", "entropy")] == [0.4, 0.09, 0.002, 0.01]
    psi = rows["Duo + Ψ-sampler (p = 0.9, η = 0.05)", 4096]
    assert [psi[name]["mean"] for name in ("perplexity", "mauve", "diversity", "entropy")] == [18.3, 0.765, 0.194, 5.2]
    assert rows["CANDI", 256]["perplexity"] == {"mean": 42.3, "std": 0.2}
    assert rows["MDLM", 32]["mauve"] == {"mean": 0.007, "std": 0.0}
    assert rows["real text", None]["entropy"]["mean"] == 5.436
    lm1b = {(row["name"], row["nfe"]): row for row in published("lm1b")}
    assert len(lm1b) == 1 + 7 * 6
    assert lm1b["FLM", 1024]["mauve"] == {"mean": 0.642, "std": 0.024}
    assert lm1b["LDLM, the paper's", 32]["perplexity"] == {"mean": 154.1, "std": 1.6}
    assert evaluate("samples.jsonl", "--protocol", "plain")["published"] == []
    assert all(math.isfinite(row[name]["mean"]) for row in lm1b.values() for name in ("perplexity", "entropy"))
