"""Documents, one text after another, from the user's own files or from a data set of the Hugging Face hub.

In: the name of a file, a folder or a hub data set, and the column that holds the text. Out: an iterator of strings that
holds one document at a time, their number, and an identity that changes whenever the documents might.
App. C "Data preprocessing" begins here; the LM1B detokeniser is MDLM's, whose protocol the paper follows.
"""

import abc
import gzip
import io
import json
import re
import zlib
from collections.abc import Iterator
from itertools import count
from pathlib import Path
from typing import Any

from ldlm._files import sha256
from ldlm.hub import PACKAGE_PREFIX, resolve

SUFFIXES = (".txt", ".jsonl", ".jsonl.gz", ".parquet")
TEXT_UNITS = ("line", "paragraph", "document")
# Twice the King James Bible. A tokenizer's memory grows with it: 16 MiB of English words take 2 GB, of dots 7 GB.
MAX_DOCUMENT_BYTES = 2**23
SKELETON = 2**20  # bytes of a JSON line outside its strings: "[]," alone takes 60 bytes in memory
STRING = re.compile(rb'"[^"\\]*+(?:\\.[^"\\]*+)*+"?', re.DOTALL)
STEM = 40  # characters: packed files and hidden states add to it, and file systems end at 255 bytes, four a character
FILES_HINT = "a local .txt, .jsonl, .jsonl.gz or .parquet file, or a folder of them"


class Corpus(abc.ABC):
    """A sequence of documents that can be walked through again and again, each time in the same order."""

    stem: str  # a short name for file names

    @abc.abstractmethod
    def __iter__(self) -> Iterator[str]:
        """Give the documents in order; ValueError naming file and line where one cannot be read."""

    @abc.abstractmethod
    def __len__(self) -> int:
        """Count the documents (local text is walked through for this)."""

    @abc.abstractmethod
    def identity(self) -> dict[str, Any]:
        """Describe the documents in JSON-able fields that differ whenever the documents may differ."""


class FileCorpus(Corpus):
    """Documents of local files: a `.jsonl` line or `.parquet` row is one; for `.txt` see `text_unit`.

    The lines of a `.txt` file end in LF, CR LF or CR, which all come out as LF; those at the end of a document are
    dropped. Strings in JSON and Parquet, and all other characters (U+0085, U+2028, form feeds), stay as they are.

    Args:
        path: a file with one of `SUFFIXES`, or a folder, searched recursively and read in sorted order.
        text_column: the JSON field or Parquet column with the text.
        text_unit: what one document of a `.txt` file is: a non-blank "line", a "paragraph" (ended by a blank line), or
            the whole "document", a file.
        max_document_bytes: of a document, and of a line; a compressed file of 1 MB can hold one of any length.

    Raises:
        FileNotFoundError: nothing is there.
        ValueError: a file of another kind; on reading: not UTF-8, not JSON, no such column, a longer document, or it
            changed meanwhile.
    """

    def __init__(
        self,
        path: str | Path,
        text_column: str = "text",
        text_unit: str = "paragraph",
        max_document_bytes: int = MAX_DOCUMENT_BYTES,
    ) -> None:
        self.path = Path(path).expanduser()
        self.text_column = text_column
        self.text_unit = text_unit
        self.max_document_bytes = max_document_bytes
        self.stem = _stem(self.path.resolve().name.partition(".")[0] or "corpus")
        self._known: dict[Path, tuple[int, ...]] = {}
        if not self.path.exists():
            raise FileNotFoundError(f"{path} does not exist; give {FILES_HINT}, or a hub name")
        if self.path.is_dir():
            inside = sorted(self.path.rglob("*"), key=lambda file: file.relative_to(self.path).as_posix())
            self.files = [
                file
                for file in inside
                if file.is_file() and has_known_suffix(file.name) and not file.name.startswith(".")
            ]
            if not self.files:
                raise FileNotFoundError(f"{path} is a folder without any of {', '.join(SUFFIXES)} in it")
        elif has_known_suffix(self.path.name) and self.path.is_file():  # reading a pipe would never end
            self.files = [self.path]
        else:
            raise ValueError(f"{path} is no file of the kinds {', '.join(SUFFIXES)}; convert it or rename it")

    def __iter__(self) -> Iterator[str]:
        """Give the documents file by file."""
        for file in self.files:
            before = self._known.get(file) or _state(file)
            try:
                if file.name.lower().endswith(".txt"):
                    yield from self._plain(file)
                elif file.name.lower().endswith(".parquet"):
                    yield from self._parquet(file)
                else:
                    yield from self._json_lines(file)
            except (ValueError, OSError):
                _check_unchanged(file, before)
                raise
            _check_unchanged(file, before)

    def __len__(self) -> int:
        """Count the documents by reading them."""
        return sum(1 for _ in self)

    def identity(self) -> dict[str, Any]:
        """Name, size and SHA-256 of each file; no absolute path, so that a moved corpus is the same corpus."""
        root = self.path if self.path.is_dir() else self.path.parent
        self._known = {file: _state(file) for file in self.files}  # reading finds out whether it is still this one
        files = [
            {"name": file.relative_to(root).as_posix(), "bytes": self._known[file][0], "sha256": sha256(file)}
            for file in self.files
        ]
        return {"files": files, "text_column": self.text_column, "text_unit": self.text_unit}

    def _plain(self, file: Path) -> Iterator[str]:
        kept, size = io.StringIO(), 0  # a list of short lines would take ten times the memory
        for number, line in _with_line_feeds(_lines(file, self.max_document_bytes)):
            blank = not line.strip()
            size = len(line.encode()) + (size if kept.tell() else 0)
            self._check_length(size, f"{file}, line {number}: a document up to there")
            if self.text_unit == "document":
                kept.write(line)
            elif self.text_unit == "line" and not blank:
                yield line.rstrip("\n")
            elif self.text_unit == "paragraph" and not blank:
                kept.write(line)
            elif self.text_unit == "paragraph" and kept.tell():
                yield kept.getvalue().rstrip("\n")
                kept = io.StringIO()
        text = kept.getvalue()
        if text.strip():
            yield text.rstrip("\n")

    def _json_lines(self, file: Path) -> Iterator[str]:
        for number, line in _lines(file, self.max_document_bytes):
            if not line.strip():
                continue
            if len(line) > SKELETON and len(STRING.sub(b"", line.encode())) > SKELETON:
                raise ValueError(
                    f"{file}, line {number} has more than {SKELETON:,} bytes outside of its strings, which is no text; "
                    "correct or remove that line"
                )
            try:
                record = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise ValueError(f"{file}, line {number} is not JSON ({error}); correct or remove that line") from None
            if not isinstance(record, dict):
                raise ValueError(f"{file}, line {number} is not a JSON object such as {{{self.text_column!r}: …}}")
            if self.text_column not in record:
                raise ValueError(_no_column(self.text_column, f"{file}, line {number}", list(record)))
            yield _text(record[self.text_column], self.text_column, f"{file}, line {number}")

    def _parquet(self, file: Path) -> Iterator[str]:
        import pyarrow
        import pyarrow.parquet

        row = 0
        try:
            with pyarrow.parquet.ParquetFile(file, pre_buffer=False) as table:
                if self.text_column not in table.schema_arrow.names:
                    raise ValueError(_no_column(self.text_column, str(file), table.schema_arrow.names))
                kind = table.schema_arrow.field(self.text_column).type
                if pyarrow.types.is_nested(kind):  # one cell can be longer than the file, and is no text
                    raise ValueError(_no_text(self.text_column, f"{file}, row 1", str(kind)))
                for group in range(table.num_row_groups):
                    self._check_group(table.metadata.row_group(group), f"{file}, after row {row}")
                    # Few rows at once: a file can hold one long text to which many rows refer.
                    for batch in table.iter_batches(4, row_groups=[group], columns=[self.text_column]):
                        for value in batch.column(0):
                            row += 1
                            where = f"{file}, row {row}"
                            if isinstance(value, pyarrow.DictionaryScalar):
                                value = value.value
                            if isinstance(value, pyarrow.BinaryScalar) and value.is_valid:
                                self._check_length(value.as_buffer().size, where)
                            yield _text(value.as_py(), self.text_column, where)
        except UnicodeDecodeError:
            raise ValueError(f"{file}, after row {row} is not UTF-8; save the text as UTF-8") from None
        except (pyarrow.ArrowException, OSError) as error:
            reason = str(error).splitlines()[0]
            raise ValueError(
                f"{file} cannot be read as Parquet ({reason}); it may be truncated: fetch it again"
            ) from None

    def _check_group(self, group: Any, where: str) -> None:
        """Compare what a row group says of its own size, before anything is decompressed."""
        columns = (group.column(place) for place in range(group.num_columns))
        sizes = [column.total_uncompressed_size for column in columns if column.path_in_schema == self.text_column]
        self._check_length(sum(sizes) // max(1, group.num_rows), f"{where}: the average text")

    def _check_length(self, size: int, where: str) -> None:
        if size > self.max_document_bytes:
            raise ValueError(_too_long(where, self.max_document_bytes))


class HubCorpus(Corpus):
    """Documents of a data set on the Hugging Face hub, which `datasets` downloads once and keeps.

    Args:
        name: the data set's name, such as `Skylion007/openwebtext`.
        config_name: which of its configurations, if it has several.
        split: which of its splits, in the `datasets` notation.
        revision: branch, tag or commit; `refs/convert/parquet` where the data set still is a script.
        text_column: the column with the text.
        max_document_bytes: of a document.

    Raises:
        FileNotFoundError: no network, or no such data set.
        ValueError: no such split, configuration or column; on reading: a longer document.
    """

    def __init__(
        self,
        name: str,
        config_name: str | None,
        split: str,
        revision: str | None,
        text_column: str,
        max_document_bytes: int = MAX_DOCUMENT_BYTES,
    ) -> None:
        import datasets

        self.stem = _stem(name)
        self.name, self.config_name, self.split, self.revision = name, config_name, split, revision
        self.text_column = text_column
        self.max_document_bytes = max_document_bytes
        try:
            self.rows = datasets.load_dataset(name, config_name, split=split, revision=revision)
        except (OSError, RuntimeError, ValueError, datasets.exceptions.DatasetsError) as error:
            kind = ValueError if isinstance(error, ValueError) else FileNotFoundError
            raise kind(
                f"dataset={name!r} (split={split!r}, config_name={config_name!r}, revision={revision!r}) could not be "
                f"loaded from the hub ({str(error).splitlines()[0]}); check name and network, or give {FILES_HINT}"
            ) from None
        if text_column not in self.rows.column_names:
            raise ValueError(_no_column(text_column, name, self.rows.column_names))

    def __iter__(self) -> Iterator[str]:
        """Give the documents in the data set's own order."""
        for number, row in enumerate(self.rows.select_columns([self.text_column])):
            text = _text(row[self.text_column], self.text_column, f"{self.name}, row {number}")
            if len(text) > self.max_document_bytes:
                raise ValueError(_too_long(f"{self.name}, row {number}", self.max_document_bytes))
            yield text

    def __len__(self) -> int:
        """Count the documents, which the data set knows."""
        return len(self.rows)

    def identity(self) -> dict[str, Any]:
        """Name, configuration, split, revision, and the fingerprint `datasets` made of the files behind them."""
        return {
            "hub": self.name,
            "config_name": self.config_name,
            "split": self.split,
            "revision": self.revision,
            "hub_fingerprint": self.rows._fingerprint,  # covers the commit, which a branch name does not
            "text_column": self.text_column,
        }


def looks_like_path(name: str) -> bool:
    """Say whether a name can only mean files: a known suffix, a leading `.`, `/` or `~`, a trailing `/`, `package:`."""
    return name.startswith((PACKAGE_PREFIX, ".", "/", "~")) or name.endswith("/") or has_known_suffix(name)


def is_local(dataset: str) -> bool:
    """Say whether a data set's name means files: it looks like a path, or something of that name is there."""
    return looks_like_path(dataset) or Path(dataset).exists()


def has_known_suffix(name: str) -> bool:
    """Say whether a file name ends in one of `SUFFIXES`, in capitals or not."""
    return name.lower().endswith(SUFFIXES)


def open_corpus(
    dataset: str,
    text_column: str = "text",
    text_unit: str = "paragraph",
    split: str = "train",
    revision: str | None = None,
    config_name: str | None = None,
    max_document_bytes: int = MAX_DOCUMENT_BYTES,
) -> Corpus:
    """Open local files where `dataset` means such (`is_local`), else a data set of the hub.

    Raises:
        FileNotFoundError: neither can be found.
        ValueError: it is there but cannot be read as asked; the sentence says which argument to change.
    """
    if is_local(dataset):
        return FileCorpus(resolve(dataset), text_column, text_unit, max_document_bytes)
    return HubCorpus(dataset, config_name, split, revision, text_column, max_document_bytes)


def lm1b_detokenizer(text: str) -> str:
    """Undo the tokenisation of the One Billion Word corpus by MDLM's rules (App. C follows that protocol).

    >>> lm1b_detokenizer("He said : it 's 5 $ 3 , ( or so ) .")
    "He said: it's 5 $3, (or so) ."
    """
    text = re.sub(r"\b(https?) : / / ", r"\1://", text)
    text = re.sub(r" '(\w+)", r"'\1", text)  # clitics: it 's, they 're; opening quotes have a space behind them
    text = re.sub(r"( \w+) \.(?=\s|$)", r"\1.", text)  # a full stop joins a word, and nothing else
    text = re.sub(r" ([?!])(?=\s|$)", r"\1", text)
    text = re.sub(r" ([,:;])(?=\s|$)", r"\1", text)
    text = text.replace(" / ", "/")
    text = re.sub(r'" ([^"]+) "', r'"\1"', text)
    text = re.sub(r"' ([^']+) '", r"'\1'", text)
    text = re.sub(r"\( ([^()]+) \)", r"(\1)", text)
    text = re.sub(r"\[ ([^\[\]]+) \]", r"[\1]", text)
    return re.sub(r"([$£]) ", r"\1", text)


def _lines(file: Path, longest: int) -> Iterator[tuple[int, str]]:
    """Give (line number from 1, line with its ending), decoded one by one so that an error can name the line."""
    try:
        with gzip.open(file, "rb") if file.name.lower().endswith(".gz") else open(file, "rb") as handle:
            for number in count(1):
                line = handle.readline(longest + 1)
                if len(line) > longest:
                    raise ValueError(_too_long(f"{file}, line {number}", longest))
                if not line:
                    return
                try:
                    yield number, line.decode("utf-8-sig" if number == 1 else "utf-8")
                except UnicodeDecodeError as error:
                    raise ValueError(f"{file}, line {number} is not UTF-8 ({error.reason}); save it as UTF-8") from None
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise ValueError(f"{file} is not a whole gzip file ({error}); fetch or compress it again") from None


def _too_long(where: str, longest: int) -> str:
    return (
        f"{where} has more than the {longest:,} bytes that a document may have; cut it, or give a larger "
        "max_document_bytes (--data.max_document_bytes)"
    )


def _with_line_feeds(lines: Iterator[tuple[int, str]]) -> Iterator[tuple[int, str]]:
    """Give the lines with a line feed for every CR LF, and for every CR, which ends a line too."""
    for number, line in lines:
        if "\r" in line:
            yield from ((number, part) for part in io.StringIO(line, newline=None))
        else:
            yield number, line


def _state(file: Path) -> tuple[int, ...]:
    """Size, inode and time of a file, one of which differs once it is written to or replaced; zeros if it is gone."""
    try:
        stat = file.stat()
    except FileNotFoundError:
        return (0, 0, 0)
    return stat.st_size, stat.st_ino, stat.st_mtime_ns


def _check_unchanged(file: Path, before: tuple[int, ...]) -> None:
    if _state(file) != before:
        raise ValueError(f"{file} changed while it was read: wait until nothing writes to it, or give a copy of it")


def _stem(name: str) -> str:
    """A name short and plain enough to begin the names of files."""
    return re.sub(r"[^\w.-]+", "-", name)[:STEM]


def _no_column(wanted: str, where: str, there: list[str]) -> str:
    return f"text_column={wanted!r} is not in {where}; it has {', '.join(map(repr, there)) or 'no columns'}"


def _no_text(column: str, where: str, kind: str) -> str:
    return f"{where}: {column!r} holds {kind}, a text is wanted; choose another text_column"


def _text(value: object, column: str, where: str) -> str:
    if not isinstance(value, str):
        raise ValueError(_no_text(column, where, type(value).__name__))
    if not value.isascii():
        try:
            value.encode()
        except UnicodeEncodeError:  # JSON's "\ud800" alone: no tokenizer takes it
            raise ValueError(f"{where}: {column!r} holds half a surrogate pair, which is no text; remove it") from None
    return value
