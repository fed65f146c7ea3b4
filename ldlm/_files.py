"""Files written whole or not at all, their digests, and names that mean files inside installed packages.

In: a path or a `package:NAME/inner/path` name. Out: a file that is complete or absent, a sha256, a path.
No section of the paper; the packed corpus, checkpoints, exports and reports are all written through here.
"""

import errno
import hashlib
import json
import os
import re
import secrets
import stat
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import BinaryIO, NoReturn

if sys.platform != "win32":
    import fcntl
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # nothing more can be written
TEMPORARY = re.compile(r"\.ldlm-\d+-[0-9a-f]{12}\.tmp")  # the names `write_atomically` writes under
# Control characters but tab and newline, what turns the direction of writing round, and halves of surrogate pairs, with
# which file names come that are not UTF-8.
UNSEEN = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


def visible(text: object) -> str:
    r"""A text, a name or an error as it may be printed: what would act on a terminal is seen instead.

    Whatever did not originate in this library is printed through here. In a table or a message of rich's, also as a
    `rich.text.Text`, which no square bracket is markup in.

    >>> print(visible("\x1b[31mred\x1b[0m, [/INST], \u202eabc\r\n"), end="")
    \x1b[31mred\x1b[0m, [/INST], \u202eabc\r
    """
    return UNSEEN.sub(lambda found: found[0].encode("unicode_escape").decode(), str(text))


def brief(value: object, most: int = 100) -> str:
    r"""A value as it may stand in a sentence: on one line, cut after so many characters. A file may hold any.

    >>> brief("one\ntwo" + 99 * "!", 8)
    'one two!...'
    """
    text = " ".join(str(value).split())
    return text if len(text) <= most else f"{text[:most]}..."


def is_special(path: str | Path) -> bool:
    """Say whether a path leads to a device, a FIFO or a socket, which is written into and never replaced."""
    return Path(path).exists() and not (Path(path).is_file() or Path(path).is_dir())


@contextmanager
def write_atomically(path: str | Path, through_links: bool = True) -> Iterator[BinaryIO]:
    """Open a temporary file beside `path` that takes its place when the block ends well, and vanishes when it does not.

    The name is unique, so two processes may write the same path at once: the later one wins, both leave a whole file.
    Data reach the disk before the name does; missing parent folders are made. A file that is replaced passes on its
    permissions and, as far as the system allows, owner and group; its other names (hard links) keep the old content.
    A device, FIFO or socket is written into, bit by bit as the block writes.

    Args:
        path: where the finished file is to stand.
        through_links: if `path` is a symbolic link, replace the file that it leads to, there or not, and not the link.

    Yields:
        The temporary file, open for binary writing; its `.name` is its path, for writers that want one.

    Raises:
        OSError: `path` is a folder, or cannot be written to; a full disk is reported with the name of the file.
    """
    path = Path(path)
    if path.is_dir():
        raise IsADirectoryError(errno.EISDIR, "this is a folder; give the name of a file in it", str(path))
    if is_special(path):
        with naming(path), open(path, "wb") as handle:
            yield handle
        return
    path = Path(os.path.realpath(path)) if through_links else path
    path.parent.mkdir(parents=True, exist_ok=True)
    # Without the name of the file: Lightning reads numbers out of names that it knows, ours among them.
    temporary = path.with_name(f".ldlm-{os.getpid()}-{secrets.token_hex(6)}.tmp")
    try:
        with naming(path), open(temporary, "xb") as handle:
            if sys.platform != "win32":
                with suppress(OSError):  # a file system without locks: nothing is swept there either
                    fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                _take_permissions(handle.fileno(), path)
            yield handle
            handle.flush()
            os.fsync(handle.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    if os.name == "posix":  # elsewhere a folder cannot be opened; without this a power cut can lose the new name
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


@contextmanager
def naming(path: str | Path) -> Iterator[None]:
    """Name a file or folder in the error of a full disk, which the system reports without a name."""
    try:
        yield
    except OSError as error:
        if error.filename is None and error.errno in FULL:
            error.filename = str(path)
        raise


def _take_permissions(descriptor: int, path: Path) -> None:
    """Give an open file the permissions of the file that it will replace, if there is one."""
    with suppress(OSError):  # no such file, or a file system without permissions
        there = path.stat(follow_symlinks=False)
        if stat.S_ISREG(there.st_mode):
            with suppress(OSError):  # only the superuser may give files away
                os.fchown(descriptor, there.st_uid, there.st_gid)
            os.fchmod(descriptor, stat.S_IMODE(there.st_mode))


def exit_on_signal(signum: int, frame: FrameType | None) -> NoReturn:
    """A signal handler that ends the process by an exception, with the status that shells report for the signal.

    So temporary files and folders are removed on the way out, which the system's own handler leaves behind.
    """
    raise SystemExit(128 + signum)


def sweep(folder: Path) -> None:
    """Remove what writers that were killed left in a folder, and nothing that a living one still writes.

    A writer holds a lock on its temporary file, which falls with its process, on this machine or another. Files of the
    last minute stay, since a file is there a moment before its lock; and so does everything where there are no locks.
    """
    for file in folder.glob(".*.tmp"):
        with suppress(OSError):  # locked, or gone, or not ours to remove
            if TEMPORARY.fullmatch(file.name) and time.time() - file.stat().st_mtime > 60:
                with open(file, "r+b") as handle:
                    if sys.platform != "win32":
                        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                        file.unlink()


def sha256(path: str | Path) -> str:
    """Return the SHA-256 of a file's bytes as 64 hexadecimal digits."""
    with open(path, "rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def verify_blocks(path: Path, digests: list[str], size: int, full: bool = True) -> None:
    """Compare each block of a file with its SHA-256.

    That they agreed is noted beside the file. Unless `full`, they are not read again while the file's size, inode and
    times are those of the note; whatever program alters or copies the file changes one of them.

    Raises:
        ValueError: a block of `size` bytes differs, or the file does not end with the last one.
    """
    note, there = path.with_suffix(".verified"), path.stat()
    known = [digests, there.st_size, there.st_ino, there.st_mtime_ns, there.st_ctime_ns]
    with suppress(OSError, ValueError):  # no note, or none of ours
        if not full and json.loads(note.read_text(encoding="utf-8")) == known:
            return
    with open(path, "rb") as handle:
        for number, wanted in enumerate([*digests, hashlib.sha256().hexdigest()]):
            if hashlib.sha256(handle.read(size)).hexdigest() != wanted:
                raise ValueError(
                    f"{path} was altered after it was written (block {number} of {size} bytes); "
                    f"delete it and {path.with_suffix('.json').name}, and it is made again"
                )
    with suppress(OSError), write_atomically(note) as file:  # where nothing can be written it is read each time
        file.write(json.dumps(known).encode())


def short(name: str) -> str:
    """A name without the folders of this machine, which mean nothing elsewhere.

    >>> short("/home/somebody/model.ckpt"), short("runs/model.ckpt")
    ('model.ckpt', 'runs/model.ckpt')
    """
    return Path(name).name if Path(name).is_absolute() else name


def check_output(output: str | None, option: str = "--output") -> None:
    """ValueError if the file to be written is a folder, or cannot be made where it is to stand."""
    if not output:
        return
    if Path(output).is_dir():
        raise ValueError(f"{option} {output} is a folder; give the name of a file in it")
    if is_special(output):
        if not os.access(output, os.W_OK):
            raise ValueError(f"{option} {output} cannot be written: there is no permission to; give another name")
        return
    there = next(folder for folder in Path(os.path.realpath(output)).parents if folder.exists())
    if not there.is_dir() or not os.access(there, os.W_OK):
        what = "a folder without permission to write" if there.is_dir() else "a file"
        raise ValueError(f"{option} {output} cannot be written: {there} is {what}; give another name")
