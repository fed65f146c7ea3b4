"""Training state of an untrusted checkpoint: it takes over no foreign path, and where it is malformed it is refused.

What must stay as it was is a folder outside the run's own, compared byte by byte.
"""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from helpers.tiny import make_data, make_task, make_tokenizer, make_trainer
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint, Timer
from lightning.pytorch.plugins import MixedPrecision

from ldlm.checkpoints.integrity import digest_file, write
from ldlm.checkpoints.io import CheckpointFiles
from ldlm.checkpoints.resume import last_checkpoint
from ldlm.training.callbacks.ema import EMA
from ldlm.training.callbacks.visualisation import SaveAtEnd
from ldlm.training.preemption import path_of_last
from ldlm.training.task import LDLMTask

pytestmark = pytest.mark.filterwarnings("ignore")


class Counts(L.Callback):
    """A user's callback, whose state is its own business."""

    def state_dict(self) -> dict[str, Any]:
        return {"seen": [1, {"words": 3}]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.seen = state_dict["seen"][1]["words"] + 1


def callbacks(run: Path, **changes: Any) -> list[L.Callback]:
    arguments = {"every_n_train_steps": 1, "save_last": True, "save_top_k": 1, "monitor": "step", "mode": "max"}
    keep = ModelCheckpoint(run, filename="{step}", **(arguments | changes))
    stop = EarlyStopping("validation/diffusion", patience=100, check_on_train_epoch_end=False)
    return [EMA(), SaveAtEnd(), keep, stop, Timer(duration={"hours": 1}), Counts()]


def task() -> LDLMTask:
    return make_task(tokenizer=make_tokenizer(), warmup_steps=4, timestep_refresh=2)


def train(run: Path, steps: int, resume: str | None = None, **changes: Any) -> L.Trainer:
    trainer = make_trainer(run, callbacks(run, **changes), max_steps=steps, enable_checkpointing=True)
    trainer.fit(task(), make_data(run.parent), ckpt_path=resume)
    return trainer


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A checkpoint after two steps, with the state of each callback in it."""
    run = tmp_path_factory.mktemp("made") / "run"
    train(run, 2)
    return run / "last.ckpt"


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.fixture
def place(made, tmp_path):
    """A run's folder with a checkpoint in it, beside a folder that is none of its business."""
    outside = tmp_path / "outside"
    (outside / "inner.ckpt").mkdir(parents=True)
    for name in ("diary.txt", "their.ckpt", "inner.ckpt/notes.txt"):
        (outside / name).write_text(name)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "link").symlink_to(outside)
    (tmp_path / "run" / "link.ckpt").symlink_to(outside / "their.ckpt")
    (tmp_path / "run" / "folder.ckpt").mkdir()
    (tmp_path / "run" / "folder.ckpt" / "notes.txt").write_text("kept")
    return tmp_path


def hostile(made: Path, place: Path, change: Callable[[dict[str, Any]], None], name: str = "bad.ckpt") -> Path:
    """The checkpoint, altered; its digest is of what it says."""
    content = torch.load(made, weights_only=True)
    change(content)
    write(content, place / "run" / name)
    return place / "run" / name


def state_of(content: dict[str, Any], kind: str) -> dict[str, Any]:
    return next(state for key, state in content["callbacks"].items() if key.startswith(kind))


PATHS = {
    "a folder by a local URL": "local://{outside}",
    "a folder by a file URL": "file://{outside}",
    "a file by a local URL": "local://{outside}/their.ckpt",
    "a folder": "{outside}",
    "a file": "{outside}/their.ckpt",
    "a folder like a file": "{outside}/inner.ckpt",
    "up and out": "{run}/../outside",
    "up and out to a file": "{run}/../outside/their.ckpt",
    "up, out and in again": "{run}/../outside/../outside/diary.txt",
    "over a link": "{run}/link/their.ckpt",
    "over a link to a folder": "{run}/link/inner.ckpt",
    "a link": "{run}/link.ckpt",
    "the run's folder": "{run}",
    "a chain of file systems": "simplecache::local://{outside}",
}


def point_to(content: dict[str, Any], path: str) -> None:
    state = state_of(content, "ModelCheckpoint")
    del state["dirpath"]
    state |= {"last_model_path": path, "best_model_path": path, "kth_best_model_path": path}
    state |= {"best_k_models": {path: torch.tensor(0.0)}, "kth_value": torch.tensor(0.0)}


BEST: dict[str, Any] = {}
NEWEST = {"monitor": None, "mode": "min"}
FAST = [("a folder by a local URL", BEST), ("up and out", NEWEST), ("over a link", NEWEST)]
SLOW = [(name, top_k) for name in PATHS for top_k in (BEST, NEWEST) if (name, top_k) not in FAST]


@pytest.mark.parametrize(("name", "top_k"), [*FAST, *(pytest.param(*case, marks=pytest.mark.slow) for case in SLOW)])
def test_a_resumed_run_removes_and_overwrites_nothing_outside_its_folder(made, place, name, top_k):
    path = PATHS[name].format(outside=place / "outside", run=place / "run")

    def change(content):
        point_to(content, path)
        key = next(key for key in content["callbacks"] if key.startswith("ModelCheckpoint"))
        content["callbacks"][make_key(top_k)] = content["callbacks"].pop(key)

    bad, before = hostile(made, place, change), contents(place / "outside")
    trainer = train(place / "run", 4, str(bad), **top_k)
    assert contents(place / "outside") == before
    assert (place / "run" / "folder.ckpt" / "notes.txt").exists()
    keep = trainer.checkpoint_callback
    assert [Path(p).parent for p in (keep.last_model_path, keep.best_model_path)] == [place / "run"] * 2
    assert not Path(keep.last_model_path).is_symlink()
    assert torch.load(place / "run" / "last.ckpt", weights_only=True)["global_step"] == 4


def make_key(changes: dict[str, Any]) -> str:
    return next(c for c in callbacks(Path("run"), **changes) if isinstance(c, ModelCheckpoint)).state_key


@pytest.mark.parametrize("how", ["the newest of the folder", "a requeued job"])
def test_the_same_holds_however_the_checkpoint_is_found(made, place, how, monkeypatch):
    def change(content):
        point_to(content, f"local://{place / 'outside'}")

    name = "bad.ckpt" if how == "the newest of the folder" else "hpc_ckpt_7.ckpt"
    bad, before = hostile(made, place, change, name), contents(place / "outside")
    resume = "hpc" if name.startswith("hpc") else str(last_checkpoint(place / "run"))
    assert resume in ("hpc", str(bad))
    trainer = train(place / "run", 4, resume)
    assert trainer.global_step == 4
    assert contents(place / "outside") == before


def test_a_signal_and_the_end_of_a_run_write_to_the_runs_folder_only(made, place):
    bad = hostile(made, place, lambda content: point_to(content, str(place / "outside" / "diary.txt")))
    trainer = make_trainer(place / "run", callbacks(place / "run"), max_steps=2, enable_checkpointing=True)
    trainer.fit(task(), make_data(place), ckpt_path=bad)  # no step is left to do
    assert path_of_last(trainer) == str(place / "run" / "last.ckpt")
    assert (place / "outside" / "diary.txt").read_text() == "diary.txt"


def test_a_run_goes_on_with_the_paths_of_its_own_folder(place):
    train(place / "run", 2, save_top_k=2)
    names = sorted(path.name for path in (place / "run").glob("step*.ckpt"))
    assert names == ["step=1.ckpt", "step=2.ckpt"]
    trainer = train(place / "run", 4, str(place / "run" / "last.ckpt"), save_top_k=2)
    assert sorted(path.name for path in (place / "run").glob("step*.ckpt")) == ["step=3.ckpt", "step=4.ckpt"]
    assert len(trainer.checkpoint_callback.best_k_models) == 2
    assert not list((place / "run").glob("last-v*"))


# --- what is removed


def test_removing_takes_one_checkpoint_and_its_digest_and_nothing_else(place, tmp_path):
    files, run, outside = CheckpointFiles(), place / "run", place / "outside"
    files.save_checkpoint({"a": 1}, run / "mine.ckpt")
    before = contents(place)
    for path in (run / "folder.ckpt", run, outside, outside / "diary.txt", f"local://{outside}"):
        files.remove_checkpoint(path)
    for path in (f"local://{outside}/inner.ckpt", f"file://{run}/folder.ckpt", run / "none.ckpt", "memory://none.ckpt"):
        files.remove_checkpoint(path)
    assert contents(place) == before
    files.remove_checkpoint(run / "link.ckpt")
    assert (outside / "their.ckpt").exists()
    assert not (run / "link.ckpt").is_symlink()
    files.remove_checkpoint(run / "mine.ckpt")
    assert not (run / "mine.ckpt").exists()
    assert not digest_file(run / "mine.ckpt").exists()


def test_a_remote_checkpoint_is_removed_alone():
    import fsspec

    memory = fsspec.filesystem("memory")
    for name in ("/run/a.ckpt", "/run/b.ckpt", "/run/c.ckpt/inner.ckpt"):
        memory.pipe_file(name, b"x")
    for name in ("a.ckpt", "c.ckpt", "none.ckpt"):
        CheckpointFiles().remove_checkpoint(f"memory://run/{name}")
    assert sorted(memory.find("/run")) == ["/run/b.ckpt", "/run/c.ckpt/inner.ckpt"]


# --- states that are malformed


def put(*keys: Any, value: Any) -> Callable[[dict[str, Any]], None]:
    """Set what stands at a place; a value that is a function makes it of what is there."""

    def change(content: dict[str, Any]) -> None:
        place: Any = content
        for key in keys[:-1]:
            place = place[key]
        place[keys[-1]] = value(place[keys[-1]]) if callable(value) else value

    return change


def of_callback(kind: str, key: str, value: Any) -> Callable[[dict[str, Any]], None]:
    return lambda content: state_of(content, kind).update({key: value})


def drop(*keys: Any) -> Callable[[dict[str, Any]], None]:
    def change(content: dict[str, Any]) -> None:
        place: Any = content
        for key in keys[:-1]:
            place = place[key]
        del place[keys[-1]]

    return change


FIT = ("loops", "fit_loop")
STEPS = (*FIT, "epoch_loop.automatic_optimization.optim_progress", "optimizer", "step", "total")
BATCHES = (*FIT, "epoch_loop.batch_progress")
GROUP = ("optimizer_states", 0, "param_groups", 0)
MOMENTS = ("optimizer_states", 0, "state")
MALFORMED: dict[str, Callable[[dict[str, Any]], None]] = {
    "step a text": put("global_step", value="many"),
    "step a list": put("global_step", value=[2]),
    "step negative": put("global_step", value=-1),
    "step beyond all": put("global_step", value=10**30),
    "step of another": put("global_step", value=3),
    "epoch nothing": put("epoch", value=None),
    "epoch a tensor": put("epoch", value=torch.ones(3)),
    "version a number": put("pytorch-lightning_version", value=3),
    "version a word": put("pytorch-lightning_version", value="new"),
    "version of old": put("pytorch-lightning_version", value="0.0.1"),
    "no version": drop("pytorch-lightning_version"),
    "loops a list": put("loops", value=[]),
    "loops empty": put("loops", value={}),
    "no loops": drop("loops"),
    "loop a text": put(*FIT, value="text"),
    "count a text": put(*STEPS, "completed", value="2"),
    "count negative": put(*STEPS, "completed", value=-2),
    "count beyond all": put(*STEPS, "completed", value=10**30),
    "count a fraction": put(*STEPS, "completed", value=2.5),
    "count a method": put(*STEPS, "reset", value=1),
    "count a dunder": put(*STEPS, "__class__", value=1),
    "no total": drop(*STEPS),
    "batches a list": put(*BATCHES, "current", value=[]),
    "last batch a text": put(*BATCHES, "is_last_batch", value="no"),
    "stepped a text": put(*FIT, "epoch_loop.state_dict", "_batches_that_stepped", value="a"),
    "loaders a number": put(*FIT, "state_dict", "combined_loader", value=3),
    "unknown loop": put(*FIT, "epoch_loop", value={"trainer": 1}),
    "schedulers a number": put("lr_schedulers", value=3),
    "schedulers too many": put("lr_schedulers", value=lambda there: there * 2),
    "schedulers none": put("lr_schedulers", value=[]),
    "no schedulers": drop("lr_schedulers"),
    "scheduler a method": put("lr_schedulers", 0, "step", value=1),
    "scheduler's optimizer": put("lr_schedulers", 0, "optimizer", value=1),
    "scheduler's step a text": put("lr_schedulers", 0, "last_epoch", value="2"),
    "scheduler's step missing": drop("lr_schedulers", 0, "last_epoch"),
    "scheduler's rates a text": put("lr_schedulers", 0, "base_lrs", value="a"),
    "scheduler's rates infinite": put("lr_schedulers", 0, "base_lrs", value=[float("inf")]),
    "optimizers a number": put("optimizer_states", value=3),
    "optimizers none": put("optimizer_states", value=[]),
    "optimizer a text": put("optimizer_states", 0, value="text"),
    "groups none": put("optimizer_states", 0, "param_groups", value=[]),
    "no groups": drop("optimizer_states", 0, "param_groups"),
    "group a text": put(*GROUP, value="text"),
    "rate a text": put(*GROUP, "lr", value="fast"),
    "rate NaN": put(*GROUP, "lr", value=float("nan")),
    "betas one": put(*GROUP, "betas", value=[0.9]),
    "betas texts": put(*GROUP, "betas", value=["a", "b"]),
    "maximize a text": put(*GROUP, "maximize", value="yes"),
    "an unknown option": put(*GROUP, "hook", value=1),
    "parameters too few": put(*GROUP, "params", value=[0]),
    "parameters lists": put(*GROUP, "params", value=lambda there: [[p] for p in there]),
    "moments a list": put(*MOMENTS, value=[1]),
    "no moments": drop("optimizer_states", 0, "state"),
    "moments of nothing": put(*MOMENTS, 10**6, value={}),
    "moments named": put(*MOMENTS, "a", value={}),
    "moments a number": put(*MOMENTS, 0, value=3),
    "moment too small": put(*MOMENTS, 0, "exp_avg", value=torch.zeros(1)),
    "moment too large": put(*MOMENTS, 0, "exp_avg_sq", value=torch.zeros(10**6)),
    "moment another shape": put(*MOMENTS, 0, "exp_avg", value=lambda there: there.reshape(-1)[:, None]),
    "moment sparse": put(*MOMENTS, 0, "exp_avg", value=lambda there: there.to_sparse()),
    "moment a text": put(*MOMENTS, 0, "exp_avg", value="text"),
    "moment missing": drop(*MOMENTS, 0, "exp_avg_sq"),
    "moment's step a vector": put(*MOMENTS, 0, "step", value=torch.zeros(9)),
    "moment's step NaN": put(*MOMENTS, 0, "step", value=torch.tensor(torch.nan)),
    "moment's step negative": put(*MOMENTS, 0, "step", value=torch.tensor(-5.0)),
    "callbacks a list": put("callbacks", value=[1]),
    "stopping's count a text": of_callback("EarlyStopping", "wait_count", "a"),
    "stopping's count negative": of_callback("EarlyStopping", "wait_count", -5),
    "stopping's score a text": of_callback("EarlyStopping", "best_score", "a"),
    "stopping's score a vector": of_callback("EarlyStopping", "best_score", torch.zeros(7)),
    "stopping's reason": of_callback("EarlyStopping", "stopping_reason", 99),
    "timer's times a text": of_callback("Timer", "time_elapsed", "long"),
    "timer's time a text": of_callback("Timer", "time_elapsed", {"train": "long"}),
    "timer's time infinite": of_callback("Timer", "time_elapsed", {"train": float("inf")}),
    "keeping a list of paths": of_callback("ModelCheckpoint", "last_model_path", ["a"]),
    "keeping a list of models": of_callback("ModelCheckpoint", "best_k_models", ["a"]),
    "keeping a score a text": of_callback("ModelCheckpoint", "best_model_score", "high"),
    "keeping a score a vector": of_callback("ModelCheckpoint", "best_model_score", torch.zeros(3)),
    "keeping an unknown": of_callback("ModelCheckpoint", "save_checkpoint", 1),
    "keeping a text": lambda content: content["callbacks"].update({make_key({}): "text"}),
    "our count a text": of_callback("SkippedSteps", "skipped_steps", "a"),
    "our count infinite": of_callback("SkippedSteps", "skipped_steps", float("inf")),
    "our count missing": lambda content: content["callbacks"].update({"SkippedSteps": {"a": 1}}),
    "a user's a text": of_callback("Counts", "seen", "text"),
    "a user's a list": of_callback("Counts", "seen", []),
    "data a list": put("PackedTextDataModule", value=["data"]),
    "data a number": put("PackedTextDataModule", value=3),
    "weights a list": put("state_dict", value=[1]),
    "weights texts": put("state_dict", value=lambda there: dict.fromkeys(there, "a")),
    "raw weights a list": put("raw_parameters", value=[1]),
    "raw weights texts": put("raw_parameters", value=lambda there: dict.fromkeys(there, "a")),
    "raw weights of others": put("raw_parameters", value={"other": torch.zeros(2)}),
    "raw weights vectors": put("raw_parameters", value=lambda there: dict.fromkeys(there, torch.zeros(1))),
    "a description a number": put("ldlm", value=3),
}


EVERY = 8  # the others need the same code and take half a second each


@pytest.mark.parametrize(
    "name",
    [
        name if index % EVERY == 0 else pytest.param(name, marks=pytest.mark.slow)
        for index, name in enumerate(MALFORMED)
    ],
)
def test_a_malformed_state_is_refused_in_a_sentence_before_the_first_step(made, place, name):
    bad = hostile(made, place, MALFORMED[name])
    before = contents(place)
    with pytest.raises(ValueError, match=r"this checkpoint|the checkpoint|loaded state dict") as caught:
        train(place / "run", 3, str(bad))
    said = str(caught.value)
    assert len(said) < 600
    assert len(said.splitlines()) == 1
    after = contents(place)
    assert {path: after.get(path) for path in before} == before
    assert not [path for path in after if "step=" in path]


def test_a_loss_scalers_state_that_would_turn_or_stop_training_is_refused(tmp_path):
    def run(steps: int, resume: Path | None = None) -> L.Trainer:
        half = MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu"))  # the Trainer alone refuses it on a CPU
        trainer = make_trainer(tmp_path, [], max_steps=steps, plugins=[half])
        trainer.fit(task(), make_data(tmp_path), ckpt_path=resume)
        return trainer

    whole = tmp_path / "run" / "whole.ckpt"
    run(2).save_checkpoint(whole)
    for value in ("text", 0.0, -1.0, float("inf"), float("nan"), None):
        bad = hostile(whole, tmp_path, put("MixedPrecision", "scale", value=value))
        with pytest.raises(ValueError, match=r"its 'MixedPrecision\.scale' is of the type"):
            run(3, bad)
    bad = hostile(whole, tmp_path, lambda content: content.update(native_amp_scaling_state={"scale": 0.0}))
    assert run(3, bad).precision_plugin.scaler.get_scale() > 0  # nobody's, which is not read


@pytest.mark.parametrize("name", ["keeping a text", "timer's times a text", "a user's a list", "loop of validation"])
def test_validating_refuses_malformed_states_too(made, place, name):
    whole = put("loops", "validate_loop", "batch_progress", "current", value="text")
    bad = hostile(made, place, MALFORMED.get(name, whole))
    trainer = make_trainer(place / "run", callbacks(place / "run"), enable_checkpointing=True)
    with pytest.raises(ValueError, match="training cannot go on from this checkpoint") as caught:
        trainer.validate(task(), make_data(place), ckpt_path=bad, verbose=False)
    assert len(str(caught.value).splitlines()) == 1


def test_patience_is_the_users_and_not_the_files(made, place):
    bad = hostile(made, place, of_callback("EarlyStopping", "patience", 0))
    trainer = train(place / "run", 3, str(bad))
    assert next(c for c in trainer.callbacks if isinstance(c, EarlyStopping)).patience == 100


def test_a_whole_state_is_restored_as_lightning_does(made, place):
    good = hostile(made, place, lambda content: None)
    before = os.listdir(place / "outside")
    trainer = train(place / "run", 3, str(good))
    assert next(c for c in trainer.callbacks if isinstance(c, Counts)).seen == 4
    assert next(c for c in trainer.callbacks if isinstance(c, Timer)).time_elapsed() > 0
    assert trainer.global_step == 3
    assert os.listdir(place / "outside") == before
    assert isinstance(trainer.lightning_module, LDLMTask)
