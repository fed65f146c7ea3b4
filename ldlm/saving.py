"""Checkpoint files: whole or absent when written, verified when read, and the newest whole one found again.

In: what a Trainer wants kept, a path; a path, a URL or a folder. Out: a `.ckpt` with its digest beside it; its content.
No section of the paper. Why Lightning's own way (2.6.6) is replaced: it stages files in another folder and does not
wait for the disk, reads altered bytes without noticing, and unpickles whatever a URL gives.
"""

import hashlib
import io
import math
import os
import pickle
import tempfile
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Iterable
from io import BufferedReader
from pathlib import Path
from types import NoneType
from typing import Any, BinaryIO

import lightning as L
import torch
from fsspec.core import url_to_fs
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor

from ldlm.files import is_special, sha256, sweep, visible, write_atomically
from ldlm.sizes import check_storages

LOOKS = 20  # at a file that another process replaces while it is read

WEIGHTS = ("state_dict", "raw_parameters")  # neither is in what a spawned process hands back
# What a run would resume with. MixedPrecision is Lightning's name for the state of the loss scaler. Callbacks are left
# out: a ModelCheckpoint that has saved nothing yet has an infinite score.
STATES = (*WEIGHTS, "optimizer_states", "lr_schedulers", "MixedPrecision")


class CheckpointFiles(TorchCheckpointIO):
    """Reads and writes a Trainer's checkpoints; every `LDLM` puts it in the place of Lightning's own.

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
                "or str(path), and leave parts out of save_hyperparameters, which LDLM does without"
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


def is_remote(path: str | Path) -> bool:
    """Say whether a path is a URL, of the web or of an object store."""
    return "://" in str(path)


def digest_file(path: Path) -> Path:
    """Where the digest of a checkpoint stands, in the form that ``sha256sum --check`` reads."""
    # Lightning 2.6.6 takes any name with hpc_ckpt_ in it for a requeued job's checkpoint, and its digits for a number.
    return path.with_name(f"{path.name.replace('hpc_ckpt_', 'hpc-ckpt-')}.sha256")


def write(content: dict[str, Any], path: Path) -> None:
    """Write a checkpoint and its digest so that a kill at any moment leaves a file that its digest file knows.

    Before the new file takes the old one's place, the digest file names both; afterwards, the new one alone. A link to
    another folder stays, and the file there is replaced. A link to a checkpoint beside it, as ``save_last="link"``
    makes them, gives its place to the new file: what it leads to is another checkpoint, kept for itself.

    Raises:
        OSError: If the disk is full, or the folder cannot be written to.
    """
    if is_special(path):  # a device or a FIFO, which has no digest
        with write_atomically(path) as file:
            _save(content, file)
        return
    target = Path(os.path.realpath(path))
    if path.is_symlink() and not target.is_relative_to(os.path.realpath(path.parent)):
        path = target
    beside = digest_file(path)
    with write_atomically(path, through_links=False) as file:
        _save(content, file)
        digest = f"{sha256(file.name)}  {path.name}\n".encode()
        if beside.exists() or not path.exists():
            with write_atomically(beside) as both:
                both.write((beside.read_bytes() if beside.exists() else b"") + digest)
    with write_atomically(beside) as alone:
        alone.write(digest)


def _save(content: dict[str, Any], file: BinaryIO) -> None:
    try:
        torch.serialization.set_crc32_options(True)  # somebody may have switched off what reading goes by
        torch.save(content, file)
        file.flush()
    except RuntimeError as error:  # torch's, of the archive that it could not end
        if isinstance(error.__context__, OSError):
            raise error.__context__ from None
        raise


def read(path: str | Path) -> Any:
    """What a checkpoint holds, as plain data and CPU tensors; nothing in it is run.

    Raises:
        ValueError: If there is no such file, or it is damaged, or holds something else; a whole one is named.
    """
    if is_remote(path):
        with tempfile.TemporaryDirectory() as folder:
            copy = Path(folder) / "fetched.ckpt"
            try:
                files, inner = url_to_fs(str(path))
                files.get_file(inner, str(copy))
            except Exception as error:  # each store has errors of its own
                raise ValueError(f"{path} could not be fetched ({type(error).__name__}: {error})") from error
            return _unpack(copy, str(path))
    path = Path(path)
    if not path.is_file():
        near = sorted(str(p) for p in path.parent.glob("*.ckpt"))[:5] if path.parent.is_dir() else []
        there = f"; there are {', '.join(near)}" if near else ""
        raise ValueError(f"checkpoint {path} does not exist{there}")
    content = _unpack(path, str(path))
    if not digest_file(path.resolve()).exists():
        name, beside = visible(path), visible(digest_file(path).name)
        rank_zero_warn(f"{name} has no {beside} beside it: the checksums in it alone verified it")
    return content


def _unpack(path: Path, source: str) -> Any:
    reason, content = _examine(path, load=True)
    if reason is None:
        return content
    other = _newest(file for file in path.parent.glob("*.ckpt") if file != path)
    remedy = f"the newest whole one beside it is {other}" if other else "use another, or train again"
    raise ValueError(f"{source} {reason}: {remedy}")


def damage(path: Path) -> str | None:
    """What is wrong with a checkpoint's bytes by the zip archive's checksums and the digest beside it, or None."""
    return _examine(path, load=False)[0]


def _examine(path: Path, load: bool) -> tuple[str | None, Any]:
    """What is wrong with a checkpoint's bytes, or None; and its content, if that is asked for and nothing is wrong.

    One open file is verified and loaded, so nothing can be put in its place in between. A run may replace the file at
    the same time: then neither the digests of before it was opened nor those of after need fit, and it is read again.
    """
    for _ in range(LOOKS):
        try:
            target = Path(os.path.realpath(path))  # save_last="link" makes links, whose digest is that of the file
            if is_special(target):
                return "is not a checkpoint", None
            before = _digests(target)
            with open(target, "rb") as file:
                opened = _identity(os.fstat(file.fileno()))
                reason, content = _verify(file, target, before, load)
                untouched = opened == _identity(os.fstat(file.fileno()))
            if untouched and reason is None:
                return None, content
            if untouched and opened == _identity(os.stat(path)) and before == _digests(target):
                return reason, None
        except FileNotFoundError:
            if not os.path.lexists(path):
                return "is not there any more", None
        except OSError as error:
            return f"cannot be opened ({error.strerror})", None
    return f"was replaced each of {LOOKS} times that it was read, or leads to no file", None


def _identity(there: os.stat_result) -> tuple[int, ...]:
    """What differs between a file and another that takes its place, or that is written over."""
    return there.st_dev, there.st_ino, there.st_size, there.st_mtime_ns


def _digests(path: Path) -> list[bytes] | None:
    """The words of a checkpoint's digest file; None if there is none."""
    try:
        return digest_file(path).read_bytes().split()
    except FileNotFoundError:
        return None


def _verify(file: BufferedReader, path: Path, digests: list[bytes] | None, load: bool) -> tuple[str | None, Any]:
    """What is wrong with an open checkpoint, or None; and its content if ``load``."""
    try:
        with zipfile.ZipFile(file) as archive:
            if sum(entry.file_size for entry in archive.infolist()) > os.fstat(file.fileno()).st_size:
                return "is not a checkpoint", None  # torch packs nothing, and what is packed could unfold to any size
            altered = archive.testzip()
    except Exception:  # a stranger's bytes can make the reader raise anything
        return "is truncated or not a checkpoint", None
    if altered is not None:
        return f"was altered: the checksum of {altered!r} in it is wrong", None
    file.seek(0)
    digest = hashlib.file_digest(file, "sha256").hexdigest().encode()
    if digests is not None and digest not in digests and digest not in (_digests(path) or []):
        name = digest_file(path).name
        return f"was altered, as its digest is none of those in {name} (remove that if it is not the file's)", None
    if not load:
        return None, None
    file.seek(0)
    try:
        content = torch.load(file, map_location="cpu", weights_only=True)
        check_storages(content)
        return None, content
    except Exception as error:  # a stranger's bytes can make the reader raise anything
        return f"could not be read as a checkpoint ({str(error).partition(chr(10))[0]})", None


def last_checkpoint(folder: str | Path) -> Path | None:
    """The newest whole checkpoint in a folder or below it to go on from: most optimizer steps, then written last.

    Others are passed over with a warning that says why. ``trainer.fit(model, data, ckpt_path=last_checkpoint("runs"))``
    starts from scratch where there is none.

    Args:
        folder: Of one run, such as ``ldlm_runs/quickstart/version_0``.
    """
    # os.walk passes over folders that vanish meanwhile.
    return _newest(Path(place, name) for place, _, names in os.walk(folder) for name in names if name[-5:] == ".ckpt")


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


def _newest(paths: Iterable[Path]) -> Path | None:
    for (step, _), path in sorted(((_age(path), path) for path in paths), reverse=True):
        reason = damage(path)
        if reason is None and step == math.inf and _age(path)[0] == math.inf:  # it may have been replaced since
            reason = "holds no state that training could go on from"
        if reason is None:
            return path
        if os.path.lexists(path):  # else a run has removed it meanwhile
            rank_zero_warn(f"{visible(path)} {visible(reason)}: it is passed over")
    return None


def _age(path: Path) -> tuple[float, float]:
    """(optimizer step, time of writing); what cannot be read comes first, so that it is told of."""
    try:
        if is_special(path):  # reading it might never end
            return math.inf, 0.0
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        check_storages(content)
        step, _ = content["global_step"], (content["ldlm"], content["optimizer_states"])
        return (step if type(step) is int else math.inf), path.stat().st_mtime
    except Exception:  # a stranger's bytes can make the reader raise anything
        return math.inf, 0.0
