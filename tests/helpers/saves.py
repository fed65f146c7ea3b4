"""Short fits that save, and files of checkpoints made without one."""

from pathlib import Path

import lightning as L
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from helpers.tiny import make_data, make_task, make_trainer
from ldlm.training.callbacks.timesteps import AdaptiveTimestepUpdate
from ldlm.training.task import LDLMTask

OLD, NEW = {"x": torch.zeros(100)}, {"x": torch.ones(100)}


def state(step: int, **more) -> dict:
    """What `last_checkpoint` asks of a checkpoint."""
    return {"global_step": step, "ldlm": {}, "optimizer_states": [], "state_dict": {"x": torch.ones(9)}, **more}


def recipe(checkpoints: ModelCheckpoint) -> list[L.Callback]:
    return [AdaptiveTimestepUpdate(2), checkpoints]


def saver(folder: Path, every: int = 2) -> ModelCheckpoint:
    """As the recipes have it."""
    arguments = {"save_last": True, "save_top_k": 1, "monitor": "step", "mode": "max"}
    return ModelCheckpoint(str(folder / "runs"), every_n_train_steps=every, **arguments)


def fit(folder: Path, task: LDLMTask | None = None, ckpt_path=None, more=(), **changes) -> L.Trainer:
    changes = {"enable_checkpointing": True, **changes}
    trainer = make_trainer(folder, [*recipe(saver(folder)), *more], **changes)
    trainer.fit(task or make_task(), make_data(folder), ckpt_path=ckpt_path)
    return trainer


def flip(path: Path, position: int, bit: int = 1) -> None:
    data = bytearray(path.read_bytes())
    data[position] ^= bit
    path.write_bytes(data)
