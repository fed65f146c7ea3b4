"""The recipe's callbacks: diffusion-to-encoder warm-up, adaptive timesteps, averaged weights.

In: a Trainer and its LDLM. Out: the model's gamma, its timestep density, its averaged parameters.
Paper: section 5.2 and App. A.2 (warm-up), section 5.3 (timesteps). The averaging is the baselines', not the paper's.

What can be a function of ``trainer.global_step`` is one; the rest is in the model's state, so that nothing here needs
a state of its own.
"""

from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from ldlm.checkpoints import describe
from ldlm.module import LDLM
from ldlm.optimisation import expect
from ldlm.resuming import Recorded


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
    """Sets the model's gamma from the step: Eq. 30.

    Args:
        steps: Length S of the warm-up in optimizer steps; 0 lets the whole gradient through from the start.
        gamma_min: Value at step 0.
        k: Steepness of the sigmoid.
        c: Where its middle lies, as a share of ``steps``.

    Raises:
        ValueError: If ``steps`` is negative or ``gamma_min`` is outside [0, 1].
    """

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
        """Gamma after ``step`` optimizer steps."""
        return warmup_gamma(step, self.steps, self.gamma_min, self.k, self.c)

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Give the model its gamma, and warn if the warm-up outlasts the run."""
        model = as_ldlm(pl_module)
        end = trainer.estimated_stepping_batches
        if 0 < end < self.steps:
            rank_zero_warn(
                f"the warm-up of {self.steps} steps is longer than the run of {end}: gamma ends at "
                f"{self.gamma(int(end)):.2g} and the encoder hardly meets the diffusion loss"
            )
        model.gamma = torch.tensor(self.gamma(trainer.global_step), device=model.device)

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Tensor, batch_idx: int
    ) -> None:
        """Gamma of this step, written in place."""
        model = as_ldlm(pl_module)
        if model.gamma is not None:
            model.gamma.fill_(self.gamma(trainer.global_step))
            model.log("train/gamma", model.gamma)  # as a tensor: a number would be copied to the device and waited for


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


class SaveAtEnd(L.Callback):
    """Writes the last checkpoint again at the end of a run, where `ModelCheckpoint` leaves its last interval's."""

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """On all ranks, as saving needs them."""
        callback = trainer.checkpoint_callback
        if isinstance(callback, ModelCheckpoint) and callback.last_model_path:
            trainer.save_checkpoint(callback.last_model_path)


class EMA(Recorded):
    """Exponential moving average of the trainable parameters, in float32; buffers are never averaged.

    After n optimizer steps decay_n = min(decay, (1 + n) / (10 + n)); a step that was left out moves nothing.
    Validation, the end of the fit, checkpoints' ``state_dict`` and exports take the averaged parameters; resuming takes
    the raw ones.

    Args:
        decay: Upper bound of the decay.

    Raises:
        ValueError: If ``decay`` is outside [0, 1).
    """

    def __init__(self, decay: float = 0.9999) -> None:
        if not 0 <= decay < 1:
            raise ValueError(f"decay={decay} must be at least 0 and below 1")
        self.decay = decay
        self._step = 0

    def settings(self) -> dict[str, Any]:
        """All arguments."""
        return dict(describe(self, kind=EMA)["init_args"])

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Make the averages before a checkpoint is restored; the same Trainer's next fit goes on with its own."""
        model = as_ldlm(pl_module)
        if stage == "fit":
            self._swap_out(model)
            known = model.averaged or {}  # a part may have been frozen, or set free, between two fits
            model.averaged = {
                name: known[name] if name in known else p.detach().float().clone() for name, p in _trainable(model)
            }

    @torch.no_grad()
    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Note the step, which a resumed run knows only now; average from what a new run starts with."""
        model = as_ldlm(pl_module)
        self._step = trainer.global_step
        if self._step == 0 and model.averaged is not None:  # a token decoder may have been filled since `setup`
            for name, p in _trainable(model):
                model.averaged[name] = p.detach().float().clone()

    @torch.no_grad()
    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: object, batch: Tensor, batch_idx: int
    ) -> None:
        """Once an optimizer step."""
        n = trainer.global_step
        model = as_ldlm(pl_module)
        if n == self._step or model.averaged is None:
            return
        self._step = n
        decay = min(self.decay, (1 + n) / (10 + n))
        averages = list(model.averaged.values())
        parameters = [p.detach().float() for _, p in _trainable(model)]
        if averages[0].device != parameters[0].device:
            model.averaged = {name: a.to(model.device) for name, a in model.averaged.items()}
            averages = list(model.averaged.values())
        weight = torch.full((), 1 - decay, device=averages[0].device)
        if model.skipped is not None:
            weight *= 1 - model.skipped
        torch._foreach_lerp_(averages, parameters, [weight] * len(averages))

    @torch.no_grad()
    def _swap_in(self, model: LDLM) -> None:
        if model.averaged is not None and model.raw is None:
            model.raw = {name: p.detach().clone() for name, p in _trainable(model)}
            for name, p in _trainable(model):
                p.copy_(model.averaged[name])

    @torch.no_grad()
    def _swap_out(self, model: LDLM) -> None:
        if model.raw is not None:
            for name, p in _trainable(model):
                if name in model.raw:
                    p.copy_(model.raw[name])
            model.raw = None

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Validate the averaged parameters."""
        if trainer.state.fn == TrainerFn.FITTING:  # elsewhere they are in place already
            self._swap_in(as_ldlm(pl_module))

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Go on training the raw ones."""
        if trainer.state.fn == TrainerFn.FITTING:
            self._swap_out(as_ldlm(pl_module))

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Leave the raw ones in place when validation is cut short."""
        if trainer.state.fn == TrainerFn.FITTING:
            self._swap_out(as_ldlm(pl_module))

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """The fitted model is the averaged one, also for what others do in ``on_fit_end``; checkpoints hold both."""
        self._swap_in(as_ldlm(pl_module))

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Likewise where a run was resumed with no step left: Lightning then leaves ``on_train_end`` out."""
        self._swap_in(as_ldlm(pl_module))


def as_ldlm(module: L.LightningModule) -> LDLM:
    """The module as an LDLM, which is what these callbacks are for."""
    return expect(module, LDLM)


def _trainable(model: LDLM) -> list[tuple[str, Tensor]]:
    return [(name, p) for name, p in model.named_parameters() if p.requires_grad]
