"""Adaptive timesteps: each step's losses go into the sampler's bins, and the density is refreshed now and then.

In: the end of an optimizer step. Out: a density of training times. Paper: section 5.3, Eq. 5.
"""

from typing import Any

import lightning as L
import torch
from torch import Tensor

from ldlm.checkpoints.description import describe
from ldlm.training.callbacks.ema import as_ldlm
from ldlm.training.resuming import Recorded


class AdaptiveTimestepUpdate(Recorded):
    """Feeds each step's losses into the timestep sampler and recomputes its density now and then.

    Args:
        every_n_steps: Optimizer steps between refreshes; the paper's 5,000 is 0.5 to 1 % of its runs.

    Raises:
        ValueError: If ``every_n_steps`` is below 1.
    """

    def __init__(self, every_n_steps: int = 5000) -> None:
        if every_n_steps < 1:
            raise ValueError(f"every_n_steps={every_n_steps} must be at least 1")
        self.every_n_steps = every_n_steps
        self._step = 0

    def settings(self) -> dict[str, Any]:
        """All arguments."""
        return dict(describe(self, kind=AdaptiveTimestepUpdate)["init_args"])

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Tell the model that its timesteps are looked after."""
        as_ldlm(pl_module).refresh_every = self.every_n_steps

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Note the step, which a resumed run knows only now; forget the half step of a fit that failed."""
        self._step = trainer.global_step
        if as_ldlm(pl_module).diffusion_weight > 0:
            as_ldlm(pl_module).timesteps.synchronize(torch.ones((), device=pl_module.device))

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: object, batch: Tensor, batch_idx: int
    ) -> None:
        """Once an optimizer step, after its last micro-step; never where no diffusion loss is observed."""
        if trainer.global_step == self._step or as_ldlm(pl_module).diffusion_weight == 0:
            return
        self._step = trainer.global_step
        timesteps = as_ldlm(pl_module).timesteps
        timesteps.synchronize(as_ldlm(pl_module).skipped)
        if self._step % self.every_n_steps == 0:
            timesteps.refresh()

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Say that nobody looks after the timesteps any more."""
        as_ldlm(pl_module).refresh_every = None
