"""A checkpoint is whole or absent whatever happens while it is written."""

import errno
import functools
import io
import os
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import lightning as L
import pytest
import torch
from helpers.saves import NEW, OLD, fit, flip, recipe, saver, state
from helpers.tiny import make_data, make_task, make_trainer
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.pytorch.plugins.io import AsyncCheckpointIO

from ldlm._files import write_atomically
from ldlm.checkpoints.integrity import damage, digest_file, read, write
from ldlm.checkpoints.io import CheckpointFiles
from ldlm.checkpoints.resume import last_checkpoint
from ldlm.training.callbacks.visualisation import SaveAtEnd

# --- writing


class Killed(BaseException):
    pass


def killed_at(moment: int, monkeypatch, path: Path) -> bool:
    """Write `NEW` and die at so many steps to the disk; whether it came to that."""
    steps = [0]

    def count(real, *arguments):
        if steps[0] == moment:
            raise Killed
        steps[0] += 1
        return real(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", functools.partial(count, os.replace))
        patch.setattr(os, "fsync", functools.partial(count, os.fsync))
        patch.setattr(torch, "save", functools.partial(count, torch.save))
        patch.setattr(Path, "unlink", lambda *_, **__: None)  # the dead clean nothing up
        try:
            write(NEW, path)
        except Killed:
            return True
    return False


@pytest.mark.parametrize("before", ["nothing", "a file with its digest", "a file without"])
def test_a_kill_at_any_step_of_a_save_leaves_the_old_file_or_the_new_one_and_its_digest_knows_it(
    tmp_path, monkeypatch, before
):
    survived = []
    for moment in range(40):
        path = tmp_path / str(moment) / "last.ckpt"
        if before != "nothing":
            write(OLD, path)
        if before == "a file without":
            digest_file(path).unlink()
        dead = killed_at(moment, monkeypatch, path)
        if path.exists():
            survived.append(float(read(path)["x"][0]))
            if digest_file(path).exists():  # and whichever it is, it is still told from an altered one
                flip(path, path.stat().st_size - 1)
                assert "digest" in str(damage(path))
        else:
            assert before == "nothing"
        if not dead:
            break
    assert not dead
    # torch's save, then a file, a name and a folder each: for both digests if the old one's is there, the checkpoint,
    # and the new digest.
    assert moment == (7 if before == "a file without" else 10)
    assert survived == sorted(survived)
    assert survived[-1] == 1
    assert before == "nothing" or survived[0] == 0


def test_a_save_after_a_kill_leaves_one_digest(tmp_path, monkeypatch):
    path = tmp_path / "last.ckpt"
    write(OLD, path)
    assert killed_at(5, monkeypatch, path)
    assert len(digest_file(path).read_text().splitlines()) == 2
    write(NEW, path)
    assert len(digest_file(path).read_text().splitlines()) == 1
    assert damage(path) is None


def test_the_digest_is_one_that_others_can_check(tmp_path):
    write(NEW, tmp_path / "last.ckpt")
    check = ["sha256sum", "--check", "last.ckpt.sha256"]
    assert subprocess.run(check, cwd=tmp_path, capture_output=True).stdout == b"last.ckpt: OK\n"


def test_checksums_are_written_even_where_they_were_switched_off(tmp_path):
    torch.serialization.set_crc32_options(False)
    try:
        write(NEW, tmp_path / "last.ckpt")
    finally:
        torch.serialization.set_crc32_options(True)
    with zipfile.ZipFile(tmp_path / "last.ckpt") as archive:
        assert archive.testzip() is None


def test_an_unmodified_trainer_saves_and_resumes_by_way_of_us(tmp_path):
    trainer = fit(tmp_path, max_steps=4)
    assert type(trainer.strategy.checkpoint_io) is CheckpointFiles
    names = sorted(path.name for path in (tmp_path / "runs").iterdir())
    assert names == ["epoch=0-step=4.ckpt", "epoch=0-step=4.ckpt.sha256", "last.ckpt", "last.ckpt.sha256"]
    resumed = fit(tmp_path, ckpt_path=last_checkpoint(tmp_path), max_steps=6)
    assert resumed.global_step == 6
    assert last_checkpoint(tmp_path) == tmp_path / "runs" / "last.ckpt"
    assert read(tmp_path / "runs" / "last.ckpt")["global_step"] == 6
    validation = make_trainer(tmp_path, [])
    validation.validate(make_task(), make_data(tmp_path), ckpt_path=tmp_path / "runs" / "last.ckpt", verbose=False)
    assert type(validation.strategy.checkpoint_io) is CheckpointFiles


def test_somebodys_own_reader_and_writer_stays(tmp_path):
    class Mine(TorchCheckpointIO):
        pass

    for mine in (Mine(), AsyncCheckpointIO(), CheckpointFiles(tries=7)):
        trainer = fit(tmp_path, max_steps=2, plugins=[mine])
        assert trainer.strategy.checkpoint_io is mine


# --- what fails


def test_a_state_that_is_not_finite_never_takes_the_place_of_a_good_one(tmp_path):
    task = make_task()
    name = next(name for name, _ in task.model.named_parameters() if name.startswith("denoiser"))

    class Poison(L.Callback):
        def on_train_batch_end(self, trainer, pl_module, *_):
            if trainer.global_step == 4:
                pl_module.model.get_parameter(name).data.view(-1)[0] = float("inf")

    trainer = make_trainer(tmp_path, [Poison(), *recipe(saver(tmp_path))], max_steps=5, enable_checkpointing=True)
    said = rf"last\.ckpt of step 4 was not written \({name} is not finite\), and what was there stays; training goes on"
    with pytest.warns(UserWarning, match=said), pytest.raises(OSError, match="the last checkpoint of this run was not"):
        trainer.fit(task, make_data(tmp_path))
    assert trainer.global_step == 5
    for file in (tmp_path / "runs").glob("*.ckpt"):
        content = read(file)
        assert content["global_step"] == 2
        assert all(bool(value.isfinite().all()) for value in content["state_dict"].values())
    assert last_checkpoint(tmp_path) is not None


def test_averages_and_raw_weights_are_both_asked_whether_they_are_finite(tmp_path):
    files = CheckpointFiles()
    good, bad = {"x": torch.ones(3)}, {"x": torch.tensor([1.0, float("nan")])}
    for content in ({"state_dict": bad, "raw_parameters": good}, {"state_dict": good, "raw_parameters": bad}):
        with pytest.warns(UserWarning, match="x is not finite"):
            files.save_checkpoint({"global_step": 1, **content}, tmp_path / "last.ckpt")
    assert not list(tmp_path.iterdir())
    whole = {"x": torch.ones(2), "count": torch.tensor(3), "note": "no tensor"}
    files.save_checkpoint({"global_step": 1, "state_dict": whole}, tmp_path / "last.ckpt")
    assert files.failures == 0


def test_a_model_that_could_never_be_saved_is_refused_before_training(tmp_path):
    task = make_task()
    task.model.denoiser.register_buffer("mask", torch.full((2,), -float("inf")))
    with pytest.raises(ValueError, match=r"denoiser\.mask is not finite before training.*persistent=False"):
        fit(tmp_path, task)
    task = make_task()
    task.model.denoiser.register_buffer("mask", torch.full((2,), -float("inf")), persistent=False)
    fit(tmp_path, task, max_steps=1)


def full_disk(monkeypatch, full: list[bool], after: int = 3000) -> None:
    """Let writing through Python fail as on a full disk whenever `full` says so."""
    real = io.BufferedWriter.write
    written = [0]

    class Full(io.BufferedWriter):
        def write(self, data):
            written[0] += len(data)
            if full[0] and written[0] > after:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return real(self, data)

    def opened(file, mode="r", **rest):
        written[0] = 0
        return Full(io.FileIO(file, mode.replace("b", ""))) if "x" in mode else open(file, mode, **rest)

    monkeypatch.setattr("ldlm._files.open", opened, raising=False)


def test_a_disk_that_fills_keeps_the_old_file_and_training_goes_on(tmp_path, monkeypatch):
    full = [False]
    full_disk(monkeypatch, full)

    class Fills(L.Callback):
        def on_train_batch_start(self, trainer, *_):
            full[0] = trainer.global_step == 3  # the save after the fourth step, and no other
            if trainer.global_step == 4:
                names = sorted(path.name for path in (tmp_path / "runs").glob("[!.]*.ckpt"))
                assert names == ["epoch=0-step=2.ckpt", "last.ckpt"]
                assert not list((tmp_path / "runs").glob(".*"))  # nothing half-written either
                assert last_checkpoint(tmp_path / "runs") == tmp_path / "runs" / "last.ckpt"

    with pytest.warns(UserWarning, match=r"last\.ckpt of step 4 was not written .*No space left.*training goes on"):
        trainer = fit(tmp_path, more=[Fills()], max_steps=6)
    assert trainer.global_step == 6
    names = sorted(path.name for path in (tmp_path / "runs").glob("*.ckpt"))
    assert names == ["epoch=0-step=6.ckpt", "last.ckpt"]  # what was kept for the while is gone
    assert read(tmp_path / "runs" / "last.ckpt")["global_step"] == 6


def test_after_so_many_failures_in_a_row_the_run_ends(tmp_path, monkeypatch):
    make_data(tmp_path).prepare_data()
    full_disk(monkeypatch, [True], after=0)
    files = CheckpointFiles(tries=2)
    with pytest.warns(UserWarning, match="ends if 2 saves in a row fail"):
        files.save_checkpoint(state(1), tmp_path / "a.ckpt")
    with pytest.raises(OSError, match=r"No space left.*as this is save 2 in a row that failed, the run ends"):
        files.save_checkpoint(state(2), tmp_path / "a.ckpt")
    assert not list(tmp_path.glob("*.ckpt*"))
    with pytest.raises(OSError, match="save 3 in a row"), pytest.warns(UserWarning, match="training goes on"):
        fit(tmp_path, max_steps=20)
    with pytest.raises(ValueError, match="tries=0"):
        CheckpointFiles(tries=0)


def test_a_run_whose_last_save_failed_does_not_end_as_if_all_were_well(tmp_path, monkeypatch):
    full = [False]
    full_disk(monkeypatch, full)

    class Fills(L.Callback):
        def on_train_end(self, *_):
            full[0] = True

    said = r"last\.ckpt of step 3 was not written"
    with (
        pytest.warns(UserWarning, match=said),
        pytest.raises(OSError, match="the last checkpoint of this run was not written"),
    ):
        fit(tmp_path, more=[Fills(), SaveAtEnd()], max_steps=3)
    assert read(tmp_path / "runs" / "last.ckpt")["global_step"] == 2


def test_a_save_by_hand_after_training_fails_at_once(tmp_path, monkeypatch):
    full = [False]
    full_disk(monkeypatch, full)
    trainer = fit(tmp_path, max_steps=2)
    full[0] = True
    with pytest.raises(OSError, match=r"by_hand\.ckpt of step 2 was not written \(.*No space left"):
        trainer.save_checkpoint(tmp_path / "by_hand.ckpt")
    full[0] = False
    trainer.save_checkpoint(tmp_path / "by_hand.ckpt")
    assert read(tmp_path / "by_hand.ckpt")["global_step"] == 2


LIMITED = """
import resource, sys, torch
from pathlib import Path
from ldlm.checkpoints.io import CheckpointFiles
files, path = CheckpointFiles(), Path(sys.argv[1]) / "last.ckpt"
files.save_checkpoint({"global_step": 1, "state_dict": {"x": torch.zeros(10)}}, path)
resource.setrlimit(resource.RLIMIT_FSIZE, (10**6, 10**6))
for step in (2, 3):
    files.save_checkpoint({"global_step": step, "state_dict": {"x": torch.zeros(10**6)}}, path)
files.save_checkpoint({"global_step": 4, "state_dict": {"x": torch.zeros(10)}}, path)
"""


def test_a_limit_on_the_size_of_files_is_a_full_disk_too(tmp_path):
    run = subprocess.run([sys.executable, "-c", LIMITED, tmp_path], capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stderr
    assert run.stderr.count("File too large") == 2
    assert "last.ckpt of step 3 was not written" in run.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["last.ckpt", "last.ckpt.sha256"]
    assert read(tmp_path / "last.ckpt")["global_step"] == 4


def test_a_folder_that_cannot_be_written_to_is_refused_before_training(tmp_path):
    (tmp_path / "file").write_text("in the way")
    trainer = make_trainer(tmp_path, recipe(saver(tmp_path / "file")), enable_checkpointing=True)
    with pytest.raises(ValueError, match=r"checkpoints cannot be written to .*runs \(.*dirpath"):
        trainer.fit(make_task(), make_data(tmp_path))
    assert trainer.global_step == 0


def test_a_start_sweeps_what_killed_saves_left_and_nothing_else(tmp_path):
    runs = tmp_path / "runs"
    runs.mkdir()
    left, foreign = runs / ".ldlm-123-0123456789ab.tmp", runs / ".last.ckpt.tmp"
    for file in (left, foreign):
        file.write_bytes(b"half")
        os.utime(file, (time.time() - 3600,) * 2)
    fit(tmp_path, max_steps=2)
    assert not left.exists()
    assert foreign.exists()


def test_lightning_finds_the_checkpoint_of_a_requeued_job_beside_its_digest_and_a_killed_save(tmp_path):
    CheckpointFiles().save_checkpoint(state(1), tmp_path / "hpc_ckpt_1.ckpt")
    with write_atomically(tmp_path / "hpc_ckpt_2.ckpt"):  # a kill would leave what is there now
        found = make_trainer(tmp_path, [])._checkpoint_connector._hpc_resume_path
    assert found == str(tmp_path / "hpc_ckpt_1.ckpt")
    assert digest_file(Path(found)).exists()


def test_removing_a_checkpoint_removes_its_digest(tmp_path):
    files = CheckpointFiles()
    files.save_checkpoint(state(1), tmp_path / "a.ckpt")
    files.save_checkpoint(state(2), tmp_path / "b.ckpt")
    files.remove_checkpoint(tmp_path / "a.ckpt")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["b.ckpt", "b.ckpt.sha256"]
    files.remove_checkpoint(tmp_path / "none.ckpt")
