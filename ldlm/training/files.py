"""A run's files: Lightning's reader and writer replaced, and refused before the first step what no file could hold.

In: a Trainer and what it would save. Out: a Trainer whose checkpoints survive a kill and are verified; or an error.
No section of the paper.
"""

import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import lightning as L
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.pytorch.callbacks import ModelCheckpoint

from ldlm.checkpoints.integrity import is_remote
from ldlm.checkpoints.io import CheckpointFiles, check_readable, not_finite, prepare
from ldlm.checkpoints.training_state import CheckedStates


def take_over(trainer: L.Trainer) -> None:
    """Put our reader, writer and checks of files in the place of Lightning's own; prepare the checkpoints' folders.

    Raises:
        ValueError: If a folder cannot be written to.
    """
    CheckedStates.look_at(trainer)
    if type(trainer.strategy.checkpoint_io) is TorchCheckpointIO:  # else it is the user's choice
        trainer.strategy.checkpoint_io = CheckpointFiles()
    if isinstance(files := trainer.strategy.checkpoint_io, CheckpointFiles):
        files.training = trainer.training
    for callback in trainer.checkpoint_callbacks if trainer.training else []:
        folder = callback.dirpath if isinstance(callback, ModelCheckpoint) else None
        if folder and trainer.is_global_zero and not is_remote(folder):
            prepare(Path(folder))


def check_finite(state: dict[str, Any]) -> None:
    """Raise ValueError if a weight or a buffer could never be saved."""
    if names := not_finite(state):
        raise ValueError(
            f"{names[0]} is not finite before training: give finite weights; a buffer that is to hold infinities "
            "is registered with persistent=False"
        )


def check_saved(trainer: L.Trainer, task: L.LightningModule) -> None:
    """Refuse what no checkpoint could be read with, be it a callback's state, while there is nothing to lose yet.

    Raises:
        ValueError: Naming it.
    """
    data: L.LightningDataModule | None = trainer.datamodule  # type: ignore[attr-defined]
    if not trainer.checkpoint_callbacks or not isinstance(trainer.strategy.checkpoint_io, CheckpointFiles):
        return
    callbacks: list[L.Callback] = trainer.callbacks  # type: ignore[attr-defined]
    kept: dict[str, Mapping[str, Any] | list[Any]] = {
        "callbacks": {callback.state_key: callback.state_dict() for callback in callbacks},
        "lr_schedulers": [config.scheduler.state_dict() for config in trainer.lr_scheduler_configs],
        "hyper_parameters": dict(task.hparams),
        "state_dict": task.state_dict(),
    }
    if data is not None:
        kept |= {type(data).__qualname__: data.state_dict(), "datamodule_hyper_parameters": dict(data.hparams)}
    try:
        check_readable(kept)
    except pickle.PicklingError as error:
        raise ValueError(str(error)) from error


def end_of_fit(trainer: L.Trainer) -> None:
    """Raise OSError if the last save failed: the run is not to end as if all were well."""
    files = trainer.strategy.checkpoint_io
    if not isinstance(files, CheckpointFiles):
        return
    files.training = False
    if files.failures:
        raise OSError("the last checkpoint of this run was not written: a warning above says why")
