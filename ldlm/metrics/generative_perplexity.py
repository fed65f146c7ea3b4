"""Generative perplexity: how likely a scorer finds generated texts.

In: texts. Out: a torchmetrics metric, which adds up over batches and over ranks.
Paper: section 6 and App. E. Log-likelihoods are in nats.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torchmetrics.utilities import dim_zero_cat

from ldlm.metrics.protocols import find_protocol
from ldlm.metrics.scorer import BATCH_TOKENS, FEATURE_TOKENS, Scorer
from ldlm.metrics.text import PerText


class GenerativePerplexity(PerText):
    """exp of the negative log-likelihood per token that a scorer gives to texts, by one of `PROTOCOLS`.

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
