"""Metrics of texts that need no other model: unigram entropy, n-gram diversity.

In: token ids, or texts. Out: torchmetrics. Paper: section 6 and App. E.
"""

import re
from collections.abc import Iterable, Sequence
from hashlib import blake2b

import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat

WORD = re.compile(r"\w+|[^\w\s]")  # what n-grams are of


def keep_apart(metric: Metric) -> None:
    """Give a metric a state that equals no other metric's, nor itself: NaN, which stays NaN when ranks are summed.

    torchmetrics 1.9 takes two metrics of a `MetricCollection` for one, for good, if their states are equal after the
    first update: as those of two protocols are, of which the first texts tell nothing.
    """
    metric.add_state("equal_to_none", torch.tensor(torch.nan), dist_reduce_fx="sum")


class PerText(Metric):
    """Keeps something of every text, in lists that are gathered over ranks, and counts."""

    is_differentiable = False
    full_state_update = False

    def __init__(self) -> None:
        super().__init__()
        keep_apart(self)
        self._nothing: dict[str, Tensor] = {}

    def _keep(self, name: str, nothing: Tensor) -> None:
        self.add_state(name, [], dist_reduce_fx="cat")
        self._nothing[name] = nothing
        setattr(self, name, [nothing])

    def _count(self, *names: str) -> None:
        for name in names:
            self.add_state(name, torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")

    def reset(self) -> None:
        """Forget all texts."""
        super().reset()
        # A rank that saw no text gathers all the same, and shapes and dtypes must be those of the others.
        for name, nothing in self._nothing.items():
            setattr(self, name, [nothing.to(self.device)])


class UnigramEntropy(PerText):
    """Mean over texts of the entropy, in nats, of the frequencies of token ids within a text (App. E).

    Special tokens count: only with them do the texts of Fig. 7 have the entropies that are printed above them.
    Count: ``empty`` texts have no ids besides the ignored ones, and are not averaged over.

    Args:
        ignore: Ids to leave out, for a comparison with entropies that leave some out, such as padding.
    """

    entropies: list[Tensor]
    empty: Tensor

    def __init__(self, ignore: Iterable[int] = ()) -> None:
        super().__init__()
        self.ignore = torch.tensor(list(ignore), dtype=torch.int64)
        self._keep("entropies", torch.empty(0, dtype=torch.float64))
        self._count("empty")

    def update(self, rows: Tensor | Sequence[Sequence[int]]) -> None:
        """Take the ids of texts, [b n] or a list of lists."""
        found = []
        for row in rows:
            ids = torch.as_tensor(row, dtype=torch.int64, device="cpu")
            counts = torch.unique(ids[~torch.isin(ids, self.ignore)], return_counts=True)[1].double()
            found.append(torch.special.entr(counts / counts.sum()).sum() if len(counts) else torch.tensor(torch.nan))
        values = torch.tensor(found, dtype=torch.float64, device=self.device)
        self.empty += values.isnan().sum()
        self.entropies.append(values[~values.isnan()])

    @property
    def per_text(self) -> Tensor:
        """The entropy of each text that is not empty, in nats, float64 [num]."""
        entropies: Tensor = dim_zero_cat(self.entropies)
        return entropies

    def compute(self) -> Tensor:
        """Mean entropy in nats, float64; NaN if all texts were empty."""
        return self.per_text.mean()


class NGramDiversity(PerText):
    r"""Product over n of unique n-grams / n-grams, both over all texts together (App. E). It falls with their number.

    The n-grams are of words and single punctuation marks, ``\w+|[^\w\s]``, with case kept. Peers split with spaCy, so
    compare these numbers with one another only, and at equal numbers of texts.

    Args:
        ns: The lengths of n-grams.
    """

    grams: list[Tensor]
    total: Tensor

    def __init__(self, ns: Sequence[int] = (2, 3, 4)) -> None:
        super().__init__()
        if not ns or min(ns) < 1:
            raise ValueError(f"ns={ns} must be one or more lengths of at least 1")
        self.ns = tuple(ns)
        self._keep("grams", torch.empty(0, 2, dtype=torch.int64))  # (n, digest): a union over ranks needs no strings
        self.add_state("total", torch.zeros(len(ns), dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, texts: Sequence[str]) -> None:
        """Take texts."""
        split = [WORD.findall(text) for text in texts]
        for place, n in enumerate(self.ns):
            grams = [tuple(words[i : i + n]) for words in split for i in range(len(words) - n + 1)]
            self.total[place] += len(grams)
            # Python's own hash differs between processes. Among a million n-grams, 64 bits collide once in 40 million.
            digests = (blake2b(" ".join(gram).encode(), digest_size=8).digest() for gram in set(grams))
            rows = [[n, int.from_bytes(digest, "little", signed=True)] for digest in digests]
            self.grams.append(torch.tensor(rows, dtype=torch.int64, device=self.device).view(-1, 2))

    def compute(self) -> Tensor:
        """Diversity, float64 in [0, 1]; 0 if there is no n-gram of some length."""
        grams = dim_zero_cat(self.grams)
        unique = torch.tensor([len(torch.unique(grams[grams[:, 0] == n, 1])) for n in self.ns], device=self.device)
        return (unique.double() / self.total.clamp(min=1)).prod()
