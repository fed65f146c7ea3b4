"""A resumed run's epochs, validations and learning rates are those of the run that was not interrupted."""

from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from helpers.tiny import make_data, make_task, make_trainer, rows
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor
from torch.utils.data import DataLoader

from ldlm.training.callbacks.visualisation import SaveAtEnd

EPOCH = 6  # steps of 4 rows in an epoch of `make_data`


class Diary(L.Callback):
    """What happened: the rows of each step, the step and epoch of each validation, the rate of each step."""

    def __init__(self) -> None:
        self.rows: dict[int, list[Tensor]] = {}
        self.validations: list[tuple[int, int]] = []
        self.rates: dict[int, float] = {}

    def on_train_batch_start(self, trainer, model, batch, batch_idx):
        self.rows.setdefault(trainer.global_step, []).append(batch)
        self.rates[trainer.global_step] = trainer.optimizers[0].param_groups[0]["lr"]

    def on_validation_start(self, trainer, model):
        self.validations.append((trainer.global_step, trainer.current_epoch))


class Saves(L.Callback):
    """Saves at the end of one call."""

    def __init__(self, path: Path, step: int, calls: int) -> None:
        self.path, self.step, self.calls = path, step, calls

    def on_train_batch_end(self, trainer, model, outputs, batch, batch_idx):
        if (trainer.global_step, trainer.fit_loop.epoch_loop.batch_progress.current.ready) == (self.step, self.calls):
            trainer.save_checkpoint(self.path)


def fit(
    folder: Path, *more: L.Callback, resume: str | None = None, task: dict[str, Any] | None = None, **options: Any
) -> Diary:
    workers = options.pop("num_workers", 0)
    data = options.pop("data") if "data" in options else make_data(folder, num_workers=workers)
    diary = Diary()
    trainer = make_trainer(
        folder,
        [*more, diary],
        **{"max_steps": -1, "enable_checkpointing": True} | options,
    )
    trainer.fit(make_task(warmup_steps=4, timestep_refresh=2, **task or {}), data, ckpt_path=resume and folder / resume)
    diary.steps = trainer.global_step
    diary.logged = trainer.fit_loop.epoch_loop._batches_that_stepped
    return diary


def assert_goes_on(whole: Diary, rest: Diary, start: int) -> None:
    """The rest is what the whole run did from a step on; a validation right there belongs to what was before."""
    assert rest.steps == whole.steps
    assert rest.logged == whole.logged
    assert rest.rates == {step: rate for step, rate in whole.rates.items() if step >= start}
    assert rest.rows.keys() == rest.rates.keys()
    for step, calls in rest.rows.items():
        assert torch.equal(torch.cat(calls), torch.cat(whole.rows[step]))
    assert rest.validations == [one for one in whole.validations if one[0] > start]


# Accumulated batches before and after; the step and the call of the epoch after which the first run saved.
CHANGES = [(1, 2, 4, 4), (2, 1, 4, 8), (2, 1, 6, 12), (1, 4, 6, 6), (4, 1, 9, 12), (4, 2, 3, 14), (2, 2, 3, 7)]


@pytest.mark.parametrize("interval", [1.0, 0.5], ids=["epochs", "halves"])
@pytest.mark.parametrize(("before", "after", "step", "calls"), CHANGES)
def test_another_number_of_accumulated_batches_changes_no_epoch_and_no_validation(
    tmp_path, before, after, step, calls, interval
):
    common = {"max_epochs": 3, "val_check_interval": interval, "task": {"lr_decay": 0.5}}
    whole = fit(tmp_path, accumulate_grad_batches=after, **common)
    assert whole.steps == 3 * EPOCH
    saves = Saves(tmp_path / "a.ckpt", step, calls)
    fit(tmp_path, saves, accumulate_grad_batches=before, **common | {"max_epochs": 2})
    assert_goes_on(whole, fit(tmp_path, resume="a.ckpt", accumulate_grad_batches=after, **common), step)


def test_an_epoch_goes_on_at_the_same_share_of_it_with_another_batch_size_that_is_insisted_on(tmp_path):
    common = {"max_epochs": 3, "task": {"allow_changes": ["batch_size"]}}
    fit(tmp_path, Saves(tmp_path / "a.ckpt", 8, 2), **common)  # a third of the second epoch, of six steps
    rest = fit(tmp_path, resume="a.ckpt", data=make_data(tmp_path, batch_size=8), **common)
    assert rest.steps == 8 + 2 + 3
    assert rest.validations == [(10, 1), (13, 2)]


def test_validation_by_steps_over_all_epochs_goes_on_counting_in_this_runs_calls(tmp_path):
    common = {"max_steps": 16, "check_val_every_n_epoch": None, "max_epochs": -1}
    first = fit(tmp_path, Saves(tmp_path / "a.ckpt", 7, 1), val_check_interval=4, **common | {"max_steps": 7})
    assert [step for step, _ in first.validations] == [4]
    rest = fit(tmp_path, resume="a.ckpt", accumulate_grad_batches=2, val_check_interval=8, **common)
    assert [step for step, _ in rest.validations] == [8, 12, 16]


def test_a_loader_of_ones_own_gives_as_many_calls_in_an_epoch_however_many_are_accumulated(tmp_path):
    loader = DataLoader(rows(32), batch_size=4)  # 8 calls
    first = fit(tmp_path, Saves(tmp_path / "a.ckpt", 6, 6), max_epochs=1, data=loader)
    assert first.steps == 8
    rest = fit(tmp_path, resume="a.ckpt", max_epochs=2, accumulate_grad_batches=4, data=loader)
    # Calls 5 to 8, since a step takes 4, and 8 more: one and two steps.
    assert rest.steps == 6 + 1 + 2


def test_a_run_goes_on_with_a_loader_of_ones_own(tmp_path):
    fit(tmp_path, Saves(tmp_path / "a.ckpt", 4, 4), max_epochs=1)
    rest = fit(tmp_path, resume="a.ckpt", max_epochs=2, data=DataLoader(rows(24), batch_size=4))
    assert rest.steps == 2 * EPOCH


class Ends(L.Callback):
    """Ends the run early, as a time limit does."""

    def on_train_batch_end(self, trainer, model, outputs, batch, batch_idx):
        trainer.should_stop = trainer.global_step == 8


def last(folder: Path, **when: Any) -> ModelCheckpoint:
    return ModelCheckpoint(folder, filename="{step}", save_last=True, **when)


ENDS = {
    "max_steps": ({"max_steps": 8}, lambda folder: [SaveAtEnd(), last(folder, every_n_train_steps=5)]),
    "an epoch's end that was none": ({"max_steps": 8}, lambda folder: [last(folder, save_on_train_epoch_end=True)]),
    "early": ({"max_epochs": 3}, lambda folder: [Ends(), SaveAtEnd(), last(folder, every_n_train_steps=5)]),
}


@pytest.mark.parametrize("end", ENDS)
@pytest.mark.parametrize("epochs", [{"max_epochs": 4}, {"max_epochs": -1, "max_steps": 4 * EPOCH}])
def test_an_epoch_that_the_end_of_a_run_cut_short_goes_on_when_the_run_is_extended(tmp_path, end, epochs):
    options, callbacks = ENDS[end]
    common = {"check_val_every_n_epoch": 2}
    whole = fit(tmp_path, **common, **epochs)
    assert whole.steps == 4 * EPOCH
    first = fit(tmp_path, *callbacks(tmp_path), **common, **options)
    assert first.steps == 8
    assert_goes_on(whole, fit(tmp_path, resume="last.ckpt", **common, **epochs), 8)


@pytest.mark.parametrize("options", [{"max_steps": 10}, {"max_epochs": 2, "limit_train_batches": 5}])
def test_a_run_that_is_extended_falls_as_if_it_had_been_as_long_from_the_start(tmp_path, monkeypatch, options):
    said: list[str] = []
    monkeypatch.setattr("ldlm.training.optim.rank_zero_info", said.append)
    task = {"lr_decay": 0.5, "learning_rate": 1e-3}
    keep = [SaveAtEnd(), last(tmp_path, every_n_train_steps=5)]
    assert fit(tmp_path, *keep, task=task, **options).rates[9] == pytest.approx(1e-3 * 1 / 5)
    longer = {name: 2 * value if name.startswith("max") else value for name, value in options.items()}
    rest = fit(tmp_path, resume="last.ckpt", task=task, **longer)
    want = {step: 1e-3 * min(1, (20 - step) / 10) for step in range(10, 20)}
    assert rest.rates == pytest.approx(want, rel=1e-12)
    assert len(said) == 1
    assert said[0].startswith("the learning rates of step 10 are [0.001], and not [0.0] as in the checkpoint's run")


# --- epochs made shorter


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize(("limit", "calls"), [(5, 5), (0.5, 3), (1, 1), (100, EPOCH)])
def test_epochs_of_fewer_batches_follow_each_other_without_a_gap_and_are_all_as_long(tmp_path, limit, calls, workers):
    data = make_data(tmp_path, num_workers=workers)
    task = {"lr_decay": 1.0, "learning_rate": 1e-3}
    diary = fit(tmp_path, data=data, task=task, max_epochs=4, limit_train_batches=limit)
    assert diary.steps == 4 * calls
    assert diary.rates == pytest.approx({step: 1e-3 * (1 - step / diary.steps) for step in range(diary.steps)})
    assert diary.validations == [(calls * epoch, epoch - 1) for epoch in (1, 2, 3, 4)]
    for step, batches in diary.rows.items():
        assert torch.equal(torch.cat(batches), data.train_dataset[data.rows_of_step(step)])


def test_an_epoch_of_part_of_a_step_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"limit_train_batches=5 makes epochs of 5 calls.*give a multiple of 2"):
        fit(tmp_path, max_epochs=2, limit_train_batches=5, accumulate_grad_batches=2)
    diary = fit(tmp_path, max_epochs=2, limit_train_batches=4, accumulate_grad_batches=2)
    assert {len(torch.cat(calls)) for calls in diary.rows.values()} == {4}
    assert diary.steps == 4


@pytest.mark.parametrize("workers", [0, 2])
def test_a_resumed_run_reads_on_even_if_its_length_was_asked_for_before(tmp_path, workers):
    # With max_epochs, and not max_steps alone, Lightning sets the loader up to count its batches, before it restores.
    common = {"max_epochs": 3, "task": {"lr_decay": 0.5}, "num_workers": workers}
    whole = fit(tmp_path, **common)
    fit(tmp_path, Saves(tmp_path / "a.ckpt", 8, 2), **common)
    assert_goes_on(whole, fit(tmp_path, resume="a.ckpt", **common), 8)


def test_loaders_made_anew_in_each_epoch_go_on_where_the_last_one_ended(tmp_path):
    data = make_data(tmp_path)
    diary = fit(tmp_path, data=data, max_epochs=3, limit_train_batches=4, reload_dataloaders_every_n_epochs=1)
    assert diary.steps == 12
    for step, batches in diary.rows.items():
        assert torch.equal(torch.cat(batches), data.train_dataset[data.rows_of_step(step)])


def test_the_end_of_a_stream_without_length_is_not_taken_for_minus_one(tmp_path):
    class Stream(torch.utils.data.IterableDataset[Tensor]):
        def __iter__(self):
            return iter(rows(8))

    with pytest.raises(ValueError, match=r"lr_decay=0\.5 needs to know where the run ends: give the trainer max_steps"):
        fit(tmp_path, data=DataLoader(Stream(), batch_size=4), max_epochs=2, task={"lr_decay": 0.5})
