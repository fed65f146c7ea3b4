"""Corpora that are damaged or merely odd: packed as other readers read them, or refused in one sentence.

What is expected is found by other means: whole files decoded at once, one text tokenised at a time, bytes put together
from GPT-2's alphabet.
"""

import gzip
import json
import os
import random
import signal
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from helpers.untrusted import one_sentence
from tokenizers import Tokenizer, pre_tokenizers
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from ldlm.data.corpus import open_corpus
from ldlm.data.packing import pack
from ldlm.tokenizer import eos_id

ODD = [
    "plain words", "", " ", "\x00", "nul\x00inside", "<|endoftext|>", "[SEP]", "[CLS] [MASK]", "<s></s>", "<unk>",
    "##ing", "שלום עולם", "\u202esdrawkcab\u202c", "مرحبا", "𝔘𝔫𝔦𝔠𝔬𝔡𝔢", "👩\u200d👩\u200d👧🏳\ufe0f\u200d🌈", "é e\u0301",
    "ﬁ", "\ufeffbom", "\ufffd", "a\u2028b\u2029c", "tab\tbed", "\x1b[31mred", "a\x0bb\x0cc\x85d", "word3 word0",
    "x" * 300, "\u200d\u200b", "\U0010ffff", "İıſ", "0" * 40, "ÿþ",
]  # fmt: skip


def stream(path: Path) -> list[int]:
    header = json.loads(path.with_suffix(".json").read_text())
    return np.fromfile(path, dtype=np.dtype(header["made_from"]["dtype"]).newbyteorder("<")).tolist()


def make_byte_tokenizer() -> PreTrainedTokenizerFast:
    """A token a byte, none of them unknown."""
    letters = ["<s>", "</s>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    model = Tokenizer(BPE({letter: i for i, letter in enumerate(letters)}, []))
    model.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    return PreTrainedTokenizerFast(tokenizer_object=model, bos_token="<s>", eos_token="</s>")


def alone(tokenizer: PreTrainedTokenizerBase) -> Callable[[str], list[int]]:
    """What makes ids of one text, by the tokenizers library itself."""
    backend = type(tokenizer.backend_tokenizer).from_str(tokenizer.backend_tokenizer.to_str())
    backend.no_padding()
    backend.no_truncation()
    backend.encode_special_tokens = True
    return lambda text: backend.encode(text, add_special_tokens=False).ids


def gpt2_bytes(ids: list[int], tokenizer: PreTrainedTokenizerBase) -> bytes:
    """GPT-2's tokens are bytes in an alphabet of its own: printable ones stand for themselves, the others follow."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    alphabet = {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}
    return bytes(alphabet[letter] for token in tokenizer.convert_ids_to_tokens(ids) for letter in token)


def texts_of(data: bytes, kind: str, unit: str) -> list[str]:
    """The documents of a file, read whole; any exception where it has none."""
    if kind == "jsonl.gz":
        data = gzip.decompress(data)
    if kind == "txt":  # universal newlines
        data = data.replace(b"\r\n", b"\n").replace(b"\r", b"\n")
    lines = [line + b"\n" for line in data.split(b"\n")]
    lines[-1] = lines[-1][:-1]
    decoded = [line.decode() for line in lines]
    decoded[0] = decoded[0].removeprefix("\ufeff")
    if kind != "txt":
        found = [json.loads(line)["text"] for line in decoded if line.strip()]
        assert all(isinstance(text, str) for text in found)
        "".join(found).encode()  # half a surrogate pair is no text
        return found
    if unit == "document":
        return ["".join(decoded).rstrip("\n")] if "".join(decoded).strip() else []
    if unit == "line":
        return [line.rstrip("\n") for line in decoded if line.strip()]
    paragraphs, current = [], ""
    for line in [*decoded, ""]:
        if line.strip():
            current += line
        elif current:
            paragraphs.append(current.rstrip("\n"))
            current = ""
    return paragraphs


def odd_file(dice: random.Random, kind: str) -> bytes:
    texts = ["".join(dice.choices(ODD, k=dice.randint(0, 6))) for _ in range(dice.randint(1, 12))]
    if kind == "txt":
        end = dice.choice(["\n", "\r\n", "\n\n", "\r\n\r\n", "\n \t\n", "\r"])
        return dice.choice(["", "\ufeff"]).encode() + end.join(texts).encode()
    whole = "".join(json.dumps({"text": t, "n": 1}, ensure_ascii=dice.random() < 0.5) + "\n" for t in texts).encode()
    return gzip.compress(whole) if kind == "jsonl.gz" else whole


def damaged(dice: random.Random, data: bytes) -> bytes:
    way = dice.choice([0, 0, 0, 0, 1, 2, 3, 4, 5])
    at = dice.randrange(len(data) + 1)
    if way == 0:  # as it is
        return data
    if way == 1:
        return data[:at]
    if way == 2 and data:
        return data[: at - 1] + bytes([dice.randrange(256)]) + data[at:]
    if way == 3:
        return (
            data[:at]
            + dice.choice([b"\xff", b"\xed\xa0\x80", b"\xc0\x80", b"\xf5\x80\x80\x80", b"\xe2\x82"])
            + data[at:]
        )
    if way == 4:
        wrong = [{"text": None}, {"text": 3}, {"text": ["a"]}, {"no": "a"}, ["a"], 3, None, {"text": "\ud800"}]
        return data + json.dumps(dice.choice(wrong)).encode()
    return data[:at] + b"\r" + data[at:]


@pytest.mark.parametrize(
    ("which", "cases"),
    [
        ("bytes", 100),
        pytest.param("gpt2", 30, marks=pytest.mark.slow),  # a large vocabulary takes most of a second a file
        pytest.param("bert", 60, marks=pytest.mark.slow),
    ],
)
@pytest.mark.parametrize("kind", ["txt", "jsonl", "jsonl.gz"])
def test_an_odd_or_damaged_corpus_is_packed_as_other_readers_read_it_or_refused(
    kind, which, cases, tmp_path, gpt2_tokenizer, bert_tokenizer
):
    signal.alarm(600)
    tokenizer = {"bytes": make_byte_tokenizer(), "gpt2": gpt2_tokenizer, "bert": bert_tokenizer}[which]
    backend = alone(tokenizer)
    dice = random.Random(f"{kind} {which}")
    refused = read = 0
    for case in range(cases):
        file, unit = tmp_path / f"{case}.{kind}", dice.choice(["line", "paragraph", "document"])
        file.write_bytes(damaged(dice, odd_file(dice, kind)))
        try:
            texts = texts_of(file.read_bytes(), kind, unit)
        except Exception:
            with pytest.raises(ValueError, match=rf"{case}\.{kind}") as caught:
                pack(open_corpus(str(file), text_unit=unit), tokenizer, tmp_path / "cache")
            one_sentence(caught.value)
            refused += 1
            continue
        if which == "bert":  # the only one of the three that does not know every character
            encoded = [backend(text) for text in texts]
            lost = sum(not own and bool(text.strip()) for own, text in zip(encoded, texts, strict=True))
            unknown = sum(own.count(tokenizer.unk_token_id) for own in encoded)
            if 4 * (unknown + lost) > sum(map(len, encoded)) + lost:
                with pytest.raises(ValueError, match=r"tokens are unknown|made no token") as caught:
                    pack(open_corpus(str(file), text_unit=unit), tokenizer, tmp_path / "cache")
                one_sentence(caught.value)
                continue
        path = pack(open_corpus(str(file), text_unit=unit), tokenizer, tmp_path / "cache")["train"]
        ids = stream(path)
        assert ids == [i for text in texts for i in [*backend(text), eos_id(tokenizer)]]
        assert ids.count(eos_id(tokenizer)) == len(texts)  # what looks like the end of a text is not one
        if which == "gpt2":
            whole = [gpt2_bytes([*row], tokenizer) for row in np.split(ids, np.flatnonzero(np.equal(ids, 50256)) + 1)]
            assert [row.removesuffix(b"<|endoftext|>").decode() for row in whole[:-1]] == texts
        read += 1
    assert refused >= cases // 20
    assert read >= cases // 3
    assert not [name for name in os.listdir(tmp_path / "cache") if name.endswith(".tmp")]


def test_odd_parquet_is_read_or_refused(tmp_path):
    tokenizer = make_byte_tokenizer()
    good = ["word1 word2", "", "<s> word3 </s>", "\x00 word4"]
    columns = {
        "good": (pyarrow.array(good), None),
        "large": (pyarrow.array(good, pyarrow.large_string()), None),
        "dictionary": (pyarrow.array(good).dictionary_encode(), None),
        "none": (pyarrow.array([]), "NoneType|0 documents|holds"),
        "nulls": (pyarrow.array([*good, None]), "row 5.*NoneType"),
        "numbers": (pyarrow.array([1, 2]), "row 1.*int"),
        "bytes": (pyarrow.array([b"\xff", b"a"]), "row 1.*bytes"),
        "lists": (pyarrow.array([["a"]]), "row 1.*list"),
    }
    for name, (column, said) in columns.items():
        file = tmp_path / f"{name}.parquet"
        pyarrow.parquet.write_table(pyarrow.table({"text": column}), file)
        if said is None:
            path = pack(open_corpus(str(file)), tokenizer, tmp_path / "cache")["train"]
            backend = alone(tokenizer)
            assert stream(path) == [i for text in good for i in [*backend(text), eos_id(tokenizer)]]
        elif name != "none":
            with pytest.raises(ValueError, match=said) as caught:
                pack(open_corpus(str(file)), tokenizer, tmp_path / "cache")
            one_sentence(caught.value)
    data = (tmp_path / "good.parquet").read_bytes()
    dice = random.Random(0)
    for case in range(40):
        file = tmp_path / f"cut{case}.parquet"
        file.write_bytes(data[: dice.randrange(len(data))])
        with pytest.raises(ValueError, match="cannot be read as Parquet") as caught:
            pack(open_corpus(str(file)), tokenizer, tmp_path / "cache")
        one_sentence(caught.value)


def test_nesting_without_end_and_what_is_no_file_are_refused(tmp_path):
    (tmp_path / "deep.jsonl").write_text('{"text": ' + "[" * 100_000)
    with pytest.raises(ValueError, match=r"deep\.jsonl, line 1 is not JSON"):
        list(open_corpus(str(tmp_path / "deep.jsonl")))
    os.mkfifo(tmp_path / "pipe.txt")
    with pytest.raises(ValueError, match=r"pipe\.txt is no file"):
        open_corpus(str(tmp_path / "pipe.txt"))
    os.symlink("/dev/zero", tmp_path / "endless.txt")
    with pytest.raises(ValueError, match=r"endless\.txt is no file"):
        open_corpus(str(tmp_path / "endless.txt"))


@pytest.mark.slow
def test_one_line_of_fifty_megabytes_is_packed(tmp_path, gpt2_tokenizer):
    text = " ".join(["word and another, " * 1000] * 2800)
    assert len(text) > 50e6
    (tmp_path / "long.jsonl").write_text(json.dumps({"text": text}))
    corpus = open_corpus(str(tmp_path / "long.jsonl"), max_document_bytes=60_000_000)
    path = pack(corpus, gpt2_tokenizer, tmp_path)["train"]
    ids = stream(path)
    assert gpt2_bytes(ids[:-1], gpt2_tokenizer).decode() == text
    assert ids[-1] == 50256
