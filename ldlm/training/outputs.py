"""What callbacks may rely on: what a task has, and what its steps return.

In: a LightningModule, what ``on_train_batch_end`` was given. Out: a task, its `LDLM`, a `StepOutput`.
No section of the paper.
"""

import abc
from typing import Any, TypedDict, cast

import lightning as L
from torch import Tensor

from ldlm.model import LDLM


class StepOutput(TypedDict):
    """What `LDLMTask.training_step` returns, and Lightning hands to ``on_train_batch_end``.

    Attributes:
        loss: What is minimised, scalar; Lightning divides it by the number of accumulated batches.
        terms: The losses that count, by name, detached scalars.
        rows: The diffusion loss of each row [b]; None without one.
        times: The schedule times of the global batch, [rows of the optimizer step].
        latent_std: Standard deviation of a latent coordinate over the rows, scalar; None for a batch of one row.
        gamma: Share of the diffusion gradient that reached the latent encoder, scalar.
        skipped: 1 if the optimizer step that this call ended changed nothing because its gradient was not finite, else
            0: a scalar on the device, written when the gradient is clipped. Reading it at once waits for the device.
    """

    loss: Tensor
    terms: dict[str, Tensor]
    rows: Tensor | None
    times: Tensor
    latent_std: Tensor | None
    gamma: Tensor
    skipped: Tensor


class ValidationOutput(TypedDict):
    """What validation and test steps return.

    Attributes:
        u: Schedule times of the rows [b].
        loss: Their diffusion losses [b].
    """

    u: Tensor
    loss: Tensor


class Task(L.LightningModule, abc.ABC):
    """What callbacks find in the module that they are given; `LDLMTask` is one.

    Attributes:
        model: What is trained.
        gamma: Share of the diffusion gradient that reaches the latent encoder, a scalar buffer.
        seed: Of the noise.
    """

    model: LDLM
    gamma: Tensor
    seed: int

    @abc.abstractmethod
    def training_step(self, batch: Tensor, batch_idx: int) -> StepOutput:
        """One micro-step."""


def step_output(outputs: Any) -> StepOutput:
    """The argument ``outputs`` of ``on_train_batch_end``, by its type.

    Raises:
        ValueError: If it is something else, as where somebody's ``training_step`` returns the loss alone.
    """
    if missing := StepOutput.__required_keys__ - (outputs or {}).keys():
        raise ValueError(
            f"training_step returned nothing as {', '.join(sorted(missing))}, which callbacks here read: return what "
            "LDLMTask.training_step returned, changed as you like"
        )
    return cast(StepOutput, outputs)


def task_of(module: L.LightningModule) -> Task:
    """The module as a task; ValueError if it is something else."""
    if not isinstance(module, Task):
        raise ValueError(f"this callback is for an LDLMTask, not for a {type(module).__name__}")
    return module


def model_of(module: L.LightningModule) -> LDLM:
    """The model that a task trains; ValueError if the module is no task."""
    return task_of(module).model
