"""Files of strangers: damaged, hostile or merely odd, each is read rightly or refused in one sentence, and none is run.

What is expected is found by other means: whole files decoded at once, one text tokenised at a time, bytes put together
from GPT-2's alphabet, tensors compared with those that were saved.
"""

import gzip
import json
import os
import pickle
import random
import shutil
import signal
import sys
import threading
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import torch
import yaml
from helpers.command import complaint
from helpers.recipe import RECIPE
from helpers.tiny import make_home, make_model, make_tokenizer, save_both
from tokenizers import Tokenizer, pre_tokenizers
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from ldlm._files import verify_blocks
from ldlm.checkpoints.description import build
from ldlm.checkpoints.integrity import digest_file
from ldlm.checkpoints.io import CheckpointFiles
from ldlm.checkpoints.pretrained import read_checkpoint
from ldlm.cli import main as cli
from ldlm.cli.fit import LDLMCLI
from ldlm.data.corpus import open_corpus
from ldlm.data.datamodule import PackedTextDataModule
from ldlm.data.packing import open_packed, pack
from ldlm.model import LDLM
from ldlm.presets import CONFIGS, recipe_file
from ldlm.recipes import checked
from ldlm.tokenizer import eos_id, pack_tokenizer, unpack_tokenizer

ODD = [
    "plain words", "", " ", "\x00", "nul\x00inside", "<|endoftext|>", "[SEP]", "[CLS] [MASK]", "<s></s>", "<unk>",
    "##ing", "שלום עולם", "\u202esdrawkcab\u202c", "مرحبا", "𝔘𝔫𝔦𝔠𝔬𝔡𝔢", "👩\u200d👩\u200d👧🏳\ufe0f\u200d🌈", "é e\u0301",
    "ﬁ", "\ufeffbom", "\ufffd", "a\u2028b\u2029c", "tab\tbed", "\x1b[31mred", "a\x0bb\x0cc\x85d", "word3 word0",
    "x" * 300, "\u200d\u200b", "\U0010ffff", "İıſ", "0" * 40, "ÿþ",
]  # fmt: skip


@pytest.fixture(autouse=True)
def no_case_takes_long():
    """A hang fails after two minutes."""
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGALRM, lambda *_: pytest.fail("this hangs"))
        signal.alarm(120)
    yield
    signal.alarm(0)


def one_sentence(error: BaseException) -> None:
    said = str(error)
    assert said
    assert len(said.splitlines()) == 1, said
    assert "Traceback" not in said


# --- corpora


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


# --- packed files


@pytest.fixture
def packed(tmp_path):
    file = tmp_path / "a.txt"
    file.write_text("\n\n".join(f"word{i % 7} word{i % 31} word3" for i in range(2000)))
    return pack(open_corpus(str(file)), make_tokenizer(), tmp_path / "cache")["train"]


def packed_again(path: Path) -> None:
    tokenizer = make_tokenizer()
    found = pack(open_corpus(str(path.parent.parent / "a.txt")), tokenizer, path.parent)["train"]
    open_packed(found, tokenizer, 16)


def flipped(dice: random.Random, data: bytes) -> bytes:
    at = dice.randrange(len(data))
    return data[:at] + bytes([data[at] ^ (1 << dice.randrange(8))]) + data[at + 1 :]


def test_two_hundred_flipped_bits_in_a_packed_file_are_all_found(packed):
    packed_again(packed)  # and noted as verified
    data, dice = packed.read_bytes(), random.Random(1)
    times = packed.stat()
    for case in range(200):
        packed.write_bytes(flipped(dice, data))
        if case % 2:  # as one would who hides it
            os.utime(packed, ns=(times.st_atime_ns, times.st_mtime_ns))
        with pytest.raises(ValueError, match=r"was altered after it was written \(block 0 "):
            packed_again(packed)
    packed.write_bytes(data)
    packed_again(packed)


def test_an_alteration_below_the_file_system_is_found_on_demand(packed, monkeypatch):
    packed_again(packed)
    times = packed.stat()
    packed.write_bytes(flipped(random.Random(2), packed.read_bytes()))
    real = Path.stat
    monkeypatch.setattr(Path, "stat", lambda path, **rest: times if path == packed else real(path, **rest))
    packed_again(packed)  # nothing but the content tells
    with pytest.raises(ValueError, match="was altered after it was written"):
        pack(open_corpus(str(packed.parent.parent / "a.txt")), make_tokenizer(), packed.parent, verify="full")
    text, cache = str(packed.parent.parent / "a.txt"), str(packed.parent)
    PackedTextDataModule(text, make_tokenizer(), 16, 2, validation=None, cache_dir=cache).prepare_data()
    with pytest.raises(ValueError, match="was altered after it was written"):
        PackedTextDataModule(
            text, make_tokenizer(), 16, 2, validation=None, cache_dir=cache, verify="full"
        ).prepare_data()


def test_what_was_verified_is_not_read_again_until_it_is_another_file(packed, monkeypatch):
    packed_again(packed)
    monkeypatch.setattr("ldlm._files.hashlib.sha256", lambda *_: pytest.fail("it is read again"))
    blocks = json.loads(packed.with_suffix(".json").read_text())["blocks"]
    verify_blocks(packed, blocks, 64 * 2**20, full=False)
    monkeypatch.undo()
    copy = packed.with_name("copy.bin")
    shutil.copy2(packed, copy)
    shutil.copy2(packed.with_suffix(".verified"), copy.with_suffix(".verified"))
    with pytest.raises(ValueError, match="was altered"):
        verify_blocks(copy, ["0" * 64], 64 * 2**20, full=False)
    packed.with_suffix(".verified").write_bytes(b"\xff")
    verify_blocks(packed, blocks, 64 * 2**20, full=False)


def test_headers_with_flipped_bits_truncated_and_swapped_ones_are_found(packed, tmp_path):
    header = packed.with_suffix(".json")
    whole, data, dice = header.read_bytes(), packed.read_bytes(), random.Random(3)
    for _ in range(200):
        header.write_bytes(flipped(dice, whole))
        if b'"digest"' not in header.read_bytes():
            continue  # it has become a header of before there were digests, and is right in all else
        with pytest.raises(ValueError, match=r"\.json (was altered|is not a whole header)"):
            packed_again(packed)
    header.write_bytes(whole)
    for _ in range(40):
        packed.write_bytes(data[: dice.randrange(len(data))])
        with pytest.raises(ValueError, match="it is damaged"):
            packed_again(packed)
    packed.write_bytes(bytes(len(data)))
    with pytest.raises(ValueError, match="was altered"):
        packed_again(packed)
    packed.write_bytes(data)
    for odd in (b"", b"[" * 100_000, b"{}", b'{"made_from": 3}', b"\xff", b"null"):
        header.write_bytes(odd)
        with pytest.raises(ValueError, match=r"\.json is not a whole header"):
            packed_again(packed)


# --- checkpoints


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A checkpoint with everything in it, its digest beside it, and an export."""
    folder = tmp_path_factory.mktemp("saved")
    model = make_model(tokenizer=make_tokenizer())
    save_both(model, folder)
    return folder


def same(one: object, other: object) -> bool:
    """Whether two checkpoints hold the same, bit for bit."""
    if isinstance(one, torch.Tensor):
        return isinstance(other, torch.Tensor) and one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, dict):
        return isinstance(other, dict) and list(one) == list(other) and all(same(one[k], other[k]) for k in one)
    if isinstance(one, list | tuple):
        return type(one) is type(other) and len(one) == len(other) and all(map(same, one, other))
    return type(one) is type(other) and one == other


LOADERS = [LDLM.load_from_checkpoint, read_checkpoint, CheckpointFiles().load_checkpoint]


def refused(path: Path, loader) -> bool:
    try:
        loader(path)
        return False
    except ValueError as error:
        refusal = error
    one_sentence(refusal)
    assert path.name in str(refusal)
    return True


def test_two_hundred_flipped_bits_in_a_checkpoint_are_all_found_with_its_digest(saved, tmp_path):
    data, dice = (saved / "whole.ckpt").read_bytes(), random.Random(4)
    path = tmp_path / "flipped.ckpt"
    shutil.copy(digest_file(saved / "whole.ckpt"), digest_file(path))
    for case in range(200):
        path.write_bytes(flipped(dice, data))
        assert refused(path, LOADERS[case % 3])
    path.write_bytes(data)
    assert not any(refused(path, loader) for loader in LOADERS)
    whole = digest_file(path).read_bytes()
    for _ in range(64):
        digest_file(path).write_bytes(flipped(dice, whole[:64]))
        assert refused(path, read_checkpoint)


@pytest.mark.filterwarnings("ignore:.*has no .*sha256 beside it.*")
def test_without_the_digest_a_flipped_bit_is_found_or_lies_where_nothing_is(saved, tmp_path):
    data, dice = (saved / "whole.ckpt").read_bytes(), random.Random(5)
    path = tmp_path / "flipped.ckpt"
    content = read_checkpoint(saved / "whole.ckpt")
    with zipfile.ZipFile(saved / "whole.ckpt") as archive:
        payload = sum(entry.file_size for entry in archive.infolist())
    found = 0
    for _ in range(200):
        path.write_bytes(flipped(dice, data))
        if refused(path, read_checkpoint):
            found += 1
        else:  # padding, or a field of the archive that nobody reads
            assert same(content, read_checkpoint(path))
    assert found >= 0.8 * 200 * payload / len(data)


@pytest.mark.filterwarnings("ignore:.*(has no .*sha256 beside it|passed over).*")
def test_cut_swapped_empty_and_foreign_files_are_refused(saved, tmp_path):
    data, dice = (saved / "whole.ckpt").read_bytes(), random.Random(6)
    path = tmp_path / "odd.ckpt"
    shutil.copy(saved / "export" / "model.safetensors", path)
    assert all(refused(path, loader) for loader in LOADERS)
    odd = [b"", b"PK\x05\x06" + bytes(18), bytes(1000), dice.randbytes(1000), b"{}", data[::-1], data[100:], data * 2]
    odd += [data[: dice.randrange(len(data))] for _ in range(100)]
    for content in odd[:-101] + odd[-100:]:
        path.write_bytes(content)
        assert refused(path, read_checkpoint)
    torch.save({"state_dict": {}, "ldlm": {}}, path)
    shutil.copy(digest_file(saved / "whole.ckpt"), digest_file(path))  # another's bytes beside this one's digest
    assert refused(path, read_checkpoint)
    path.unlink()
    path.mkdir()
    assert refused(path, read_checkpoint)


def zipped(path: Path, content: bytes, compression: int = zipfile.ZIP_STORED, **files: bytes) -> None:
    """An archive as torch writes it, around any pickle."""
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, value in {"data.pkl": content, "version": b"3\n", "byteorder": b"little", **files}.items():
            archive.writestr(f"archive/{name}", value)


class Runs:
    def __init__(self, function, *arguments) -> None:
        self.function, self.arguments = function, arguments

    def __reduce__(self):
        return (self.function, self.arguments)


@pytest.mark.filterwarnings("ignore:.*(has no .*sha256 beside it|passed over).*")
def test_pickles_that_would_run_something_are_refused_unrun(saved, tmp_path):
    marker, path = tmp_path / "was_run", tmp_path / "bad.ckpt"
    content = read_checkpoint(saved / "whole.ckpt")
    harmful = [
        Runs(os.system, f"touch {marker}"),
        Runs(open, str(marker), "w"),
        Runs(eval, f"open({str(marker)!r}, 'w')"),
        Runs(exec, f"open({str(marker)!r}, 'w')"),
        Runs(os.mkdir, str(marker)),
    ]
    for harm in harmful:
        places = [harm, {**content, "extra": harm}, {**content, "state_dict": harm}]
        places += [{**content, "tokenizer": {"a": harm}}, {**content, "ldlm": {**content["ldlm"], "model": harm}}]
        for place in places:
            torch.save(place, path)
            assert all(refused(path, loader) for loader in LOADERS)
            path.write_bytes(pickle.dumps(place if place is harm else {"state_dict": harm}))
            assert refused(path, read_checkpoint)
            zipped(path, pickle.dumps(harm))
            assert refused(path, read_checkpoint)
    torch.jit.script(torch.nn.Linear(2, 2)).save(path)
    assert refused(path, read_checkpoint)
    assert not marker.exists()
    zipped(path, pickle.dumps(harmful[1]))
    torch.load(path, weights_only=False)
    assert marker.exists()  # they do run where they are let


@pytest.mark.filterwarnings("ignore:.*(has no .*sha256 beside it|passed over).*")
def test_archives_that_unfold_and_pickles_that_make_no_sense_are_refused(tmp_path):
    path, dice = tmp_path / "bad.ckpt", random.Random(7)
    zipped(path, pickle.dumps({"state_dict": {}}), zipfile.ZIP_DEFLATED, bomb=bytes(10**7))
    assert path.stat().st_size < 20_000
    assert refused(path, read_checkpoint)
    start = pickle.dumps({"state_dict": {}, "ldlm": [1.0, "text", (2, 3)]}, protocol=2)
    for case in range(300):
        zipped(path, dice.randbytes(dice.randrange(200)) if case % 3 == 0 else flipped(dice, flipped(dice, start)))
        assert refused(path, read_checkpoint)


def nested(depth: int, kind: type) -> object:
    value: object = 1
    for _ in range(depth):
        value = [value] if kind is list else {"a": value}
    return value


def save_deep(content: object, path: Path) -> None:
    """`torch.save` with room for what nests deeper than the interpreter goes by itself."""
    limit = sys.getrecursionlimit()
    sys.setrecursionlimit(10**6)
    size = threading.stack_size(2**29)
    thread = threading.Thread(target=torch.save, args=(content, path))
    thread.start()
    thread.join()
    threading.stack_size(size)
    sys.setrecursionlimit(limit)


PART = "ldlm.UniformGrid"
HOSTILE = {
    "os.system": {"class_path": "os.system", "init_args": {"command": "touch was_run"}},
    "a function of ours": {"class_path": "ldlm._files.write_atomically", "init_args": {"path": "was_run"}},
    "an import of ours": {"class_path": "ldlm.checkpoints.description.os", "init_args": {}},
    "a class of ours that is no part": {"class_path": "ldlm.LDLM", "init_args": {}},
    "a dunder": {"class_path": "ldlm.diffusion.grids.__class__", "init_args": {}},
    "a dunder of a class": {"class_path": "ldlm.UniformGrid.__init__", "init_args": {}},
    "a dunder module": {"class_path": "__main__.__builtins__", "init_args": {}},
    "an abstract class": {"class_path": "ldlm.Sampler", "init_args": {}},
    "a module that is not there": {"class_path": "no.such.Thing", "init_args": {}},
    "no module": {"class_path": "", "init_args": {}},
    "a number": {"class_path": 3, "init_args": {}},
    "a list": {"class_path": ["os", "system"], "init_args": {}},
    "no arguments": {"class_path": PART, "init_args": None},
    "a list of arguments": {"class_path": PART, "init_args": [1]},
    "numbered arguments": {"class_path": PART, "init_args": {1: 2}},
    "an argument too many": {"class_path": PART, "init_args": {"t_min": 0.1, "self": 3}},
    "a text for a number": {"class_path": PART, "init_args": {"t_min": "a"}},
    "a list for a number": {"class_path": PART, "init_args": {"t_min": [1]}},
    "a part for a number": {"class_path": PART, "init_args": {"t_min": {"class_path": PART, "init_args": {}}}},
    "a negative size": {"class_path": "ldlm.DiT", "init_args": {"latent_size": -1, "num_latents": 8}},
    "more than all memory": {"class_path": "ldlm.DiT", "init_args": {"latent_size": 2**60, "num_latents": 8}},
    "no heads": {"class_path": "ldlm.DiT", "init_args": {"latent_size": 12, "num_latents": 8, "heads": 0}},
    "harm within a part": {
        "class_path": "ldlm.MixedGrid",
        "init_args": {"first": {"class_path": "os.system", "init_args": {"command": "touch was_run"}}},
    },
    "a part of another kind within a part": {
        "class_path": "ldlm.MixedGrid",
        "init_args": {"first": {"class_path": "ldlm.DDIM", "init_args": {}}},
    },
    "lists without end": nested(20_000, list),
    "dictionaries without end": nested(20_000, dict),
    "parts without end": None,
}  # fmt: skip


@pytest.mark.filterwarnings("ignore:.*has no .*sha256 beside it.*")
@pytest.mark.parametrize("name", HOSTILE)
def test_a_description_that_says_more_than_a_model_is_refused_in_a_sentence(saved, tmp_path, monkeypatch, capsys, name):
    monkeypatch.chdir(tmp_path)
    hostile = HOSTILE[name]
    if name == "parts without end":
        hostile = {"class_path": PART, "init_args": {}}
        for _ in range(20_000):
            hostile = {"class_path": "ldlm.MixedGrid", "init_args": {"first": hostile}}
    content = read_checkpoint(saved / "whole.ckpt")
    for place in ("grid", "denoiser"):
        content["ldlm"]["model"]["init_args"][place] = hostile
        save_deep(content, Path("bad.ckpt"))
        assert len(complaint(capsys, "generate", "bad.ckpt", "-n", "1", "--nfe", "1")) < 600
    shutil.copytree(saved / "export", "export")
    about = json.loads(Path("export/ldlm.json").read_text())
    if "without end" not in name:
        about["model"]["init_args"]["grid"] = hostile
        Path("export/ldlm.json").write_text(json.dumps(about))
        complaint(capsys, "generate", "export", "-n", "1", "--nfe", "1")
    assert not Path("was_run").exists()


@pytest.mark.filterwarnings("ignore:.*has no .*sha256 beside it.*")
@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("grid", {"class_path": "ldlm.DDIM", "init_args": {}}),
        ("schedule", {"class_path": PART, "init_args": {}}),
        ("token_encoder", 3),
        ("denoiser", None),
        ("sigma_dec", "a"),
        ("learning_rate", []),
        ("tokenizer", "gpt2"),
        ("no_such_argument", 1),
        ("__class__", 1),
    ],
)
def test_a_model_that_cannot_be_made_is_refused_in_a_sentence(saved, tmp_path, capsys, key, value):
    content = read_checkpoint(saved / "whole.ckpt")
    if key == "tokenizer":  # the file's own tokenizer is taken, whatever name stands there
        content["ldlm"]["model"]["init_args"][key] = value
        torch.save(content, tmp_path / "bad.ckpt")
        assert len(LDLM.load_from_checkpoint(tmp_path / "bad.ckpt").tokenizer) == 40
        return
    content["ldlm"]["model"]["init_args"][key] = value
    torch.save(content, tmp_path / "bad.ckpt")
    complaint(capsys, "generate", str(tmp_path / "bad.ckpt"))


@pytest.mark.filterwarnings("ignore:.*has no .*sha256 beside it.*")
@pytest.mark.parametrize(
    "state",
    [
        [1, 2],
        {"a": 3},
        "a text",
        "sparse",
        "complex",
        "meta",
    ],
)
def test_weights_that_are_none_are_refused_in_a_sentence(saved, tmp_path, capsys, state):
    content = read_checkpoint(saved / "whole.ckpt")
    whole = content["state_dict"]
    if state == "sparse":
        state = {name: value.to_sparse() if value.dim() == 2 else value for name, value in whole.items()}
    elif state == "a text":
        state = {name: value if i else "text" for i, (name, value) in enumerate(whole.items())}
    elif state == "complex":
        state = {name: torch.zeros(3, dtype=torch.complex64) for name in whole}
    elif state == "meta":
        state = {name: value.to("meta") for name, value in whole.items()}
    content["state_dict"] = state
    torch.save(content, tmp_path / "bad.ckpt")
    complaint(capsys, "export", str(tmp_path / "bad.ckpt"), str(tmp_path / "export"))
    assert not (tmp_path / "export").exists()


def text(content: str) -> torch.Tensor:
    return torch.frombuffer(bytearray(content.encode()), dtype=torch.uint8)


@pytest.mark.parametrize(
    "files",
    [
        {"": text("a")},
        {"..": text("a")},
        {"a\0b": text("a")},
        {"x" * 300: text("a")},
        {"\ud800": text("a")},
        {3: text("a")},
        {"tokenizer.json": "text"},
        {"tokenizer.json": text("{")},
        {"tokenizer.json": text("[" * 1_000_000)},
        {"tokenizer.json": text('{"version": "1.0", "model": {"type": "BPE", "vocab": [], "merges": 3}}')},
        {"tokenizer_config.json": text("[" * 1_000_000)},
        {"tokenizer_config.json": text("3")},
        {},
        [],
        3,
    ],
)
def test_what_is_no_tokenizer_is_refused_in_a_sentence(tmp_path, monkeypatch, files):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    if isinstance(files, dict) and "tokenizer.json" not in files and files:
        files = {**pack_tokenizer(make_tokenizer()), **files}
    with pytest.raises(ValueError, match=r"^(the tokenizer of )?x\.ckpt (holds no files|could not be read)") as caught:
        unpack_tokenizer(files, "x.ckpt")
    one_sentence(caught.value)
    assert not list(tmp_path.iterdir())


def test_a_tokenizers_own_code_is_never_run_and_its_files_stay_in_their_folder(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    files = pack_tokenizer(make_tokenizer())
    config = json.loads(files["tokenizer_config.json"].numpy().tobytes())
    config |= {"auto_map": {"AutoTokenizer": ["evil.Tokenizer", "evil.Tokenizer"]}, "trust_remote_code": True}
    evil = f"open({str(tmp_path / 'was_run')!r}, 'w')\n"
    files |= {"evil.py": text(evil), "../../was_run": text("a"), str(tmp_path / "anywhere"): text("a")}
    before = set(sys.modules)
    for kind in (config["tokenizer_class"], "Tokenizer", None, "os.system", "evil.Tokenizer"):
        files["tokenizer_config.json"] = text(json.dumps(config | {"tokenizer_class": kind}))
        try:
            unpack_tokenizer(files, "x.ckpt")
        except ValueError as error:
            one_sentence(error)
    assert not [name for name in set(sys.modules) - before if "evil" in name]
    assert not list(tmp_path.iterdir())
    assert not (tmp_path.parent / "was_run").exists()


@pytest.mark.parametrize("content", ["[" * 1_000_000, "{", "3", "null", "\x00", '{"format": 1}', '{"a": NaN'])
def test_an_export_whose_json_is_odd_is_refused_in_a_sentence(saved, tmp_path, capsys, content):
    shutil.copytree(saved / "export", tmp_path / "export")
    (tmp_path / "export" / "ldlm.json").write_text(content)
    complaint(capsys, "generate", str(tmp_path / "export"))


def test_flipped_bits_in_an_exports_weights_and_tokenizer_are_found(saved, tmp_path):
    shutil.copytree(saved / "export", tmp_path / "export")
    dice = random.Random(8)
    for name in ("model.safetensors", "tokenizer.json", "tokenizer_config.json"):
        file = tmp_path / "export" / name
        whole = file.read_bytes()
        for _ in range(30):
            file.write_bytes(flipped(dice, whole))
            with pytest.raises(ValueError, match=rf"{name} (was altered|could not be read)") as caught:
                LDLM.from_pretrained(tmp_path / "export")
            one_sentence(caught.value)
        file.write_bytes(whole)
    LDLM.from_pretrained(tmp_path / "export")


def test_an_export_that_was_cut_short_over_an_older_one_does_not_load(saved, tmp_path, monkeypatch):
    shutil.copytree(saved / "export", tmp_path / "export")
    monkeypatch.setattr("ldlm.storage.Storage.description", lambda *_: 1 / 0)  # what is written last
    with pytest.raises(ZeroDivisionError):
        make_model(seed=5, tokenizer=make_tokenizer()).save_pretrained(tmp_path / "export")
    monkeypatch.undo()
    with pytest.raises(ValueError, match="or its export was cut short: export the model again"):
        LDLM.from_pretrained(tmp_path / "export")


def test_plain_data_with_what_looks_like_a_part_is_built_as_far_as_it_is_one():
    assert build({"class_path": 1}) == {"class_path": 1}
    assert build({"class_path": PART, "init_args": {}, "more": 1})["more"] == 1


# --- recipes


class Parsed(Exception):
    pass


BOMB = "n0: &n0 [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"n{i}: &n{i} [{', '.join([f'*n{i - 1}'] * 9)}]\n" for i in range(1, 40)
)
GOOD = yaml.safe_dump(RECIPE)
MISLEADING_RECIPES = {
    "a bomb": BOMB,
    "a bomb in the model": "model:\n" + "".join(f"  {line}\n" for line in BOMB.splitlines()),
    "a bomb as a value": f"{BOMB}tokenizer: *n39\n",
    "not UTF-8": GOOD.encode() + b"# \xff",
    "UTF-16": GOOD.encode("utf-16"),
    "a tab": f"{GOOD}\n\tx: 1\n",
    "a key twice": f"{GOOD}\nsequence_length: 9\n",
    "a key twice within": GOOD.replace("trainer:", "trainer:\n  max_steps: 99"),
    "lists without end": "x: " + "[" * 50_000,
    "closed lists without end": "x: " + "[" * 5000 + "]" * 5000,
    "maps without end": "model: " + "{a: " * 5000 + "1" + "}" * 5000,
    "forty levels": "x: " + "[" * 40 + "]" * 40,
    "itself": "x: &x [*x]\n",
    "itself in the model": "model: &x {a: *x}\n",
    "an alias of nothing": "x: *nothing\n",
    "a NUL": "tokenizer: \0\n",
    "two documents": f"{GOOD}\n---\na: 1\n",
}
ODD_RECIPES = {
    "python": "tokenizer: !!python/object/apply:os.system ['touch was_run']\n",
    "python alone": "!!python/object/apply:os.system ['touch was_run']\n",
    "a python name": "tokenizer: !!python/name:os.system\n",
    "nothing": "",
    "a list": "- 1\n",
    "a word": "hello\n",
    "a number as a key": "1: 2\n",
    "no key": "null: 2\n",
    "a list as a key": "? [a, b]\n: 2\n",
    "harm as a class": GOOD.replace("class_path: DiT", "class_path: os.system"),
    "a list as a class": GOOD.replace("class_path: DiT", "class_path: [1]"),
    "harm as a callback": "trainer: {callbacks: [{class_path: os.system, init_args: {command: touch was_run}}]}\n",
    "a huge number": "sequence_length: " + "9" * 5000 + "\n",
    "itself as its config": "config: bad.yaml\n",
}


@pytest.mark.parametrize("name", MISLEADING_RECIPES)
def test_a_misleading_recipe_is_refused_before_it_is_read(tmp_path, name):
    content = MISLEADING_RECIPES[name]
    (tmp_path / "bad.yaml").write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError, match=r"bad\.yaml cannot be read as a recipe: ") as caught:
        recipe_file(str(tmp_path / "bad.yaml"))
    one_sentence(caught.value)


def test_the_shipped_recipes_are_far_from_what_is_refused():
    for file in [*Path(str(CONFIGS)).glob("*.yaml"), *Path(str(CONFIGS)).glob("*/*.yaml")]:
        assert checked(str(file)) == str(file)


@pytest.mark.parametrize("name", ODD_RECIPES)
def test_an_odd_recipe_is_refused_in_a_sentence_and_runs_nothing(tmp_path, monkeypatch, capsys, name):
    monkeypatch.chdir(tmp_path)
    content = ODD_RECIPES[name]
    Path("bad.yaml").write_bytes(content if isinstance(content, bytes) else content.encode())
    complaint(capsys, "fit", "--config", "bad.yaml")
    assert os.listdir() == ["bad.yaml"]


def test_what_yaml_allows_and_does_no_harm_is_read(tmp_path, monkeypatch):
    def stop(_):
        raise Parsed

    monkeypatch.setattr(LDLMCLI, "instantiate_classes", stop)
    for content in (GOOD, f"\ufeff{GOOD}", GOOD.replace("\n", "\r\n"), f"# ש 👩‍👧\n{GOOD}", f"---\n{GOOD}...\n"):
        (tmp_path / "good.yaml").write_text(content, newline="")
        with pytest.raises(Parsed):
            cli.main(["fit", "--config", str(tmp_path / "good.yaml")])


WRONG = [None, True, -1, 0, 3.5, "text", "", [], [1], {}, {"a": 1}, {"class_path": "os.system"}, 10**30, float("nan")]


def mutated(dice: random.Random) -> str:
    """The recipe with one or two of its values, keys or letters altered, for better or worse."""
    recipe = json.loads(json.dumps(RECIPE))
    for _ in range(dice.randint(0, 2)):
        place, way = recipe, dice.randrange(4)
        while True:
            keys = list(place) if isinstance(place, dict) else list(range(len(place)))
            if not keys:
                break
            key = dice.choice(keys)
            if isinstance(place[key], dict | list) and place[key] and dice.random() < 0.8:
                place = place[key]
                continue
            if way == 0:
                del place[key]
            elif way == 1 and isinstance(place, dict):
                place[f"{key}x"] = place.pop(key)
            elif way == 2 and isinstance(place[key], int | float):
                place[key] = place[key] * dice.choice([2, 0.5, 1]) + dice.choice([0, 1])
            else:
                place[key] = dice.choice(WRONG)
            break
    text = yaml.safe_dump(recipe)
    if dice.random() < 0.2:
        at = dice.randrange(len(text))
        text = text[:at] + dice.choice(["\t", "\0", "*", "&", "!", "{", "]", ":", "\n", "é", "\u2028", " "]) + text[at:]
    return text


def mutations(count: int, seed: int, folder: Path, capsys, *words: str) -> tuple[int, int]:
    """How many mutated recipes were refused, each in a sentence, and how many were read."""
    dice, told, read = random.Random(seed), 0, 0
    for case in range(count):
        before, code = told, 0
        (folder / "bad.yaml").write_text(mutated(dice), encoding="utf-8")
        try:
            cli.main(["fit", "--config", "bad.yaml", *words])
            read += 1
        except Parsed:
            read += 1
        except SystemExit as stop:
            code = stop.code
            told += 1
        said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("ldlm: ")]
        assert told + read == case + 1
        assert len(said) == told - before, (folder / "bad.yaml").read_text()
        assert told == before or code == 2
    return told, read


def test_mutated_recipes_are_refused_in_a_sentence_or_read(tmp_path, monkeypatch, capsys):
    def stop(_):
        raise Parsed

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(LDLMCLI, "instantiate_classes", stop)
    told, read = mutations(12, 0, tmp_path, capsys)
    assert told + read == 12


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_many_mutated_recipes_are_refused_in_a_sentence_or_trained_by(tmp_path, monkeypatch, capsys):
    signal.alarm(900)
    monkeypatch.chdir(tmp_path)
    make_home(tmp_path)
    told, read = mutations(150, 1, tmp_path, capsys, "--trainer.max_steps", "1")
    assert told >= 50
    assert read >= 20
    assert not (tmp_path / "was_run").exists()
