"""Diffusion-to-encoder warm-up: the share of the diffusion gradient that reaches the latent encoder, over time.

In: the optimizer step. Out: gamma. Paper: section 5.2 and App. A.2, Eq. 29-30.
"""

from typing import Any

import lightning as L
import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from ldlm.checkpoints.description import describe
from ldlm.training.outputs import task_of
from ldlm.training.records import Recorded


def warmup_gamma(step: int, steps: int, gamma_min: float = 0.0, k: float = 10.0, c: float = 0.8) -> float:
    """Gamma(s) of Eq. 29-30, the share of the diffusion gradient that reaches the latent encoder.

    Args:
        step: Optimizer steps done, s.
        steps: Length of the warm-up, S; 0 for none.
        gamma_min: Value at s = 0.
        k: Steepness of the sigmoid.
        c: Where its middle lies, as a share of S.

    >>> warmup_gamma(0, 1000), round(warmup_gamma(800, 1000), 4), warmup_gamma(1000, 1000)
    (0.0, 0.5675, 1.0)
    """
    if step >= steps:
        return 1.0
    low, now, high = torch.sigmoid(k * (torch.tensor([0.0, step / steps, 1.0], dtype=torch.float64) - c)).tolist()
    return float(gamma_min + (1 - gamma_min) * (now - low) / (high - low))


class DiffusionToEncoderWarmup(Recorded):
    """Sets the task's gamma from the step: Eq. 30. A task brings one itself, of its ``warmup_steps``.

    Args:
        steps: Length S of the warm-up in optimizer steps; 0 lets the whole gradient through from the start.
        gamma_min: Value at step 0.
        k: Steepness of the sigmoid.
        c: Where its middle lies, as a share of ``steps``.

    Raises:
        ValueError: If ``steps`` is negative or ``gamma_min`` is outside [0, 1].
    """

    brought = False  # whether a task made it, of its own argument

    def __init__(self, steps: int, gamma_min: float = 0.0, k: float = 10.0, c: float = 0.8) -> None:
        if steps < 0:
            raise ValueError(f"steps={steps} must be 0 (no warm-up) or more")
        if not 0 <= gamma_min <= 1:
            raise ValueError(f"gamma_min={gamma_min} must be between 0 and 1")
        self.steps = steps
        self.gamma_min = gamma_min
        self.k = k
        self.c = c

    def settings(self) -> dict[str, Any]:
        """All arguments."""
        return dict(describe(self, kind=DiffusionToEncoderWarmup)["init_args"])

    def gamma(self, step: int) -> float:
        """Gamma after ``step`` optimizer steps; a seam, for a subclass that follows another curve."""
        return warmup_gamma(step, self.steps, self.gamma_min, self.k, self.c)

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Give the task its gamma, and warn if the warm-up outlasts the run."""
        end = trainer.estimated_stepping_batches
        if 0 < end < self.steps:
            rank_zero_warn(
                f"the warm-up of {self.steps} steps is longer than the run of {end}: gamma ends at "
                f"{self.gamma(int(end)):.2g} and the encoder hardly meets the diffusion loss"
            )
        task_of(pl_module).gamma.fill_(self.gamma(trainer.global_step))

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Tensor, batch_idx: int
    ) -> None:
        """Gamma of this step, written in place."""
        gamma = task_of(pl_module).gamma.fill_(self.gamma(trainer.global_step))
        pl_module.log("train/gamma", gamma)  # as a tensor: a number would be copied to the device and waited for
