"""EMA weights: kept while training, and used everywhere else.

In: the parameters after each optimizer step. Out: their exponential moving average, in checkpoints and in the model.
No section of the paper: the authors' earlier code and every compared baseline average, see docs/decisions.md.

All that happens to the averages is here: they begin, follow, stand in for the live parameters, are saved and restored.
`LDLMTask` calls `EMA.save` and `EMA.restore` itself, since Lightning (2.6.6) leaves a callback's own hooks out where
weights alone are saved, and calls them after the model's where a run is resumed.
"""

from typing import Any

import lightning as L
import torch
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor

from ldlm.checkpoints.description import describe
from ldlm.model import LDLM
from ldlm.training.outputs import model_of, step_output
from ldlm.training.records import Recorded


class EMA(Recorded):
    """Exponential moving average of the trainable parameters, in float32; buffers are never averaged.

    After n optimizer steps decay_n = min(decay, (1 + n) / (10 + n)); a skipped step moves nothing. Validation, the end
    of the fit, checkpoints' ``state_dict`` and exports take the EMA weights; resuming takes the live ones.

    Args:
        decay: Upper bound of the decay.

    Attributes:
        averages: The EMA weights by name, float32, of the fit at hand or of the last one; None before any.
        live: The live parameters while the EMA weights stand in the model; None otherwise.

    Raises:
        ValueError: If ``decay`` is outside [0, 1).
    """

    def __init__(self, decay: float = 0.9999) -> None:
        if not 0 <= decay < 1:
            raise ValueError(f"decay={decay} must be at least 0 and below 1")
        self.decay = decay
        self._step = 0
        self._model: LDLM | None = None  # whose averages these are
        self.averages: dict[str, Tensor] | None = None
        self.live: dict[str, Tensor] | None = None

    def settings(self) -> dict[str, Any]:
        """All arguments."""
        return dict(describe(self, kind=EMA)["init_args"])

    # ---- averaging ---------------------------------------------------------------------------------------------

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Begin before a checkpoint is restored; the same Trainer's next fit continues with its own averages."""
        model = model_of(pl_module)
        if stage != "fit":
            return
        if trainer.global_step == 0 or self._model is not model or not self._stand_in(model):
            self.averages = self.live = None
        self._model = model
        self._swap_out(model)
        self._begin(model)

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Leave out what another callback has frozen since."""
        self._begin(model_of(pl_module))

    @torch.no_grad()
    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Note the step, which a resumed run knows only now; average from what a new run starts with."""
        self._step = trainer.global_step
        if self._step == 0:  # a token decoder may have been filled since `setup`
            self.averages = None
            self._begin(model_of(pl_module))

    @torch.no_grad()
    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Tensor, batch_idx: int
    ) -> None:
        """Once an optimizer step."""
        n = trainer.global_step
        if n == self._step or self.averages is None:
            return
        self._step = n
        decay = min(self.decay, (1 + n) / (10 + n))
        parameters = [p.detach().float() for _, p in _trainable(model_of(pl_module))]
        averages = list(self.averages.values())
        if averages[0].device != parameters[0].device:
            averages = [a.to(parameters[0].device) for a in averages]
            self.averages = dict(zip(self.averages, averages, strict=True))
        weight = torch.full((), 1 - decay, device=averages[0].device)
        weight *= 1 - step_output(outputs)["skipped"]
        torch._foreach_lerp_(averages, parameters, [weight] * len(averages))

    @torch.no_grad()
    def _begin(self, model: LDLM) -> None:
        """An average for each trainable parameter: the one there is, or the parameter. Others are forgotten."""
        known = self.averages or {}  # a part may have been frozen, or set free, between two fits
        self.averages = {
            name: known[name] if name in known else p.detach().float().clone() for name, p in _trainable(model)
        }

    # ---- standing in for the live parameters --------------------------------------------------------------------

    @torch.no_grad()
    def _stand_in(self, model: LDLM) -> bool:
        """Whether the averages are up to date: no other weights were put into the model since the fit ended."""
        if self.averages is None or self.live is None:
            return True
        now = dict(_trainable(model))  # what another callback has frozen since has its own weights
        return all(torch.equal(a.to(now[name]), now[name]) for name, a in self.averages.items() if name in now)

    @torch.no_grad()
    def _swap_in(self, model: LDLM) -> None:
        if self.averages is not None and self.live is None:
            now = dict(model.named_parameters())
            self.live = {name: now[name].detach().clone() for name in self.averages}
            for name, average in self.averages.items():
                now[name].copy_(average)

    @torch.no_grad()
    def _swap_out(self, model: LDLM) -> None:
        if self.live is not None:
            for name, p in _trainable(model):
                if name in self.live:  # else it was set free since
                    p.copy_(self.live[name])
            self.live = None

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Validate the EMA weights."""
        if trainer.state.fn == TrainerFn.FITTING:  # elsewhere they are in place already
            self._swap_in(model_of(pl_module))

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Train the live ones on."""
        if trainer.state.fn == TrainerFn.FITTING:
            self._swap_out(model_of(pl_module))

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Leave the live ones in place when validation is cut short."""
        if trainer.state.fn == TrainerFn.FITTING:
            self._swap_out(model_of(pl_module))

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """The fitted model has the EMA weights, also for what others do in ``on_fit_end``; checkpoints hold both."""
        self._swap_in(model_of(pl_module))

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Likewise where a run was resumed with no step left: Lightning then leaves ``on_train_end`` out."""
        self._swap_in(model_of(pl_module))

    # ---- files ---------------------------------------------------------------------------------------------------

    def save(self, checkpoint: dict[str, Any], model: LDLM) -> None:
        """Put the EMA weights into ``state_dict`` and the live ones beside it."""
        if self.averages is not None and self._stand_in(model):
            state = checkpoint["state_dict"]
            checkpoint["raw_parameters"] = self.live or {name: state[name] for name in self.averages}
            checkpoint["state_dict"] = state | self.averages

    @torch.no_grad()
    def restore(self, checkpoint: dict[str, Any]) -> None:
        """Take a checkpoint's averages; where it has none, averaging begins from its weights.

        ``state_dict`` holds the live parameters from here on.
        """
        for name, average in (self.averages or {}).items():
            average.copy_(checkpoint["state_dict"][name])
        checkpoint["state_dict"] = checkpoint["state_dict"] | checkpoint.get("raw_parameters", {})


def _trainable(model: LDLM) -> list[tuple[str, Tensor]]:
    return [(name, p) for name, p in model.named_parameters() if p.requires_grad]
