"""Protocols of generative perplexity: what differs between the papers that report it.

In: a name. Out: how texts are cut, framed and averaged. Paper: section 6 (metrics).
"""

import difflib
from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from ldlm.metrics.scorer import Scorer


# How texts' scores [... num 2], nats lost and tokens scored, become one perplexity [...].
def _over_tokens(scores: Tensor) -> Tensor:
    nats, tokens = scores.sum(-2).unbind(-1)
    return (nats / tokens).exp()


def _over_texts(scores: Tensor) -> Tensor:
    return (scores[..., 0] / scores[..., 1]).exp().mean(-1)


def _over_middle_texts(scores: Tensor) -> Tensor:
    perplexities = (scores[..., 0] / scores[..., 1]).exp().sort(-1).values
    count = perplexities.shape[-1]
    return perplexities[..., count // 20 : count - count // 20].mean(-1)


@dataclass(frozen=True)
class Protocol:
    """A definition of generative perplexity. Numbers of different definitions are not comparable.

    Attributes:
        definition: In words, for reports.
        reduce: From texts' scores [... num 2], (nats, tokens), to perplexity [...].
        bos: Whether the scorer's BOS is put before each text, so that its first token is scored.
        mdlm_eos: Whether end-of-text tokens are padded and left out as MDLM does.
        special_tokens: Whether the special tokens that begin, end or pad documents stay in the texts, as the scorer's
            end-of-text token. In whatever is scored, of a model, a file or a reference, they do, or they do not.
    """

    definition: str
    reduce: Callable[[Tensor], Tensor]
    bos: bool = False
    mdlm_eos: bool = False
    special_tokens: bool = False

    def limit(self, sequence_length: int, scorer: Scorer) -> int | None:
        """Tokens the scorer reads of a model's text; MDLM reads as many as its models write. None for its context."""
        return min(sequence_length, scorer.context) if self.mdlm_eos else None

    def boundary(self, scorer: Scorer) -> str | None:
        """What stands for special tokens between documents: the scorer's end-of-text; None where they are removed."""
        return str(scorer.tokenizer.eos_token) if self.special_tokens else None


PROTOCOLS = {
    "plain": Protocol(
        "exp of the mean over all scored tokens; texts without special tokens, a blank between documents; no BOS, so "
        "that a text's first token is context only",
        _over_tokens,
    ),
    "mdlm": Protocol(
        "exp of the mean over all scored tokens; texts with the special tokens between documents, as the scorer's "
        "end-of-text; no BOS, so that a text's first token is context only; of the end-of-text tokens in a text only "
        "the first is scored, text after it is scored; texts are padded with end-of-text to the longest given "
        "together, so a shorter text that has none gets one",
        _over_tokens,
        mdlm_eos=True,
        special_tokens=True,
    ),
    "hf_mean": Protocol(
        "mean over texts of exp of the mean over a text's tokens; texts without special tokens, a blank between "
        "documents; BOS before each text, so that all its tokens are scored",
        _over_texts,
        bos=True,
    ),
    "tencdm": Protocol(
        "as hf_mean, but the lowest and the highest twentieth of the texts' perplexities (rounded down) are left out",
        _over_middle_texts,
        bos=True,
    ),
    "flow_matching": Protocol(
        "mean over texts of exp of the mean over a text's tokens but the first; texts with the special tokens between "
        "documents, as the scorer's end-of-text, scored like any other; texts are tokenised again, where the original "
        "scores the model's ids",
        _over_texts,
        special_tokens=True,
    ),
}


def find_protocol(name: str) -> Protocol:
    """The protocol of that name; ValueError offering the nearest if there is none."""
    if name not in PROTOCOLS:
        close = difflib.get_close_matches(name.lower(), PROTOCOLS, n=1)
        hint = f"; did you mean {close[0]!r}?" if close else ""
        raise ValueError(f"there is no protocol {name!r} among {', '.join(PROTOCOLS)}{hint}")
    return PROTOCOLS[name]
