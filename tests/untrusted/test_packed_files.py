"""Packed files that were altered: every bit is found, and what was verified is not read again."""

import json
import os
import random
import shutil
from pathlib import Path

import pytest
from helpers.tiny import make_tokenizer
from helpers.untrusted import flipped

from ldlm._files import verify_blocks
from ldlm.data.corpus import open_corpus
from ldlm.data.datamodule import PackedTextDataModule
from ldlm.data.packing import open_packed, pack


@pytest.fixture
def packed(tmp_path):
    file = tmp_path / "a.txt"
    file.write_text("\n\n".join(f"word{i % 7} word{i % 31} word3" for i in range(2000)))
    return pack(open_corpus(str(file)), make_tokenizer(), tmp_path / "cache")["train"]


def packed_again(path: Path) -> None:
    tokenizer = make_tokenizer()
    found = pack(open_corpus(str(path.parent.parent / "a.txt")), tokenizer, path.parent)["train"]
    open_packed(found, tokenizer, 16)


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
