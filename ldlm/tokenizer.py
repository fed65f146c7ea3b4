"""Tokenizers: which one, which of its ids stand between documents, its digest, its files as tensors.

In: a name, a transformers tokenizer, token ids, or files. Out: a tokenizer, ids, texts, files.
No section of the paper.
"""

import hashlib
import json
import os
import tempfile
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from ldlm._files import FULL, naming
from ldlm._sizes import storage_bytes
from ldlm.hub import check_json, resolve

LOST = -1  # in the place of text that a tokenizer drops
ODD = "\ufdd0"  # a noncharacter: Unicode promises that no text holds it
SAMPLE = "The naïve  Cafe, 1,234 東京\n\tDON'T"  # tells tokenizers apart that are written in Python


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


def frame_ids(tokenizer: PreTrainedTokenizerBase) -> tuple[int | None, int | None]:
    """Return the ids that begin and end a row: BOS, CLS or what ends one; EOS, or SEP for the BERT family; or None."""
    end = _first(tokenizer.eos_token_id, tokenizer.sep_token_id)
    return _first(tokenizer.bos_token_id, tokenizer.cls_token_id, end), end


def _first(*ids: int | None) -> int | None:
    return next((number for number in ids if number is not None), None)


def eos_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """Return the id that ends a document and a row; ValueError if the tokenizer has neither EOS nor SEP."""
    _, end = frame_ids(tokenizer)
    if end is None:
        raise ValueError(
            f"tokenizer={name_tokenizer(tokenizer)!r} has neither an EOS nor a SEP token; set its eos_token"
        )
    return end


def bos_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """Return the id that begins a row; ValueError if there is none."""
    begin, _ = frame_ids(tokenizer)
    return eos_id(tokenizer) if begin is None else begin


def special_ids(tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """Return the ids of special tokens: those with a name, such as EOS, and those that are only marked as special."""
    marked = {number for number, token in tokenizer.added_tokens_decoder.items() if token.special}
    return marked | set(tokenizer.all_special_ids)


def unknown_id(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """Return the id of text that the vocabulary lacks; None if there is no such id, or it has another meaning too."""
    found = [tokenizer.unk_token_id]
    if tokenizer.is_fast:
        try:
            found = [token.id for token in tokenizer.backend_tokenizer.model.tokenize(ODD)]
        except Exception:  # tokenizers' own, which has no subclass: the model has no id for what it lacks
            return None
    named = {tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.cls_token_id, tokenizer.sep_token_id}
    return found[0] if len(found) == 1 and found[0] not in named else None  # several: bytes stand for what is lacking


def tokenizer_digest(tokenizer: PreTrainedTokenizerBase) -> str:
    """Return a SHA-256 of what turns text into ids, BOS and EOS; it survives saving, and a new token for padding.

    What stands between the parts of a model's input, such as a template with [CLS], plays no part in packed text.
    """
    frame = frame_ids(tokenizer)
    if tokenizer.is_fast:
        return _backend_digest(tokenizer.backend_tokenizer.to_str(), frozenset(special_ids(tokenizer)), frame)
    about = {"frame": frame, "class": type(tokenizer).__name__, "vocabulary": tokenizer.get_vocab()}
    with suppress(ValueError):  # it has no id for some of the sample
        about["sample"] = token_id_function(tokenizer)([SAMPLE])
    return fingerprint(about)


@lru_cache(maxsize=2)  # a run asks for it again and again, and a vocabulary of 128,000 takes a second
def _backend_digest(state: str, special: frozenset[int], frame: tuple[int | None, int | None]) -> str:
    """The digest of what the tokenizers library writes down, which is JSON."""
    parts = json.loads(state)
    pieces, added = dict(parts["model"]["vocab"]), sorted(parts["added_tokens"], key=lambda token: token["id"])
    about = {"frame": frame} | {name: parts[name] for name in ("model", "normalizer", "pre_tokenizer")}
    # A special token that is no piece of the vocabulary cannot be made of text.
    about["special"] = [token["id"] for token in added if token["id"] in special and token["content"] in pieces]
    about["added"] = [token for token in added if token["id"] not in special]
    before = about["pre_tokenizer"] or {}
    if before.get("type") == "Metaspace" and before["prepend_scheme"] == "always" and not about["added"]:
        # Nothing divides a text before this, so its beginning is the only one; transformers saves Llama's so (5.23).
        before["prepend_scheme"] = "first"
    return fingerprint(about)


def vocabulary_size(tokenizer: PreTrainedTokenizerBase) -> int:
    """Return one more than the largest id, which a vocabulary with gaps lets exceed `len(tokenizer)`."""
    return max(len(tokenizer), 1 + max(tokenizer.get_vocab().values(), default=0))


def packed_vocabulary_size(tokenizer: PreTrainedTokenizerBase) -> int:
    """Return one more than the largest id that packed text can hold: of special tokens, only BOS, EOS and unknown."""
    absent = special_ids(tokenizer) - {unknown_id(tokenizer), *frame_ids(tokenizer)}
    return 1 + max((number for number in tokenizer.get_vocab().values() if number not in absent), default=0)


def token_id_function(
    tokenizer: PreTrainedTokenizerBase, mark_lost: bool = False
) -> Callable[[list[str]], list[list[int]]]:
    """Give the fastest way from texts to ids, nothing added; a literal <|endoftext|> is text, not the end of one.

    No id of a special token comes out of it, except that of unknown text. Where a vocabulary cannot spell a special
    token in other pieces, as one of whole words cannot, it is unknown.

    Args:
        tokenizer: whose ids; it stays as it is.
        mark_lost: whether `LOST` stands where a tokenizer without an id for unknown text drops some.

    Raises:
        ValueError: from the call, if a text has what the tokenizer has no id for.
    """
    (call, dropped), unknown, name = _plain_call(tokenizer), unknown_id(tokenizer), name_tokenizer(tokenizer)
    special = special_ids(tokenizer) - {unknown}

    def encode(texts: list[str]) -> list[list[int]]:
        try:
            found = call(texts)
        except Exception as error:  # tokenizers' own, which has no subclass
            raise ValueError(f"tokenizer={name!r} cannot read a text ({error}); give it an unk_token") from error
        for row, text in enumerate(texts):
            if special.isdisjoint(found[row]):
                continue
            if dropped in found[row]:
                marked = (LOST if number == dropped else number for number in found[row])
                found[row] = [number for number in marked if mark_lost or number != LOST]
            elif unknown is None:
                token = tokenizer.convert_ids_to_tokens(next(number for number in found[row] if number in special))
                raise ValueError(
                    f"tokenizer={name!r} makes its special token {token!r} of the text {text[:80]!r}, and has no token "
                    "for unknown text to put there: remove what it stands for by detokenize, or give another tokenizer"
                )
            else:
                found[row] = [unknown if number in special else number for number in found[row]]
        return found

    return encode


def _plain_call(tokenizer: PreTrainedTokenizerBase) -> tuple[Callable[[list[str]], list[list[int]]], int | None]:
    """Give a way from texts to ids in which special tokens that a text spells out are not recognised.

    And the id that stands in it for characters that are dropped otherwise, if there is one.
    """
    if not tokenizer.is_fast:
        plain = {"add_special_tokens": False, "split_special_tokens": True, "verbose": False}
        return lambda texts: tokenizer(texts, padding=False, truncation=False, **plain)["input_ids"], None
    # Transformers' own call also wants to know where each token stood. A copy: the tokenizer stays as it was given.
    # `encode_special_tokens` alone leaves a special token to the model, and a vocabulary that has it as a piece, as
    # Unigram and whole words do, makes it whole again. So in the copy no special token has a name that text can have.
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    model, hidden = state["model"], special_ids(tokenizer) | {unknown_id(tokenizer)}
    unigram = model["type"] == "Unigram"
    pieces = {piece: number for number, (piece, _) in enumerate(model["vocab"])} if unigram else model["vocab"]
    named = pieces | {token["content"]: token["id"] for token in state["added_tokens"]}
    names = {piece: f"{ODD}{number}{ODD}" for piece, number in named.items() if number in hidden}
    for token in state["added_tokens"]:
        if token["id"] in hidden:
            token.update(content=names[token["content"]], special=True, normalized=False)
    if unigram:
        model["vocab"] = [[names.get(piece, piece), score] for piece, score in model["vocab"]]
    else:
        model["vocab"] = {names.get(piece, piece): number for piece, number in model["vocab"].items()}
        model["unk_token"] = names.get(model["unk_token"], model["unk_token"])
    dropped = None
    if model["type"] == "BPE":
        if not model["unk_token"]:  # it would drop what it lacks, and says so by a special token that text cannot have
            piece, dropped = next(((piece, pieces[piece]) for piece in names if piece in pieces), ("", None))
            model["unk_token"] = names.get(piece)
        prefix = model["continuing_subword_prefix"] or ""
        pairs = (((one, two), one + two.removeprefix(prefix)) for one, two in model["merges"])
        model["merges"] = [pair for pair, whole in pairs if names.keys().isdisjoint([*pair, whole])]
    state.update(truncation=None, padding=None, post_processor=None, decoder=None)
    backend = type(tokenizer.backend_tokenizer).from_str(json.dumps(state))
    backend.encode_special_tokens = True
    return lambda texts: [found.ids for found in backend.encode_batch_fast(texts, add_special_tokens=False)], dropped


def fingerprint(made_from: dict[str, Any]) -> str:
    """SHA-256 of plain data, as JSON of sorted keys."""
    return hashlib.sha256(json.dumps(made_from, sort_keys=True).encode()).hexdigest()


def name_tokenizer(tokenizer: PreTrainedTokenizerBase) -> str:
    """Say which tokenizer this is: its name, or the last component of its folder, and its size."""
    name = tokenizer.name_or_path.rstrip("/")
    short = name.rpartition("/")[2] if name.startswith("/") else name
    return f"{short or type(tokenizer).__name__} ({len(tokenizer):,} tokens)"


def pack_tokenizer(tokenizer: PreTrainedTokenizerBase) -> dict[str, Tensor]:
    """A tokenizer's files by name, each as bytes [length] uint8."""
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        files = [path for path in sorted(Path(folder).iterdir()) if path.is_file()]
        return {path.name: torch.frombuffer(bytearray(path.read_bytes()), dtype=torch.uint8) for path in files}


def check_tokenizer(tokenizer: PreTrainedTokenizerBase) -> None:
    """Raise ValueError if transformers does not save a tokenizer whole: a checkpoint's would give other ids."""
    kept = unpack_tokenizer(pack_tokenizer(tokenizer), "the model")
    if tokenizer_digest(kept) != tokenizer_digest(tokenizer):
        raise ValueError(
            f"tokenizer={name_tokenizer(tokenizer)!r} gives other ids once it is saved and loaded again, and a "
            "checkpoint would hold that other one: save it by save_pretrained, and give the folder as the tokenizer"
        )


def unpack_tokenizer(files: dict[str, Tensor], source: str = "the file") -> PreTrainedTokenizerBase:
    """The inverse of `pack_tokenizer`; ValueError if these are no tokenizer's files."""
    with tempfile.TemporaryDirectory() as folder, naming(folder):
        try:
            if sum(content.nbytes for content in files.values()) > storage_bytes(files.values()):
                raise ValueError("several of them are the same bytes")
            for name, content in files.items():
                (Path(folder) / Path(name).name).write_bytes(content.numpy().tobytes())
        except Exception as error:  # a stranger's names and contents can be anything
            if isinstance(error, OSError) and error.errno in FULL:
                raise
            raise ValueError(f"{source} holds no files of a tokenizer ({error})") from error
        return read_tokenizer(folder, source)


def read_tokenizer(folder: str | os.PathLike[str], source: str) -> PreTrainedTokenizerBase:
    """The tokenizer of a folder, none of whose code is run; ValueError if it cannot be read."""
    try:
        check_json(Path(folder))
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            folder, trust_remote_code=False, local_files_only=True
        )
    except Exception as error:  # a stranger's files can make it raise anything
        reason = str(error).partition("\n")[0]
        raise ValueError(f"the tokenizer of {source} could not be read ({reason})") from error
    return tokenizer


# Special tokens that stand between documents or around a row; what ends a document comes first.
BOUNDARIES = ("eos_token", "sep_token", "bos_token", "cls_token", "pad_token")


def boundary_tokens(tokenizer: PreTrainedTokenizerBase) -> dict[str, int]:
    """The tokenizer's special tokens that begin, end or pad documents, and their ids."""
    tokens = tokenizer.special_tokens_map
    return {tokens[name]: tokenizer.convert_tokens_to_ids(tokens[name]) for name in BOUNDARIES if name in tokens}


def split_documents(tokenizer: PreTrainedTokenizerBase, rows: Sequence[Sequence[int]]) -> list[list[str]]:
    """The documents of each row of token ids, as texts: what stands before, between and after its `boundary_tokens`.

    A row with k of them has k + 1 documents, empty ones among them: nothing is lost. Other special tokens, such as the
    unknown one, are left out.
    """
    marks, split = set(boundary_tokens(tokenizer).values()), []
    for row in rows:
        documents: list[list[int]] = [[]]
        for token in row:
            if token in marks:
                documents.append([])
            else:
                documents[-1].append(token)
        split.append(tokenizer.batch_decode(documents, skip_special_tokens=True))
    return split


def join_documents(documents: Sequence[str], boundary: str | None = None) -> str:
    """One text of documents: with ``boundary`` between any two; None for a blank, empty ones and outer blanks gone."""
    if boundary is not None:
        return boundary.join(documents)
    return " ".join(stripped for document in documents if (stripped := document.strip()))
