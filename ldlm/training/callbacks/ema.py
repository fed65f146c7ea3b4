"""The recipe's callbacks: diffusion-to-encoder warm-up, adaptive timesteps, averaged weights.

In: a Trainer and its LDLM. Out: the model's gamma, its timestep density, its averaged parameters.
Paper: section 5.2 and App. A.2 (warm-up), section 5.3 (timesteps). The averaging is the baselines', not the paper's.

What can be a function of ``trainer.global_step`` is one; the rest is in the model's state, so that nothing here needs
a state of its own.
"""

from typing import Any

import lightning as L
import torch
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor

from ldlm.checkpoints.description import describe
from ldlm.model import LDLM
from ldlm.training.optim import expect
from ldlm.training.resuming import Recorded


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
