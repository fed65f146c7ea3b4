"""A SLURM job goes on from what it left itself when it was put back into the queue, and from no other job's file."""

import os
import signal
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
import yaml
from helpers.tiny import make_data, make_home, make_task, make_trainer

from ldlm.cli import main as cli

SIZES = {"latent_size": 12, "width": 16, "layers": 1, "heads": 2}
STEPS = 5  # after which the first job is put back


def recipe(name: str, steps: int) -> dict[str, Any]:
    keep = {"every_n_train_steps": 1, "save_last": True}
    coders = ("latent_encoder", "PerceiverResamplerEncoder"), ("latent_decoder", "PerceiverResamplerDecoder")
    return {
        "seed_everything": 1,
        "sequence_length": 8,
        "tokenizer": "./encoder",
        "data": {"dataset": "text.txt", "batch_size": 4, "validation": None, "cache_dir": "cache"},
        "model": {
            "token_encoder": {"class_path": "PretrainedTokenEncoder", "init_args": {"model": "./encoder"}},
            **{part: {"class_path": path, "init_args": {"hidden_size": 16, **SIZES}} for part, path in coders},
            "denoiser": {"class_path": "DiT", "init_args": {**SIZES}},
            "token_decoder": {"class_path": "LinearTokenDecoder", "init_args": {"hidden_size": 16, "vocab_size": 40}},
        },
        "training": {"warmup_steps": 2, "timestep_refresh": 1, "statistics_rows": 8},
        "trainer": {
            "max_steps": steps,
            "accelerator": "cpu",
            "devices": 1,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "logger": {"class_path": "TensorBoardLogger", "init_args": {"save_dir": "runs", "name": name}},
            "callbacks": [
                {"class_path": "ModelCheckpoint", "init_args": keep},
                {"class_path": "test_requeued.PutsBack"},
            ],
        },
    }


class PutsBack(L.Callback):
    """What SLURM does when the time is up."""

    def on_train_batch_end(self, trainer, model, outputs, batch, batch_idx):
        if trainer.global_step == STEPS:
            os.kill(os.getpid(), signal.SIGUSR1)


def job(monkeypatch, number: int) -> None:
    environment = {"NTASKS": 1, "JOB_NAME": "night", "JOB_ID": number, "PROCID": 0, "LOCALID": 0, "NODEID": 0}
    for name, value in environment.items():
        monkeypatch.setenv(f"SLURM_{name}", str(value))


@pytest.fixture
def first(tmp_path, monkeypatch):
    """A folder in which the first experiment, job 1, was put back into the queue after five steps."""
    monkeypatch.chdir(tmp_path)
    make_home(tmp_path)
    scontrol = tmp_path / "bin" / "scontrol"
    scontrol.parent.mkdir()
    scontrol.write_text("#!/bin/sh\n")
    scontrol.chmod(0o755)
    monkeypatch.setenv("PATH", f"{scontrol.parent}{os.pathsep}{os.environ['PATH']}")
    job(monkeypatch, 1)
    for name, steps in (("first", 9), ("second", 2)):
        Path(f"{name}.yaml").write_text(yaml.safe_dump(recipe(name, steps)))
    with pytest.raises(SystemExit):
        cli.main(["fit", "--config", "first.yaml"])
    assert (tmp_path / "hpc_ckpt_1.ckpt").exists()


def last_step(folder: str) -> int:
    return torch.load(f"runs/{folder}/checkpoints/last.ckpt", weights_only=True)["global_step"]


@pytest.mark.parametrize("number", [2, 1], ids=["another job", "the same job"])
@pytest.mark.parametrize("words", [[], ["--ckpt_path", "last"]], ids=["no checkpoint named", "last"])
def test_a_second_experiment_in_the_same_folder_starts_from_scratch(first, monkeypatch, words, number):
    job(monkeypatch, number)
    cli.main(["fit", "--config", "second.yaml", *words])
    assert last_step("second/version_0") == 2


@pytest.mark.parametrize("words", [[], ["--ckpt_path", "last"]], ids=["no checkpoint named", "last"])
def test_the_job_that_was_put_back_goes_on(first, monkeypatch, words):
    job(monkeypatch, 1)
    cli.main(["fit", "--config", "first.yaml", *words])  # a fifth step would have put it back again
    assert last_step("first/version_0" if words else "first/version_1") == 9


def test_a_script_is_told_whose_file_lightning_would_go_on_from(tmp_path, monkeypatch):
    def fit(steps: int, **named: Any) -> L.Trainer:
        trainer = make_trainer(tmp_path, [], max_steps=steps)
        trainer.fit(make_task(warmup_steps=4, timestep_refresh=2), make_data(tmp_path), **named)
        return trainer

    job(monkeypatch, 1)
    fit(1).save_checkpoint(tmp_path / "hpc_ckpt_1.ckpt")
    monkeypatch.chdir(tmp_path)
    assert fit(2).ckpt_path == str(tmp_path / "hpc_ckpt_1.ckpt")
    job(monkeypatch, 2)
    with pytest.raises(
        ValueError, match=r"hpc_ckpt_1.ckpt was left by the SLURM job 1.*move it away to train from scr"
    ):
        fit(2)
    assert fit(2, ckpt_path="hpc_ckpt_1.ckpt").global_step == 2  # named by its user


def test_what_is_asked_of_lightning_is_still_there():
    # If this fails, Lightning has changed how a checkpoint is chosen: see `ldlm.training.resuming.begin_anew`.
    connector = L.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False)._checkpoint_connector
    assert {"_user_managed", "_hpc_resume_path"} <= {*dir(connector)}
