"""Runs killed at any moment, again and again, end with the very weights of a run that nobody touched."""

import hashlib
import multiprocessing
import os
import random
import signal
import time
from pathlib import Path

import lightning as L
import pytest
import torch
from helpers.tiny import make_data, make_task, make_trainer
from lightning.pytorch.callbacks import ModelCheckpoint

from ldlm.checkpoints.integrity import damage, read
from ldlm.checkpoints.resume import last_checkpoint
from ldlm.training.callbacks.ema import EMA

STEPS, KILLS, KILLS_A_RUN = 60, 44, 6


class Ballast(L.Callback):
    """Makes checkpoints so large that writing one takes a noticeable share of the run."""

    def __init__(self) -> None:
        self.weight = torch.arange(300_000, dtype=torch.float32)

    def state_dict(self) -> dict:
        return {"weight": self.weight}

    def load_state_dict(self, state: dict) -> None:
        assert torch.equal(state["weight"], self.weight)


def train(folder: Path) -> None:
    """What a job does each time it is started: go on from what is there, in the way of the recipes."""
    os.setpgid(0, 0)
    os.dup2(os.open(folder / "log", os.O_WRONLY | os.O_CREAT | os.O_APPEND), 2)
    arguments = {"every_n_train_steps": 2, "save_last": True, "save_top_k": 1, "monitor": "step", "mode": "max"}
    callbacks = [
        EMA(),
        Ballast(),
        ModelCheckpoint(str(folder / "runs"), **arguments),
    ]
    trainer = make_trainer(folder, callbacks, max_steps=STEPS, enable_checkpointing=True)
    found = last_checkpoint(folder / "runs")
    with open(folder / "starts", "a") as file:
        file.write(f"{read(found)['global_step'] if found else 0}\n")
    trainer.fit(make_task(warmup_steps=20, timestep_refresh=5), make_data(folder), ckpt_path=found)


def fingerprint(value: object) -> str:
    """A digest of all that training goes on from: weights, averages, bins, optimizer, schedule."""
    digest = hashlib.sha256()

    def add(value: object) -> None:
        if isinstance(value, torch.Tensor):
            digest.update(str((value.dtype, value.shape)).encode() + value.contiguous().numpy().tobytes())
        elif isinstance(value, dict):
            for key in sorted(value, key=str):
                digest.update(str(key).encode())
                add(value[key])
        elif isinstance(value, list | tuple):
            for part in value:
                add(part)
        else:
            digest.update(repr(value).encode())

    add(value)
    return digest.hexdigest()


def end_of(folder: Path) -> str:
    found = last_checkpoint(folder / "runs")
    assert found is not None
    content = read(found)
    assert content["global_step"] == STEPS
    return fingerprint([content[key] for key in ("state_dict", "raw_parameters", "optimizer_states", "lr_schedulers")])


def start(context, folder: Path):
    process = context.Process(target=train, args=(folder,))
    process.start()
    return process


def saving(folder: Path) -> bool:
    return any(name.endswith(".tmp") for name in os.listdir(folder / "runs"))


@pytest.mark.slow
def test_runs_killed_at_random_moments_lose_nothing(tmp_path, capsys):
    # Children are forked from a process that has imported everything and run nothing: no threads to be torn by a fork.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["test_survival"])
    dice = random.Random(0)
    whole = tmp_path / "whole"
    whole.mkdir()
    start(context, whole.with_name("nothing")).join(120)  # by now everything is imported
    began = time.monotonic()
    process = start(context, whole)
    process.join(300)
    takes = time.monotonic() - began
    assert process.exitcode == 0, (whole / "log").read_text()
    wanted = end_of(whole)

    kills = during = resumed = runs = 0
    while kills < KILLS:
        folder = tmp_path / str(runs)
        (folder / "runs").mkdir(parents=True)
        runs += 1
        for _ in range(KILLS_A_RUN):
            before = time.monotonic()
            process = start(context, folder)
            wait, in_a_save = dice.uniform(0, takes), dice.random() < 0.5
            while process.is_alive() and (time.monotonic() < before + wait or (in_a_save and not saving(folder))):
                pass  # a pause would miss files that are there for a few milliseconds
            process.kill()
            process.join(60)
            if process.exitcode == 0:  # it was quicker
                break
            assert process.exitcode == -signal.SIGKILL, (folder / "log").read_text()
            kills += 1
            during += saving(folder)
            for file in (folder / "runs").glob(".*.tmp"):
                os.utime(file, (0, 0))  # old enough for the next start to sweep it
            files = list((folder / "runs").glob("*.ckpt"))
            assert all(damage(file) is None for file in files)  # none is torn, and none is taken for torn
        process = start(context, folder)
        process.join(300)
        assert process.exitcode == 0, (folder / "log").read_text()
        assert end_of(folder) == wanted, f"run {runs} lost something"
        starts = [int(line) for line in (folder / "starts").read_text().split()]
        assert starts == sorted(starts)  # no kill threw a run back behind where it had gone on from
        resumed += sum(step > 0 for step in starts)
        assert not saving(folder)
    with capsys.disabled():
        print(
            f"\n{kills} kills, {during} of them while a file was being written; {resumed} starts from a checkpoint; "
            f"{runs} of {runs} runs ended as the one left alone, in {time.monotonic() - began:.0f} s"
        )
    assert during >= 10
