"""One optimizer step: AdamW, its learning rate, the clipped gradient, and the step that is skipped.

In: parameters and the gradients of all ranks. Out: new parameters; or, where a number is not finite, the old ones and
a flag. Paper: App. C (optimisation).
"""

from math import inf
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor, nn


def adamw(
    parameters: list[nn.Parameter],
    learning_rate: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    fused: bool,
) -> torch.optim.AdamW:
    """AdamW, which a checkpoint gives its moments and no options: those are of the run at hand."""
    optimizer = torch.optim.AdamW(
        parameters, lr=learning_rate, betas=(betas[0], betas[1]), eps=eps, weight_decay=weight_decay, fused=fused
    )
    optimizer.register_load_state_dict_pre_hook(keep_options)
    return optimizer


class LearningRate(torch.optim.lr_scheduler.LambdaLR):
    """Linear warm-up from 1e-8, constant, and a linear fall at the end.

    The rate is a function of the step; of a restored state it takes the step alone. The base rate, the curve and the
    end are this run's. Where the rate is not the one that the checkpoint's run would have had, both are logged.

    Args:
        optimizer: Whose rate it is.
        warmup: Steps of linear warm-up.
        decay: Last share of the run over which the rate falls linearly to 0; 0 keeps it constant.
        end: Steps of the run; infinity if they are not known.

    Raises:
        ValueError: If the rate is to fall and the end is not known.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, warmup: int, decay: float, end: float) -> None:
        if decay and not 0 <= end < inf:  # -1 for a loader whose length is not known
            raise ValueError(f"lr_decay={decay} needs to know where the run ends: give the trainer max_steps")
        start = 1e-8 / optimizer.param_groups[0]["lr"]

        def factor(step: int) -> float:
            rise = 1.0 if step >= warmup else start + (1 - start) * step / warmup
            fall = min(1.0, (end - step) / (decay * end)) if decay else 1.0
            return min(rise, max(fall, 0.0))

        super().__init__(optimizer, factor)

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


def clip_or_skip(
    optimizer: torch.optim.Optimizer,
    parameters: list[Tensor],
    norm: Tensor,
    skipped: Tensor,
    clip: float | None,
    by_value: bool,
) -> None:
    """Clip a gradient, or see that the optimizer's next step changes nothing if the gradient is not finite.

    The gradient is by now the mean over ranks and accumulated batches, so one NaN anywhere is in every rank's norm, and
    all ranks skip alike.

    Args:
        optimizer: A fused one reads the flag on the device.
        parameters: Those with a gradient.
        norm: The norm of all gradients together, scalar.
        skipped: 1 if it is not finite, else 0, scalar.
        clip: Largest norm, or largest value; None for none.
        by_value: Which of the two it is.
    """
    if optimizer.defaults.get("fused"):
        optimizer.found_inf = skipped  # type: ignore[attr-defined]  # what torch's own loss scaler sets
    elif skipped:  # a user's own optimizer, which moves nothing without gradients; this waits for the device
        optimizer.zero_grad()
        return
    # Lightning's mixed-precision plugin would refuse fused optimizers here.
    if clip and by_value:
        torch.nn.utils.clip_grad_value_(parameters, clip)
    elif clip:
        torch.nn.utils.clip_grads_with_norm_(parameters, clip, norm)


def guarded(loss: Tensor) -> Tensor:
    """The loss, with a gradient of NaN where it is not finite: gradients are summed over ranks, and losses are not."""
    return loss * torch.where(loss.detach().isfinite(), 1.0, torch.nan)
