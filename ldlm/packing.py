"""The tokens of a whole corpus in one flat file.

In: a `Corpus` and a tokenizer. Out: for each part (train, validation) a `.bin` of token ids, all documents one after
another and each followed by EOS, with a `.json` header that says everything that shaped it.
App. C "Data preprocessing": MDLM's protocol, without its faults: no tail is lost between batches of documents, and
BERT's documents end in [SEP]. What is read from the file, [BOS] + n-2 tokens + [EOS], is in `rows.py`.
"""

import copy
import hashlib
import inspect
import json
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from fractions import Fraction
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from lightning.pytorch.utilities import rank_zero_info
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from ldlm.corpus import Corpus
from ldlm.files import resolve, sweep, verify_blocks, visible, write_atomically
from ldlm.rows import PackedRows

FORMAT_VERSION = 1
BLOCK_BYTES = 64 * 2**20  # one digest per block: an altered file is found, and found where
BATCH_CHARACTERS = 2**20  # enough to keep a fast tokenizer's threads busy, little enough for any memory
PARTS = ("train", "validation")
VERIFICATIONS = ("once", "full")


def load_tokenizer(tokenizer: str | PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """Load a tokenizer by hub id, folder or `package:` name; one that is built already is returned as it is.

    Raises:
        FileNotFoundError: no such folder or package, no such model on the hub, or no network.
    """
    if not isinstance(tokenizer, str):
        return tokenizer
    try:
        return AutoTokenizer.from_pretrained(resolve(tokenizer), trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        raise FileNotFoundError(
            f"tokenizer={tokenizer!r} is neither a folder with a tokenizer nor one that the hub gave "
            f"({str(error).splitlines()[0]}); check name and network, or give a folder made by save_pretrained"
        ) from None


def eos_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """Return the id that ends a document and a row: EOS, or SEP for the BERT family; ValueError if there is neither."""
    for token in (tokenizer.eos_token_id, tokenizer.sep_token_id):
        if token is not None:
            return int(token)
    raise ValueError(f"tokenizer={name_tokenizer(tokenizer)!r} has neither an EOS nor a SEP token; set its eos_token")


def bos_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """Return the id that begins a row: BOS, or CLS, or what ends a row; ValueError if there is none."""
    for token in (tokenizer.bos_token_id, tokenizer.cls_token_id):
        if token is not None:
            return int(token)
    return eos_id(tokenizer)


def tokenizer_digest(tokenizer: PreTrainedTokenizerBase) -> str:
    """Return a SHA-256 of what turns text into ids, the same in every process and wherever the tokenizer came from."""
    if tokenizer.is_fast:
        model = json.loads(tokenizer.backend_tokenizer.to_str())
        model.update(truncation=None, padding=None)  # set by whichever call came last, and unused here
    else:
        model = {"class": type(tokenizer).__name__, "vocabulary": tokenizer.get_vocab()}
    return hashlib.sha256(json.dumps(model, sort_keys=True).encode()).hexdigest()


def vocabulary_size(tokenizer: PreTrainedTokenizerBase) -> int:
    """Return one more than the largest id, which a vocabulary with gaps lets exceed `len(tokenizer)`."""
    return max(len(tokenizer), 1 + max(tokenizer.get_vocab().values(), default=0))


def read_header(path: Path, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """Read the header beside a packed `.bin` and check everything that can be checked without reading the tokens.

    Raises:
        ValueError: the header is not one of ours or was altered, the tokenizer is another, or the length is wrong.
        FileNotFoundError: `.bin` or header is missing.
    """
    remedy = f"delete {path} and {path.with_suffix('.json').name}, and it is packed again"
    for file in (path, path.with_suffix(".json")):
        if not file.exists():
            raise FileNotFoundError(f"{file} does not exist, though the packed corpus consists of both; {remedy}")
    try:
        header = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))
        made_from, version, tokens = header["made_from"], header["format_version"], header["tokens"]
        whole = header["fingerprint"] == _fingerprint(made_from) and len(header["blocks"]) >= 0
        whole = whole and header.pop("digest", None) in (None, _fingerprint(header))  # of all that is left
        length = tokens * np.dtype(made_from["dtype"]).itemsize
        digest, name = made_from["tokenizer"], header["tokenizer"]
    except (ValueError, TypeError, KeyError, RecursionError):
        raise ValueError(f"{path.with_suffix('.json')} is not a whole header of a packed corpus; {remedy}") from None
    if version != FORMAT_VERSION or not whole:
        raise ValueError(f"{path.with_suffix('.json')} was altered or is of another format version; {remedy}")
    if digest != tokenizer_digest(tokenizer):
        raise ValueError(
            f"{path} was packed with tokenizer {name!r} (digest {digest[:12]}), but {name_tokenizer(tokenizer)!r} "
            f"(digest {tokenizer_digest(tokenizer)[:12]}) is given; use the former, or {remedy}"
        )
    if path.stat().st_size != length:
        raise ValueError(f"{path} has {path.stat().st_size} bytes, but {length} were written: it is damaged; {remedy}")
    return dict(header)


def open_packed(
    path: str | Path,
    tokenizer: PreTrainedTokenizerBase,
    sequence_length: int,
    special_tokens: bool = True,
    limit: int | None = None,
) -> PackedRows:
    """Open a packed `.bin` as rows; header, tokenizer and length are checked, see `read_header`.

    Args:
        path: the `.bin`, its header beside it.
        tokenizer: the one it was packed with.
        sequence_length: n, tokens in a row.
        special_tokens: whether [BOS] and [EOS] take the first and last of these.
        limit: keep only so many rows, spread evenly over the file.
    """
    path = Path(path)
    header = read_header(path, tokenizer)
    frame = (bos_id(tokenizer), eos_id(tokenizer)) if special_tokens else None
    return PackedRows(path, header["made_from"]["dtype"], header["tokens"], sequence_length, frame, limit)


def pack(
    corpus: Corpus,
    tokenizer: PreTrainedTokenizerBase,
    folder: str | Path,
    parts: tuple[str, ...] = ("train",),
    held_out: float | int | None = None,
    detokenize: Callable[[str], str] | None = None,
    verify: str = "once",
) -> dict[str, Path]:
    """Tokenise a corpus into files in `folder`, or find them there unaltered and made of exactly the same things.

    Two processes may pack the same corpus at once: each writes all of it, and the later one's equal files stay.

    Args:
        corpus: the documents.
        tokenizer: what makes ids of them; special tokens written out in a text stay text.
        folder: where the files stand.
        parts: ("train",), ("validation",), or both: then `held_out` divides the documents.
        held_out: a fraction in (0, 1), spread evenly (0.1: every tenth document), or the number of last documents.
        detokenize: applied to each text first; a named function of a module.
        verify: "once", a file that is there is read through the first time it is met; "full", every time.

    Returns:
        The path of the `.bin` of each part.

    Raises:
        ValueError: a file in the folder was truncated or altered, or the corpus cannot be read or divided.
    """
    end, dtype = eos_id(tokenizer), "uint16" if vocabulary_size(tokenizer) <= 2**16 else "uint32"
    common = {
        **corpus.identity(),
        "detokenize": detokenize and f"{detokenize.__module__}.{detokenize.__qualname__}",
        "detokenize_source": detokenize and hashlib.sha256(inspect.getsource(detokenize).encode()).hexdigest(),
        "tokenizer": tokenizer_digest(tokenizer),
        "eos": end,
        "vocabulary": vocabulary_size(tokenizer),
        "dtype": dtype,
        "held_out": held_out,
    }
    made_from = {part: {**common, "part": part} for part in parts}
    paths = {part: Path(folder) / f"{corpus.stem}-{part}-{_fingerprint(made_from[part])[:16]}.bin" for part in parts}
    missing = [part for part in parts if not (paths[part].exists() and paths[part].with_suffix(".json").exists())]
    for part in set(parts) - set(missing):
        header = read_header(paths[part], tokenizer)
        if header["made_from"] != made_from[part]:
            raise ValueError(f"{paths[part]} stands where another corpus belongs; delete it and its header")
        verify_blocks(paths[part], header["blocks"], BLOCK_BYTES, full=verify == "full")
    if not missing:
        return paths
    sweep(Path(folder))
    holds_out = _division(corpus, held_out)
    with ExitStack() as stack:
        # The tokens take their place first and the headers last: without its header a file is never used.
        written = {part: _Stream(stack.enter_context(write_atomically(paths[part])), dtype) for part in missing}
        for number, ids in enumerate(_tokenise(corpus, tokenizer, detokenize)):
            part = PARTS[holds_out(number)] if len(parts) > 1 else parts[0]
            if part in written:
                written[part].append([*ids, end])
        for stream in written.values():
            stream.flush(last=True)
    for part, stream in written.items():
        header = {"format_version": FORMAT_VERSION, "fingerprint": _fingerprint(made_from[part])}
        header |= {"tokenizer": name_tokenizer(tokenizer), "tokens": stream.tokens}
        header |= {"documents": stream.documents, "blocks": stream.blocks, "made_from": made_from[part]}
        header["digest"] = _fingerprint(header)
        with write_atomically(paths[part].with_suffix(".json")) as handle:
            handle.write(json.dumps(header, indent=1).encode())
        rank_zero_info(f"packed {stream.documents:,} documents, {stream.tokens:,} tokens into {visible(paths[part])}")
    return paths


class _Stream:
    """One part's tokens on their way to its file, with a digest of each block; holds a block at most."""

    def __init__(self, handle: BinaryIO, dtype: str) -> None:
        self.handle, self.dtype = handle, np.dtype(dtype).newbyteorder("<")
        self.tokens = self.documents = 0
        self.blocks: list[str] = []
        self._waiting = bytearray()

    def append(self, ids: list[int]) -> None:
        self._waiting += np.array(ids, dtype=self.dtype).tobytes()
        self.tokens += len(ids)
        self.documents += 1
        if len(self._waiting) >= BLOCK_BYTES:
            self.flush()

    def flush(self, last: bool = False) -> None:
        while len(self._waiting) >= BLOCK_BYTES or (last and self._waiting):
            block = bytes(self._waiting[:BLOCK_BYTES])
            del self._waiting[:BLOCK_BYTES]
            self.blocks.append(hashlib.sha256(block).hexdigest())
            self.handle.write(block)


def _tokenise(
    corpus: Iterable[str], tokenizer: PreTrainedTokenizerBase, detokenize: Callable[[str], str] | None
) -> Iterator[list[int]]:
    """Give the ids of each document; documents go to the tokenizer in batches, whose edges change nothing."""
    encode, waiting = encoder(tokenizer), deque[Future[list[list[int]]]]()
    with ThreadPoolExecutor(1) as ahead:  # a fast tokenizer needs no Python: files are read and written meanwhile
        for texts in batches(corpus if detokenize is None else map(detokenize, corpus)):
            waiting.append(ahead.submit(encode, texts))
            if len(waiting) > 2:
                yield from waiting.popleft().result()
        for rest in waiting:
            yield from rest.result()


def encoder(tokenizer: PreTrainedTokenizerBase) -> Callable[[list[str]], list[list[int]]]:
    """Give the fastest way from texts to ids, nothing added; a literal <|endoftext|> is text, not the end of one."""
    if not tokenizer.is_fast:
        plain = {"add_special_tokens": False, "split_special_tokens": True, "verbose": False}
        return lambda texts: tokenizer(texts, padding=False, truncation=False, **plain)["input_ids"]
    # Transformers' own call also wants to know where each token stood. A copy: the tokenizer stays as it was given.
    backend = copy.deepcopy(tokenizer.backend_tokenizer)
    backend.no_truncation(), backend.no_padding()
    backend.encode_special_tokens = True
    return lambda texts: [found.ids for found in backend.encode_batch_fast(texts, add_special_tokens=False)]


def batches(corpus: Iterable[str]) -> Iterator[list[str]]:
    """Give the documents in lists of some `BATCH_CHARACTERS`."""
    texts: list[str] = []
    characters = 0
    for text in corpus:
        texts.append(text)
        characters += len(text) + 1  # so that empty documents count too
        if characters >= BATCH_CHARACTERS:
            yield texts
            texts, characters = [], 0
    if texts:
        yield texts


def _division(corpus: Corpus, held_out: float | int | None) -> Callable[[int], bool]:
    """Say which documents are held out."""
    if held_out is None:
        return lambda number: False
    if isinstance(held_out, int):
        count = len(corpus)
        if held_out >= count:
            raise ValueError(f"validation={held_out} documents cannot be held out of {count}; give a smaller number")
        return lambda number: number >= count - held_out
    # As a decimal, since 10 * 0.1 is not to depend on rounding: i is held out when floor((i + 1) f) > floor(i f).
    fraction = Fraction(repr(held_out))
    return lambda number: (number + 1) * fraction // 1 > number * fraction // 1


def _fingerprint(made_from: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(made_from, sort_keys=True).encode()).hexdigest()


def name_tokenizer(tokenizer: PreTrainedTokenizerBase) -> str:
    """Say which tokenizer this is: its name, or the last component of its folder, and its size."""
    name = tokenizer.name_or_path.rstrip("/")
    short = name.rpartition("/")[2] if name.startswith("/") else name
    return f"{short or type(tokenizer).__name__} ({len(tokenizer):,} tokens)"
