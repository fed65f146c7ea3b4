"""Measures of generated text: perplexity under a scorer, unigram entropy, n-gram diversity, MAUVE.

In: texts, rows of token ids, or features of texts. Out: torchmetrics, which add up over batches and over ranks.
Paper: section 6 and App. E. Entropies and log-likelihoods are in nats.
"""

import os
import re
import sys
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from hashlib import blake2b

import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat

from ldlm.scorer import BATCH_TOKENS, FEATURE_TOKENS, Scorer, find_protocol

FEW_TEXTS = 500  # for MAUVE
WORD = re.compile(r"\w+|[^\w\s]")  # what n-grams are of


def keep_apart(metric: Metric) -> None:
    """Give a metric a state that equals no other metric's, nor itself: NaN, which stays NaN when ranks are summed.

    torchmetrics 1.9 takes two metrics of a `MetricCollection` for one, for good, if their states are equal after the
    first update: as those of two protocols are, of which the first texts tell nothing.
    """
    metric.add_state("equal_to_none", torch.tensor(torch.nan), dist_reduce_fx="sum")


class _PerText(Metric):
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


class GenerativePerplexity(_PerText):
    """exp of the negative log-likelihood per token that a scorer gives to texts, by one of `ldlm.scorer.PROTOCOLS`.

    Counts: ``skipped`` texts have no token that could be scored; ``truncated`` ones were longer than ``max_length``;
    ``length`` is the scorer's tokens in all texts, without what the protocol adds.

    Args:
        scorer: From `load_scorer`.
        protocol: plain, mdlm, hf_mean, tencdm or flow_matching.
        batch_tokens: Tokens read together, padding included; see `Scorer.nats`. Changes no result.
        max_length: Tokens read of a text, BOS included; None for the scorer's context. MDLM takes its model's length.
        keep_features: Whether to keep, from the same forward passes, what `Scorer.features` gives of each text: of its
            first ``max_length`` tokens, where those are fewer. Then ``features`` is float32 [num h].

    Raises:
        ValueError: If there is no such protocol, ``max_length`` is not between 2 and the context, the scorer lacks a
            token the protocol needs, or features are wanted behind a BOS; from ``update`` if the scorer's logits are
            not finite.
    """

    scores: list[Tensor]
    hidden: list[Tensor]
    skipped: Tensor
    truncated: Tensor
    length: Tensor

    def __init__(
        self,
        scorer: Scorer,
        protocol: str = "mdlm",
        batch_tokens: int = BATCH_TOKENS,
        max_length: int | None = None,
        keep_features: bool = False,
    ) -> None:
        super().__init__()
        self.scorer, self.batch_tokens, self.keep_features = scorer, batch_tokens, keep_features
        self.protocol = find_protocol(protocol)
        self.max_length = scorer.context if max_length is None else max_length
        if not 2 <= self.max_length <= scorer.context:
            raise ValueError(f"max_length={max_length} must be from 2 to {scorer.context}, {scorer.name}'s context")
        self.bos, self.eos = scorer.tokenizer.bos_token_id, scorer.tokenizer.eos_token_id
        for name, needed, token in [
            ("BOS", self.protocol.bos, self.bos),
            ("EOS", self.protocol.special_tokens, self.eos),
        ]:
            if needed and token is None:
                raise ValueError(f"protocol={protocol!r} needs {name}, which {scorer.name} has not; 'plain' needs none")
        if keep_features and self.protocol.bos:
            raise ValueError(f"protocol={protocol!r} reads BOS before each text, which no features do: drop them")
        self._keep("scores", torch.empty(0, 2, dtype=torch.float64))
        if keep_features:
            self._keep("hidden", torch.empty(0, scorer.model.config.hidden_size))
        self._count("skipped", "truncated", "length")

    def update(self, texts: Sequence[str]) -> None:
        """Score texts; for mdlm, those given together are padded together."""
        if not texts:
            return
        rows, limit = self.scorer.encode(texts), self.max_length - self.protocol.bos
        self.truncated += sum(len(row) > limit for row in rows)
        rows = [row[:limit] for row in rows]
        self.length += sum(map(len, rows))
        ends = [max(1, min(len(row), FEATURE_TOKENS)) for row in rows]  # nothing that is put behind a text matters here
        if self.protocol.bos:
            rows = [[self.bos, *row] for row in rows]
        if self.protocol.mdlm_eos:
            longest = max(map(len, rows))
            rows = [row if self.eos in row or len(row) == longest else [*row, self.eos] for row in rows]
        if self.keep_features:
            rows = [row or self.scorer.nothing for row in rows]
        pairs = torch.zeros(len(rows), 2, dtype=torch.float64)
        found, hidden = self.scorer.read(rows, ends, self.batch_tokens)
        for pair, row, nats in zip(pairs, rows, found, strict=True):
            kept = nats[self._scored(torch.tensor(row))[1:]]
            pair[0], pair[1] = kept.sum(), len(kept)
        if not pairs.isfinite().all():
            raise ValueError(f"scorer {self.scorer.name!r} gives logits that are not finite: load it in float32")
        self.skipped += int((pairs[:, 1] == 0).sum())
        self.scores.append(pairs.to(self.device))
        if self.keep_features:
            self.hidden.append(hidden.to(self.device))

    def _scored(self, row: Tensor) -> Tensor:
        """Which tokens of a row count as targets, but for its first [n]."""
        if not self.protocol.mdlm_eos:
            return torch.ones_like(row, dtype=torch.bool)
        end = row == self.eos
        scored: Tensor = ~end | (end.cumsum(0) == 1)
        return scored

    @property
    def every_text(self) -> Tensor:
        """Nats and scored tokens of each text, in their order, zeros for one that was skipped; float64 [num 2]."""
        scores: Tensor = dim_zero_cat(self.scores)
        return scores

    @property
    def per_text(self) -> Tensor:
        """Nats and scored tokens of each text that was scored, float64 [num 2]."""
        scores = self.every_text
        return scores[scores[:, 1] > 0]

    @property
    def features(self) -> Tensor:
        """Of each text, whether it was scored or not, float32 [num h]; only with ``keep_features``."""
        features: Tensor = dim_zero_cat(self.hidden)
        return features

    def compute(self) -> Tensor:
        """Perplexity, float64; NaN if no text was scored."""
        perplexity: Tensor = self.protocol.reduce(self.per_text)
        return perplexity


class UnigramEntropy(_PerText):
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


class NGramDiversity(_PerText):
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


class Mauve(_PerText):
    """MAUVE between generated and real texts, in [0, 1], by mauve-text with its defaults, averaged over k-means seeds.

    One seed moves it by 0.005 to 0.01. Always report the numbers of texts, their length, and the featuriser.

    Args:
        num_features: Width h of the features, which `Scorer.features` makes.
        seeds: Of k-means; 25, mauve-text's own, and those after it.

    Raises:
        ValueError: From ``update`` if features have another width; from ``compute`` if mauve-text is not installed or
            one side has no texts.
    """

    real: list[Tensor]
    generated: list[Tensor]

    def __init__(self, num_features: int, seeds: Sequence[int] = (25, 26, 27, 28, 29)) -> None:
        super().__init__()
        self.num_features, self.seeds = num_features, tuple(seeds)
        if not self.seeds:
            raise ValueError("seeds=() must name at least one seed of k-means")
        for name in ("real", "generated"):
            self._keep(name, torch.empty(0, num_features))

    def update(self, features: Tensor, real: bool) -> None:
        """Take features of texts, [num h], real ones or generated ones."""
        if features.dim() != 2 or features.shape[1] != self.num_features:
            raise ValueError(f"features have shape {list(features.shape)}, but [num, {self.num_features}] is expected")
        (self.real if real else self.generated).append(features.float().to(self.device))

    def compute(self) -> Tensor:
        """Mean over the k-means seeds, float64. Warns under 500 texts a side."""
        try:
            from mauve import compute_mauve  # GPL-3, so only where it is asked for
        except ImportError as error:
            raise ValueError('MAUVE needs mauve-text: pip install "ldlm[eval]"') from error
        real, generated = (dim_zero_cat(state).cpu().numpy() for state in (self.real, self.generated))
        if not len(real) or not len(generated):
            raise ValueError(f"MAUVE compares {len(generated)} generated with {len(real)} real texts; both are needed")
        if min(len(real), len(generated)) < FEW_TEXTS:
            told = f"MAUVE of {len(generated)} texts and {len(real)} real ones: under {FEW_TEXTS} it says little"
            warnings.warn(told, stacklevel=2)
        with _silence():
            scores = [compute_mauve(real, generated, seed=seed).mauve for seed in self.seeds]
        return torch.tensor(scores, dtype=torch.float64, device=self.device).mean()


@contextmanager
def _silence() -> Iterator[None]:
    """Nothing on standard error, not even from C++: faiss warns at mauve-text's own number of clusters, always."""
    sys.stderr.flush()
    kept = os.dup(2)
    try:
        with open(os.devnull, "wb") as nowhere:
            os.dup2(nowhere.fileno(), 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
