"""How much of generated text stands word for word in the training text.

In: documents of the training text, one after another; generated texts. Out: a torchmetric, a share in [0, 1].
Not in the paper; of TEncDM's and LD4LG's measures, which count 4-grams as well.
"""

from collections.abc import Iterable
from functools import lru_cache
from hashlib import blake2b

import torch
from torch import Tensor
from torchmetrics import Metric

from ldlm.metrics.text import WORD, keep_apart

N = 4
MULTIPLIER = 0x5851F42D4C957F2D  # Knuth's, of MMIX: odd, so that no word of an n-gram is multiplied away
PENDING = 2**24  # n-grams that are collected before they are merged: 128 MiB


def digests(texts: Iterable[str]) -> Tensor:
    """A 64-bit digest of each 4-gram within each text, as often as it occurs, int64 [num].

    The 4-grams are of the words and punctuation marks of `NGramDiversity`. Words' own digests are combined as the
    coefficients of a polynomial modulo 2^64, so that a corpus costs little more than finding its words.
    """
    found = [torch.empty(0, dtype=torch.int64)]
    for text in texts:
        words = torch.tensor([_word(word) for word in WORD.findall(text)], dtype=torch.int64)
        if len(words) >= N:
            windows = words.unfold(0, N, 1)
            value = windows[:, 0]
            for place in range(1, N):
                value = value * MULTIPLIER + windows[:, place]  # int64 wraps around, which is what is meant
            found.append(value)
    return torch.cat(found)


@lru_cache(maxsize=2**20)
def _word(word: str) -> int:
    return int.from_bytes(blake2b(word.encode(), digest_size=8).digest(), "little", signed=True)


def known_ngrams(documents: Iterable[str]) -> Tensor:
    """The digests of all 4-grams of a text, each once, sorted, int64 [num].

    The text is streamed. What is kept is 8 bytes for each distinct 4-gram, and at most four times that and half a
    gigabyte while they are merged.

    Args:
        documents: Such as a `ldlm.data.corpus.Corpus`.
    """
    known, pending, waiting = torch.empty(0, dtype=torch.int64), [], 0
    for document in documents:
        pending.append(digests([document]))
        waiting += len(pending[-1])
        if waiting > max(PENDING, len(known)):
            known, pending, waiting = _merged(known, pending), [], 0
    return _merged(known, pending)


def _merged(known: Tensor, pending: list[Tensor]) -> Tensor:
    merged: Tensor = torch.unique(torch.cat([known, *pending]))
    return merged


class Memorisation(Metric):
    """Share of the generated 4-grams that occur in the training text; every occurrence counts, not every distinct one.

    Real text that was not trained on has a share of its own, well above 0: compare with that.

    Args:
        known: From `known_ngrams`. No state: it is neither synchronised nor saved.
    """

    is_differentiable = False
    full_state_update = False
    found: Tensor
    total: Tensor

    def __init__(self, known: Tensor) -> None:
        super().__init__()
        keep_apart(self)
        self.known = known
        for name in ("found", "total"):
            self.add_state(name, torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, texts: Iterable[str]) -> None:
        """Take texts."""
        values = digests(texts)
        self.total += len(values)
        if len(self.known):
            places = torch.searchsorted(self.known, values).clamp(max=len(self.known) - 1)
            self.found += int((self.known[places] == values).sum())

    def compute(self) -> Tensor:
        """The share, float64; NaN if no text has four words."""
        return self.found.double() / self.total
