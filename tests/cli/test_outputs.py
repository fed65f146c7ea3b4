"""Where something else than a plain file stands under the name of an output: devices, FIFOs, links, folders."""

import argparse
import ast
import contextlib
import os
import socket
import stat
import threading
import tty
from pathlib import Path

import lightning as L
import pytest
import torch
from helpers import ROOT
from helpers.command import complaint
from helpers.tiny import make_data, make_model, make_task, make_tokenizer, make_trainer
from lightning.pytorch.callbacks import ModelCheckpoint

from ldlm._files import check_output, write_atomically
from ldlm.checkpoints.integrity import damage, digest_file, read, write
from ldlm.cli.generate import write_batches
from ldlm.evaluation.trace import Frame, Token, Trace, write_trace
from ldlm.training.callbacks.predictions import ReconstructionWriter

PACKAGE = ROOT / "ldlm"
CONTENT = {"x": torch.arange(50)}


def bare(path: Path) -> None:
    with write_atomically(path) as file:
        file.write(b"new")


def texts(path: Path) -> None:
    model = make_model(tokenizer=make_tokenizer())
    write_batches(model, [torch.full((2, 8), 5)], argparse.Namespace(output=str(path), num_samples=2))


def page(path: Path) -> None:
    frame = Frame(call=1, t=1.0, tokens=[Token(text="word1", changed=1, special=False)], final=1, text="word1")
    write_trace(path, Trace(nfe=1, frames=[frame]), "a model")


def prediction(path: Path) -> None:
    writer = ReconstructionWriter(str(path))
    writer._lines = ["{}"]
    writer.on_predict_end(make_trainer(path.parent, []), make_task())


def checkpoint(path: Path) -> None:
    write(CONTENT, path)


WRITERS = [bare, texts, page, prediction, checkpoint]


@pytest.mark.parametrize("writer", WRITERS, ids=lambda writer: writer.__name__)
def test_a_device_is_written_into_and_stays_a_device(tmp_path, writer):
    master, slave = os.openpty()
    tty.setraw(slave)
    got = bytearray()

    def listen() -> None:
        while True:
            try:
                got.extend(os.read(master, 65536))
            except OSError:  # nobody has the other end any more
                return

    listener = threading.Thread(target=listen, daemon=True)
    listener.start()
    device = os.ttyname(slave)
    writer(Path(device))
    writer(tmp_path / "plain")
    assert stat.S_ISCHR(os.stat(device).st_mode)
    os.close(slave)
    listener.join(10)
    os.close(master)
    wanted = (tmp_path / "plain").read_bytes()
    if writer is checkpoint:  # torch writes no two files alike
        assert len(got) == len(wanted)
    else:
        assert bytes(got) == wanted


@pytest.mark.parametrize("writer", WRITERS, ids=lambda writer: writer.__name__)
def test_a_fifo_hands_its_reader_what_a_file_would_hold(tmp_path, writer):
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    got: list[bytes] = []
    reader = threading.Thread(target=lambda: got.append(fifo.read_bytes()), daemon=True)
    reader.start()
    writer(fifo)
    reader.join(10)
    assert stat.S_ISFIFO(fifo.stat().st_mode)
    writer(tmp_path / "plain")
    assert len(got[0]) == (tmp_path / "plain").stat().st_size
    if writer is checkpoint:
        (tmp_path / "again.ckpt").write_bytes(got[0])
        assert torch.equal(torch.load(tmp_path / "again.ckpt", weights_only=True)["x"], CONTENT["x"])
    names = {path.name for path in tmp_path.iterdir()}
    assert names <= {"fifo", "plain", "plain.sha256", "again.ckpt"}


def test_ranks_that_predict_into_a_device_make_no_files_beside_it(tmp_path, monkeypatch):
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    reader = threading.Thread(target=fifo.read_bytes, daemon=True)
    reader.start()
    monkeypatch.setattr(L.Trainer, "world_size", 2)
    prediction(fifo)
    reader.join(10)
    assert [path.name for path in tmp_path.iterdir()] == ["fifo"]


def test_a_socket_is_refused_and_stays_a_socket(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # the name of a socket is at most 108 bytes long
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind("socket")
        with pytest.raises(OSError, match="socket"):
            bare(Path("socket"))
        assert stat.S_ISSOCK(os.stat("socket").st_mode)


@pytest.mark.parametrize("there", [True, False], ids=["whole", "dangling"])
@pytest.mark.parametrize("writer", WRITERS, ids=lambda writer: writer.__name__)
def test_a_link_stays_a_link_and_the_file_it_leads_to_is_replaced(tmp_path, writer, there):
    for name in ("here", "elsewhere"):
        (tmp_path / name).mkdir()
    link, target = tmp_path / "here/link", tmp_path / "elsewhere/target"
    link.symlink_to("../elsewhere/middle")
    (tmp_path / "elsewhere/middle").symlink_to("target")
    if there:
        target.write_bytes(b"old")
    writer(link)
    assert link.is_symlink()
    assert (tmp_path / "elsewhere/middle").is_symlink()
    assert target.is_file()
    assert target.read_bytes() not in (b"", b"old")
    if writer is checkpoint:
        assert torch.equal(read(link)["x"], CONTENT["x"])
        assert digest_file(target).exists()
    assert not list(tmp_path.rglob(".*"))


def test_a_kill_leaves_the_old_file_behind_a_link(tmp_path):
    (tmp_path / "target").write_bytes(b"old")
    (tmp_path / "link").symlink_to("target")
    with contextlib.suppress(RuntimeError), write_atomically(tmp_path / "link") as file:
        file.write(b"half")
        raise RuntimeError("power cut")
    assert (tmp_path / "link").read_bytes() == b"old"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["link", "target"]


@pytest.mark.parametrize("mode", [0o600, 0o640, 0o664, 0o444, 0o755])
@pytest.mark.parametrize("writer", WRITERS, ids=lambda writer: writer.__name__)
def test_a_file_that_is_replaced_keeps_its_permissions(tmp_path, writer, mode):
    file = tmp_path / "file"
    file.write_bytes(b"old")
    file.chmod(mode)
    if writer is checkpoint:
        digest_file(file).write_bytes(b"")
        digest_file(file).chmod(mode)
        writer(file)
        assert stat.S_IMODE(digest_file(file).stat().st_mode) == mode
    else:
        writer(file)
    assert file.read_bytes() != b"old"
    assert stat.S_IMODE(file.stat().st_mode) == mode


def test_a_file_that_is_replaced_keeps_its_owner_where_the_system_allows_it(tmp_path):
    file = tmp_path / "file"
    file.write_bytes(b"old")
    try:
        os.chown(file, 12345, 54321)
    except PermissionError:  # not the superuser: a group of one's own is all that can be given
        os.chown(file, -1, os.getgroups()[-1])
    before = file.stat()
    bare(file)
    assert file.read_bytes() == b"new"
    assert (file.stat().st_uid, file.stat().st_gid) == (before.st_uid, before.st_gid)


@pytest.mark.parametrize("umask", [0o022, 0o077, 0o002])
def test_a_new_file_has_the_permissions_of_any_other_new_file(tmp_path, umask):
    before = os.umask(umask)
    try:
        bare(tmp_path / "ours")
        (tmp_path / "theirs").write_bytes(b"")
    finally:
        os.umask(before)
    assert (tmp_path / "ours").stat().st_mode == (tmp_path / "theirs").stat().st_mode


def test_another_name_of_a_file_keeps_what_the_file_held(tmp_path):
    (tmp_path / "file").write_bytes(b"old")
    (tmp_path / "other").hardlink_to(tmp_path / "file")
    bare(tmp_path / "file")
    assert (tmp_path / "file").read_bytes() == b"new"
    assert (tmp_path / "other").read_bytes() == b"old"


@pytest.mark.parametrize("writer", WRITERS, ids=lambda writer: writer.__name__)
def test_a_folder_is_refused_by_name_and_nothing_is_left(tmp_path, writer):
    (tmp_path / "folder").mkdir()
    with pytest.raises(IsADirectoryError, match=r"this is a folder; give the name of a file in it.*folder"):
        writer(tmp_path / "folder")
    assert [path.name for path in tmp_path.rglob("*")] == ["folder"]


@pytest.mark.parametrize("kind", ["a device", "a fifo", "a link to a folder that can be written to"])
def test_what_can_be_written_is_not_refused_beforehand(tmp_path, monkeypatch, kind):
    locked = tmp_path / "locked"
    (tmp_path / "open").mkdir()
    locked.mkdir()
    name = "/dev/null"
    if kind == "a fifo":
        name = str(locked / "fifo")
        os.mkfifo(name)
    elif kind != "a device":
        name = str(locked / "link")
        os.symlink("../open/new", name)
    allowed = os.access
    closed = {str(locked), "/dev"}  # what the superuser may write to, others may not
    monkeypatch.setattr(os, "access", lambda path, mode: str(path) not in closed and allowed(path, mode))
    check_output(name)
    with pytest.raises(ValueError, match="without permission to write"):
        check_output(str(locked / "file"))


def test_two_outputs_of_an_evaluation_may_go_to_the_same_device_but_not_to_the_same_file(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "texts.txt").write_text("word1 word2")
    for name in ("scores.json", "/dev/null"):
        said = complaint(capsys, "evaluate", "texts.txt", "--output", name, "--report", name, "--protocol", "none")
        assert ("would replace another file" in said) == (name == "scores.json")


# --- checkpoints


def test_a_save_over_lightnings_link_leaves_the_checkpoint_that_it_led_to(tmp_path):
    write({"x": torch.zeros(2)}, tmp_path / "step=6.ckpt")
    (tmp_path / "last.ckpt").symlink_to("step=6.ckpt")
    write({"x": torch.ones(2)}, tmp_path / "last.ckpt")
    assert torch.equal(read(tmp_path / "step=6.ckpt")["x"], torch.zeros(2))
    assert torch.equal(read(tmp_path / "last.ckpt")["x"], torch.ones(2))
    assert not (tmp_path / "last.ckpt").is_symlink()


def test_a_run_that_keeps_its_last_checkpoint_as_a_link_leaves_whole_files(tmp_path):
    runs = tmp_path / "runs"
    saver = ModelCheckpoint(
        str(runs), save_last="link", save_top_k=2, monitor="step", mode="max", every_n_train_steps=2
    )
    trainer = make_trainer(tmp_path, [saver], max_steps=6, enable_checkpointing=True)
    trainer.fit(make_task(timestep_refresh=2), make_data(tmp_path))
    assert (runs / "last.ckpt").is_symlink()
    assert read(runs / "last.ckpt")["global_step"] == 6
    trainer.save_checkpoint(runs / "last.ckpt")  # as a stop on a signal does
    assert len(list(runs.glob("*.ckpt"))) == 3
    for file in runs.glob("*.ckpt"):
        assert damage(file) is None


# --- siblings

# Files that are opened for writing in another way, and why.
EXEMPT = {
    "_files.py": "write_atomically itself",
    "tokenizer.py": "a tokenizer's files, in a temporary folder",
    "benchmarks/packing.py": "texts, in a temporary folder",
    "studies/run.py": "logs, to which lines are added",
    "benchmarks/timing.py": "a counter of the system",
    "metrics/mauve.py": "the null device",
}


def writes(tree: ast.AST) -> list[ast.Call]:
    """Calls that open a file for writing by name."""
    found = []
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        name = ast.unparse(node.func).rpartition(".")[2]
        words = [a.value for a in [*node.args, *(k.value for k in node.keywords)] if isinstance(a, ast.Constant)]
        modes = [w for w in words if isinstance(w, str) and w and set(w) <= set("rwaxbt+")]
        if name in ("write_text", "write_bytes", "touch") or (
            name == "open" and any(set(m) & set("wax+") for m in modes)
        ):
            found.append(node)
        if (
            name in ("savefig", "dump", "save")
            and node.args
            and isinstance(node.args[-1], ast.Constant | ast.JoinedStr)
        ):
            found.append(node)
    return found


def test_every_file_of_the_package_is_written_by_the_one_function_for_it():
    def name(path: Path) -> str:
        return path.relative_to(PACKAGE).as_posix()

    assert {name(path) for path in PACKAGE.rglob("*.py") if writes(ast.parse(path.read_text()))} == set(EXEMPT)
