"""Lightning's reader and writer of checkpoints, replaced by ones that survive a kill and verify what they read.

In: what a Trainer saves. Out: a file and its digest; a failed save is reported, and the run continues.
No section of the paper.
"""

import io
import math
import pickle
import tempfile
from collections import OrderedDict
from collections.abc import Callable, Iterable
from pathlib import Path
from types import NoneType
from typing import Any

import torch
from fsspec.core import url_to_fs
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from ldlm._files import sweep, visible
from ldlm._sizes import check_storages
from ldlm.checkpoints.integrity import digest_file, is_remote, read, write

WEIGHTS = ("state_dict", "raw_parameters")  # neither is in what a spawned process hands back
# What a run would resume with. MixedPrecision is Lightning's name for the state of the loss scaler. Callbacks are left
# out: a ModelCheckpoint that has saved nothing yet has an infinite score.
STATES = (*WEIGHTS, "optimizer_states", "lr_schedulers", "MixedPrecision")


class CheckpointFiles(TorchCheckpointIO):
    """Reads and writes a Trainer's checkpoints; every `LDLMTask` puts it in the place of Lightning's own.

    A save that fails is warned of and leaves the older file in place: if the disk is full, a state is not finite, or
    somebody's callback keeps what reading would refuse. Files that were to make room for it stay until a later save
    succeeds.

    Args:
        tries: Saves that may fail in a row; the last of them ends the run.
    """

    def __init__(self, tries: int = 3) -> None:
        if tries < 1:
            raise ValueError(f"tries={tries} must be at least 1, which ends the run when a save fails")
        self.tries = tries
        self.failures = 0
        self.training = True  # afterwards nobody would try again, and a failure is an error at once
        self._leaving: set[str] = set()

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        """Write a checkpoint whole, or keep what is there.

        Raises:
            OSError: If this is the last of ``tries`` saves in a row that failed, or fails when training is over.
        """
        try:
            for part in STATES:
                if names := not_finite(checkpoint.get(part, {})):
                    name = names[0] if part in WEIGHTS else f"{part}.{names[0]}"
                    raise FloatingPointError(f"{name} is not finite")
            check_readable(checkpoint)
            if is_remote(path):
                super().save_checkpoint(checkpoint, path, storage_options)
            else:
                write(checkpoint, Path(path))
        except (OSError, FloatingPointError, pickle.PicklingError) as error:
            self.failures += 1
            reason = error.strerror if isinstance(error, OSError) and error.strerror else error
            told = (
                f"{path} of step {checkpoint.get('global_step')} was not written ({reason}), and what was there stays"
            )
            if not self.training:
                raise OSError(told) from error
            if self.failures >= self.tries:
                raise OSError(f"{told}; as this is save {self.failures} in a row that failed, the run ends") from error
            rank_zero_warn(f"{visible(told)}; training goes on, and ends if {self.tries} saves in a row fail")
        else:
            self.failures = 0
            self._leaving.discard(str(path))

    def load_checkpoint(
        self, path: str | Path, map_location: Callable[..., Any] | None = None, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Read a file or a URL by `read`, without ever running what is in it, whatever ``weights_only`` says."""
        content: dict[str, Any] = read(path)
        return content

    def remove_checkpoint(self, path: str | Path) -> None:
        """Remove a checkpoint and its digest, once the save that takes its place has succeeded; never anything else."""
        self._leaving.add(str(path))
        while self._leaving and not self.failures:
            remove(self._leaving.pop())


def remove(path: str) -> None:
    """Remove one checkpoint file and its digest. What has another name, or is a folder, stays, with a warning."""
    if not path.endswith(".ckpt"):
        rank_zero_warn(f"{path} is not removed: only files called .ckpt are")
    elif is_remote(path):
        files, inner = url_to_fs(path)
        if files.isfile(inner):
            files.rm_file(inner)
    elif Path(path).is_dir():
        rank_zero_warn(f"{path} is not removed: it is a folder")
    else:
        Path(path).unlink(missing_ok=True)
        digest_file(Path(path)).unlink(missing_ok=True)


def not_finite(state: object) -> list[str]:
    """The names of numbers and floating-point tensors in nested containers that are infinite, or no number at all."""
    if torch.is_tensor(state):
        return [""] if state.is_floating_point() and not bool(state.isfinite().all()) else []
    if isinstance(state, float):
        return [""] if not math.isfinite(state) else []
    items: Iterable[tuple[object, object]] = ()
    if isinstance(state, dict):
        items = state.items()
    elif isinstance(state, list | tuple):
        items = enumerate(state)
    return [f"{name}.{found}".rstrip(".") for name, value in items for found in not_finite(value)]


def check_readable(checkpoint: dict[str, Any]) -> None:
    """Refuse what `read` would refuse, while there is an older file and somebody to tell.

    Raises:
        pickle.PicklingError: Naming the key of what is not plain data, and what it is.
    """
    for name, value in checkpoint.items():
        if found := unreadable(value, name):
            raise pickle.PicklingError(
                f"{found}, and a checkpoint with that could never be read: keep numbers, strings, lists, dictionaries "
                "and tensors in the states of callbacks and data modules and in hyper-parameters, such as value.item() "
                "or str(path), and leave the model out of save_hyperparameters, which LDLMTask does without"
            )


def unreadable(value: Any, name: str) -> str | None:
    """Which part of a value torch would not read with ``weights_only=True``, as "NAME is a TYPE"; None if all is well.

    Plain data are told by their exact types, as numpy.float64 is a float, but not to a reader; torch itself is asked
    about everything else.
    """
    if type(value) in (NoneType, bool, int, float, str):
        return None
    if type(value) is Tensor and not vars(value):
        try:
            check_storages(value)
        except ValueError as error:
            return f"{name} {error} (tensor.expand makes such; clone it)"
        return None
    if type(value) in (dict, OrderedDict):
        inner = [
            *((key, f"the key {key!r} of {name}") for key in value),
            *((v, f"{name}[{k!r}]") for k, v in value.items()),
        ]
    elif type(value) in (list, tuple):
        inner = [(item, f"{name}[{place}]") for place, item in enumerate(value)]
    else:
        try:
            torch.save(value, buffer := io.BytesIO())
            torch.load(io.BytesIO(buffer.getvalue()), weights_only=True)
        except Exception:  # anybody's classes can make it raise anything
            return f"{name} is a {type(value).__module__}.{type(value).__qualname__}".replace("builtins.", "")
        return None
    return next(filter(None, (unreadable(*item) for item in inner)), None)


def prepare(folder: Path) -> None:
    """Make a folder for checkpoints and sweep it; ValueError if it cannot be written to."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise ValueError(
            f"checkpoints cannot be written to {folder} ({error.strerror}): give ModelCheckpoint another dirpath, or "
            "the logger another save_dir"
        ) from error
    sweep(folder)
