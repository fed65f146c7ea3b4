"""Checkpoint files: whole or absent when written, verified when read, and the newest whole one found again.

In: what a Trainer wants kept, a path; a path, a URL or a folder. Out: a `.ckpt` with its digest beside it; its content.
No section of the paper. Why Lightning's own way (2.6.6) is replaced: it stages files in another folder and does not
wait for the disk, reads altered bytes without noticing, and unpickles whatever a URL gives.
"""

import hashlib
import math
import os
import tempfile
import zipfile
from collections.abc import Iterable
from io import BufferedReader
from pathlib import Path
from typing import Any, BinaryIO

import torch
from fsspec.core import url_to_fs
from lightning.pytorch.utilities import rank_zero_warn

from ldlm._files import is_special, sha256, visible, write_atomically
from ldlm._sizes import check_storages

LOOKS = 20  # at a file that another process replaces while it is read


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
    other = newest(file for file in path.parent.glob("*.ckpt") if file != path)
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


def newest(paths: Iterable[Path]) -> Path | None:
    """The complete checkpoint of most steps, then the one written last; others are passed over with a warning."""
    for (step, _), path in sorted(((age(path), path) for path in paths), reverse=True):
        reason = damage(path)
        if reason is None and step == math.inf and age(path)[0] == math.inf:  # it may have been replaced since
            reason = "holds no state that training could go on from"
        if reason is None:
            return path
        if os.path.lexists(path):  # else a run has removed it meanwhile
            rank_zero_warn(f"{visible(path)} {visible(reason)}: it is passed over")
    return None


def age(path: Path) -> tuple[float, float]:
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
