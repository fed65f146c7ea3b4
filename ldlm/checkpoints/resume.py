"""Which checkpoint a run continues from: the newest complete one of a folder or of a run.

In: a folder, or a Trainer. Out: a path, or None. No section of the paper.
"""

import os
from pathlib import Path

import lightning as L
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_info

from ldlm._files import visible
from ldlm.checkpoints.integrity import is_remote, newest


def last_checkpoint(folder: str | Path) -> Path | None:
    """The newest whole checkpoint in a folder or below it to go on from: most optimizer steps, then written last.

    Others are passed over with a warning that says why. ``trainer.fit(task, data, ckpt_path=last_checkpoint("runs"))``
    starts from scratch where there is none.

    Args:
        folder: Of one run, such as ``ldlm_runs/quickstart/version_0``.
    """
    # os.walk passes over folders that vanish meanwhile.
    return newest(Path(place, name) for place, _, names in os.walk(folder) for name in names if name[-5:] == ".ckpt")


def last_of_run(trainer: L.Trainer) -> Path | None:
    """The newest whole checkpoint of the run that saved last, among those in the place where a Trainer would save.

    A `TensorBoardLogger` goes on in that run's folder. Nothing being there is told, and is no error: a job that is
    queued again and again says the same each time.
    """
    logger, place, version = trainer.logger, str(trainer.default_root_dir), None
    if logger is not None:
        place = os.path.join(logger.save_dir or place, str(logger.name))
    if isinstance(logger, TensorBoardLogger):
        version = logger._version  # None if nobody gave one; asking for `version` would count one up
    runs = [Path(place, "checkpoints"), *Path(place).glob("*/checkpoints")]
    if version is not None:
        runs = [Path(place, version if isinstance(version, str) else f"version_{version}", "checkpoints")]
    callbacks = [c for c in trainer.checkpoint_callbacks if isinstance(c, ModelCheckpoint) and c.dirpath]
    if callbacks:
        place, runs = str(callbacks[0].dirpath), [Path(str(c.dirpath)) for c in callbacks]
    if is_remote(place):
        raise ValueError(f"the last checkpoint is looked for on this machine's disks, not in {place}: name it in full")
    for run in sorted(filter(Path.is_dir, runs), key=_modified, reverse=True):
        if found := last_checkpoint(run):
            number = run.parent.name.removeprefix("version_")
            if isinstance(logger, TensorBoardLogger) and version is None and not callbacks and number.isdecimal():
                logger._version = int(number)
            return found
    rank_zero_info(f"there is no whole checkpoint in {visible(place)} to go on from: training starts from scratch")
    return None


def _modified(path: Path) -> float:
    """When a folder was written to last; long ago, if it vanished meanwhile."""
    try:
        return path.stat().st_mtime
    except FileNotFoundError:
        return 0.0
