"""Things that go wrong in a run, at a chosen step, micro-step and rank."""

import math

import lightning as L
import torch


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

        decoder = task.model.token_decoder
        loss = decoder.loss

        def poisoned(*arguments):
            right = loss(*arguments)
            if not due() or "loss" not in self.where:
                return right
            return right * math.nan if "nan" in self.where else right + math.inf

        def poison(gradient):
            if due() and "gradient" in self.where:
                gradient = gradient.clone()
                gradient.view(-1)[3] = torch.nan
            return gradient

        decoder.loss = poisoned  # a term of the total
        decoder.head.weight.register_hook(poison)  # before the gradients of ranks are summed


KINDS = ["nan in the loss", "inf in the loss", "nan in one gradient"]
