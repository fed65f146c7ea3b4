"""Scorers: the causal language models that texts are scored with.

In: the name of a model; texts, or rows of its token ids. Out: nats of each token, features of each text [num h].
Paper: section 6, whose generative perplexity is gpt2-large's.
"""

import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModelForCausalLM, AutoTokenizer

from ldlm._files import sha256
from ldlm.hub import local_folder, resolve, weights_digest
from ldlm.nn.token_encoders import DTYPES

FEATURE_TOKENS = 1024  # that mauve-text reads of a text
BATCH_TOKENS = 4096  # with gpt2-large's vocabulary, 0.8 GB of float32 logits


@dataclass(frozen=True)
class Scorer:
    """A causal language model; no nn.Module, so that what holds one never writes its weights into a checkpoint.

    Attributes:
        name: What it was asked for by.
        dtype: What its weights are kept in.
        sha256: Digest of its weights.
        context: The most tokens it reads at once.
    """

    name: str
    model: Any
    tokenizer: Any
    dtype: str
    sha256: str
    context: int

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of each text, with no special token added."""
        rows: list[list[int]] = self.tokenizer(list(texts), add_special_tokens=False, verbose=False).input_ids
        return rows

    def nats(self, rows: Sequence[Sequence[int]], batch_tokens: int = BATCH_TOKENS) -> list[Tensor]:
        """Negative log-likelihood of tokens 2, 3, ... of each row given those before, float64 on the CPU.

        Args:
            rows: Token ids, none of more than ``context``.
            batch_tokens: Tokens read together, padding included; logits take 4 bytes times the vocabulary for each.
        """
        return self.read(rows, [1] * len(rows), batch_tokens)[0]

    @torch.no_grad()
    def read(
        self, rows: Sequence[Sequence[int]], ends: Sequence[int], batch_tokens: int = BATCH_TOKENS
    ) -> tuple[list[Tensor], Tensor]:
        """`nats` of each row and, from the same forward pass, the last layer's hidden state at its ``ends``-th token.

        Args:
            rows: As in `nats`; one without tokens has a hidden state of zeros.
            ends: From 1 to a row's length.
            batch_tokens: As in `nats`.

        Returns:
            The nats, and float32 [num h] on the CPU.
        """
        found = [torch.empty(0, dtype=torch.float64)] * len(rows)
        states = torch.zeros(len(rows), self.model.config.hidden_size)
        hidden: list[Tensor] = []  # of the batch that is read; asking transformers for it would keep every layer's
        hook = self.model.base_model.register_forward_hook(lambda _, __, out: hidden.append(out.last_hidden_state))
        with hook:
            for places, ids in self._batches(rows, batch_tokens):
                with torch.autocast(ids.device.type, enabled=False):  # a trainer's bf16-mixed must not change a score
                    logits = self.model(input_ids=ids, use_cache=False).logits
                for place, row, guess, state in zip(places, ids, logits, hidden.pop(), strict=True):
                    last = len(rows[place]) - 1
                    # Each row alone: no second copy of all logits.
                    loss = F.cross_entropy(guess[:last].float(), row[1 : last + 1], reduction="none")
                    found[place] = loss.double().cpu()
                    states[place] = state[ends[place] - 1].float()
        return found, states

    @torch.no_grad()
    def features(
        self, texts: Sequence[str], max_length: int = FEATURE_TOKENS, batch_tokens: int = BATCH_TOKENS
    ) -> Tensor:
        """What MAUVE compares: the last layer's hidden state at each text's last token, float32 [num h] on the CPU.

        Args:
            texts: The texts. An empty one is read as a single end-of-text token.
            max_length: Tokens read of a text.
            batch_tokens: Tokens read together, padding included.
        """
        rows = [row[: min(max_length, self.context)] or self.nothing for row in self.encode(texts)]
        found = torch.empty(len(rows), self.model.config.hidden_size)
        for places, ids in self._batches(rows, batch_tokens):
            with torch.autocast(ids.device.type, enabled=False):
                hidden = self.model.base_model(input_ids=ids, use_cache=False).last_hidden_state
            for place, states in zip(places, hidden, strict=True):
                found[place] = states[len(rows[place]) - 1].float()
        return found

    @property
    def nothing(self) -> list[int]:
        """What is read where a text has no token but a hidden state is wanted: a single end-of-text token."""
        return [self.tokenizer.eos_token_id or 0]

    def _batches(self, rows: Sequence[Sequence[int]], batch_tokens: int) -> Iterator[tuple[list[int], Tensor]]:
        """Rows of like length together, longest first: their places in ``rows``, their ids padded on the right [b n].

        A causal model sees nothing to the right, so padding needs no mask and changes no result.
        """
        order = sorted((place for place, row in enumerate(rows) if row), key=lambda place: -len(rows[place]))
        while order:
            count = max(1, batch_tokens // len(rows[order[0]]))
            places, order = order[:count], order[count:]
            yield places, pad_sequence([torch.tensor(rows[place]) for place in places], True).to(self.model.device)


def load_scorer(name: str, dtype: str = "float32", device: torch.device | str = "cpu") -> Scorer:
    """Load a scorer, once: it is given to every metric that needs one.

    Args:
        name: Hub id, a folder, or a ``.gguf`` file; ``package:NAME/...`` for a folder or file of a package.
        dtype: float32, bfloat16 or float16, into which the weights of a ``.gguf`` are unpacked.
        device: Where it runs.

    Raises:
        ValueError: If it is not to be had, cannot be read or cannot score texts, or the dtype is another.
    """
    if dtype not in DTYPES:
        raise ValueError(f"dtype={dtype!r} is none of {', '.join(DTYPES)}")
    packed = name.endswith(".gguf")
    try:
        path = Path(resolve(name))
    except FileNotFoundError as error:  # its text says how to get the package
        raise ValueError(f"scorer: {error}") from error
    try:
        folder = path.parent if packed else local_folder(name, None, "*.json", "*.txt", "*.model", "*.safetensors")
        digest, file = (sha256(path), path.name) if packed else (weights_digest(folder), None)
        tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=file, trust_remote_code=False)
        model, loaded = AutoModelForCausalLM.from_pretrained(
            folder,
            gguf_file=file,
            dtype=DTYPES[dtype],
            trust_remote_code=False,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # else an error that names no weights; they are refused below
        )
    except ImportError as error:
        raise ValueError(f'scorer {name!r} needs gguf and accelerate: pip install "ldlm[eval]"') from error
    except (OSError, ValueError, SafetensorError, struct.error) as error:  # the last: a .gguf cut short
        reason = str(error).partition("\n")[0]
        fault = f"cannot be read ({reason}): mend it" if path.exists() else "is not to be had: check name and network"
        raise ValueError(
            f"scorer {name!r} {fault}, or give a folder that holds a causal language model in safetensors, or a .gguf"
        ) from error
    model.requires_grad_(False).eval()
    unfit = _unfit(model, tokenizer, [*loaded["missing_keys"], *(name for name, *_ in loaded["mismatched_keys"])])
    if unfit:
        raise ValueError(f"scorer {name!r} {unfit}: give a causal language model with its tokenizer")
    try:
        context = int(model.config.max_position_embeddings)
    except AttributeError:  # a family without positions
        context = int(tokenizer.model_max_length)
    return Scorer(name, model.to(device), tokenizer, dtype, digest, context)


def _unfit(model: Any, tokenizer: Any, missing: list[str]) -> str | None:
    """Why what transformers loaded cannot score texts. It fills weights that are missing with noise, and says so."""
    if missing:
        return f"has no weights that fit {', '.join(sorted(missing)[:3])}{' ...' if len(missing) > 3 else ''}"
    known = model.get_input_embeddings().num_embeddings
    if not 0 < tokenizer.vocab_size <= known:
        return f"has a tokenizer of {tokenizer.vocab_size} tokens and embeddings of {known}"
    with torch.no_grad():
        first, second = model(input_ids=torch.tensor([[0, 0], [0, 1]])).logits[:, 0]
    causal = torch.allclose(first, second, rtol=0.05, atol=0.05, equal_nan=True)  # bfloat16 may differ by rounding
    return None if causal else "lets a token see those behind it"
