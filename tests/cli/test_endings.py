"""How commands end: a closed pipe, Ctrl-C, a full disk, SIGTERM, an unreadable file; each in a sentence at most."""

import errno
import os
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import lightning as L
import pytest
from helpers import ROOT
from helpers.command import complaint
from helpers.tiny import make_data, make_home, make_model, make_task, make_tokenizer, make_trainer
from lightning.pytorch.callbacks import ModelCheckpoint

from ldlm._files import exit_on_signal
from ldlm.checkpoints.integrity import read
from ldlm.cli import main as cli
from ldlm.model import LDLM

VERBS = [*cli.OURS, *cli.LIGHTNING]

# A command whose work is a file that is never finished, so that no test waits for torch to be imported.
STUCK = """
import sys, time
from ldlm.cli import main as cli
from ldlm._files import write_atomically

def work(words):
    with write_atomically("out.json") as file:
        file.write(b"half")
        open("begun", "w").close()
        for _ in range(1200):  # in short sleeps: a signal just before a long one is noticed after it
            time.sleep(0.05)

cli.OURS["bench"] = work
cli.main(["bench"])
"""
CHATTY = """
from ldlm.cli import main as cli

def work(words):
    for number in range(100_000):
        print(f"[{number}] a text", flush=True)

cli.OURS["bench"] = work
cli.main(["bench"])
"""


def start(*words: str, places: dict[str, str] | None = None, **changes) -> subprocess.Popen:
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, sys.path)])} | (places or {})
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "env": environment}
    return subprocess.Popen([sys.executable, *words], **(pipes | changes))


def wait_for(file: Path, process: subprocess.Popen) -> None:
    end = time.monotonic() + 60
    while not file.exists():
        assert process.poll() is None
        assert time.monotonic() < end
        time.sleep(0.02)


ENDS = [(signal.SIGTERM, 143, ""), (signal.SIGHUP, 129, ""), (signal.SIGINT, 130, "ldlm: interrupted\n")]


@pytest.mark.parametrize(("signum", "status", "said"), ENDS)
def test_a_command_that_is_stopped_leaves_no_file_and_says_a_line_at_most(tmp_path, signum, status, said):
    process = start("-c", STUCK, cwd=tmp_path)
    wait_for(tmp_path / "begun", process)
    process.send_signal(signum)
    out, err = process.communicate(timeout=30)
    assert (process.returncode, out, err) == (status, "", said)
    assert [path.name for path in tmp_path.iterdir()] == ["begun"]


def test_a_signal_that_is_ignored_stays_ignored(tmp_path):
    ignoring = f"import signal; signal.signal(signal.SIGHUP, signal.SIG_IGN)\n{STUCK}"  # as nohup does
    process = start("-c", ignoring, cwd=tmp_path)
    wait_for(tmp_path / "begun", process)
    process.send_signal(signal.SIGHUP)
    time.sleep(0.2)
    assert process.poll() is None
    process.terminate()
    process.communicate(timeout=30)
    assert process.returncode == 143


@pytest.mark.parametrize("words", [["-c", CHATTY], ["-m", "ldlm", "presets"], ["-m", "ldlm", "--version"]])
def test_a_reader_that_has_enough_ends_the_command_quietly(tmp_path, words):
    reading, writing = os.pipe()
    process = start(*words, cwd=tmp_path, stdout=writing)
    os.close(writing)
    if words[0] == "-c":
        assert os.read(reading, 9) == b"[0] a tex"
    os.close(reading)
    _, err = process.communicate(timeout=30)
    assert (process.returncode, err) == (141, "")


@pytest.mark.parametrize("buffered", ["", "1"], ids=["buffered", "unbuffered"])
@pytest.mark.parametrize("words", [["-c", CHATTY], ["-m", "ldlm", "presets"], ["-m", "ldlm", "--help"]])
def test_a_standard_output_that_is_full_is_named_in_a_sentence(tmp_path, monkeypatch, words, buffered):
    monkeypatch.setenv("PYTHONUNBUFFERED", buffered)
    with open("/dev/full", "wb") as full:
        process = start(*words, cwd=tmp_path, stdout=full)
        _, err = process.communicate(timeout=30)
    assert (process.returncode, err) == (2, "ldlm: standard output: No space left on device\n")


def test_a_standard_error_that_is_full_leaves_the_status_right(tmp_path):
    with open("/dev/full", "wb") as full:
        process = start("-m", "ldlm", "generat", cwd=tmp_path, stderr=full)
        out, _ = process.communicate(timeout=30)
    assert (process.returncode, out) == (2, "")


FAILURES = [
    (OSError(errno.ENOSPC, "No space left on device", "out.json"), "out.json: No space left on device"),
    (PermissionError(errno.EACCES, "Permission denied", "a/b.txt"), "a/b.txt: Permission denied"),
    (OSError(errno.EIO, "Input/output error"), "Input/output error"),
    (OSError("the last checkpoint was not written"), "the last checkpoint was not written"),
]


@pytest.mark.parametrize(("error", "told"), FAILURES, ids=lambda value: str(value)[:30])
@pytest.mark.parametrize("verb", VERBS)
def test_an_error_of_the_system_is_a_sentence_with_the_name_of_the_file(monkeypatch, capsys, verb, error, told):
    def fails(*_):
        raise error

    monkeypatch.setitem(cli.OURS, verb, fails)  # of Lightning's verbs, too: ours are looked for first
    assert complaint(capsys, verb) == f"ldlm: {told}"


def test_lightnings_verbs_pass_an_error_of_the_system_on_with_its_file(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)

    def fails(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device", "out.json")

    for name in ("Fit", "FitDecoder", "Stored"):
        monkeypatch.setattr(f"ldlm.cli.fit.{name}.__init__", fails)
    monkeypatch.setattr("ldlm.cli.fit.read_checkpoint", lambda _: {})
    for verb in cli.LIGHTNING:
        assert complaint(capsys, verb, "--ckpt_path", "x.ckpt") == "ldlm: out.json: No space left on device"


def test_an_interrupted_trainer_ends_with_the_status_of_an_interrupt(monkeypatch, capsys):
    def trainer(words):
        try:
            raise KeyboardInterrupt
        except KeyboardInterrupt:
            sys.exit(1)  # what Lightning 2.6.6 does

    for kind, status in [(trainer, 130), (lambda _: sys.exit(3), 3)]:
        monkeypatch.setitem(cli.OURS, "bench", kind)
        with pytest.raises(SystemExit) as stop:
            cli.main(["bench"])
        assert stop.value.code == status


def test_signals_are_given_back_after_a_command(monkeypatch):
    seen = []
    monkeypatch.setitem(cli.OURS, "bench", lambda _: seen.append(signal.getsignal(signal.SIGTERM)))
    before = signal.signal(signal.SIGTERM, signal.SIG_DFL)
    try:
        cli.main(["bench"])
        assert seen == [exit_on_signal]
        assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        cli.main(["bench"])
        assert seen[1] == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGTERM, before)


# --- with a model


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    folder = tmp_path_factory.mktemp("home")
    make_home(folder)
    make_model(tokenizer=make_tokenizer()).save_pretrained(folder / "model")
    trainer = make_trainer(folder, [], max_steps=1)
    trainer.fit(make_task(timestep_refresh=2, tokenizer=make_tokenizer()), make_data(folder))
    trainer.save_checkpoint(folder / "model.ckpt")
    return folder


QUIET = ["--data.batch_size", "4", "--trainer.accelerator", "cpu", "--trainer.logger", "false"]
WRITE = [
    ["generate", "model", "-n", "200", "--nfe", "2", "--output", "out.json"],
    ["generate", "model", "-n", "1", "--nfe", "2", "--trace", "out.html"],
    ["export", "model.ckpt", "out"],
    [
        "predict",
        "--ckpt_path",
        "model.ckpt",
        "--data.dataset",
        "text.txt",
        "--data.validation",
        "0.9",
        "--output",
        "out.jsonl",
    ],
]


@pytest.mark.parametrize("words", WRITE, ids=lambda words: f"{words[0]} {words[-2]}")
def test_a_disk_that_is_full_is_named_with_the_file_and_nothing_half_written_stays(home, monkeypatch, capsys, words):
    monkeypatch.chdir(home)
    if words[0] == "predict":
        words = [*words, "--data.cache_dir", "packed", *QUIET]
        make_data(
            home, cache_dir=str(home / "packed"), dataset="text.txt", validation=0.9, tokenizer=make_tokenizer()
        ).prepare_data()
    before = set(home.rglob("*"))
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (8000, hard))
    try:
        said = complaint(capsys, "--import", "helpers.tiny", *words)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "out" in said
    assert said.endswith("File too large")
    after = {path for path in home.rglob("*") if path.is_file() and path.suffix != ".verified"}
    assert after <= before


def test_a_folder_to_predict_into_is_refused_before_the_rows_are_read(home, monkeypatch, capsys):
    monkeypatch.chdir(home)
    monkeypatch.setattr("ldlm.PackedTextDataModule.prepare_data", lambda _: pytest.fail("it was not refused"))
    words = ["--ckpt_path", "model.ckpt", "--data.dataset", "text.txt", "--output", "model", *QUIET]
    assert "model is a folder; give the name of a file in it" in complaint(
        capsys, "--import", "helpers.tiny", "predict", *words
    )


# What Lightning's loops and ours are stopped in the middle of.
SLOW = """
import time
from ldlm import LDLM, LDLMTask

def slow(*_, **__):
    open("begun", "w").close()
    for _ in range(1200):
        time.sleep(0.05)

def slow_batches(*_, **__):
    yield slow()

LDLMTask.validation_step = LDLMTask.test_step = LDLMTask.predict_step = slow
LDLM.sample_batches = slow_batches
"""
REAL = [
    ["validate", "--ckpt_path", "model.ckpt", "--data.dataset", "text.txt", *QUIET],
    ["test", "--ckpt_path", "model.ckpt", "--data.dataset", "text.txt", *QUIET],
    ["predict", "--ckpt_path", "model.ckpt", "--data.dataset", "text.txt", "--output", "out.jsonl", *QUIET],
    ["generate", "model", "--nfe", "2", "--output", "out.json"],
]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("words", "signum", "status", "said"),
    [*((words, *ENDS[0]) for words in REAL), (REAL[0], *ENDS[2]), (REAL[3], *ENDS[2])],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_a_model_at_work_can_be_stopped(home, tmp_path, words, signum, status, said):
    shutil.copytree(home, tmp_path / "home")
    work = tmp_path / "home"
    (work / "slow.py").write_text(SLOW)
    (tmp_path / "temporary").mkdir()
    places = {"TMPDIR": str(tmp_path / "temporary"), "LDLM_CACHE": str(work / "packed")}
    before = set(work.iterdir()) | {work / "begun", work / "packed", work / "__pycache__"}
    process = start("-m", "ldlm", "--import", "helpers.tiny", "--import", "slow", *words, cwd=work, places=places)
    wait_for(work / "begun", process)
    process.send_signal(signum)
    _, err = process.communicate(timeout=60)
    assert process.returncode == status, err
    assert "Traceback" not in err
    assert err.endswith(said)
    assert set(work.iterdir()) <= before
    assert list((tmp_path / "temporary").iterdir()) == []


# --- temporary folders


def full(*_, **__):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), tempfile.gettempdir())


def test_a_run_whose_folder_for_temporary_files_fills_saves_on(tmp_path, monkeypatch):
    class Fills(L.Callback):
        def on_train_start(self, trainer, pl_module):
            monkeypatch.setattr("tempfile.mkdtemp", full)
            monkeypatch.setattr("tempfile.mkstemp", full)

    saver = ModelCheckpoint(str(tmp_path / "runs"), every_n_train_steps=1, save_last=True)
    trainer = make_trainer(tmp_path, [Fills(), saver], max_steps=3, enable_checkpointing=True)
    trainer.fit(make_task(timestep_refresh=2, tokenizer=make_tokenizer()), make_data(tmp_path))
    monkeypatch.undo()
    assert read(tmp_path / "runs/last.ckpt")["global_step"] == 3
    loaded = LDLM.load_from_checkpoint(tmp_path / "runs/last.ckpt").tokenizer
    assert loaded.get_vocab() == make_tokenizer().get_vocab()


def test_each_fit_saves_the_tokenizer_that_its_model_has_then(tmp_path):
    model = make_model(tokenizer=make_tokenizer())
    for template in ("one", "two"):
        model.tokenizer.chat_template = template
        trainer = make_trainer(tmp_path, [], max_steps=1)
        trainer.fit(make_task(model=model, timestep_refresh=2), make_data(tmp_path))
        trainer.save_checkpoint(tmp_path / "a.ckpt")
        assert LDLM.load_from_checkpoint(tmp_path / "a.ckpt").tokenizer.chat_template == template


@pytest.mark.parametrize(
    "words", [["generate", "model"], ["export", "model.ckpt", "out"], ["validate", "--ckpt_path", "model.ckpt"]]
)
def test_a_full_folder_for_temporary_files_is_named_where_one_is_needed(home, monkeypatch, capsys, words):
    monkeypatch.chdir(home)
    monkeypatch.setattr("tempfile.mkdtemp", full)
    said = complaint(capsys, "--import", "helpers.tiny", *words)
    assert said == f"ldlm: {tempfile.gettempdir()}: No space left on device"


def test_a_folder_for_temporary_files_that_fills_is_not_called_a_damaged_file(home, monkeypatch, capsys):
    monkeypatch.chdir(home)

    def no_room(path, content):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(Path, "write_bytes", no_room)
    said = complaint(capsys, "--import", "helpers.tiny", "generate", "model")
    assert said.startswith(f"ldlm: {tempfile.gettempdir()}")
    assert said.endswith("No space left on device")


def test_a_fit_needs_no_folder_for_temporary_files_for_a_tokenizer_that_it_has_not_stored(monkeypatch):
    from ldlm.cli.fit import Fit, Stored

    monkeypatch.setattr("tempfile.mkdtemp", full)
    monkeypatch.setattr("ldlm.cli.fit.LightningCLI.__init__", lambda *_, **__: None)
    assert Fit(["fit"]).tokenizer == Stored(["validate"], None).tokenizer == "gpt2"  # the folder is a stored one's
