"""Training runs in a process of their own: ``python fit.py RUNS``, a JSON list of arguments of `fit`.

Each leaves its checkpoints in a folder, a line for each micro-step in ``losses.txt`` (rank 0), and what each rank has
in the end in ``rank0.pt``, ``rank1.pt``.
"""

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"
sys.path.pop(0)  # this folder, whose tokenizers.py would hide the package
sys.path.insert(0, str(Path(__file__).parent.parent))

import lightning as L
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from helpers.faults import Poison
from helpers.tiny import make_data, make_task, make_tokenizer, make_trainer
from ldlm.training.callbacks.ema import EMA


class Note(L.Callback):
    """Writes each loss down, with the step, and slows training and validation down."""

    def __init__(self, folder: Path, pause: float, validation_pause: float) -> None:
        self.file, self.pause, self.validation_pause = folder / "losses.txt", pause, validation_pause
        self.gradients: dict[str, torch.Tensor] = {}

    def on_before_optimizer_step(self, trainer, task, optimizer):
        if not self.gradients:
            self.gradients = {name: p.grad.clone() for name, p in task.named_parameters()}

    def on_train_batch_end(self, trainer, task, outputs, batch, batch_idx):
        if trainer.global_rank == 0:
            with self.file.open("a") as file:
                file.write(f"{trainer.global_step} {task._micro_step} {outputs['loss'].item()!r}\n")
        time.sleep(self.pause)

    def on_validation_batch_start(self, trainer, task, batch, batch_idx, dataloader_idx=0):
        if trainer.global_rank == 0 and not trainer.sanity_checking:
            (self.file.parent / "validating").touch()
        time.sleep(self.validation_pause)


class Between(L.Callback):
    """Saves after the first of the accumulated batches of a step."""

    def __init__(self, folder: Path, step: int) -> None:
        self.folder, self.step = folder, step

    def on_train_batch_end(self, trainer, task, outputs, batch, batch_idx):
        if (trainer.global_step, task._micro_step) == (self.step, 0):
            trainer.save_checkpoint(self.folder / "between.ckpt")


class Raises(L.Callback):
    """One rank's exception, after a step."""

    def __init__(self, rank: int, step: int) -> None:
        self.rank, self.step = rank, step

    def on_train_batch_end(self, trainer, task, outputs, batch, batch_idx):
        if trainer.global_rank == self.rank and trainer.global_step == self.step:
            raise KeyError(f"a fault of rank {self.rank} alone")


def fit(
    folder: str,
    max_steps: int,
    devices: int = 1,
    accumulated: int = 1,
    workers: int = 0,
    resume: str | None = None,
    resuming_rank: int | None = None,
    epochs: bool = False,
    pause: float = 0.0,
    validation_pause: float = 0.0,
    save_every: int = 1,
    batch_size: int = 4,
    validation: float | int = 0.1,
    poison: list[Any] | None = None,
    raises: list[int] | None = None,
    between: int | None = None,
    **changes: Any,
) -> None:
    """One run; `epochs` saves at the ends of epochs and not of steps."""
    here = Path(folder)
    here.mkdir(parents=True, exist_ok=True)
    every = {"every_n_epochs": 1} if epochs else {"every_n_train_steps": save_every}
    callbacks: list[L.Callback] = [
        ema := EMA(),
        note := Note(here, pause, validation_pause),
        ModelCheckpoint(here, filename="{step}", save_top_k=-1, save_last=True, **every),
    ]
    if poison:
        where, steps, rank = poison
        callbacks.insert(0, Poison(where, set(steps), rank))
    if between:
        callbacks.append(Between(here, between))
    if raises:
        callbacks.append(Raises(*raises))
    settings = {"warmup_steps": 5, "timestep_refresh": 3, "lr_warmup_steps": 20}
    task = make_task(seed=7 if resume else 0, tokenizer=make_tokenizer(), **settings)
    changes = {"max_epochs": -1, "gradient_clip_val": 0.5, "accumulate_grad_batches": accumulated} | changes
    strategy = "ddp" if devices > 1 else "auto"
    trainer = make_trainer(
        here, callbacks, max_steps=max_steps, devices=devices, strategy=strategy, enable_checkpointing=True, **changes
    )
    data = make_data(here.parent, batch_size=batch_size, validation=validation, num_workers=workers)
    trainer.fit(task, data, ckpt_path=resume if resuming_rank in (None, trainer.global_rank) else None)
    left = {
        "gradients": note.gradients,
        "state": task.state_dict(),
        "raw": ema.live,
        "optimizer": trainer.optimizers[0].state_dict()["state"],
        "metrics": {n: v for n, v in trainer.callback_metrics.items() if n.startswith(("validation/", "train/skip"))},
        "tokens": task.model.sample_tokens(8, nfe=16),
        "texts": task.model.generate(8, nfe=16),
    }
    torch.save(left, here / f"rank{trainer.global_rank}.pt")


if __name__ == "__main__":
    for run in json.loads(sys.argv[1]):
        fit(**run)
