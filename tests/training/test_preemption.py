"""A run that is told to stop saves, exits with status 143 and goes on elsewhere as if nothing had been."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from helpers import ROOT
from helpers.runs import assert_same_run
from helpers.runs import run as run_all
from helpers.tiny import make_data, make_task, make_trainer
from lightning.pytorch.callbacks import ModelCheckpoint

from ldlm.training.callbacks.ema import EMA
from ldlm.training.preemption import StopOnSignal, Stopped, path_of_last
from ldlm.training.task import LDLMTask

STEPS = 400


class Run:
    """A run in processes of its own, its group's leader and its other rank."""

    def __init__(self, folder: Path, launcher: tuple[str, ...] = (), **arguments: Any) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        environment = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM", "LOCAL_RANK"))}
        environment |= {"PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, sys.path)])}
        environment |= arguments.pop("environment", {})
        words = [json.dumps([{"folder": str(folder), "max_steps": STEPS, "save_every": 1000, **arguments}])]
        self.error = folder / "stderr.txt"
        self.process = subprocess.Popen(
            [sys.executable, *launcher, str(ROOT / "tests/helpers/fit.py"), *words],
            stderr=self.error.open("w"),
            stdout=subprocess.DEVNULL,
            env=environment,
            start_new_session=True,
        )

    def others(self) -> list[int]:
        """Processes that the first one started, loaders and all."""
        found = subprocess.run(["pgrep", "-P", str(self.process.pid)], capture_output=True, text=True, check=False)
        return [int(word) for word in found.stdout.split()]

    def wait_for(self, what: str, seconds: float = 90) -> None:
        """Wait for a file, or for so many steps."""
        end = time.monotonic() + seconds
        while True:
            file = self.folder / ("losses.txt" if what.isdigit() else what)
            if file.exists() and (not what.isdigit() or len(file.read_text().splitlines()) >= int(what)):
                return
            assert self.process.poll() is None, self.error.read_text()[-3000:]
            assert time.monotonic() < end, self.error.read_text()[-3000:]
            time.sleep(0.05)

    def end(self, seconds: float) -> int:
        """The exit status; nothing of it is left."""
        try:
            status = self.process.wait(seconds)
        finally:
            try:
                os.killpg(self.process.pid, signal.SIGKILL)
                left = True
            except ProcessLookupError:
                left = False
        assert not left, "processes were left behind"
        return status


def to_parent(run: Run) -> None:
    os.kill(run.process.pid, signal.SIGTERM)


def to_parent_by_usr1(run: Run) -> None:
    os.kill(run.process.pid, signal.SIGUSR1)


def to_the_other_rank(run: Run) -> None:
    os.kill(run.others()[0], signal.SIGTERM)


def to_all(run: Run) -> None:
    os.killpg(run.process.pid, signal.SIGTERM)


def twice(run: Run) -> None:
    to_all(run)
    to_parent(run)


CASES = [
    ("one-parent", 1, to_parent, {}),
    ("one-usr1", 1, to_parent_by_usr1, {}),
    ("one-twice-with-loaders", 1, twice, {"workers": 2}),
    (
        "one-validating",
        1,
        to_parent,
        {"validation_pause": 0.3, "val_check_interval": 20, "check_val_every_n_epoch": None},
    ),
    ("two-parent", 2, to_parent, {}),
    ("two-other", 2, to_the_other_rank, {}),
    ("two-all", 2, to_all, {"accumulated": 2}),
    ("two-twice-usr1", 2, lambda run: (to_parent_by_usr1(run), twice(run)), {}),
]


@pytest.fixture(scope="module")
def stopped(tmp_path_factory):
    """The eight runs, each stopped, and what was left: folder, exit status, seconds it took, step of the checkpoint."""
    found = {}
    for name, devices, send, arguments in CASES:
        run = Run(tmp_path_factory.mktemp("signals") / name, devices=devices, pause=0.02, **arguments)
        run.wait_for("validating" if "validating" in name else "12")
        began = time.monotonic()
        send(run)
        status = run.end(30)
        seconds = time.monotonic() - began
        step = torch.load(run.folder / "last.ckpt", weights_only=True)["global_step"]
        found[name] = (run, status, seconds, step)
    return found


@pytest.mark.slow
@pytest.mark.parametrize(("name", "arguments"), [(case[0], case[3]) for case in CASES])
def test_a_signal_ends_a_run_within_15_seconds_with_status_143_and_one_checkpoint(stopped, name, arguments):
    run, status, seconds, step = stopped[name]
    assert status in (143, -15) if "twice" in name else status == 143  # a shell sees 143 either way
    assert seconds < 15
    assert [path.name for path in run.folder.glob("*.ckpt")] == ["last.ckpt"]
    assert 12 // arguments.get("accumulated", 1) <= step < STEPS
    assert f"after step {step}: go on with --ckpt_path {run.folder / 'last.ckpt'}" in run.error.read_text()


@pytest.mark.slow
@pytest.mark.parametrize("devices", [1, 2])
def test_the_runs_that_were_stopped_go_on_as_if_they_had_not_been(stopped, tmp_path, devices):
    runs = []
    for accumulated in {case[3].get("accumulated", 1) for case in CASES if case[1] == devices}:
        common = {"devices": devices, "accumulated": accumulated}
        mine = [c[0] for c in CASES if c[1] == devices and c[3].get("accumulated", 1) == accumulated]
        whole, last = str(tmp_path / f"whole{accumulated}"), max(stopped[name][3] for name in mine) + 3
        runs.append({"folder": whole, "max_steps": last, **common})
        for name in mine:
            run, *_, step = stopped[name]
            resume = {"resume": str(run.folder / "last.ckpt"), "max_steps": step + 3, **common}
            runs.append({"folder": str(tmp_path / name), **resume})
    run_all(*runs)
    for name, count, _, arguments in CASES:
        if count == devices:
            step = stopped[name][3]
            assert_same_run(tmp_path / f"whole{arguments.get('accumulated', 1)}", tmp_path / name, step, step + 3)


@pytest.mark.slow
def test_a_slurm_job_is_put_back_into_the_queue_by_sigusr1_and_finds_its_checkpoint(tmp_path):
    scontrol = tmp_path / "bin" / "scontrol"
    scontrol.parent.mkdir()
    scontrol.write_text(f'#!/bin/sh\necho "$@" >> {tmp_path}/asked.txt\n')
    scontrol.chmod(0o755)
    job = {"SLURM_NTASKS": "1", "SLURM_JOB_NAME": "night", "SLURM_JOB_ID": "4711", "SLURM_PROCID": "0"}
    job |= {"SLURM_LOCALID": "0", "SLURM_NODEID": "0", "PATH": f"{scontrol.parent}{os.pathsep}{os.environ['PATH']}"}
    run = Run(tmp_path / "first", pause=0.02, environment=job)
    run.wait_for("5")
    to_parent_by_usr1(run)
    assert run.end(30) == 143
    assert (tmp_path / "asked.txt").read_text() == "requeue 4711\n"
    step = torch.load(run.folder / "last.ckpt", weights_only=True)["global_step"]
    hpc = torch.load(run.folder / "hpc_ckpt_1.ckpt", weights_only=True)
    assert hpc["global_step"] == step
    # What Lightning finds for a requeued job that names no checkpoint; SIGTERM asks for no second requeue.
    again = Run(run.folder, max_steps=step + STEPS, pause=0.02, environment=job)
    again.wait_for("30")
    to_parent(again)
    assert again.end(30) == 143
    assert (tmp_path / "asked.txt").read_text() == "requeue 4711\n"
    assert torch.load(run.folder / "last.ckpt", weights_only=True)["global_step"] > step
    assert "hpc_ckpt_1.ckpt" in again.error.read_text()


LAUNCHERS = {"lightning": (), "torchrun": ("-m", "torch.distributed.run", "--nproc_per_node=2")}


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_one_ranks_exception_ends_all_ranks_with_its_message(tmp_path, launcher, rank):
    run = Run(tmp_path / "run", LAUNCHERS[launcher], devices=2, raises=[rank, 6], pause=0.02)
    run.wait_for("4")
    began = time.monotonic()
    assert run.end(60) not in (0, 143)
    assert time.monotonic() - began < 30
    assert f"KeyError: 'a fault of rank {rank} alone'" in run.error.read_text()


# --- in this process


class Kills(L.Callback):
    """Sends this process a signal in a hook."""

    def __init__(self, hook: str, signum: int = signal.SIGTERM) -> None:
        setattr(self, hook, lambda *_, **__: os.kill(os.getpid(), signum))


def tiny() -> LDLMTask:
    return make_task(warmup_steps=4, timestep_refresh=2)


@pytest.mark.parametrize("hook", ["on_fit_start", "on_train_start", "on_validation_start", "on_save_checkpoint"])
def test_whenever_the_signal_comes_the_run_ends_with_its_step_and_gives_the_signals_back(tmp_path, hook):
    before = signal.signal(signal.SIGUSR1, signal.SIG_DFL), signal.signal(signal.SIGTERM, signal.SIG_DFL)
    try:
        keep = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=2, save_top_k=-1)
        # One's own guard stands first and acts last, after the averages of its step.
        callbacks = [StopOnSignal(), ema := EMA(), Kills(hook), keep]
        trainer = make_trainer(tmp_path, callbacks, max_steps=9, val_check_interval=3, enable_checkpointing=True)
        task = tiny()
        with pytest.raises(SystemExit) as stop:
            trainer.fit(task, make_data(tmp_path))
        assert stop.value.code == 143
        assert signal.getsignal(signal.SIGUSR1) == signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    finally:
        signal.signal(signal.SIGUSR1, before[0])
        signal.signal(signal.SIGTERM, before[1])
    saved = torch.load(tmp_path / "last.ckpt", weights_only=True)
    expected = {"on_fit_start": 1, "on_train_start": 1, "on_validation_start": 4, "on_save_checkpoint": 2}
    assert saved["global_step"] == trainer.global_step == expected[hook]
    assert torch.equal(saved["state_dict"]["token_decoder.head.weight"], ema.averages["token_decoder.head.weight"])
    assert torch.equal(saved["raw_parameters"]["token_decoder.head.weight"], task.model.token_decoder.head.weight)


def test_a_handler_of_ones_own_is_called_too_and_comes_back(tmp_path):
    heard: list[int] = []

    def mine(signum, frame):
        heard.append(signum)

    before = signal.signal(signal.SIGUSR1, mine)
    try:
        trainer = make_trainer(tmp_path, [EMA(), Kills("on_train_start", signal.SIGUSR1)])
        with pytest.raises(SystemExit):
            trainer.fit(tiny(), make_data(tmp_path))
        assert heard == [signal.SIGUSR1]
        assert signal.getsignal(signal.SIGUSR1) is mine
    finally:
        signal.signal(signal.SIGUSR1, before)


def test_a_stop_that_cannot_save_points_to_no_file_that_is_not_there(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    keep = ModelCheckpoint(tmp_path, every_n_train_steps=100)
    trainer = make_trainer(tmp_path, [EMA(), keep, Kills("on_train_start")], max_steps=5, enable_checkpointing=True)
    said: list[str] = []
    monkeypatch.setattr("ldlm.checkpoints.io.write", full)
    monkeypatch.setattr("ldlm.training.preemption.rank_zero_info", said.append)
    with pytest.warns(UserWarning, match="No space left"), pytest.raises(Stopped) as stop:
        trainer.fit(tiny(), make_data(tmp_path))
    assert stop.value.code == 143
    assert len(said) == 1
    assert "last.ckpt could not be written" in said[0]
    assert "go on with" not in said[0]
    assert not list(tmp_path.glob("*.ckpt"))


def test_after_a_fit_that_was_not_stopped_lightnings_own_ways_are_back(tmp_path):
    before = signal.getsignal(signal.SIGTERM)
    trainer = make_trainer(tmp_path, [EMA()], max_steps=1)
    trainer.fit(tiny(), make_data(tmp_path))
    assert signal.getsignal(signal.SIGTERM) == before
    assert "register_signal_handlers" not in vars(trainer._signal_connector)
    assert "_broadcast_sigterm_tensor" not in vars(trainer.fit_loop.epoch_loop)


def test_what_is_replaced_in_lightning_is_still_there():
    # If this fails, Lightning has changed what StopOnSignal replaces: see docs/reliability.md for what to check.
    trainer = L.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False)
    names = dir(trainer._signal_connector), dir(trainer.fit_loop.epoch_loop)
    assert {"register_signal_handlers", "_slurm_sigusr_handler_fn"} <= set(names[0])
    assert "_broadcast_sigterm_tensor" in names[1]


def test_the_last_checkpoint_is_the_trainers_own_or_stands_beside_its_others(tmp_path):
    assert path_of_last(make_trainer(tmp_path, [])) is None
    keep = ModelCheckpoint(tmp_path / "kept")
    trainer = make_trainer(tmp_path, [keep], enable_checkpointing=True)
    assert path_of_last(trainer) == str(tmp_path / "kept" / "last.ckpt")
    keep.last_model_path = "elsewhere/last-v1.ckpt"
    assert path_of_last(trainer) == "elsewhere/last-v1.ckpt"
