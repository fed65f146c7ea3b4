"""What a person looks at while training: figures, texts, speed, and a look back at the end.

In: a Trainer with a TensorBoard logger (others get the numbers only) and its task. Out: log entries, printed texts.
Paper: Fig. 5 and 6.
"""

import os
import re
import shlex
import time
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities import CombinedLoader
from rich.console import Console
from rich.table import Table
from rich.text import Text
from torch import Tensor

from ldlm._files import visible
from ldlm.model import LDLM
from ldlm.plots import gamma_curve, loss_over_time
from ldlm.training.callbacks.warmup import DiffusionToEncoderWarmup
from ldlm.training.outputs import model_of

CURVE_BINS = 20  # held-out rows are few: fewer bins than the timestep sampler's


class FigureLogger(L.Callback):
    """Logs the loss over time (Fig. 5) and the warm-up curve (Fig. 6) after each validation."""

    def __init__(self) -> None:
        self._sums = torch.zeros(2, CURVE_BINS)

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Forget the last validation."""
        self._sums.zero_()

    def on_validation_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: Tensor,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Collect the losses of the held-out rows by time; each rank its own."""
        if outputs is not None:
            index = (outputs["u"] * CURVE_BINS).long().clamp(max=CURVE_BINS - 1).cpu()
            loss = outputs["loss"].float().cpu()
            self._sums.index_add_(1, index, torch.stack([loss, torch.ones_like(loss)]))

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Log both figures."""
        writer = tensorboard(trainer)
        if writer is None or trainer.sanity_checking:
            return
        seen = self._sums[1] > 0
        if seen.any():
            u = ((torch.arange(CURVE_BINS) + 0.5) / CURVE_BINS)[seen].double()
            adapted = model_of(pl_module).timesteps.cdf(u.to(pl_module.device)).cpu()
            loss = (self._sums[0] / self._sums[1])[seen]
            figure = loss_over_time(u.tolist(), adapted.tolist(), loss.tolist())
            writer.add_figure("loss over time", figure, trainer.global_step)
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(callback, DiffusionToEncoderWarmup) and callback.steps:
                steps = [round(i * callback.steps * 1.2 / 100) for i in range(101)]
                figure = gamma_curve(steps, [callback.gamma(step) for step in steps], trainer.global_step)
                writer.add_figure("warm-up", figure, trainer.global_step)


class SampleLogger(L.Callback):
    """Generates a few texts after each validation, and logs them.

    Args:
        num_samples: Texts each time.
        nfe: Calls of the denoiser per text.
        seed: The same noise each time, so that one sees the same texts change.
    """

    def __init__(self, num_samples: int = 8, nfe: int = 32, seed: int = 0) -> None:
        self.num_samples = num_samples
        self.nfe = nfe
        self.seed = seed

    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Rank 0 generates, while `EMA` has the averaged parameters in place; the others go on."""
        model = model_of(pl_module)
        writer = tensorboard(trainer)
        if writer is None or trainer.sanity_checking or model.tokenizer is None:
            return
        texts = sample_texts(trainer, model, self.num_samples, self.nfe, self.seed)
        table = "\n".join(["| | generated |", "|---|---|", *(f"| {i} | {cell(t)} |" for i, t in enumerate(texts))])
        writer.add_text("samples", table, trainer.global_step)


class Throughput(L.Callback):
    """Logs ``train/tokens_per_second`` over all ranks.

    Args:
        every_n_steps: Optimizer steps over which the speed is averaged.
    """

    def __init__(self, every_n_steps: int = 50) -> None:
        self.every_n_steps = every_n_steps
        self._since = (0, 0.0)
        self._tokens = 0

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Start the clock."""
        self._since, self._tokens = (trainer.global_step, time.monotonic()), 0

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: object, batch: Tensor, batch_idx: int
    ) -> None:
        """Count tokens, and report now and then."""
        self._tokens += batch.numel() * trainer.world_size
        step, start = self._since
        if trainer.global_step - step >= self.every_n_steps:
            now = time.monotonic()
            pl_module.log("train/tokens_per_second", self._tokens / (now - start))
            self._since, self._tokens = (trainer.global_step, now), 0

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Validation does not count."""
        self._since, self._tokens = (trainer.global_step, time.monotonic()), 0


class ShowSamples(L.Callback):
    """At the end of the fit, prints generated texts beside real ones and the command that generates more.

    Args:
        num_samples: Texts of each kind.
        nfe: Calls of the denoiser per text.
        seed: Of the noise.
    """

    def __init__(self, num_samples: int = 4, nfe: int = 64, seed: int = 0) -> None:
        self.num_samples = num_samples
        self.nfe = nfe
        self.seed = seed

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Rank 0 prints."""
        model = model_of(pl_module)
        if trainer.global_rank or model.tokenizer is None or trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        texts = sample_texts(trainer, model, self.num_samples, self.nfe, self.seed)
        console = Console()
        table = Table("generated", "real", title=f"after {trainer.global_step} steps", show_lines=True, expand=True)
        for generated, real in zip(texts, self._real(trainer, pl_module), strict=False):
            table.add_row(Text(visible(generated)), Text(visible(real)))
        console.print(table)
        best = checkpoint_path(trainer)
        if best:
            more = f"Generate more:  ldlm generate {visible(shlex.quote(best))} -n 8 --nfe {self.nfe}"
            console.print(Text(more), soft_wrap=True)
        writer = tensorboard(trainer)
        if writer is not None:
            where = visible(shlex.quote(writer.log_dir))
            console.print(Text(f"Look at it:     tensorboard --logdir {where}"), soft_wrap=True)

    def _real(self, trainer: L.Trainer, pl_module: L.LightningModule) -> list[str]:
        """Texts of the first batch of the first loader that has one, held-out rows before those trained on."""
        given = [loaders for loaders in (trainer.val_dataloaders, trainer.train_dataloader) if loaders is not None]
        for loader in CombinedLoader(given, mode="sequential").flattened:
            for batch in loader:
                tokens = pl_module._on_before_batch_transfer(batch)
                return model_of(pl_module).to_text(tokens[: self.num_samples])
        return []


def sample_texts(trainer: L.Trainer, model: LDLM, count: int, nfe: int, seed: int) -> list[str]:
    """Texts generated in the precision of the run."""
    with trainer.precision_plugin.forward_context():
        return model.generate(count, nfe, seed=seed, batch_size=count)


def tensorboard(trainer: L.Trainer) -> Any:
    """TensorBoard's writer on rank 0, or None where there is none."""
    loggers = [logger for logger in trainer.loggers if isinstance(logger, TensorBoardLogger)]
    return loggers[0].experiment if loggers and trainer.global_rank == 0 else None


def checkpoint_path(trainer: L.Trainer) -> str:
    """The last checkpoint of the run, or an empty string."""
    callback = trainer.checkpoint_callback
    if not isinstance(callback, ModelCheckpoint):
        return ""
    path = callback.last_model_path or callback.best_model_path
    return os.path.relpath(path) if path else ""


def cell(text: str) -> str:
    """A text as one cell of a Markdown table, none of it Markdown or HTML: TensorBoard would fetch images it names."""
    return re.sub(r"[^\w\s]|_", lambda found: f"&#{ord(found[0])};", " ".join(visible(text).split()))


class SaveAtEnd(L.Callback):
    """Writes the last checkpoint again at the end of a run, where `ModelCheckpoint` leaves its last interval's."""

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """On all ranks, as saving needs them."""
        callback = trainer.checkpoint_callback
        if isinstance(callback, ModelCheckpoint) and callback.last_model_path:
            trainer.save_checkpoint(callback.last_model_path)
