"""What watches over the numbers of a run that nobody watches: updates left out, latents that collapse or explode.

In: a Trainer and its task, which brings these callbacks along; one of the trainer's own takes the place of its like.
Out: counts, warnings, and an end where nothing is learnt any more. Paper: section 5.2 and Table 1 know the collapse.

Nothing here waits for a device or for another rank within a step: numbers are sent off and read an interval later.
"""

import math
from collections.abc import Iterable
from typing import Any

import lightning as L
import torch
import torch.distributed as dist
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from ldlm.data.datamodule import PackedTextDataModule
from ldlm.training.outputs import model_of, step_output

SHOWN = 32  # rows and times that an error lists
# torch.amp.GradScaler starts at 2^16 and halves at each overflow: so many skipped steps in a row are its way to 1.
SCALER_STEPS = 16


class DeferredRead:
    """Some numbers on their way from a device: sent now, read when they have long arrived."""

    def __init__(self) -> None:
        self._values: Tensor | None = None
        self._work: dist.Work | None = None
        self._event: torch.cuda.Event | None = None

    def send(self, values: Tensor, work: dist.Work | None = None) -> None:
        """Send off a tensor, which a collective may still be at work on."""
        self._values, self._work, self._event = values.clone() if work is None else values, work, None
        if values.is_cuda:
            if work is not None:
                work.wait()  # makes the stream wait, not this process
            self._values = torch.empty_like(values, device="cpu", pin_memory=True).copy_(values, non_blocking=True)
            self._work, self._event = None, torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._event.record()

    def read(self) -> list[float] | None:
        """What was sent last, None if nothing was."""
        if self._work is not None:
            self._work.wait()
        if self._event is not None:
            self._event.synchronize()
        return None if self._values is None else self._values.tolist()


class SkippedSteps(L.Callback):
    """Counts the updates that were left out for numbers that are not finite, and ends a run that makes no others.

    ``train/skipped_steps`` is their number. The counts are looked at every few steps, so a run ends up to twice that
    many steps after the last straw; what it trained on until then was left out as well.

    Args:
        max_in_a_row: So many updates left out one after the other end the run; with 16-mixed 16 more, which are its
            loss scaler's on its way down.
        every_n_steps: Optimizer steps between two looks at the counts.

    Raises:
        ValueError: If an argument is below 1; while training, when the run ends, naming step, times and rows.
    """

    def __init__(self, max_in_a_row: int = 10, every_n_steps: int = 25) -> None:
        for name, value in [("max_in_a_row", max_in_a_row), ("every_n_steps", every_n_steps)]:
            if value < 1:
                raise ValueError(f"{name}={value} must be at least 1")
        self.max_in_a_row = max_in_a_row
        self.every_n_steps = every_n_steps
        # In all, in a row until now, most in a row, the step of the last; float32 counts to 16 million.
        self._counts = torch.tensor([0.0, 0.0, 0.0, -1.0])

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Begin to count, or go on."""
        self._told = float(self._counts[0])
        self._counts = torch.tensor([self._told, 0.0, 0.0, -1.0], device=pl_module.device)
        self._times = torch.zeros(0, device=pl_module.device)
        self._step, self._next, self._later = (
            trainer.global_step,
            trainer.global_step + self.every_n_steps,
            DeferredRead(),
        )

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Tensor, batch_idx: int
    ) -> None:
        """Once an optimizer step, after its last micro-step."""
        output, step = step_output(outputs), trainer.global_step
        if step == self._step:
            return
        self._step = step
        skipped = output["skipped"]
        total, row, most, last = self._counts
        row = (row + 1) * skipped
        bad = skipped > 0
        self._counts = torch.stack(
            [total + skipped, row, torch.maximum(most, row), torch.where(bad, float(step - 1), last)]
        )
        # The last batch of an epoch may be smaller: of times of two lengths the shorter ones end in NaN.
        times, before = pad_sequence([output["times"], self._times], batch_first=True, padding_value=math.nan)
        self._times = torch.where(bad, times, before)
        pl_module.log("train/skipped_steps", self._counts[0])
        if step >= self._next:
            self._look(trainer, self._later.read())
            self._later.send(self._counts)
            self._next = step + self.every_n_steps

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Look at the counts of the last steps too."""
        self._look(trainer, self._counts.tolist())

    def state_dict(self) -> dict[str, Any]:
        """The number of updates left out, which a resumed run counts on from."""
        return {"skipped_steps": float(self._counts[0])}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Count on."""
        self._counts[0] = state_dict["skipped_steps"]

    def _look(self, trainer: L.Trainer, counts: list[float] | None) -> None:
        if counts is None:
            return
        total, _, most, last = counts
        if most >= self.max_in_a_row + (SCALER_STEPS if trainer.precision == "16-mixed" else 0):
            total, _, most, last = self._counts.tolist()  # as of now, to go with the times
            raise ValueError(
                f"{most:.0f} updates in a row were left out because loss or gradient was not finite, {total:.0f} in "
                f"all. The parameters are as they were before. The last was step {last:.0f}, counted from 0, at the "
                f"times u = {_first(round(u, 4) for u in self._times.tolist() if not math.isnan(u))} on "
                f"{_rows(trainer, int(last))}. Lower the learning rate, clip the gradient, or look at these rows"
            )
        if total > self._told:
            rank_zero_warn(
                f"{total:.0f} updates were left out so far because loss or gradient was not finite, the last of them "
                f"step {last:.0f}: parameters, averages and timestep statistics are as if it had not been"
            )
            self._told = math.inf  # once; the count is logged


class LatentMonitor(L.Callback):
    """Warns, once each, of latents that collapse and of latents that explode.

    ``train/latent_std`` is the standard deviation of a latent coordinate over the rows of a batch, at one position:
    what is the same for every text says nothing about any of them, however much it varies over positions. Batches of
    one row have none, and are not looked at.

    Args:
        every_n_steps: Optimizer steps between two looks.
    """

    def __init__(self, every_n_steps: int = 25) -> None:
        if every_n_steps < 1:
            raise ValueError(f"every_n_steps={every_n_steps} must be at least 1")
        self.every_n_steps = every_n_steps

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Ask the schedule once what it takes to be seen."""
        model = model_of(pl_module)
        ends = torch.tensor([0.01, 0.99], device=model.device)
        self._low, self._high = (model.schedule.sigma(ends) / model.schedule.alpha(ends)).tolist()
        self._next, self._later, self._warned = trainer.global_step + self.every_n_steps, DeferredRead(), set[str]()

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Tensor, batch_idx: int
    ) -> None:
        """Now and then, read what was sent off an interval ago."""
        output, model = step_output(outputs), model_of(pl_module)
        if trainer.global_step < self._next or output["rows"] is None:
            return
        self._next = trainer.global_step + self.every_n_steps
        told = "token" in output["terms"]
        decodes = model.sigma_dec > 0 and bool(output["terms"].keys() - {"diffusion"})
        if (values := self._later.read()) is not None:
            std, gamma, error = values
            coordinates = model.latent_encoder.num_latents * model.latent_encoder.latent_size / model.sequence_length
            seen, sigma_dec = (self._low, self._high), model.sigma_dec if decodes else None
            warning = diagnosis(std, gamma, error if told else None, seen, sigma_dec, coordinates)
            if warning is not None and warning[0] not in self._warned:
                self._warned.add(warning[0])
                rank_zero_warn(f"step {trainer.global_step}: {warning[0]}: {warning[1]}")
        if (spread := output["latent_std"]) is None:
            return
        # The cross-entropy as a share of guessing's.
        share = output["terms"].get("token", output["gamma"]) / math.log(model.token_encoder.vocab_size)
        self._later.send(torch.stack([spread, output["gamma"], share]))


def spread_over_rows(z0: Tensor) -> Tensor | None:
    """``train/latent_std`` of latents [b m d], the root mean square over positions and coordinates; None for one row.

    The mean square and no other mean, because it bounds what a Gaussian channel of these coordinates can carry.
    """
    return z0.var(dim=0).mean().sqrt() if len(z0) > 1 else None


def diagnosis(
    std: float,
    gamma: float,
    error: float | None,
    seen: tuple[float, float],
    sigma_dec: float | None,
    coordinates: float,
) -> tuple[str, str] | None:
    """What is wrong with latents, in a few words, and what to do; None if nothing is known to be.

    Three bounds, none of them fitted. Of the 13 runs in ``docs/results/table1-laptop`` the two for a collapse name the
    three in which latents collapsed, at steps 19, 219 and 519 of 1,600, and no other. Those runs recorded the mean
    standard deviation over rows and positions together, which is the larger quantity: see docs/decisions.md.

    Args:
        std: Standard deviation of a coordinate over rows.
        gamma: Share of the diffusion gradient that reaches the encoder; the second bound waits for the end of the
            warm-up, since latents start small.
        error: Cross-entropy over that of guessing, ln V; None where there is none.
        seen: sigma/alpha of the schedule at t = 0.01 and t = 0.99: deviations that drown in the noise of all times but
            the first hundredth, and that stand above it in all but the last.
        sigma_dec: Deviation of the decoder's noise, None where nothing is decoded under noise.
        coordinates: Latent coordinates a token.
    """
    share = "" if error is None else f" (cross-entropy at {error:.0%} of guessing's)"
    advice = "lengthen the warm-up (training.warmup_steps), lower sigma_dec, or lower the learning rate"
    if std < seen[0]:
        return (
            "the latents have collapsed",
            f"their deviation {std:.2g} lies below the noise at nearly every time, {seen[0]:.2g} at t = 0.01{share}; "
            f"{advice}",
        )
    # The capacity of a Gaussian channel, in nats: ½ ln(1 + SNR) a coordinate.
    if sigma_dec is not None and gamma >= 1 and (nats := coordinates / 2 * math.log1p((std / sigma_dec) ** 2)) < 1:
        return (
            "the latents have collapsed",
            f"at deviation {std:.2g} under decoder noise of {sigma_dec:.2g} they can tell at most {nats:.2g} nats a "
            f"token{share}; {advice}",
        )
    if std > seen[1]:
        return (
            "the latents explode",
            f"their deviation {std:.3g} stands above the noise at nearly every time, {seen[1]:.3g} at t = 0.99, but "
            "sampling starts from noise alone; raise the objective's "
            "diffusion_weight, shorten the warm-up, or lower the learning rate",
        )
    return None


def _rows(trainer: L.Trainer, step: int) -> str:
    data = trainer.datamodule  # type: ignore[attr-defined]
    if isinstance(data, PackedTextDataModule):
        return f"the rows {_first(data.rows_of_step(step))} of {data.train_dataset.path.name}"
    return "that step's batch of a loader whose rows are not known here"


def _first(values: Iterable[float]) -> str:
    listed = [*values]
    more = f" and {len(listed) - SHOWN} more" if len(listed) > SHOWN else ""
    return f"{listed[:SHOWN]}{more}"
