"""What a model, its data and its Trainer must agree on, so that a misfit is named before the first step.

In: parts, a tokenizer, a data module, a loader's batch. Out: nothing, the batch's token ids, or a ValueError in one
sentence. No section of the paper.
"""

from collections.abc import Mapping

import lightning as L
import torch
from lightning.pytorch.callbacks import (
    BaseFinetuning,
    BatchSizeFinder,
    GradientAccumulationScheduler,
    LearningRateFinder,
    ModelPruning,
    StochasticWeightAveraging,
    WeightAveraging,
)
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy, Strategy
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from ldlm.data.datamodule import PackedTextDataModule
from ldlm.nn.token_encoders import FrozenTokenEncoder, TokenEncoder
from ldlm.tokenizer import name_tokenizer, tokenizer_digest

PRECISIONS = ("32-true", "bf16-mixed", "16-mixed")
AVERAGING = "averages weights where neither validation nor checkpoints here would look: use ldlm.EMA"
TUNING = (
    "trains before the run begins and without its other callbacks, so without the warm-up and before the hidden "
    "states' mean and deviation are measured: leave it out (after Tuner, take a new Trainer), and compare short runs"
)
REFUSED = {
    BaseFinetuning: "changes what is trained in the midst of a run: freeze parameters before it, or use "
    "ldlm.FixedLatents, and train on from a checkpoint",
    BatchSizeFinder: TUNING,
    GradientAccumulationScheduler: "would change the rows of an optimizer step from epoch to epoch, and noise, times, "
    "the order of rows and resumed runs count on their number: leave it out, and give the trainer one "
    "accumulate_grad_batches",
    LearningRateFinder: TUNING,
    ModelPruning: "renames the parameters, and no checkpoint could be read again: prune a trained model",
    StochasticWeightAveraging: AVERAGING,
    WeightAveraging: AVERAGING,
}


def check_data(data: PackedTextDataModule, sequence_length: int, tokenizer: PreTrainedTokenizerBase | None) -> None:
    """Compare the data's row length and tokenizer with the model's."""
    if data.sequence_length != sequence_length:
        raise ValueError(
            f"the data has sequence_length={data.sequence_length} and the model {sequence_length}: give both the same"
        )
    if tokenizer is not None and tokenizer_digest(data.loaded_tokenizer) != tokenizer_digest(tokenizer):
        raise ValueError(
            f"the data is tokenised by {name_tokenizer(data.loaded_tokenizer)} and the model's texts are made by "
            f"{name_tokenizer(tokenizer)}: give both the same tokenizer"
        )


def check_encoder(token_encoder: TokenEncoder, tokenizer: PreTrainedTokenizerBase | None) -> None:
    """Compare the tokenizer with the one that lies beside a pre-trained encoder's weights, token by token.

    A few tokens may differ, as when somebody added a padding token; two models' vocabularies differ almost everywhere,
    even where their sizes agree.
    """
    own = token_encoder.own_tokenizer() if isinstance(token_encoder, FrozenTokenEncoder) else None
    if own is None or tokenizer is None:
        return
    theirs, ours = own.get_vocab(), tokenizer.get_vocab()
    if sum(ours.get(token) != number for token, number in theirs.items()) > 0.01 * len(theirs):
        raise ValueError(
            f"the tokenizer {name_tokenizer(tokenizer)} gives other ids than the one of the token encoder, "
            f"{name_tokenizer(own)}: use the tokenizer that belongs to the encoder"
        )


def tokens_of(batch: object, sequence_length: int, vocab_size: int) -> Tensor:
    """The token ids of a batch, int64 [b n].

    Args:
        batch: Integers [b n]: a tensor, a list or tuple of that tensor alone, or a dictionary that has it as
            ``input_ids``, of which only ``attention_mask`` is looked at besides: rows here carry no padding.
        sequence_length: Tokens a row, n.
        vocab_size: Ids are below it. On another device than the CPU they are not looked at, as that would wait for it.

    Raises:
        ValueError: If the batch is something else.
    """
    tokens, given = batch, _shown(batch)
    if isinstance(batch, Mapping):
        tokens = batch.get("input_ids")
        given = f"a dictionary with the keys {', '.join(map(repr, batch))}"
        given = given if tokens is None else f"a dictionary with 'input_ids' {_shown(tokens)}"
    elif isinstance(batch, list | tuple) and len(batch) == 1:
        (tokens,) = batch
        given = f"a {type(batch).__name__} of {_shown(tokens)}"
    whole = isinstance(tokens, Tensor) and not (tokens.is_floating_point() or tokens.is_complex())
    if (
        not isinstance(tokens, Tensor)
        or not whole
        or tokens.dtype == torch.bool
        or tokens.shape[1:] != (sequence_length,)
    ):
        raise ValueError(
            f"a batch is {given}, but token ids are wanted: integers of shape [rows, {sequence_length}], as a tensor, "
            "as all that a list or tuple holds, or as 'input_ids' of a dictionary; mend the loader or its collate_fn, "
            "or take the tokens out in on_before_batch_transfer, a hook of tasks and data modules"
        )
    mask = batch.get("attention_mask") if isinstance(batch, Mapping) else None
    if isinstance(mask, Tensor) and mask.device.type == "cpu" and not mask.numpy().all():
        raise ValueError(
            "a batch has padding, as its attention_mask has zeros, and would be trained to write it: rows carry none "
            "here; pack texts into whole rows, as PackedTextDataModule does"
        )
    if tokens.device.type == "cpu" and tokens.numel():
        low, high = tokens.numpy().min(), tokens.numpy().max()  # the host's memory, so nothing is waited for
        if low < 0 or high >= vocab_size:
            raise ValueError(
                f"a batch has token ids from {low} to {high}, but the token encoder knows 0 to {vocab_size - 1}: use "
                "the tokenizer that belongs to the encoder"
            )
    return tokens.long()


def _shown(value: object) -> str:
    """A value in a few words."""
    if isinstance(value, Tensor):
        kind = str(value.dtype).removeprefix("torch.")
        return f"{'an' if kind.startswith('i') else 'a'} {kind} tensor {list(value.shape)}"
    if isinstance(value, list | tuple):
        return f"a {type(value).__name__} of {len(value)} items"
    return f"of type {type(value).__name__}"


def check_callbacks(callbacks: list[L.Callback]) -> None:
    """Refuse callbacks of Lightning's that would change in the midst of a run what is trained, or what a step is."""
    for callback in callbacks:
        for kind, reason in REFUSED.items():
            if isinstance(callback, kind):
                raise ValueError(f"{type(callback).__name__} {reason}")


def check_uncompiled(task: L.LightningModule, model: nn.Module) -> None:
    """Refuse what was compiled whole: a training step draws noise and logs, and there is no ``forward``."""
    traces = (task._compiler_ctx, task._compiled_call_impl, model._compiled_call_impl)
    if any(trace is not None for trace in traces):
        raise ValueError(
            "torch.compile cannot compile a whole LDLM or its LDLMTask, whose training step draws noise and logs: "
            "give both as they were, and compile the model's layers by ldlm.CompileBlocks() among the callbacks"
        )


def check_precision(precision: str) -> None:
    """Refuse what is not float32 where it matters."""
    if precision not in PRECISIONS:
        raise ValueError(
            f"precision={precision!r} is not supported, as weights, losses and bin statistics are float32 here: use "
            "'bf16-mixed', which computes in 16 bits and keeps 32, or '32-true'"
        )


def check_strategy(strategy: Strategy) -> None:
    """Refuse strategies that cut the parameters up: norms, averages and checkpoints here are of whole ones."""
    if isinstance(strategy, FSDPStrategy | DeepSpeedStrategy | ModelParallelStrategy):
        raise ValueError(
            f"{type(strategy).__name__} cuts the parameters up, and gradient norm, averaged weights and checkpoints "
            "would be of a piece: use strategy='ddp'; the paper's model, optimizer and averages take 6 GB on each GPU"
        )
