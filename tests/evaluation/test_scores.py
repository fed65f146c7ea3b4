"""`ldlm evaluate`: its numbers against other people's programs, and what it writes down."""

import hashlib
import json
import math

import numpy as np
import pytest
import scipy.stats
import torch
from helpers.command import evaluate, evaluation_folder
from helpers.tiny import WORDS, make_tokenizer
from mauve import compute_mauve

from ldlm.cli import main as cli
from ldlm.diffusion.samplers import DDIM
from ldlm.metrics.scorer import load_scorer
from ldlm.model import LDLM

SAMPLING = ["-n", "12", "--nfe", "3", "--batch_size", "5", "--temperature", "1"]


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    folder = tmp_path_factory.mktemp("evaluation")
    evaluation_folder(folder, words=len(WORDS))
    return folder


@pytest.fixture
def here(home, monkeypatch):
    monkeypatch.chdir(home)
    return home


def losses(texts: list[str]) -> list[tuple[float, int]]:
    """transformers' own loss of each text that has one, and over how many tokens."""
    scorer = load_scorer("./scorer")
    rows = [torch.tensor([row]) for row in scorer.encode(texts) if len(row) > 1]
    with torch.no_grad():
        return [(scorer.model(row, labels=row).loss.double().item(), row.shape[1] - 1) for row in rows]


def weighted(pairs: list[tuple[float, int]]) -> float:
    return math.exp(sum(loss * count for loss, count in pairs) / sum(count for _, count in pairs))


def entropies(rows) -> list[float]:
    return [scipy.stats.entropy(np.unique(row, return_counts=True)[1]) for row in rows if len(row)]


def test_a_models_scores_are_those_of_the_texts_it_generates_with_each_seed(here, capsys):
    seeds = [3, 4, 5]
    result = evaluate("model", *SAMPLING, "--sampler", "DDIM", "--protocol", "plain", "--seeds", *map(str, seeds))
    model = LDLM.from_pretrained("model")
    arguments = {"nfe": 3, "sampler": DDIM(), "batch_size": 5, "temperature": 1.0}
    tokens = [model.sample_tokens(12, seed=seed, **arguments) for seed in seeds]
    pairs = [losses(model.to_text(rows)) for rows in tokens]
    want = [weighted(each) for each in pairs]
    assert result["perplexity"]["per_seed"] == pytest.approx(want, rel=1e-5)
    assert result["perplexity"]["mean"] == pytest.approx(np.mean(want), rel=1e-5)
    assert result["perplexity"]["std"] == pytest.approx(np.std(want, ddof=1), rel=1e-3)
    assert result["entropy"]["per_seed"] == pytest.approx([np.mean(entropies(rows)) for rows in tokens], rel=1e-6)
    assert result["entropy"]["ids"] == "of the model"
    kept = [(rows > 2).sum(1).tolist() for rows in tokens]  # 0, 1, 2 are special
    assert result["mean_length"] == pytest.approx(np.mean(kept))
    assert result["skipped"] == 36 - sum(map(len, pairs))
    sampling = result["sampling"]
    assert (sampling["nfe"], sampling["seeds"], sampling["batch_size"]) == (3, seeds, 5)
    assert sampling["sampler"]["class_path"] == "ldlm.DDIM"
    weights = hashlib.sha256((here / "scorer/model.safetensors").read_bytes()).hexdigest()
    scorer = {"name": "./scorer", "sha256": weights, "dtype": "float32", "context": 32, "max_length": 32}
    assert result["scorer"] == scorer
    assert set(result["versions"]) == {"ldlm", "torch", "lightning", "transformers", "python"}
    printed = capsys.readouterr().out
    assert f"{np.mean(want):.4g}" in printed


def test_intervals_are_scipys_percentile_bootstrap_over_texts(here):
    result = evaluate("real.jsonl", "--protocol", "flow_matching")
    texts = [json.loads(line)["text"] for line in (here / "real.jsonl").read_text().splitlines()]
    perplexities = [math.exp(loss) for loss, _ in losses(texts)]
    for name, values in (("perplexity", perplexities), ("entropy", entropies([text.split() for text in texts]))):
        theirs = scipy.stats.bootstrap((values,), np.mean, method="percentile", n_resamples=20000, rng=0)
        want = [theirs.confidence_interval.low, theirs.confidence_interval.high]
        assert result[name]["interval_95"] == pytest.approx(want, abs=0.06 * (want[1] - want[0]))
        assert result[name]["mean"] == pytest.approx(np.mean(values), rel=1e-5)
        assert result[name]["std"] is None
    assert result["sampling"] is None


def test_entropy_is_over_the_ids_of_the_file_else_of_the_tokenizer_named_else_of_the_scorer(here):
    make_tokenizer().save_pretrained("words")
    lines = [{"text": "word1 word1", "ids": [1, 2, 3, 4]}, {"text": "word3", "ids": [7]}]
    (here / "ids.jsonl").write_text("\n".join(map(json.dumps, lines)))
    (here / "plain.txt").write_text("word1 word2\nword1\n\nword3")
    told = evaluate("ids.jsonl")["entropy"]
    assert (told["mean"], told["ids"]) == (pytest.approx(math.log(4) / 2), "of the model")
    without = evaluate("plain.txt")
    assert without["texts"] == 2
    third = scipy.stats.entropy([2, 1]) / 2
    assert (without["entropy"]["mean"], without["entropy"]["ids"]) == (pytest.approx(third), "of the scorer")
    assert evaluate("plain.txt", "--tokenizer", "./words")["entropy"]["ids"] == "of ./words"


def test_real_texts_are_scored_and_compared_with_as_many_as_there_are_samples(here):
    lines = (here / "real.jsonl").read_text().splitlines()
    (here / "few.jsonl").write_text("\n".join(lines[15:40]))
    (here / "start.jsonl").write_text("\n".join(lines[:25]))
    result = evaluate("few.jsonl", "--reference", "real.jsonl", "--protocol", "plain")
    for name in ("perplexity", "entropy", "diversity"):
        assert result["reference"][name] == evaluate("start.jsonl", "--protocol", "plain")[name]
    scorer = load_scorer("./scorer")
    real, ours = (scorer.features([json.loads(line)["text"] for line in part]) for part in (lines[:25], lines[15:40]))
    want = [compute_mauve(real.numpy(), ours.numpy(), seed=seed).mauve for seed in range(25, 30)]
    assert result["mauve"]["mean"] == pytest.approx(np.mean(want), abs=1e-6)
    assert (result["mauve"]["featuriser"], result["mauve"]["kmeans_seeds"]) == ("./scorer", list(range(25, 30)))


def test_texts_that_cannot_be_scored_give_null_and_their_number(here):
    (here / "short.txt").write_text("word1\n\nword2")
    result = evaluate("short.txt", "--protocol", "plain")
    assert result["skipped"] == 2
    wanted = {"mean": None, "std": None, "per_seed": [None], "interval_95": None, "special_tokens": "removed"}
    assert result["perplexity"] == wanted


def test_what_is_written_names_no_folder_of_this_machine(here):
    words = [str(here / "real.jsonl"), "--protocol", "plain", "--tokenizer", str(here / "scorer")]
    cli.main(["evaluate", *words, "--scorer", str(here / "scorer"), "--output", "absolute.json"])
    assert str(here) not in (here / "absolute.json").read_text()
