"""What a step hands to callbacks, and the model they find in a task.

In: a LightningModule. Out: its `LDLM`; the types of what `LDLMTask`'s steps return. No section of the paper.
"""

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


def step_output(outputs: Any) -> StepOutput:
    """The argument ``outputs`` of ``on_train_batch_end``, by its type."""
    return cast(StepOutput, outputs)


def model_of(module: L.LightningModule) -> LDLM:
    """The model that a task trains.

    Raises:
        ValueError: If the module is no `LDLMTask`.
    """
    model = dict(module.named_children()).get("model")
    if not isinstance(model, LDLM):
        raise ValueError(f"this callback is for an LDLMTask, not for a {type(module).__name__}")
    return model
