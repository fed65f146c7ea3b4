"""`--ckpt_path last` finds the run that saved last and goes on in its folder; own objectives and decoders fit."""

import copy
import os
import sys
import zipfile

import pytest
import torch
import yaml
from helpers.command import complaint
from helpers.recipe import RECIPE
from helpers.tiny import make_home
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from ldlm.checkpoints.integrity import digest_file
from ldlm.cli import main as cli
from ldlm.training.task import LDLMTask

LAST = "runs/tiny/version_{}/checkpoints/last.ckpt"


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A folder with an encoder, a text and a recipe."""
    folder = tmp_path_factory.mktemp("home")
    make_home(folder)
    recipe = copy.deepcopy(RECIPE)
    recipe["trainer"]["callbacks"] = [
        callback for callback in recipe["trainer"]["callbacks"] if callback["class_path"] != "ShowSamples"
    ]
    recipe["trainer"]["num_sanity_val_steps"] = 0
    (folder / "tiny.yaml").write_text(yaml.safe_dump(recipe))
    return folder


@pytest.fixture
def here(home, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    for name in ("encoder", "text.txt", "tiny.yaml"):
        os.symlink(home / name, tmp_path / name)
    return tmp_path


def fit(*words: str) -> None:
    cli.main(["fit", "--config", "tiny.yaml", *words])


def steps(file: str) -> int:
    return torch.load(file, weights_only=True)["global_step"]


def test_a_job_that_always_says_last_starts_goes_on_and_passes_over_damage(here, monkeypatch):
    said = []
    monkeypatch.setattr("ldlm.checkpoints.resume.rank_zero_info", said.append)
    fit("--ckpt_path", "last", "--trainer.max_steps", "2")
    assert said == ["there is no whole checkpoint in runs/tiny to go on from: training starts from scratch"]
    fit("--ckpt_path=last", "--trainer.max_steps", "4")
    assert [path.name for path in (here / "runs/tiny").iterdir()] == ["version_0"]  # the log goes on in it, too
    assert len(list((here / "runs/tiny/version_0").glob("events*"))) == 2
    assert steps(LAST.format(0)) == 4
    last = here / LAST.format(0)
    last.write_bytes(last.read_bytes()[:-5])
    with pytest.warns(UserWarning, match=r"last\.ckpt is truncated or not a checkpoint: it is passed over"):
        fit("--ckpt_path", "last", "--trainer.max_steps", "6")
    found = {path.name: steps(str(path)) for path in last.parent.glob("*step=6.ckpt")}
    assert list(found.values()) == [6]


def test_the_last_run_is_the_one_that_saved_last_and_a_folder_means_its_newest_checkpoint(here, capsys):
    fit("--trainer.max_steps", "4")
    fit("--trainer.max_steps", "2")
    fit("--ckpt_path", "last", "--trainer.max_steps", "3")
    assert sorted(path.name for path in (here / "runs/tiny").iterdir()) == ["version_0", "version_1"]
    assert [steps(LAST.format(version)) for version in (0, 1)] == [4, 3]
    cli.main(["validate", "--config", "tiny.yaml", "--ckpt_path", "runs/tiny/version_1"])
    assert "validation/accuracy" in capsys.readouterr().out
    assert "no checkpoint in this folder is whole" in complaint(capsys, "validate", "--ckpt_path", "encoder")
    assert "give validate the folder of the run" in complaint(capsys, "validate", "--ckpt_path", "last")


def test_a_version_that_is_given_is_the_run_that_is_meant(here, capsys):
    fit("--trainer.max_steps", "2", "--trainer.logger.version", "7")
    fit("--trainer.max_steps", "4", "--trainer.logger.version", "")
    fit("--trainer.max_steps", "3", "--trainer.logger.version", "7", "--ckpt_path", "last")
    assert steps(LAST.format(7)) == 3
    assert steps("runs/tiny/checkpoints/last.ckpt") == 4
    where = ["--trainer.logger", "false", "--trainer.default_root_dir", "s3://bucket/runs"]
    said = complaint(capsys, "fit", "--config", "tiny.yaml", *where, "--ckpt_path", "last")
    assert "not in s3://bucket/runs: name it in full" in said


def test_last_finds_checkpoints_in_a_folder_of_the_users_own_and_without_a_logger(here):
    where = ["--trainer.callbacks+=ModelCheckpoint", "--trainer.callbacks.dirpath=mine"]
    where += ["--trainer.callbacks.every_n_train_steps=1"]
    bare = ["--trainer.logger", "false", "--trainer.default_root_dir", "bare"]
    for options, folder in ((bare, "bare/checkpoints"), ([*bare, *where], "mine")):
        fit(*options, "--trainer.max_steps", "2")
        fit(*options, "--ckpt_path", "last", "--trainer.max_steps", "4")
        assert max(steps(str(path)) for path in (here / folder).glob("*.ckpt")) == 4


def test_a_full_disk_ends_in_a_sentence(here, capsys, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("ldlm.checkpoints.io.write", full)
    with pytest.warns(UserWarning, match="training goes on"):
        said = complaint(capsys, "fit", "--config", "tiny.yaml", "--trainer.max_steps", "9")
    assert "No space left on device" in said
    assert "as this is save 3 in a row that failed, the run ends" in said


def test_a_damaged_file_given_by_name_ends_in_a_sentence_that_names_a_whole_one(here, capsys):
    fit("--trainer.max_steps", "2")
    last = here / LAST.format(0)
    data = bytearray(last.read_bytes())
    with zipfile.ZipFile(last) as archive:
        largest = max(archive.infolist(), key=lambda entry: entry.file_size)
    data[largest.header_offset + largest.file_size // 2 + 512] ^= 4  # not in what lies between two entries
    last.write_bytes(data)
    digest_file(last).unlink()
    for command in ("fit", "validate", "predict"):
        said = complaint(capsys, command, "--config", "tiny.yaml", "--ckpt_path", str(last))
        assert "was altered: the checksum of" in said
        assert "the newest whole one beside it is" in said
        assert "step=2.ckpt" in said


OBJECTIVE = """
from ldlm import Losses, Objective


class Mine(Objective):
    def __init__(self, weight: float = 1.0) -> None:
        self.weight = weight

    def __call__(self, model, tokens, u, gamma, source):
        z0 = model.encode(tokens)
        token = model.token_decoder.loss(model.latent_decoder(z0), tokens, None)
        return Losses(self.weight * token, {"mine": token}, None, z0.detach())

    def prepare(self, model):
        model.denoiser.requires_grad_(False)
"""


def test_an_objective_of_the_users_in_the_current_folder_is_trained_by_its_name(here, monkeypatch):
    monkeypatch.setattr(sys, "path", [*sys.path])
    (here / "my_objective.py").write_text(OBJECTIVE)
    fit("--training.objective", "my_objective.Mine", "--training.objective.init_args.weight", "0.5")
    checkpoint = torch.load(LAST.format(0), weights_only=True)
    described = checkpoint["ldlm"]["training"]["init_args"]["objective"]
    assert described == {"class_path": "my_objective.Mine", "init_args": {"weight": 0.5}}
    events = EventAccumulator("runs/tiny/version_0", size_guidance={"scalars": 0})
    events.Reload()
    mine, total = ([event.value for event in events.Scalars(f"train/{name}")] for name in ("mine", "loss"))
    assert len(mine) == 3
    assert total == pytest.approx([0.5 * loss for loss in mine])
    assert checkpoint["optimizer_states"][0]["state"]
    task = LDLMTask.load_from_checkpoint(LAST.format(0))
    assert (type(task.objective).__name__, task.objective.weight) == ("Mine", 0.5)
    del sys.modules["my_objective"]


def test_a_decoder_on_the_kept_latent_decoder_is_all_that_fit_decoder_trains(here):
    fit("--trainer.max_steps", "2")
    stage = ["--stage.checkpoint", LAST.format(0), "--stage.layers", "1", "--stage.heads", "2"]
    stage += ["--stage.keep_latent_decoder", "true", "--trainer.logger.init_args.name", "decoder"]
    cli.main(["fit-decoder", "--config", "tiny.yaml", *stage])
    found = torch.load("runs/decoder/version_0/checkpoints/last.ckpt", weights_only=True)
    new, old = found["state_dict"], torch.load(LAST.format(0), weights_only=True)["state_dict"]
    assert new["token_decoder.head.weight"].shape == (40, 16)  # from hidden states, of width 16
    kept = [name for name in old if not name.startswith("token_decoder")]
    assert any(name.startswith("latent_decoder") for name in kept)
    assert all(torch.equal(new[name], old[name]) for name in kept)
    trained = [name for name in new if name.startswith("token_decoder")]
    assert len(found["optimizer_states"][0]["state"]) == len(trained)
