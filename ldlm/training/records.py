"""What a checkpoint says of the run that wrote it: model, task, callbacks, trainer.

In: a task and its trainer. Out: plain data, by which a resumed run is compared. No section of the paper.
"""

import abc
import hashlib
import json
import os
from typing import Any

import lightning as L
import torch
from lightning.pytorch.utilities import GradClipAlgorithmType
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from ldlm.checkpoints.description import describe, describe_model
from ldlm.objective import Objective
from ldlm.tokenizer import tokenizer_digest
from ldlm.training.outputs import Task


class Recorded(L.Callback, abc.ABC):
    """A callback whose settings change what a run learns: checkpoints record them, a resumed run compares them."""

    @abc.abstractmethod
    def settings(self) -> dict[str, Any]:
        """The settings by name, plain data."""


def record_run(trainer: L.Trainer, tokenizer: PreTrainedTokenizerBase | None) -> dict[str, Any]:
    """What changes a run's result besides its data and the model's arguments, as plain data."""
    callbacks: list[L.Callback] = trainer.callbacks  # type: ignore[attr-defined]
    by_value = trainer.gradient_clip_algorithm == GradClipAlgorithmType.VALUE
    return {
        **{
            f"{type(callback).__name__}.{name}": value
            for callback in callbacks
            if isinstance(callback, Recorded)
            for name, value in callback.settings().items()
        },
        "tokenizer": None if tokenizer is None else f"of sha256 {tokenizer_digest(tokenizer)[:16]}",
        "gradient_clip_val": trainer.gradient_clip_val,
        "gradient_clip_algorithm": "value" if by_value else "norm",
        "precision": trainer.precision,
        "devices": trainer.world_size,
        "accumulate_grad_batches": trainer.accumulate_grad_batches,
        "limit_train_batches": trainer.limit_train_batches,
        "max_steps": trainer.max_steps,
        "max_epochs": trainer.max_epochs,
        "batches": trainer.num_training_batches,
        "job": name_job(trainer),
    }


def name_job(trainer: L.Trainer) -> str | None:
    """The SLURM job, which keeps its number when it is put back into the queue, and what it trains; None elsewhere."""
    number = os.environ.get("SLURM_JOB_ID")
    logger = trainer.logger
    return number if number is None or logger is None else f"{number} ({logger.name})"


def describe_run(task: Task, objective: Objective, frozen: str | None) -> dict[str, Any]:
    """A task, its model and the run at hand, as plain data.

    Args:
        task: A task; without a trainer (saved by ``trainer.strategy.connect(task)``) there is no run to tell of.
        objective: What it minimises.
        frozen: A name of the weights that came frozen, which a resumed run is to have as well; None if none did.

    Raises:
        ValueError: If a part or the objective cannot be described.
    """
    training = describe(task, leave_out=("model", "objective", "allow_changes"))
    training["init_args"]["objective"] = describe(objective)
    about = describe_model(task.model) | {"training": training}
    if task._trainer is not None:
        about["run"] = record_run(task.trainer, task.model.tokenizer)
        if frozen is not None:
            about["run"]["frozen"] = frozen
    # By way of JSON a number is of no class of its own, such as numpy's, which reading would refuse.
    return dict(json.loads(json.dumps(about)))


def name_weights(state: dict[str, Tensor]) -> str:
    """Name tensors by a digest of their bytes."""
    digest = hashlib.sha256()
    for name, tensor in sorted(state.items()):
        digest.update(name.encode() + tensor_bytes(tensor))
    return f"of sha256 {digest.hexdigest()[:16]}"


def tensor_bytes(tensor: Tensor) -> bytes:
    """The bytes of a tensor's numbers, in their order."""
    return tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()
