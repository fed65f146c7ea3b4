"""One optimizer step: AdamW, its learning rate, the clipped gradient, and the update that is left out.

In: the gradients of all ranks. Out: new parameters; or, where a number is not finite, the old ones and a flag.
Paper: App. C (optimisation).
"""

from math import inf
from typing import Any, TypeVar

import torch
from lightning.pytorch.utilities import rank_zero_info
from lightning.pytorch.utilities.types import OptimizerLRSchedulerConfig
from torch import Tensor

from ldlm.storage import Storage

T = TypeVar("T")


class Optimisation(Storage):
    """The optimizer and its steps, in terms of arguments that `LDLM`'s constructor keeps.

    Attributes:
        skipped: 1 if the last optimizer step changed nothing because its gradient was not finite, else 0: a scalar on
            the device, which nobody reads there and then. None before the first step.
        counted: Accumulated batches, and calls of an epoch, of the run that is resumed; None in a new one.
        times: The times of the last global batch, [rows of the optimizer step].
        logged: What the last call logged, by name, scalars on the device.
    """

    sequence_length: int
    learning_rate: float
    betas: tuple[float, float]
    eps: float
    weight_decay: float
    lr_warmup_steps: int
    lr_decay: float
    seed: int
    skipped: Tensor | None
    counted: tuple[int, float] | None
    times: Tensor
    logged: dict[str, Tensor]

    def configure_optimizers(self) -> OptimizerLRSchedulerConfig:
        """AdamW, linear warm-up from 1e-8, constant, and a linear fall over the last ``lr_decay`` of the run."""
        parameters = [p for p in self.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(
            parameters,
            lr=self.learning_rate,
            betas=(self.betas[0], self.betas[1]),
            eps=self.eps,
            weight_decay=self.weight_decay,
            fused=self.trainer.precision != "16-mixed",  # a fused optimizer unscales by itself, after clipping
        )
        optimizer.register_load_state_dict_pre_hook(keep_options)
        end = self.trainer.estimated_stepping_batches if self.lr_decay else inf
        if self.lr_decay and not 0 <= end < inf:  # -1 for a loader whose length is not known
            raise ValueError(f"lr_decay={self.lr_decay} needs to know where the run ends: give the trainer max_steps")

        def factor(step: int) -> float:
            start = 1e-8 / self.learning_rate
            rise = 1.0 if step >= self.lr_warmup_steps else start + (1 - start) * step / self.lr_warmup_steps
            fall = min(1.0, (end - step) / (self.lr_decay * end)) if self.lr_decay else 1.0
            return min(rise, max(fall, 0.0))

        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": LearningRate(optimizer, factor), "interval": "step"},
        }

    def on_train_start(self) -> None:
        """See that all ranks stand at the same step, and that Lightning counts this run's calls.

        Lightning 2.6.6 counts the calls of an epoch, of which another number of accumulated batches or of rows makes
        more or fewer. The same share of the epoch is counted as done, in whole steps: a checkpoint may have been
        written between two accumulated batches (by ``train_time_interval``, or in the first step after resuming), whose
        gradient is in no checkpoint, so that their step is begun anew.
        """
        super().on_train_start()
        steps: Tensor = self.all_gather(torch.tensor([self.trainer.global_step], device=self.device))  # type: ignore[assignment]
        if (steps != self.trainer.global_step).any():
            raise ValueError(
                f"the ranks would go on from different steps, {steps.flatten().tolist()}: give --ckpt_path a file that "
                "all of them can read"
            )
        loop = self.trainer.fit_loop.epoch_loop
        progress = loop.batch_progress
        parts, batches = self.trainer.accumulate_grad_batches, self.trainer.num_training_batches
        parts_then, batches_then = self.counted or (parts, batches)
        ready = progress.current.ready
        before, done = progress.total.ready - ready, ready - ready % parts_then
        if progress.is_last_batch:  # the last batch of an epoch is stepped on whatever was accumulated
            done = ready
        if inf not in (batches, batches_then):
            before, done = before * int(batches) // int(batches_then), done * int(batches) // int(batches_then)
        if not progress.is_last_batch:
            done -= done % parts
            if ready % parts_then and loop.restarted_on_train_batch_end:
                loop._batches_that_stepped -= 1  # the step of the loggers, which Lightning takes for made
        for counts, now in ((vars(progress.current), done), (vars(progress.total), before + done)):
            shift = now - counts["ready"]
            for name in counts:  # ready, started, processed, completed
                counts[name] += shift

    def configure_gradient_clipping(
        self,
        optimizer: torch.optim.Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Leave out an update that is not finite, on all ranks alike; else clip as Lightning does.

        The gradient is by now the mean over ranks and accumulated batches, so one NaN anywhere is in everybody's norm.
        The fused step reads the flag on the device. With 16-mixed, the loss scaler leaves out the same updates.
        """
        parameters = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        norm = torch.nn.utils.get_total_norm([p.grad for p in parameters])
        self.skipped = (~norm.isfinite()).float()
        self.log("train/grad_norm", norm)
        if self.trainer.precision == "16-mixed":
            if gradient_clip_val:
                self.clip_gradients(optimizer, gradient_clip_val, gradient_clip_algorithm)
            return
        if optimizer.defaults.get("fused"):
            optimizer.found_inf = self.skipped  # type: ignore[attr-defined]  # what torch's own loss scaler sets
        elif self.skipped:  # somebody's own optimizer, which moves nothing without gradients; this waits for the device
            optimizer.zero_grad()
            return
        # Lightning's mixed-precision plugin would refuse fused optimizers here.
        if gradient_clip_val and gradient_clip_algorithm == "value":
            torch.nn.utils.clip_grad_value_(parameters, gradient_clip_val)
        elif gradient_clip_val:
            torch.nn.utils.clip_grads_with_norm_(parameters, gradient_clip_val, norm)


class LearningRate(torch.optim.lr_scheduler.LambdaLR):
    """A learning rate that is a function of the step; of a restored state it takes the step alone.

    The base rate, the curve and the end of the run are this run's. Where the rate is not the one that the checkpoint's
    run would have gone on with, both are logged.
    """

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go to the state's step; ValueError if it has none."""
        if not isinstance(step := state_dict.get("last_epoch"), int):
            raise ValueError(f"the checkpoint's learning rate has last_epoch={step!r} and not a step: use another")
        self.last_epoch, self._step_count = step, step + 1
        self._last_lr = [
            base * factor(self.last_epoch) for base, factor in zip(self.base_lrs, self.lr_lambdas, strict=True)
        ]
        for group, rate in zip(self.optimizer.param_groups, self._last_lr, strict=True):
            group["lr"] = rate
        if repr(self._last_lr) != repr(then := state_dict.get("_last_lr")):
            rank_zero_info(
                f"the learning rates of step {step} are {self._last_lr}, and not {then} as in the checkpoint's run: "
                "their arguments or the end of the run differ"
            )


def keep_options(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> dict[str, Any]:
    """A restored optimizer's state with the options that this one was made with, not those of the state."""
    groups, own = state["param_groups"], optimizer.param_groups
    kept = [group | {k: v for k, v in mine.items() if k != "params"} for group, mine in zip(groups, own, strict=True)]
    return state | {"param_groups": kept}


def expect(module: object, kind: type[T]) -> T:
    """The module of a callback, as what the callback is for; ValueError if it is something else."""
    if not isinstance(module, kind):
        raise ValueError(f"this callback is for an LDLM, not for a {type(module).__name__}")
    return module


def guarded(loss: Tensor) -> Tensor:
    """The loss, with a gradient of NaN where it is not finite: gradients are summed over ranks, and losses are not."""
    return loss * torch.where(loss.detach().isfinite(), 1.0, torch.nan)
