"""What a reader would refuse is found before it is written: at the start of a run, or while the older file is there."""

import argparse
import dataclasses
import datetime
import enum
import functools
import io
from collections import Counter, OrderedDict, defaultdict, namedtuple
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
from helpers.tiny import make_data, make_model, make_task, make_trainer, rows
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.utils.data import DataLoader

from ldlm.checkpoints.integrity import damage, read
from ldlm.checkpoints.io import unreadable
from ldlm.training.callbacks.ema import EMA
from ldlm.training.task import LDLMTask


class Mood(enum.Enum):
    """Somebody's own."""

    GOOD = 1


@dataclasses.dataclass
class Score:
    """Somebody's own."""

    value: float = 1.0


class Shaped(torch.Tensor):
    """Somebody's own."""


Pair = namedtuple("Pair", ["a", "b"])
marked = torch.zeros(2)
marked.mood = Mood.GOOD  # an attribute of a tensor is pickled with it

VALUES = [
    None, True, 1, 1.5, 1j, "a", b"a", bytearray(b"a"), {1, 2}, (1, "a"), [1, [2.0]], {"a": {1: None}},
    OrderedDict(a=1), torch.zeros(2), torch.zeros(2, dtype=torch.bfloat16), torch.nn.Parameter(torch.zeros(2)),
    torch.zeros(3, 3)[:, 0],
    torch.float32, torch.device("cpu"), torch.Size([1]), Counter("aab"), torch.zeros(2, device="meta"),
    np.float64(1), np.int64(1), np.bool_(True), np.zeros(2), Path("a"), Mood.GOOD, Score(), Pair(1, 2), marked,
    torch.zeros(2).as_subclass(Shaped), datetime.timedelta(1), argparse.Namespace(a=1), functools.partial(print),
    defaultdict(int), frozenset({1}), range(3), int, print, torch.nn.Linear(1, 1), {Mood.GOOD: 1},
    {1: {"a": [np.float32(1)]}},
    [torch.zeros(2), Path("a")], lambda: 1, torch.Generator(),
]  # fmt: skip


@pytest.mark.parametrize("value", VALUES, ids=lambda value: type(value).__name__)
def test_what_torch_would_not_read_is_found_and_nothing_else(value):
    try:
        torch.save({"value": value}, buffer := io.BytesIO())
        torch.load(io.BytesIO(buffer.getvalue()), weights_only=True)
        refused = False
    except Exception:
        refused = True
    assert (unreadable(value, "value") is not None) == refused


@pytest.mark.parametrize(
    ("value", "told"),
    [
        ({"MyCallback": {"best": [1.0, np.float64(2)]}}, "callbacks['MyCallback']['best'][1] is a numpy.float64"),
        ({"MyCallback": {"path": Path("a")}}, "callbacks['MyCallback']['path'] is a pathlib.PosixPath"),
        ({"MyCallback": {Mood.GOOD: 1}}, "the key <Mood.GOOD: 1> of callbacks['MyCallback'] is a test_unreadable.Mood"),
        ({"MyCallback": lambda: 1}, "callbacks['MyCallback'] is a function"),
    ],
)
def test_the_key_and_the_type_are_named(value, told):
    assert unreadable(value, "callbacks") == told


def test_a_buffer_that_repeats_its_storage_is_refused_before_the_first_step(tmp_path):
    task = make_task()
    task.model.register_buffer("scale", torch.ones(1).expand(3))
    with pytest.raises(ValueError, match=r"state_dict\['scale'\] holds a tensor of shape \[3\] with 4 bytes.*clone it"):
        fit(tmp_path, task=task)


class Keeps(L.Callback):
    """Somebody's callback, whose state may change while the run goes on."""

    def __init__(self, value: Any, from_step: int = 0) -> None:
        self.value, self.from_step = value, from_step
        self.trainer: L.Trainer | None = None

    def on_fit_start(self, trainer, model):
        self.trainer = trainer

    def state_dict(self):
        return {"best": self.value if self.trainer and self.trainer.global_step >= self.from_step else 0.0}


class Adds(Keeps):
    """The same by another hook."""

    def state_dict(self):
        return {}

    def on_save_checkpoint(self, trainer, model, checkpoint):
        checkpoint["mine"] = {"best": self.value}


class WithHyperparameters(LDLMTask):
    """A user's subclass that saves what it need not."""

    def __init__(self, model):
        super().__init__(model, warmup_steps=4, timestep_refresh=3, statistics_rows=8)
        self.save_hyperparameters()


class WithState(L.LightningDataModule):
    """A user's data module."""

    def train_dataloader(self):
        return DataLoader(rows(16), batch_size=4)

    def state_dict(self):
        return {"place": np.int64(3)}


def fit(
    folder: Path, *more: L.Callback, data: object = None, task: LDLMTask | None = None, steps: int = 6
) -> L.Trainer:
    keep = ModelCheckpoint(folder, every_n_train_steps=1, save_top_k=-1, filename="{step}")
    trainer = make_trainer(folder, [EMA(), *more, keep], max_steps=steps, enable_checkpointing=True)
    task = make_task(warmup_steps=4, timestep_refresh=3) if task is None else task
    trainer.fit(task, DataLoader(rows(16), batch_size=4) if data is None else data)
    return trainer


@pytest.mark.parametrize("value", [np.float64(1), Path("a"), Mood.GOOD, Score(), lambda: 1, Pair(1, 2)])
def test_a_state_that_could_not_be_read_is_refused_before_the_first_step(tmp_path, value):
    with pytest.raises(ValueError, match=r"\['best'\] is a .*could never be read") as raised:
        fit(tmp_path, Keeps(value))
    assert type(value).__name__ in str(raised.value)
    assert list(tmp_path.glob("*.ckpt*")) == []


def test_a_data_modules_state_is_looked_at_too(tmp_path):
    with pytest.raises(ValueError, match=r"WithState\['place'\] is a numpy.int64"):
        fit(tmp_path, data=WithState())


def test_hyper_parameters_that_could_not_be_read_are_refused_before_the_first_step(tmp_path):
    told = r"hyper_parameters\['model'\] is a ldlm.model.LDLM.*leave the model out"
    with pytest.raises(ValueError, match=told):
        fit(tmp_path, task=WithHyperparameters(make_model()))


def test_a_state_that_goes_bad_takes_no_files_place(tmp_path, recwarn):
    with pytest.raises(OSError, match=r"callbacks\['Keeps'\]\['best'\] is a numpy.float64.*save 3 in a row"):
        fit(tmp_path, Keeps(np.float64(1), from_step=3))
    assert sorted(path.name for path in tmp_path.glob("*.ckpt")) == ["step=1.ckpt", "step=2.ckpt"]
    assert sum("training goes on, and ends if 3" in str(warning.message) for warning in recwarn) == 2
    assert all(damage(path) is None and read(path) for path in tmp_path.glob("*.ckpt"))


def test_what_a_hook_adds_to_a_checkpoint_is_looked_at_when_it_is_saved(tmp_path):
    with pytest.raises(OSError, match=r"mine\['best'\] is a test_unreadable.Mood.*save 3 in a row"):
        fit(tmp_path, Adds(Mood.GOOD))
    assert list(tmp_path.glob("*.ckpt*")) == []


def test_what_can_be_read_is_written_and_read_back(tmp_path):
    trainer = fit(tmp_path, Keeps({"best": [1.0, torch.ones(2)], 3: ("a", None)}), data=make_data(tmp_path))
    (state,) = [c for name, c in read(tmp_path / "step=6.ckpt")["callbacks"].items() if name == "Keeps"]
    assert state["best"][3] == ("a", None)
    assert torch.equal(state["best"]["best"][1], torch.ones(2))
    assert trainer.global_step == 6


def test_a_run_that_writes_no_checkpoints_may_keep_what_it_likes(tmp_path):
    trainer = make_trainer(tmp_path, [Keeps(np.float64(1))], max_steps=2)
    trainer.fit(make_task(warmup_steps=4, timestep_refresh=3), DataLoader(rows(16), batch_size=4))
    with pytest.raises(OSError, match=r"is a numpy\.float64"):  # until it is asked to write one
        trainer.save_checkpoint(tmp_path / "asked.ckpt")
    assert not (tmp_path / "asked.ckpt").exists()
