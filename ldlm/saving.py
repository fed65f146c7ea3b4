"""Checkpoint files: whole or absent when written, verified when read, and the newest whole one found again.

In: what a Trainer wants kept, a path; a path, a URL or a folder. Out: a `.ckpt` with its digest beside it; its content.
No section of the paper. Why Lightning's own way (2.6.6) is replaced: it stages files in another folder and does not
wait for the disk, reads altered bytes without noticing, and unpickles whatever a URL gives.
"""

import math
import os
import tempfile
import zipfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import lightning as L
import torch
from fsspec.core import url_to_fs
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn

from ldlm.files import sha256, sweep, write_atomically

WEIGHTS = ("state_dict", "raw_parameters")  # neither is in what a spawned process hands back
# What a run would resume with. MixedPrecision is Lightning's name for the state of the loss scaler. Callbacks are left
# out: a ModelCheckpoint that has saved nothing yet has an infinite score.
STATES = (*WEIGHTS, "optimizer_states", "lr_schedulers", "MixedPrecision")


class CheckpointFiles(TorchCheckpointIO):
    """Reads and writes a Trainer's checkpoints; every `LDLM` puts it in the place of Lightning's own.

    A save that fails, be it that the disk is full or that a state is not finite, is warned of and leaves the older
    file in place. Files that were to make room for it stay until a later save succeeds.

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
            if is_remote(path):
                super().save_checkpoint(checkpoint, path, storage_options)
            else:
                write(checkpoint, Path(path))
        except (OSError, FloatingPointError) as error:
            self.failures += 1
            told = f"{path} of step {checkpoint.get('global_step')} was not written ({error}), and what was there stays"
            if not self.training:
                raise OSError(told) from error
            if self.failures >= self.tries:
                raise OSError(f"{told}; as this is save {self.failures} in a row that failed, the run ends") from error
            rank_zero_warn(f"{told}; training goes on, and ends if {self.tries} saves in a row fail")
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
        """Remove a checkpoint and its digest, once the save that takes its place has succeeded."""
        self._leaving.add(str(path))
        while self._leaving and not self.failures:
            leaving = self._leaving.pop()
            super().remove_checkpoint(leaving)
            if not is_remote(leaving):
                digest_file(Path(leaving)).unlink(missing_ok=True)


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

    Before the new file takes the old one's place, the digest file names both; afterwards, the new one alone.

    Raises:
        OSError: If the disk is full, or the folder cannot be written to.
    """
    beside = digest_file(path)
    with write_atomically(path) as file:
        try:
            torch.serialization.set_crc32_options(True)  # somebody may have switched off what reading goes by
            torch.save(content, file)
            file.flush()
        except RuntimeError as error:  # torch's, of the archive that it could not end
            if isinstance(error.__context__, OSError):
                raise error.__context__ from None
            raise
        digest = f"{sha256(file.name)}  {path.name}\n".encode()
        if beside.exists() or not path.exists():
            with write_atomically(beside) as both:
                both.write((beside.read_bytes() if beside.exists() else b"") + digest)
    with write_atomically(beside) as alone:
        alone.write(digest)


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
        rank_zero_warn(f"{path} has no {digest_file(path).name} beside it: the checksums in it alone verified it")
    return content


def _unpack(path: Path, source: str) -> Any:
    reason = damage(path)
    if reason is None:
        try:
            return torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:  # a stranger's bytes can make the reader raise anything
            reason = f"could not be read as a checkpoint ({str(error).partition(chr(10))[0]})"
    other = _newest(file for file in path.parent.glob("*.ckpt") if file != path)
    remedy = f"the newest whole one beside it is {other}" if other else "use another, or train again"
    raise ValueError(f"{source} {reason}: {remedy}")


def damage(path: Path) -> str | None:
    """What is wrong with a checkpoint's bytes by the zip archive's checksums and the digest beside it, or None."""
    try:
        with zipfile.ZipFile(path) as archive:
            if sum(entry.file_size for entry in archive.infolist()) > path.stat().st_size:
                return "is not a checkpoint"  # torch packs nothing, and what is packed could unfold to any size
            altered = archive.testzip()
    except Exception:  # a stranger's bytes can make the reader raise anything
        return "is truncated or not a checkpoint"
    if altered is not None:
        return f"was altered: the checksum of {altered!r} in it is wrong"
    beside = digest_file(path.resolve())  # save_last="link" makes links, whose digest is that of the file
    if beside.exists() and sha256(path).encode() not in beside.read_bytes().split():
        return f"was altered, as its digest is none of those in {beside.name} (remove that if it is not the file's)"
    return None


def last_checkpoint(folder: str | Path) -> Path | None:
    """The newest whole checkpoint in a folder or below it to go on from: most optimizer steps, then written last.

    Others are passed over with a warning that says why. ``trainer.fit(model, data, ckpt_path=last_checkpoint("runs"))``
    starts from scratch where there is none.

    Args:
        folder: Of one run, such as ``ldlm_runs/quickstart/version_0``.
    """
    return _newest(Path(folder).rglob("*.ckpt"))


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
    for run in sorted(filter(Path.is_dir, runs), key=lambda run: run.stat().st_mtime, reverse=True):
        if found := last_checkpoint(run):
            number = run.parent.name.removeprefix("version_")
            if isinstance(logger, TensorBoardLogger) and version is None and not callbacks and number.isdecimal():
                logger._version = int(number)
            return found
    rank_zero_info(f"there is no whole checkpoint in {place} to go on from: training starts from scratch")
    return None


def _newest(paths: Iterable[Path]) -> Path | None:
    for (step, _), path in sorted(((_age(path), path) for path in paths), reverse=True):
        reason = damage(path) or ("holds no state that training could go on from" if step == math.inf else None)
        if reason is None:
            return path
        rank_zero_warn(f"{path} {reason}: it is passed over")
    return None


def _age(path: Path) -> tuple[float, float]:
    """(optimizer step, time of writing); what cannot be read comes first, so that it is told of."""
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        step, _ = int(content["global_step"] + 0), (content["ldlm"], content["optimizer_states"])
        return step, path.stat().st_mtime
    except Exception:  # a stranger's bytes can make the reader raise anything
        return math.inf, 0.0
