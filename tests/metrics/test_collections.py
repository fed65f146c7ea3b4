"""In a torchmetrics `MetricCollection` each of our metrics has the value that it has alone, whatever else is in it."""

import pickle
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from helpers.tiny import VOCAB, WORDS, generator, make_scorer_folder
from torch import Tensor
from torchmetrics import Metric, MetricCollection

from ldlm.metrics.generative_perplexity import GenerativePerplexity
from ldlm.metrics.mauve import Mauve
from ldlm.metrics.memorisation import Memorisation, known_ngrams
from ldlm.metrics.protocols import PROTOCOLS
from ldlm.metrics.scorer import Scorer, load_scorer
from ldlm.metrics.text import NGramDiversity, UnigramEntropy


@pytest.fixture(scope="module")
def scorers(tmp_path_factory) -> tuple[Scorer, Scorer]:
    """Two of the same name, vocabulary and context, with other weights."""
    folder = make_scorer_folder(tmp_path_factory.mktemp("one") / "scorer")
    other = load_scorer(str(make_scorer_folder(tmp_path_factory.mktemp("other") / "scorer")))
    with torch.no_grad():
        other.model.lm_head.weight.mul_(0.5)
    return load_scorer(str(folder)), other


METRICS: dict[str, Callable[[tuple[Scorer, Scorer]], Metric]] = {
    **{name: (lambda scorers, name=name: GenerativePerplexity(scorers[0], name)) for name in PROTOCOLS},
    "another scorer": lambda scorers: GenerativePerplexity(scorers[1], "plain"),
    "shorter": lambda scorers: GenerativePerplexity(scorers[0], "plain", max_length=3),
    "features": lambda scorers: GenerativePerplexity(scorers[0], "plain", keep_features=True),
    "entropy": lambda _: UnigramEntropy(),
    "entropy without 5": lambda _: UnigramEntropy([5]),
    "diversity": lambda _: NGramDiversity(),
    "diversity of 1, 2, 3": lambda _: NGramDiversity((1, 2, 3)),
    "memorised of much": lambda _: Memorisation(known_ngrams(some_texts(40, 9))),
    "memorised of little": lambda _: Memorisation(known_ngrams(some_texts(2, 9))),
}


def some_texts(count: int, seed: int) -> list[str]:
    lengths = torch.randint(0, 13, (count,), generator=generator(seed)).tolist()
    picks = torch.randint(0, 4, (count, 13), generator=generator(seed + 1)).tolist()
    return [" ".join([WORDS[i] for i in row[:n]] + ["</s>"] * (n % 3)) for row, n in zip(picks, lengths, strict=True)]


def some_rows(count: int, seed: int, low: int = 0) -> Tensor:
    return torch.randint(low, VOCAB, (count, 9), generator=generator(seed))


# After the first of each, metrics of other settings have the same state: there is nothing yet, or nothing that differs.
UPDATES = {
    "nothing first": [([], some_rows(0, 0)), (some_texts(9, 1), some_rows(9, 1)), (some_texts(5, 2), some_rows(5, 2))],
    "nothing that differs first": [
        (["word1 word2"], some_rows(2, 0, low=6)),
        (some_texts(9, 1), some_rows(9, 1)),
        (some_texts(5, 2), some_rows(5, 2)),
    ],
}


def update(metric: Metric | MetricCollection, updates: list[tuple[list[str], Tensor]]) -> None:
    for texts, rows in updates:
        given = {"texts": texts, "rows": rows}
        if not isinstance(metric, MetricCollection):  # which gives each what it takes
            del given["texts" if isinstance(metric, UnigramEntropy) else "rows"]
        metric.update(**given)


ALONE: dict[tuple[str, tuple[int, ...]], float] = {}  # computed once, by what was given


def alone(scorers: tuple[Scorer, Scorer], name: str, updates: list[tuple[list[str], Tensor]]) -> float:
    key = name, tuple(map(id, updates))
    if key not in ALONE:
        metric = METRICS[name](scorers)
        update(metric, updates)
        ALONE[key] = float(metric.compute())
    return ALONE[key]


def assert_values(got: dict[str, Tensor], scorers, names: list[str], updates: list[tuple[list[str], Tensor]]) -> None:
    assert {name: float(value) for name, value in got.items()} == pytest.approx(
        {name: alone(scorers, name, updates) for name in names}, rel=1e-12, nan_ok=True
    )


@pytest.mark.parametrize("updates", UPDATES.values(), ids=UPDATES)
@pytest.mark.parametrize("first", [*METRICS][:-1])
def test_a_value_beside_any_other_metric_is_the_value_alone(scorers, first, updates):
    for second in [*METRICS][[*METRICS].index(first) + 1 :]:
        collection = MetricCollection({name: METRICS[name](scorers) for name in (first, second)})
        update(collection, updates)
        assert_values(collection.compute(), scorers, [first, second], updates)


@pytest.mark.parametrize("updates", UPDATES.values(), ids=UPDATES)
@pytest.mark.parametrize(
    "again", [MetricCollection.clone, lambda c: pickle.loads(pickle.dumps(c))], ids=["clone", "pickle"]
)
def test_copies_amid_the_updates_have_the_values_alone(scorers, updates, again):
    collection = MetricCollection({name: METRICS[name](scorers) for name in METRICS})
    update(collection, updates[:1])
    copied = again(collection)
    for each in (collection, copied):
        update(each, updates[1:])
        assert_values(each.compute(), scorers, [*METRICS], updates)
    update(copied, updates[1:])  # shares nothing with what it was copied from
    assert_values(collection.compute(), scorers, [*METRICS], updates)


@pytest.mark.parametrize("updates", UPDATES.values(), ids=UPDATES)
def test_a_metric_and_its_clone_stay_two_in_one_collection(scorers, updates):
    for name, make in METRICS.items():
        metric = make(scorers)
        both = MetricCollection({name: metric, "again": metric.clone()})
        update(both, updates)
        got = both.compute()
        assert float(got["again"]) == float(got[name]) == pytest.approx(alone(scorers, name, updates), rel=1e-12)


@pytest.mark.parametrize("updates", UPDATES.values(), ids=UPDATES)
def test_a_collection_that_is_reset_begins_anew(scorers, updates):
    collection = MetricCollection({name: METRICS[name](scorers) for name in METRICS})
    update(collection, updates)
    collection.reset()
    update(collection, updates[:2])
    assert_values(collection.compute(), scorers, [*METRICS], updates[:2])


@pytest.mark.parametrize("updates", UPDATES.values(), ids=UPDATES)
def test_forward_gives_each_batchs_value_and_adds_it_up(scorers, updates):
    collection = MetricCollection({name: METRICS[name](scorers) for name in METRICS})
    for batch in updates:
        assert_values(collection(texts=batch[0], rows=batch[1]), scorers, [*METRICS], [batch])
    assert_values(collection.compute(), scorers, [*METRICS], updates)


@pytest.mark.parametrize("updates", UPDATES.values(), ids=UPDATES)
def test_ranks_are_added_up_for_each_metric_alone(scorers, updates):
    collection = MetricCollection({name: METRICS[name](scorers) for name in METRICS})
    update(collection, updates)
    for metric in collection.values(copy_state=False):  # a second rank with the same texts
        metric.distributed_available_fn = lambda: True
        metric.dist_sync_fn = lambda value, group: [value, value]
    assert_values(collection.compute(), scorers, [*METRICS], updates * 2)
    update(collection, updates[1:])  # the ranks' sums do not stay
    assert_values(collection.compute(), scorers, [*METRICS], (updates + updates[1:]) * 2)


def test_mauves_of_other_seeds_are_not_merged():
    def features(count: int, shift: float) -> Tensor:
        return torch.randn(count, 4, generator=generator(count)) + shift

    def fill(metric: Metric | MetricCollection) -> Metric | MetricCollection:
        for count in (0, 40, 30):
            metric.update(features=features(count, 0.0), real=True)
            metric.update(features=features(count, 0.5), real=False)
        return metric

    seeds = {"a": (25,), "b": (31,)}
    together = fill(MetricCollection({name: Mauve(4, each) for name, each in seeds.items()}))
    assert len(together.compute_groups) == 2
    assert together.compute() == {name: fill(Mauve(4, each)).compute() for name, each in seeds.items()}


def test_the_scorers_of_these_tests_differ_in_nothing_but_weights(scorers, tmp_path):
    assert Path(scorers[0].name).name == Path(scorers[1].name).name
    assert alone(scorers, "plain", UPDATES["nothing first"]) != alone(
        scorers, "another scorer", UPDATES["nothing first"]
    )
