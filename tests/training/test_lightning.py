"""What a user of Lightning tries: what only watches changes no bit of a run, and what cannot work says so at once."""

from collections.abc import Callable
from pathlib import Path

import lightning as L
import pytest
import torch
from helpers.tiny import make_data, make_task, make_trainer, rows
from lightning.pytorch import callbacks as C
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.tuner import Tuner
from torch.utils.data import DataLoader

from ldlm.checkpoints.resume import last_checkpoint
from ldlm.training.callbacks.ema import EMA
from ldlm.training.task import LDLMTask

TOKENS = rows(16)


def loader(tokens: torch.Tensor = TOKENS) -> DataLoader:
    return DataLoader(tokens, batch_size=4)


def recipe() -> LDLMTask:
    return make_task(warmup_steps=4, timestep_refresh=3)


def fit(folder: Path, *more: L.Callback, resume: Path | None = None, **changes: object) -> dict[str, torch.Tensor]:
    """What six steps and two validations leave: the weights, averages and statistics."""
    task, ema = recipe(), EMA()
    arguments = {"max_steps": 6, "check_val_every_n_epoch": None, "val_check_interval": 3} | changes
    make_trainer(folder, [ema, *more], **arguments).fit(task, loader(), loader(rows(8, 1)), ckpt_path=resume)
    return {**task.state_dict(), **{f"raw {name}": value for name, value in ema.live.items()}}


@pytest.fixture(scope="module")
def plain(tmp_path_factory) -> dict[str, torch.Tensor]:
    """The run that nobody watches."""
    return fit(tmp_path_factory.mktemp("plain"))


WATCHERS: dict[str, Callable[[Path], list[L.Callback]]] = {
    "ModelSummary": lambda _: [C.ModelSummary(max_depth=3)],
    "RichModelSummary": lambda _: [C.RichModelSummary()],
    "RichProgressBar": lambda _: [C.RichProgressBar()],
    "TQDMProgressBar": lambda _: [C.TQDMProgressBar()],
    "LearningRateMonitor": lambda _: [C.LearningRateMonitor()],
    "DeviceStatsMonitor": lambda _: [C.DeviceStatsMonitor()],
    "EarlyStopping": lambda _: [C.EarlyStopping("validation/token", patience=9)],
    "Timer": lambda _: [C.Timer("00:00:01:00")],
    "LambdaCallback": lambda _: [C.LambdaCallback(on_train_start=lambda *_: None)],
    "ThroughputMonitor": lambda _: [C.ThroughputMonitor(len, window_size=2)],
    "two of ModelCheckpoint": lambda folder: [
        C.ModelCheckpoint(folder / "a", every_n_train_steps=1, save_top_k=-1),
        C.ModelCheckpoint(folder / "b", monitor="validation/token", save_last="link"),
    ],
    "OnExceptionCheckpoint": lambda folder: [C.OnExceptionCheckpoint(folder)],
}
SETTINGS = {
    "detect_anomaly": {"detect_anomaly": True},
    "deterministic": {"deterministic": True},
    "inference_mode": {"inference_mode": False},
    "num_sanity_val_steps": {"num_sanity_val_steps": 2},
    "sync_batchnorm": {"sync_batchnorm": True},
    "profiler": {"profiler": "simple"},
    "use_distributed_sampler": {"use_distributed_sampler": False},
    "reload_dataloaders": {"reload_dataloaders_every_n_epochs": 1},
    "max_time": {"max_time": "00:00:05:00"},
    "fast_dev_run": {"fast_dev_run": 4, "max_steps": -1},
    "barebones": {"barebones": True},
}


def assert_same(got: dict[str, torch.Tensor], want: dict[str, torch.Tensor]) -> None:
    assert got.keys() == want.keys()
    assert [name for name, value in want.items() if not torch.equal(got[name], value)] == []


@pytest.mark.parametrize("name", WATCHERS)
def test_a_callback_of_lightnings_changes_no_bit_of_a_run(tmp_path, name, plain):
    bar = {"enable_progress_bar": "Progress" in name, "enable_checkpointing": "Checkpoint" in name}
    assert_same(fit(tmp_path, *WATCHERS[name](tmp_path), logger=CSVLogger(tmp_path), **bar), plain)


@pytest.mark.parametrize("name", SETTINGS)
def test_a_setting_of_the_trainer_changes_no_bit_of_a_run(tmp_path, name, plain):
    changes = dict(SETTINGS[name])
    if name == "barebones":
        changes |= dict.fromkeys(("enable_checkpointing", "enable_model_summary", "enable_progress_bar"))
        changes |= dict.fromkeys(("num_sanity_val_steps", "logger"))
    try:
        got = fit(tmp_path, **changes)
    finally:
        torch.use_deterministic_algorithms(False)
        torch.autograd.set_detect_anomaly(False)
    if name == "fast_dev_run":  # four steps of its own, no checkpoint and no logger
        plain = fit(tmp_path / "four", max_steps=4)
    assert_same(got, plain)


def test_gradients_are_clipped_by_value_as_torch_clips_them(tmp_path):
    class Note(L.Callback):
        def on_before_optimizer_step(self, trainer, model, optimizer):
            self.before = [p.grad.clone() for p in model.parameters()]

        def on_before_zero_grad(self, trainer, model, optimizer):
            if trainer.global_step == 1:
                self.after = [p.grad.clone() for p in model.parameters()]

    note = Note()
    fit(tmp_path, note, max_steps=2, gradient_clip_val=1e-3, gradient_clip_algorithm="value", accumulate_grad_batches=1)
    fit(tmp_path, first := Note(), max_steps=1)
    want = [gradient.clamp(-1e-3, 1e-3) for gradient in first.before]
    assert any(gradient.abs().max() > 1e-3 for gradient in first.before)
    assert all(map(torch.equal, note.after, want))


def test_overfitting_a_plain_loaders_first_batches_trains_on_them_alone(tmp_path):
    seen = []

    class Note(L.Callback):
        def on_train_batch_end(self, trainer, model, outputs, batch, batch_idx):
            seen.append(batch)

    fit(tmp_path, Note(), overfit_batches=2, check_val_every_n_epoch=1, val_check_interval=None)
    assert {tuple(row) for batch in seen for row in batch.tolist()} == {tuple(row) for row in TOKENS[:8].tolist()}


def test_a_run_goes_on_from_the_checkpoint_of_an_exception(tmp_path, plain):
    class Fault(L.Callback):
        def on_train_batch_start(self, trainer, model, batch, batch_idx):
            if trainer.global_step == 4:
                raise KeyError("a fault")

    with pytest.raises(KeyError):
        fit(tmp_path, C.OnExceptionCheckpoint(tmp_path, "fault"), Fault(), enable_checkpointing=True)
    assert last_checkpoint(tmp_path) == tmp_path / "fault.ckpt"
    assert_same(fit(tmp_path, resume=tmp_path / "fault.ckpt"), plain)


@pytest.mark.parametrize(
    "callback",
    [
        C.WeightAveraging,
        C.EMAWeightAveraging,
        lambda: C.StochasticWeightAveraging(1e-3),
        lambda: C.LearningRateFinder(num_training_steps=5),
        lambda: C.BatchSizeFinder(max_trials=1),
        lambda: C.GradientAccumulationScheduler({0: 1, 1: 2}),
        lambda: C.ModelPruning("l1_unstructured", amount=0.1),
        lambda: C.BackboneFinetuning(1),
    ],
)
def test_a_callback_that_cannot_work_is_refused_by_name_and_changes_nothing(tmp_path, callback):
    refused, task = callback(), recipe()
    before = {name: value.clone() for name, value in task.state_dict().items()}
    trainer = make_trainer(tmp_path, [EMA(), refused])
    with pytest.raises(ValueError, match=rf"{type(refused).__name__} \w+ .*: (use|leave|freeze|prune) "):
        trainer.fit(task, loader())
    assert_same(dict(task.state_dict()), before)
    assert all(p.requires_grad for p in task.parameters())


@pytest.mark.parametrize("data", [lambda _: loader(), make_data], ids=["a loader", "our data"])
def test_the_tuner_is_refused_as_it_would_train_before_the_run(tmp_path, data):
    for ask in (Tuner.lr_find, Tuner.scale_batch_size):
        trainer = make_trainer(tmp_path, [])
        given = data(tmp_path)
        named = {"datamodule": given} if isinstance(given, L.LightningDataModule) else {"train_dataloaders": given}
        if named.keys() == {"train_dataloaders"} and ask is Tuner.scale_batch_size:
            continue  # Lightning refuses loaders here
        with pytest.raises(ValueError, match="trains before the run begins and without its other callbacks"):
            ask(Tuner(trainer), recipe(), **named)


@pytest.mark.parametrize("precision", ["64-true", "bf16-true", "16-true"])
@pytest.mark.parametrize("call", ["fit", "validate", "test", "predict"])
def test_a_precision_that_is_not_ours_is_refused_everywhere(tmp_path, precision, call):
    trainer = make_trainer(tmp_path, [], precision=precision)
    with pytest.raises(ValueError, match=f"precision='{precision}' is not supported.*'bf16-mixed'"):
        getattr(trainer, call)(recipe(), loader())


def test_a_model_that_was_compiled_whole_is_refused(tmp_path):
    trainer = make_trainer(tmp_path, [])
    by_method = recipe()
    by_method.compile(backend="eager")
    for task in (torch.compile(recipe(), backend="eager"), by_method):
        with pytest.raises(ValueError, match="CompileBlocks"):
            trainer.fit(task, loader())


def test_a_model_that_was_never_fitted_is_not_validated_without_a_word(tmp_path):
    trainer, task = make_trainer(tmp_path, []), make_task()
    with pytest.warns(UserWarning, match="mean and deviation were never measured"):
        trainer.validate(task, loader(), verbose=False)
    task.model.token_encoder.fit_statistics([TOKENS], 8)
    assert trainer.validate(task, loader(), verbose=False)
