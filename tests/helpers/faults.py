"""Things that go wrong in a run, at a chosen step, micro-step and rank."""

import math
from collections.abc import Callable

import lightning as L
import torch
from torch import Tensor

from ldlm.model import LDLM
from ldlm.objective import Losses, Objective
from ldlm.rng import Source


class Poisoned(Objective):
    """An objective whose total is what `wrong` makes of the right one."""

    def __init__(self, objective: Objective, wrong: Callable[[Tensor], Tensor]) -> None:
        self.objective, self.wrong = objective, wrong

    def __call__(self, model: LDLM, tokens: Tensor, u: Tensor, gamma: Tensor | float, source: Source) -> Losses:
        right = self.objective(model, tokens, u, gamma, source)
        return right._replace(total=self.wrong(right.total))


class Poison(L.Callback):
    """Makes a loss, or one number of one gradient, other than finite.

    `where` is "nan in the loss", "inf in the loss" (whose gradient is finite by itself) or "nan in one gradient".
    """

    def __init__(self, where: str, steps: set[int], rank: int | None = None, micro_step: int = 0) -> None:
        self.where, self.steps, self.rank, self.micro_step = where, steps, rank, micro_step

    def on_fit_start(self, trainer, task):
        def due() -> bool:
            here = self.rank in (None, trainer.global_rank) and task._micro_step == self.micro_step
            return here and trainer.global_step in self.steps

        def wrong(total):
            if not due() or "loss" not in self.where:
                return total
            return total * math.nan if "nan" in self.where else total + math.inf

        def poison(gradient):
            if due() and "gradient" in self.where:
                gradient = gradient.clone()
                gradient.view(-1)[3] = torch.nan
            return gradient

        self.right, self.poisoned = task.objective, Poisoned(task.objective, wrong)
        task.model.token_decoder.head.weight.register_hook(poison)  # before the gradients of ranks are summed

    # In place for the length of a step alone: a checkpoint describes the objective.

    def on_train_batch_start(self, trainer, task, batch, batch_idx):
        task.objective = self.poisoned

    def on_train_batch_end(self, trainer, task, outputs, batch, batch_idx):
        task.objective = self.right


KINDS = ["nan in the loss", "inf in the loss", "nan in one gradient"]
