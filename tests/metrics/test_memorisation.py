"""Memorisation against sets of words, and the digests that stand for them."""

import math
import re

import pytest
import torch
from helpers.tiny import WORDS, generator

from ldlm.metrics import memorisation
from ldlm.metrics.memorisation import Memorisation, digests, known_ngrams


def some_texts(count: int, seed: int, words: int = 4) -> list[str]:
    lengths = torch.randint(0, 15, (count,), generator=generator(seed)).tolist()
    return [
        " ".join(WORDS[i] for i in torch.randint(0, words, (length,), generator=generator(seed + n + 1)).tolist())
        for n, length in enumerate(lengths)
    ]


def four_grams(texts: list[str]) -> list[tuple[str, ...]]:
    split = [re.findall(r"\w+|[^\w\s]", text) for text in texts]
    return [tuple(words[i : i + 4]) for words in split for i in range(len(words) - 3)]


@pytest.mark.parametrize("pending", [2**24, 10])
def test_memorisation_is_the_share_of_four_grams_that_a_set_of_tuples_finds(monkeypatch, pending):
    monkeypatch.setattr(memorisation, "PENDING", pending)  # 10: merged again and again while the text streams by
    training, generated = some_texts(30, seed=1), some_texts(25, seed=50)
    known = set(four_grams(training))
    found = [gram in known for gram in four_grams(generated)]
    assert 0.2 < sum(found) / len(found) < 0.9
    digested = known_ngrams(iter(training))
    assert len(digested) == len(known)
    metric = Memorisation(digested)
    metric.update(generated[:10])
    metric.update(generated[10:])
    assert metric.compute().item() == sum(found) / len(found)
    metric.reset()
    metric.update(training)
    assert metric.compute().item() == 1


def test_every_occurrence_counts_and_none_across_texts():
    metric = Memorisation(known_ngrams(["a b c d", "e, f g"]))
    metric.update(["a b c d x a b c d", "a b c", "d e , f g", ""])  # 6 with 2 known; 0; 2 with 1 known; 0
    assert (int(metric.found), int(metric.total)) == (3, 8)


def test_words_in_another_order_or_number_have_another_digest():
    texts = ["a b c d", "b a c d", "a b d c", "d c b a", "a a a a", "b b b b", "ab c d e", "a bc d e", "A b c d"]
    assert len(set(digests(texts).tolist())) == len(texts)


def test_without_training_text_nothing_is_found_and_without_four_words_there_is_no_share():
    metric = Memorisation(known_ngrams([]))
    metric.update(["a b c"])
    assert math.isnan(metric.compute().item())
    metric.update(["a b c d"])
    assert metric.compute().item() == 0
