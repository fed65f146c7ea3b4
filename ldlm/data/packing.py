"""The tokens of a whole corpus in one flat file.

In: a `Corpus` and a tokenizer. Out: for each part (train, validation) a `.bin` of token ids, all documents one after
another and each followed by EOS, with a `.json` header that says everything that shaped it.
App. C "Data preprocessing": MDLM's protocol, without its faults: no tail is lost between batches of documents, and
BERT's documents end in [SEP]. What is read from the file, [BOS] + n-2 tokens + [EOS], is in `rows.py`.
"""

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
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from transformers import PreTrainedTokenizerBase

from ldlm._files import sweep, verify_blocks, visible, write_atomically
from ldlm.data.corpus import Corpus
from ldlm.data.rows import PackedRows
from ldlm.tokenizer import (
    LOST,
    bos_id,
    eos_id,
    fingerprint,
    name_tokenizer,
    packed_vocabulary_size,
    token_id_function,
    tokenizer_digest,
    unknown_id,
)

FORMAT_VERSION = 1
BLOCK_BYTES = 64 * 2**20  # one digest per block: an altered file is found, and found where
BATCH_CHARACTERS = 2**20  # enough to keep a fast tokenizer's threads busy, little enough for any memory
PARTS = ("train", "validation")
# Shares of unknown tokens. In its own language a subword vocabulary stays under .01, one of 10,000 whole words under
# .03; text in another script gives .4 and more, since a run of unknown characters can be a single token.
MUCH_UNKNOWN, MOST_UNKNOWN = 0.01, 0.25
VERIFICATIONS = ("once", "full")


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
        whole = header["fingerprint"] == fingerprint(made_from) and len(header["blocks"]) >= 0
        whole = whole and header.pop("digest", None) in (None, fingerprint(header))  # of all that is left
        length = tokens * np.dtype(made_from["dtype"]).itemsize
        digest, name = made_from["tokenizer"], header["tokenizer"]
        whole = whole and unknown_share(header) >= 0
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
        ValueError: a file in the folder was truncated or altered, the corpus cannot be read or divided, or much of it
            is unknown to the tokenizer.
    """
    end, size = eos_id(tokenizer), packed_vocabulary_size(tokenizer)
    dtype, unknown = "uint16" if size <= 2**16 else "uint32", unknown_id(tokenizer)
    common = {
        **corpus.identity(),
        "detokenize": detokenize and f"{detokenize.__module__}.{detokenize.__qualname__}",
        "detokenize_source": detokenize and hashlib.sha256(inspect.getsource(detokenize).encode()).hexdigest(),
        "tokenizer": tokenizer_digest(tokenizer),
        "eos": end,
        "vocabulary": size,
        "dtype": dtype,
        "held_out": held_out,
    }
    made_from = {part: {**common, "part": part} for part in parts}
    paths = {part: Path(folder) / f"{corpus.stem}-{part}-{fingerprint(made_from[part])[:16]}.bin" for part in parts}
    missing = [part for part in parts if not (paths[part].exists() and paths[part].with_suffix(".json").exists())]
    for part in set(parts) - set(missing):
        header = read_header(paths[part], tokenizer)
        if header["made_from"] != made_from[part]:
            raise ValueError(f"{paths[part]} stands where another corpus belongs; delete it and its header")
        verify_blocks(paths[part], header["blocks"], BLOCK_BYTES, full=verify == "full")
        _warn_of_unknown(header, paths[part], tokenizer)
    if not missing:
        return paths
    sweep(Path(folder))
    holds_out = _division(corpus, held_out)
    with ExitStack() as stack:
        # The tokens take their place first and the headers last: without its header a file is never used.
        written = {part: _Stream(stack.enter_context(write_atomically(paths[part])), dtype) for part in missing}
        for number, (text, ids) in enumerate(_tokenise(corpus, tokenizer, detokenize)):
            part = PARTS[holds_out(number)] if len(parts) > 1 else parts[0]
            if part in written:
                kept = [number for number in ids if number != LOST] if LOST in ids else ids
                written[part].append([*kept, end])
                written[part].unknown += 0 if unknown is None else kept.count(unknown)
                written[part].lost += len(ids) - len(kept) if ids else bool(text.strip())
        for stream in written.values():
            stream.flush(last=True)
            _refuse_unknown(stream.counts(), tokenizer)
    for part, stream in written.items():
        header = {"format_version": FORMAT_VERSION, "fingerprint": fingerprint(made_from[part])}
        header |= {"tokenizer": name_tokenizer(tokenizer), **stream.counts()}
        header |= {"blocks": stream.blocks, "made_from": made_from[part]}
        header["digest"] = fingerprint(header)
        with write_atomically(paths[part].with_suffix(".json")) as handle:
            handle.write(json.dumps(header, indent=1).encode())
        rank_zero_info(f"packed {stream.documents:,} documents, {stream.tokens:,} tokens into {visible(paths[part])}")
        _warn_of_unknown(header, paths[part], tokenizer)
    return paths


def unknown_share(counts: dict[str, Any]) -> float:
    """Return the share of a text's tokens that are unknown, by a header's counts; what was lost counts as unknown."""
    texts = counts["tokens"] - counts["documents"] + counts["lost"]  # each document has one token that ends it
    return float((counts["unknown"] + counts["lost"]) / max(1, texts))


def _warn_of_unknown(header: dict[str, Any], path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    share = unknown_share(header)
    if share >= MUCH_UNKNOWN:
        rank_zero_warn(
            f"{share:.1%} of the tokens in {path} are unknown to {name_tokenizer(tokenizer)}: that much of the text is "
            "lost, and no model of it can be right there; a tokenizer made for this text knows it all"
        )


def _refuse_unknown(counts: dict[str, Any], tokenizer: PreTrainedTokenizerBase) -> None:
    name = name_tokenizer(tokenizer)
    if counts["lost"] and counts["tokens"] == counts["documents"]:
        raise ValueError(
            f"tokenizer={name!r} made no token of the text of {counts['documents']:,} documents: its vocabulary is "
            "empty, or has none of their characters; load it by from_pretrained (transformers 5 ignores vocab_file= "
            "and merges_file=, its arguments are vocab= and merges=), or give another"
        )
    if (share := unknown_share(counts)) > MOST_UNKNOWN:
        raise ValueError(
            f"{share:.0%} of the text's tokens are unknown to tokenizer={name!r}, and more than {MOST_UNKNOWN:.0%} is "
            "another language or another kind of text than it was made for: give a tokenizer that knows this text"
        )


class _Stream:
    """One part's tokens on their way to its file, with a digest of each block; holds a block at most."""

    def __init__(self, handle: BinaryIO, dtype: str) -> None:
        self.handle, self.dtype = handle, np.dtype(dtype).newbyteorder("<")
        self.tokens = self.documents = self.unknown = self.lost = 0
        self.blocks: list[str] = []
        self._waiting = bytearray()

    def append(self, ids: list[int]) -> None:
        self._waiting += np.array(ids, dtype=self.dtype).tobytes()
        self.tokens += len(ids)
        self.documents += 1
        if len(self._waiting) >= BLOCK_BYTES:
            self.flush()

    def counts(self) -> dict[str, int]:
        """Say how many tokens there are, of them unknown ones, and how much text, or whole documents, gave none."""
        counts = {"tokens": self.tokens, "documents": self.documents}
        return counts | {"unknown": self.unknown, "lost": self.lost}

    def flush(self, last: bool = False) -> None:
        while len(self._waiting) >= BLOCK_BYTES or (last and self._waiting):
            block = bytes(self._waiting[:BLOCK_BYTES])
            del self._waiting[:BLOCK_BYTES]
            self.blocks.append(hashlib.sha256(block).hexdigest())
            self.handle.write(block)


def _tokenise(
    corpus: Iterable[str], tokenizer: PreTrainedTokenizerBase, detokenize: Callable[[str], str] | None
) -> Iterator[tuple[str, list[int]]]:
    """Give each document and its ids; documents go to the tokenizer in batches, whose edges change nothing."""
    encode, waiting = token_id_function(tokenizer, mark_lost=True), deque[tuple[list[str], Future[list[list[int]]]]]()
    with ThreadPoolExecutor(1) as ahead:  # a fast tokenizer needs no Python: files are read and written meanwhile
        for texts in batches(corpus if detokenize is None else map(detokenize, corpus)):
            waiting.append((texts, ahead.submit(encode, texts)))
            if len(waiting) > 2:
                texts, first = waiting.popleft()
                yield from zip(texts, first.result(), strict=True)
        for texts, rest in waiting:
            yield from zip(texts, rest.result(), strict=True)


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
