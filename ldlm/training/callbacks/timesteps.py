"""Adaptive timesteps: each step's losses go into the sampler's bins, and the density is refreshed now and then.

In: the end of an optimizer step. Out: a density of training times. Paper: section 5.3, Eq. 5.
"""

from typing import Any

import lightning as L
import torch
from torch import Tensor

from ldlm.checkpoints.description import describe
from ldlm.training.outputs import model_of, step_output
from ldlm.training.records import Recorded


class AdaptiveTimestepUpdate(Recorded):
    """Feeds each step's losses into the timestep sampler and recomputes its density now and then.

    A task brings one itself, of its ``timestep_refresh``.

    Args:
        every_n_steps: Optimizer steps between refreshes; the paper's 5,000 is 0.5 to 1 % of its runs.

    Raises:
        ValueError: If ``every_n_steps`` is below 1.
    """

    brought = False  # whether a task made it, of its own argument

    def __init__(self, every_n_steps: int = 5000) -> None:
        if every_n_steps < 1:
            raise ValueError(f"every_n_steps={every_n_steps} must be at least 1")
        self.every_n_steps = every_n_steps
        self._step = 0

    def settings(self) -> dict[str, Any]:
        """All arguments."""
        return dict(describe(self, kind=AdaptiveTimestepUpdate)["init_args"])

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Note the step, which a resumed run knows only now; forget the half step of a fit that failed."""
        self._step = trainer.global_step
        model_of(pl_module).timesteps.synchronize(torch.ones((), device=pl_module.device))

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Tensor, batch_idx: int
    ) -> None:
        """Once an optimizer step, after its last micro-step; never where no diffusion loss is observed."""
        output = step_output(outputs)
        if trainer.global_step == self._step or output["rows"] is None:
            return
        self._step = trainer.global_step
        timesteps = model_of(pl_module).timesteps
        timesteps.synchronize(output["skipped"])
        if self._step % self.every_n_steps == 0:
            timesteps.refresh()
