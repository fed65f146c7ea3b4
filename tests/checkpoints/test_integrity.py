"""A checkpoint that is not whole is never read, and the newest whole one is found; behind a URL too."""

import functools
import http.server
import os
import shutil
import threading

import pytest
import torch
from helpers.saves import NEW, OLD, fit, flip, recipe, state
from helpers.tiny import make_data, make_task, make_trainer
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.pytorch.callbacks import ModelCheckpoint

from ldlm.checkpoints.integrity import damage, digest_file, read, write
from ldlm.checkpoints.io import CheckpointFiles
from ldlm.checkpoints.resume import last_checkpoint
from ldlm.model import LDLM

# --- reading


def test_a_missing_digest_is_a_warning_and_a_wrong_one_an_error(tmp_path):
    path = tmp_path / "a.ckpt"
    write(NEW, path)
    digest_file(path).unlink()
    with pytest.warns(UserWarning, match=r"a\.ckpt has no a\.ckpt\.sha256 beside it"):
        assert torch.equal(read(path)["x"], NEW["x"])
    write(OLD, tmp_path / "b.ckpt")
    shutil.copy(digest_file(tmp_path / "b.ckpt"), digest_file(path))
    with pytest.raises(ValueError, match=r"a\.ckpt was altered, .* none of those in a\.ckpt\.sha256 \(remove that if"):
        read(path)


def test_checksums_alone_find_an_altered_weight(tmp_path):
    path = tmp_path / "a.ckpt"
    write(NEW, path)
    digest_file(path).unlink()
    flip(path, path.read_bytes().index(torch.ones(2).numpy().tobytes()) + 3)
    assert torch.load(path, weights_only=True)["x"][0] != 1  # which torch does not notice
    with pytest.raises(ValueError, match=r"a\.ckpt was altered: the checksum of .*data/0' in it is wrong"):
        read(path)


def test_a_damaged_file_names_the_newest_whole_one_beside_it(tmp_path):
    for step, name in [(1, "a"), (3, "b"), (2, "c")]:
        write(state(step), tmp_path / f"{name}.ckpt")
    for name in ("d", "e"):
        write(state(9), tmp_path / f"{name}.ckpt")
        flip(tmp_path / f"{name}.ckpt", 200)
    with (
        pytest.raises(ValueError, match=rf"d\.ckpt was altered.*newest whole one beside it is {tmp_path}/b\.ckpt$"),
        pytest.warns(UserWarning, match=r"e\.ckpt was altered.*passed over") as warned,
    ):
        read(tmp_path / "d.ckpt")
    assert len(warned) == 1


def test_the_last_checkpoint_is_the_one_of_most_steps_that_is_whole(tmp_path):
    assert last_checkpoint(tmp_path / "nowhere") is None
    names = {"version_0/checkpoints/last": 30, "version_1/checkpoints/epoch=0-step=20": 20, "zero": 30, "newest": 40}
    for age, (name, step) in enumerate(names.items()):
        write(state(step), tmp_path / f"{name}.ckpt")
        os.utime(tmp_path / f"{name}.ckpt", (1e9 - age,) * 2)
    assert last_checkpoint(tmp_path) == tmp_path / "newest.ckpt"
    flip(tmp_path / "newest.ckpt", 500)
    with pytest.warns(UserWarning, match=r"newest\.ckpt was altered.*passed over"):
        assert last_checkpoint(tmp_path) == tmp_path / "version_0/checkpoints/last.ckpt"  # of two, the later written
    assert last_checkpoint(tmp_path / "version_1") == tmp_path / "version_1/checkpoints/epoch=0-step=20.ckpt"


@pytest.mark.parametrize(
    "content",
    [{"state_dict": {}}, [1], {"ldlm": {}, "global_step": "7", "optimizer_states": []}, {"ldlm": {}, "global_step": 7}],
)
def test_what_training_cannot_go_on_from_is_passed_over(tmp_path, content):
    torch.save(content, tmp_path / "other.ckpt")
    with pytest.warns(UserWarning, match=r"other\.ckpt holds no state that training could go on from"):
        assert last_checkpoint(tmp_path) is None


def test_weights_alone_are_told_apart_from_a_state_to_go_on_from(tmp_path):
    checkpoints = ModelCheckpoint(str(tmp_path / "runs"), every_n_train_steps=2, save_weights_only=True)
    trainer = make_trainer(tmp_path, recipe(checkpoints), max_steps=2, enable_checkpointing=True)
    trainer.fit(make_task(), make_data(tmp_path))
    with pytest.raises(ValueError, match="holds weights alone"):
        fit(tmp_path, ckpt_path=checkpoints.best_model_path, max_steps=4)
    assert LDLM.load_from_checkpoint(checkpoints.best_model_path).sequence_length == 8


# --- URLs


class Malicious:
    def __init__(self, marker) -> None:
        self.marker = marker

    def __reduce__(self):
        return (open, (str(self.marker), "w"))


@pytest.fixture
def web(tmp_path):
    """A web server for a folder; its address."""

    class Silent(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_):
            pass

    folder = tmp_path / "web"
    folder.mkdir()
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Silent, directory=folder)) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def test_a_checkpoint_behind_a_url_is_read_as_one_here_and_never_run(tmp_path, web, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    fit(tmp_path, max_steps=2)
    shutil.copy(tmp_path / "runs" / "last.ckpt", tmp_path / "web" / "good.ckpt")
    marker = tmp_path / "was_run"
    torch.save({**state(1), "state_dict": Malicious(marker)}, tmp_path / "web" / "bad.ckpt")
    shutil.copy(tmp_path / "web" / "good.ckpt", tmp_path / "web" / "cut.ckpt")
    flip(tmp_path / "web" / "cut.ckpt", 5000)

    assert fit(tmp_path, ckpt_path=f"{web}/good.ckpt", max_steps=3).global_step == 3
    make_trainer(tmp_path, []).validate(make_task(), make_data(tmp_path), ckpt_path=f"{web}/good.ckpt", verbose=False)
    assert LDLM.load_from_checkpoint(f"{web}/good.ckpt").sequence_length == 8

    for name, said in [("bad", "could not be read as a checkpoint"), ("cut", "was altered"), ("none", "be fetched")]:
        source = f"{web}/{name}.ckpt"
        with pytest.raises(ValueError, match=f"{name}.ckpt .*{said}"):
            fit(tmp_path, ckpt_path=source)
        with pytest.raises(ValueError, match=said):
            make_trainer(tmp_path, []).validate(make_task(), make_data(tmp_path), ckpt_path=source)
        with pytest.raises(ValueError, match=said):
            LDLM.load_from_checkpoint(source)
    assert not marker.exists()
    assert not list(tmp_path.glob("tmp*"))


def test_stock_lightning_would_have_run_it(tmp_path, web):
    """The reason for all this; if it fails, Lightning has changed and some of it can go."""
    marker = tmp_path / "was_run"
    torch.save({**state(1), "state_dict": Malicious(marker)}, tmp_path / "web" / f"bad{os.getpid()}.ckpt")
    torch.hub.set_dir(str(tmp_path / "hub"))
    try:
        TorchCheckpointIO().load_checkpoint(f"{web}/bad{os.getpid()}.ckpt")
    finally:
        torch.hub._hub_dir = None
    assert marker.exists()


def test_stores_that_are_no_disk_are_left_to_lightning(tmp_path):
    files = CheckpointFiles()
    files.save_checkpoint(state(5), "memory://bucket/last.ckpt")
    assert files.load_checkpoint("memory://bucket/last.ckpt")["global_step"] == 5
    files.remove_checkpoint("memory://bucket/last.ckpt")
    with pytest.raises(ValueError, match="could not be fetched"):
        files.load_checkpoint("memory://bucket/last.ckpt")


def test_a_link_to_a_checkpoint_goes_by_that_ones_digest(tmp_path):
    write(state(3), tmp_path / "last.ckpt")  # as a run that was stopped leaves it; then save_last="link" goes on
    write(state(6), tmp_path / "step=6.ckpt")
    (tmp_path / "last.ckpt").unlink()
    (tmp_path / "last.ckpt").symlink_to("step=6.ckpt")
    assert damage(tmp_path / "last.ckpt") is None
    assert read(tmp_path / "last.ckpt")["global_step"] == 6


def test_a_step_that_cannot_be_compared_is_passed_over(tmp_path):
    write(state(5), tmp_path / "good.ckpt")
    for name, step in [("a", torch.ones(2)), ("b", 1j), ("c", float("nan"))]:
        write(state(step), tmp_path / f"{name}.ckpt")
    with pytest.warns(UserWarning, match="passed over"):
        assert last_checkpoint(tmp_path) == tmp_path / "good.ckpt"
