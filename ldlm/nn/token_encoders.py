"""Token encoders: the frozen language model whose hidden states everything else is built on.

In: token ids [b n].
Out: hidden states [b n h], shifted and scaled to zero mean and unit variance per feature over the training text.
Paper: sections 4.1, 5.1 and 6; App. B.1 and B.3 for other layers and other encoders.

Frozen weights are kept out of the module tree: they are in no state_dict, no optimiser, no EMA copy and no DDP bucket.
They are read on the first call, checked against their SHA-256, and follow the module from device to device.
"""

import abc
from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, PreTrainedModel, PreTrainedTokenizerBase

from ldlm._sizes import building_at_most
from ldlm.hub import local_folder, weights_digest, weights_size
from ldlm.tokenizer import load_tokenizer

# Below this a feature's deviation is rounding: dividing by it would turn noise into a feature.
MIN_STD = 1e-3
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class TokenEncoder(nn.Module, abc.ABC):
    """Tokens to normalised hidden states.

    A subclass writes `hidden_states`, the raw ones; normalisation and its statistics are here.

    Args:
        hidden_size: Width h of the hidden states.
        vocab_size: Vocabulary size v; token ids are below it.
    """

    mean: Tensor
    std: Tensor
    statistics_rows: Tensor

    def __init__(self, hidden_size: int, vocab_size: int) -> None:
        super().__init__()
        self.hidden_size = hidden_size
        self.vocab_size = vocab_size
        self.register_buffer("mean", torch.zeros(hidden_size))
        self.register_buffer("std", torch.ones(hidden_size))
        self.register_buffer("statistics_rows", torch.zeros((), dtype=torch.int64))
        # What stands in for `hidden_states` while `ldlm.CacheHiddenStates` has them on disk; in no checkpoint.
        self.stored: Callable[[Tensor], Tensor] | None = None

    @abc.abstractmethod
    def hidden_states(self, tokens: Tensor) -> Tensor:
        """Token ids [b n] -> raw hidden states [b n h]."""

    @abc.abstractmethod
    def embeddings(self) -> Tensor:
        """The input embedding matrix [v h'], where some token decoders start."""

    def forward(self, tokens: Tensor) -> Tensor:
        """Token ids [b n] -> normalised hidden states [b n h], float32."""
        return (self._raw(tokens).float() - self.mean) / self.std

    @torch.no_grad()
    def fit_statistics(self, batches: Iterable[Tensor], rows: int) -> None:
        """Set mean and deviation per feature over all positions of the first ``rows`` rows, over all ranks.

        Sums are float64; each rank reads its own share of the rows, and the sums are added over ranks.

        Args:
            batches: Token ids [b n], as this rank's loader gives them.
            rows: Rows over all ranks.

        Raises:
            ValueError: If there are no batches, or none has a row, or a mean or a standard deviation is not finite;
                nothing is changed then.
        """
        ranks = dist.get_world_size() if dist.is_initialized() else 1
        sums = torch.zeros(2, self.hidden_size, dtype=torch.float64, device=self.mean.device)
        count = seen = 0
        for tokens in batches:
            hidden = self._raw(tokens.to(self.mean.device)).double().flatten(0, 1)
            sums += torch.stack([hidden.sum(0), hidden.square().sum(0)])
            count, seen = count + len(hidden), seen + len(tokens)
            if seen * ranks >= rows:
                break
        totals = torch.cat([sums.flatten(), sums.new_tensor([count, seen])])
        if ranks > 1:
            dist.all_reduce(totals)
        if not totals[-1]:
            raise ValueError(
                "the training loader gives no rows, so there is nothing to measure the hidden states' mean and "
                "deviation on, and nothing to train on: look at its data set, drop_last and limit_train_batches"
            )
        mean, square = totals[:-2].view(2, -1) / totals[-2]
        std = (square - mean.square()).clamp(min=0).sqrt().clamp(min=MIN_STD)
        bad = ~torch.stack([mean, std]).float().isfinite().all(0)
        if bad.any():
            raise ValueError(
                f"{type(self).__name__} gives hidden states that are not finite, or too large for float32, in "
                f"{int(bad.sum())} of {self.hidden_size} features, of which {int(bad.nonzero()[0])} is the first: no "
                "statistics were set; look at the encoder's weights and at its dtype"
            )
        self.mean.copy_(mean)
        self.std.copy_(std)
        self.statistics_rows.copy_(totals[-1])

    def _raw(self, tokens: Tensor) -> Tensor:
        """Raw hidden states, stored or computed."""
        return self.hidden_states(tokens) if self.stored is None else self.stored(tokens)


class FrozenTokenEncoder(TokenEncoder):
    """A token encoder made of pre-trained weights that are never trained.

    A subclass writes `prepare`, which makes the wanted module of the full model.

    Args:
        model: Hub id, a folder, or ``package:NAME/folder`` for one inside an installed package.
        revision: Branch, tag or commit on the hub.
        sha256: Digest the weights must have; None takes whatever is there, and remembers it.
        dtype: What the frozen weights are kept in: float32, bfloat16 or float16.
        hidden_size: Width h.
        vocab_size: Vocabulary size v.

    Raises:
        ValueError: On the first call, if the model is not to be had or has other weights than ``sha256``.
    """

    def __init__(
        self, model: str, revision: str | None, sha256: str | None, dtype: str, hidden_size: int, vocab_size: int
    ) -> None:
        super().__init__(hidden_size, vocab_size)
        if dtype not in DTYPES:
            raise ValueError(f"dtype={dtype!r} is not one of {', '.join(DTYPES)}")
        self.model = model
        self.revision = revision
        self.sha256 = sha256
        self.dtype = dtype
        # In a list, so that nn.Module does not register it: it must be in no state_dict and no parameters().
        self._frozen: list[PreTrainedModel] = []

    @abc.abstractmethod
    def prepare(self, full: PreTrainedModel) -> None:
        """Cut the full pre-trained model down, in place, to what is needed."""

    def own_tokenizer(self) -> PreTrainedTokenizerBase | None:
        """The tokenizer whose files lie beside the weights; None if there are none."""
        folder = local_folder(self.model, self.revision, "*.json", "*.txt", "*.model")
        files = ("tokenizer.json", "tokenizer_config.json", "vocab.txt", "vocab.json")
        return load_tokenizer(str(folder)) if any((folder / file).is_file() for file in files) else None

    def frozen(self) -> Any:
        """The model on this module's device, read and verified now if it has not been."""
        if not self._frozen:
            folder = local_folder(self.model, self.revision, "*.json", "*.safetensors")
            digest = weights_digest(folder)
            if self.sha256 not in (None, digest):
                raise ValueError(
                    f"the weights of {self.model} have SHA-256 {digest}, but {self.sha256} is expected: "
                    "give the revision or the folder that holds the weights this model was trained with"
                )
            self.sha256 = digest
            if folder.parent.name == "snapshots":  # the hub's cache names this folder after the commit
                self.revision = folder.name
            # config.json is no part of the digest, and could describe a model of any size.
            with building_at_most(*weights_size(folder), f"model={self.model!r}"):
                full = AutoModel.from_pretrained(
                    folder,
                    dtype=DTYPES[self.dtype],
                    use_safetensors=True,
                    trust_remote_code=False,
                    local_files_only=True,
                )
            full.config.use_cache = False
            self.prepare(full.requires_grad_(False).eval())
            self._frozen.append(full)
        return self._frozen[0].to(self.mean.device)


class PretrainedTokenEncoder(FrozenTokenEncoder):
    """Hidden states of any transformers `AutoModel`, decoder-only or bidirectional, cut after the layer it needs.

    Args:
        model: Hub id, a folder, or ``package:NAME/folder``.
        layer: Index into transformers' ``hidden_states``: 0 the embeddings, -1 the last layer with its final norm,
            -3 (the paper's) the third from the end, without that norm.
        revision: Branch, tag or commit on the hub.
        sha256: Digest the weights must have; None takes what is there. Checkpoints carry it.
        dtype: What the frozen weights are kept in: float32, bfloat16 or float16.
        hidden_size: Read from the model's configuration if None. A checkpoint carries it, so that a model which only
            generates needs no files of the encoder.
        vocab_size: Likewise.

    Raises:
        ValueError: If the model is not to be had, has no such layer, or has other weights than ``sha256``.
    """

    def __init__(
        self,
        model: str = "gpt2",
        layer: int = -3,
        revision: str | None = None,
        sha256: str | None = None,
        dtype: str = "float32",
        hidden_size: int | None = None,
        vocab_size: int | None = None,
    ) -> None:
        if hidden_size is None or vocab_size is None:
            config = AutoConfig.from_pretrained(local_folder(model, revision, "config.json"), trust_remote_code=False)
            count_blocks(layer, config.num_hidden_layers)
            hidden_size, vocab_size = int(config.hidden_size), int(config.vocab_size)
        super().__init__(model, revision, sha256, dtype, hidden_size, vocab_size)
        self.layer = layer

    @torch.no_grad()
    def hidden_states(self, tokens: Tensor) -> Tensor:
        """[b n] -> [b n h], bit for bit transformers' ``hidden_states[layer]``."""
        try:
            return self.frozen()(tokens).last_hidden_state  # type: ignore[no-any-return]
        except (IndexError, RuntimeError) as error:
            if (n := tokens.shape[1]) > (most := self.frozen().config.max_position_embeddings):
                raise ValueError(f"sequence_length={n} is more than the {most} of {self.model}") from error
            raise

    def embeddings(self) -> Tensor:
        """The input embedding matrix [v h']."""
        table: Tensor = self.frozen().get_input_embeddings().weight
        return table

    def prepare(self, full: PreTrainedModel) -> None:
        """Drop the blocks above ``layer`` and the norm after them, and check that the hidden states stay the same."""
        layers = full.config.num_hidden_layers
        blocks = count_blocks(self.layer, layers)
        probe = torch.arange(min(8, full.config.vocab_size)).unsqueeze(0)
        with torch.no_grad():
            wanted = full(probe, output_hidden_states=True).hidden_states[blocks]
        if blocks < layers:
            for parent in list(full.modules()):
                stacks = [c for c in parent.children() if isinstance(c, nn.ModuleList) and len(c) == layers]
                for stack in stacks:
                    del stack[blocks:]
                    for name, child in list(parent.named_children()):
                        if "norm" in type(child).__name__.lower():  # LayerNorm, LlamaRMSNorm, ...: the final norm
                            parent.set_submodule(name, nn.Identity())
        with torch.no_grad():
            if not torch.equal(full(probe).last_hidden_state, wanted):
                raise ValueError(
                    f"model={self.model!r} could not be cut at layer={self.layer}: its first {blocks} blocks alone do "
                    "not give the hidden states of that index; use layer=-1, or write a TokenEncoder for this family"
                )


def count_blocks(layer: int, num_layers: int) -> int:
    """How many blocks lie below ``hidden_states[layer]``, a list with one entry more than there are blocks.

    >>> count_blocks(-3, 12)
    10
    """
    blocks = layer if layer >= 0 else num_layers + 1 + layer
    if not 0 <= blocks <= num_layers:
        raise ValueError(
            f"layer={layer} does not exist: the model has {num_layers} layers, so layer runs from "
            f"{-num_layers - 1} (the embeddings) to -1 (the last), or from 0 to {num_layers}"
        )
    return blocks


class ShallowTokenEncoder(FrozenTokenEncoder):
    """A pre-trained model's input embeddings, frozen: one vector a token, without context (Table 1, row Emb).

    Args:
        model: Hub id, a folder, or ``package:NAME/folder``.
        revision: Branch, tag or commit on the hub.
        sha256: Digest the weights must have; None takes what is there.
        hidden_size: Read from the model's configuration if None.
        vocab_size: Likewise.
    """

    def __init__(
        self,
        model: str = "gpt2",
        revision: str | None = None,
        sha256: str | None = None,
        hidden_size: int | None = None,
        vocab_size: int | None = None,
    ) -> None:
        if hidden_size is None or vocab_size is None:
            config = AutoConfig.from_pretrained(local_folder(model, revision, "config.json"), trust_remote_code=False)
            hidden_size, vocab_size = int(config.hidden_size), int(config.vocab_size)
        super().__init__(model, revision, sha256, "float32", hidden_size, vocab_size)

    def hidden_states(self, tokens: Tensor) -> Tensor:
        """[b n] -> [b n h]."""
        hidden: Tensor = self.frozen().get_input_embeddings()(tokens)
        return hidden

    def embeddings(self) -> Tensor:
        """The table itself [v h]."""
        table: Tensor = self.frozen().get_input_embeddings().weight
        return table

    def prepare(self, full: PreTrainedModel) -> None:
        """Nothing is cut: the other weights are read, and never run."""


class EmbeddingTokenEncoder(TokenEncoder):
    """Embeddings learned from scratch with everything else (Table 1, row Emb with a θ). Not frozen.

    Args:
        hidden_size: Width h of the embeddings.
        vocab_size: Vocabulary size v.
    """

    def __init__(self, hidden_size: int = 768, vocab_size: int = 50257) -> None:
        super().__init__(hidden_size, vocab_size)
        self.table = nn.Embedding(vocab_size, hidden_size)  # N(0, 1): normalised from the start

    def hidden_states(self, tokens: Tensor) -> Tensor:
        """[b n] -> [b n h]."""
        hidden: Tensor = self.table(tokens)
        return hidden

    def embeddings(self) -> Tensor:
        """The table itself [v h]."""
        table: Tensor = self.table.weight
        return table
