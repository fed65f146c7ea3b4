"""Readers beside writers: a whole file is never called altered, and what is used is what was verified."""

import contextlib
import multiprocessing
import os
import time
import warnings
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from helpers.tiny import make_model, make_tokenizer

from ldlm.checkpoints.integrity import damage, digest_file, read, write
from ldlm.checkpoints.resume import last_checkpoint
from ldlm.model import LDLM

NUMBERS = 100_000  # so large that reading takes a while
SPAWNED = multiprocessing.get_context("spawn")  # a fork would wait for ever for torch's threads, which it lacks


def state(step: int) -> dict:
    """A checkpoint whose every number is its step."""
    return {"global_step": step, "ldlm": {}, "optimizer_states": [], "state_dict": {"x": torch.full((NUMBERS,), step)}}


def whole(content: dict) -> bool:
    return bool((content["state_dict"]["x"] == content["global_step"]).all())


def over_and_over(path: Path) -> None:
    """As `ModelCheckpoint` writes ``last.ckpt``."""
    step = 0
    while True:
        write(state(step := step + 1), path / "last.ckpt")


def the_best_and_a_link(path: Path) -> None:
    """As ``save_last="link"`` with ``save_top_k=1`` does it: a new file, the link made anew, the older file removed."""
    step = 0
    while True:
        new, old = path / f"step={step + 1}.ckpt", path / f"step={step}.ckpt"
        write(state(step := step + 1), new)
        (path / "last.ckpt").unlink(missing_ok=True)
        (path / "last.ckpt").symlink_to(new.name)
        old.unlink(missing_ok=True)
        digest_file(old).unlink(missing_ok=True)


def folders_that_come_and_go(path: Path) -> None:
    """As if somebody cleaned up runs beside a run."""
    step = 0
    while True:
        folder = path / f"run{step}"
        write(state(step := step + 1), folder / "last.ckpt")
        write(state(step), path / "stays" / "last.ckpt")
        for file in folder.iterdir():
            file.unlink()
        folder.rmdir()


@contextlib.contextmanager
def writing(work: Callable[[Path], None], path: Path) -> Iterator[None]:
    """A process that writes all the while."""
    process = SPAWNED.Process(target=work, args=(path,))
    process.start()
    try:
        end = time.monotonic() + 120
        while (nothing := last_checkpoint(path) is None) and time.monotonic() < end:
            time.sleep(0.05)
        assert not nothing, "the process wrote nothing"
        yield
        assert process.is_alive()
    finally:
        process.kill()
        process.join(30)


def test_a_checkpoint_that_a_run_replaces_all_the_time_is_whole_at_each_of_200_looks(tmp_path):
    steps = []
    with writing(over_and_over, tmp_path):
        for _ in range(100):
            assert damage(tmp_path / "last.ckpt") is None
            content = read(tmp_path / "last.ckpt")
            assert whole(content)
            steps.append(content["global_step"])
    assert steps == sorted(steps)
    assert len(set(steps)) > 3  # it was another one, again and again


@pytest.mark.parametrize("work", [over_and_over, the_best_and_a_link, folders_that_come_and_go])
def test_the_newest_checkpoint_beside_a_run_is_found_at_each_of_100_looks_without_a_warning(tmp_path, work):
    found = set()
    with writing(work, tmp_path), warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(100):
            path = last_checkpoint(tmp_path)
            assert path is not None
            with contextlib.suppress(FileNotFoundError):  # it may be gone again by now
                found.add(path.stat().st_mtime_ns)
    assert len(found) > 2


def test_what_is_altered_is_still_told_beside_a_run_that_replaces_other_files(tmp_path):
    write(state(1), tmp_path / "mine.ckpt")
    data = bytearray((tmp_path / "mine.ckpt").read_bytes())
    data[len(data) // 2] ^= 1
    with writing(over_and_over, tmp_path):
        (tmp_path / "mine.ckpt").write_bytes(data)
        for _ in range(20):
            assert "was altered" in str(damage(tmp_path / "mine.ckpt"))


def test_what_is_loaded_is_what_was_verified_though_another_file_takes_its_place_in_between(tmp_path, monkeypatch):
    path, other = tmp_path / "a.ckpt", tmp_path / "other"
    write(state(1), path)
    verified = zipfile.ZipFile.testzip

    def swapped(archive: zipfile.ZipFile) -> str | None:
        answer = verified(archive)
        torch.save(state(2), other)
        other.replace(path)  # with no digest that knows it
        return answer

    monkeypatch.setattr(zipfile.ZipFile, "testzip", swapped)
    content = read(path)
    assert content["global_step"] == 1
    monkeypatch.undo()
    assert "was altered" in str(damage(path))


def test_a_file_that_is_written_over_while_it_is_read_is_read_again(tmp_path, monkeypatch):
    path = tmp_path / "a.ckpt"
    write(state(1), path)
    old = path.read_bytes()
    write(state(2), tmp_path / "b.ckpt")
    new = (tmp_path / "b.ckpt").read_bytes()
    loaded, turns = torch.load, []

    def written_over(file, **rest):
        content = loaded(file, **rest)
        if not turns:
            with open(path, "r+b") as handle:  # as rsync --inplace does: the same file, other bytes
                handle.write(new)
            os.utime(path, ns=(1, len(old)))
        turns.append(content["global_step"])
        return content

    digest_file(path).write_text(digest_file(path).read_text() + digest_file(tmp_path / "b.ckpt").read_text())
    monkeypatch.setattr(torch, "load", written_over)
    assert read(path)["global_step"] == 2
    assert turns == [1, 2]


@pytest.mark.parametrize("kind", ["a fifo", "a folder", "a dangling link", "a circle of links"])
def test_what_only_has_the_name_of_a_checkpoint_is_passed_over_and_waited_for_by_nobody(tmp_path, kind):
    write(state(1), tmp_path / "good.ckpt")
    path = tmp_path / "last.ckpt"
    if kind == "a fifo":
        os.mkfifo(path)
    elif kind == "a folder":
        path.mkdir()
    else:
        path.symlink_to("nowhere.ckpt" if kind == "a dangling link" else path.name)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert last_checkpoint(tmp_path) == tmp_path / "good.ckpt"
    with pytest.raises(ValueError, match=r"last\.ckpt (does not exist|is|cannot)"):
        read(path)


def exports(folder: Path, begun) -> None:
    turn = 0
    while True:
        model = make_model(seed=turn % 3, tokenizer=make_tokenizer())
        model.save_pretrained(folder / "export")
        begun.set()
        turn += 1
        time.sleep(0.05)


def test_an_export_that_is_replaced_all_the_time_is_one_of_the_models_or_is_being_written(tmp_path):
    known = [make_model(seed=seed).token_decoder.head.weight for seed in range(3)]
    begun = SPAWNED.Event()
    process = SPAWNED.Process(target=exports, args=(tmp_path, begun))
    make_model(tokenizer=make_tokenizer()).save_pretrained(tmp_path / "export")
    process.start()
    assert begun.wait(120)
    loaded, said, end = 0, set(), time.monotonic() + 30
    try:
        while loaded < 10 and time.monotonic() < end:
            try:
                weight = LDLM.from_pretrained(tmp_path / "export").token_decoder.head.weight
            except ValueError as error:
                said.add(str(error))
            else:
                assert any(torch.equal(weight, one) for one in known)
                loaded += 1
        assert process.is_alive()
    finally:
        process.kill()
        process.join(30)
    assert loaded == 10
    assert all("is being written" in one for one in said)
