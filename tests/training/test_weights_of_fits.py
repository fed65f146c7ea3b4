"""Averaged and raw weights are those of the fit at hand: nothing of an earlier one outlives what it describes."""

import lightning as L
import pytest
import torch
from helpers.tiny import make_data, make_model, make_task, make_trainer
from torch import Tensor

from ldlm.diffusion.timesteps import UniformTimesteps
from ldlm.model import LDLM
from ldlm.training.callbacks.ema import EMA
from ldlm.training.callbacks.hidden_state_cache import CacheHiddenStates
from ldlm.training.task import LDLMTask


def tiny(seed: int = 0) -> LDLMTask:
    return make_task(seed, warmup_steps=4, timestep_refresh=2)


def weights(model: LDLM) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def same(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


class Start(L.Callback):
    """The weights that a fit begins with, and those after each step."""

    def __init__(self) -> None:
        self.weights: dict[int, dict[str, Tensor]] = {}

    def on_train_start(self, trainer, task):
        self.weights[trainer.global_step] = weights(task.model)

    def on_train_batch_end(self, trainer, task, outputs, batch, batch_idx):
        self.weights[trainer.global_step] = weights(task.model)


def saved(trainer: L.Trainer, path) -> dict:
    trainer.save_checkpoint(path)
    return torch.load(path, weights_only=True)


@pytest.fixture
def fitted(tmp_path):
    """A task after three averaged steps, its data, its trainer and its averages."""
    task, data, ema = tiny(), make_data(tmp_path), EMA()
    trainer = make_trainer(tmp_path, [ema], max_steps=3)
    trainer.fit(task, data)
    assert not same(ema.live, weights(task.model))
    return task, data, trainer, ema


def again(trainer: L.Trainer, task: LDLMTask, data, steps: int) -> Start:
    """The same trainer's next fit."""
    trainer.fit_loop.epoch_loop.max_steps = steps
    trainer.callbacks.append(start := Start())
    trainer.fit(task, data)
    return start


def test_no_averages_of_an_earlier_fit_reach_a_checkpoint_of_a_fit_without_them(fitted, tmp_path):
    task, data, *_ = fitted
    trainer = make_trainer(tmp_path, [start := Start()], max_steps=2)
    trainer.fit(task, data)
    file = saved(trainer, tmp_path / "second.ckpt")
    assert "raw_parameters" not in file
    assert same({name: file["state_dict"][name] for name in start.weights[2]}, start.weights[2])
    assert same(weights(task.model), start.weights[2])
    assert same(weights(LDLM.load_from_checkpoint(tmp_path / "second.ckpt")), start.weights[2])


def test_a_new_fit_begins_with_the_weights_that_the_model_holds_and_averages_from_there(fitted, tmp_path):
    task, data, *_ = fitted
    held = weights(task.model)
    ema, start = EMA(), Start()
    make_trainer(tmp_path, [ema, start], max_steps=1).fit(task, data)
    assert same(start.weights[0], held)
    assert ema.averages.keys() == held.keys()
    for name, average in ema.averages.items():  # decay 2/11 after the first step
        torch.testing.assert_close(average, 2 / 11 * held[name] + 9 / 11 * start.weights[1][name])


@pytest.mark.parametrize("way", ["load_state_dict", "in place", "a part"])
@pytest.mark.parametrize("trainer", ["new", "same"])
def test_weights_loaded_between_two_fits_are_what_the_next_fit_begins_with(fitted, tmp_path, way, trainer):
    task, data, first, ema = fitted
    model, other = task.model, make_model(seed=5)
    if way == "load_state_dict":
        model.load_state_dict(other.state_dict())
    elif way == "in place":
        with torch.no_grad():
            model.token_decoder.head.weight.add_(1)
    else:
        model.denoiser.load_state_dict(other.denoiser.state_dict())
    held = weights(model)
    if trainer == "same":
        start = again(first, task, data, 4)
    else:
        ema, start = EMA(), Start()
        make_trainer(tmp_path, [ema, start], max_steps=1).fit(task, data)
    begin = min(start.weights)
    assert same(start.weights[begin], held)
    assert not same(ema.averages, held)


def test_weights_loaded_after_a_fit_are_what_a_checkpoint_holds(fitted, tmp_path):
    task, _, trainer, _ = fitted
    model = task.model
    model.load_state_dict(make_model(seed=5).state_dict())
    file = saved(trainer, tmp_path / "loaded.ckpt")
    assert "raw_parameters" not in file
    assert same({name: file["state_dict"][name] for name in weights(model)}, weights(model))


def test_validating_another_checkpoint_leaves_its_weights_to_the_next_one(fitted, tmp_path):
    task, data, trainer, _ = fitted
    make_trainer(tmp_path, [], max_steps=1).fit(other := tiny(seed=5), data)
    other.trainer.save_checkpoint(tmp_path / "other.ckpt")
    trainer.validate(task, data, ckpt_path=tmp_path / "other.ckpt", verbose=False)
    file = saved(trainer, tmp_path / "validated.ckpt")
    held = weights(other.model)
    assert same({name: file["state_dict"][name] for name in held}, held)


def test_the_same_trainers_next_fit_goes_on_with_the_live_weights(fitted):
    task, data, trainer, ema = fitted
    live, averaged = ema.live, {name: a.clone() for name, a in ema.averages.items()}
    start = again(trainer, task, data, 4)
    assert same(start.weights[3], live)
    for name, average in ema.averages.items():  # decay 5/14 after the fourth
        torch.testing.assert_close(average, 5 / 14 * averaged[name] + 9 / 14 * start.weights[4][name])


@pytest.mark.parametrize("trainer", ["new", "same"])
@pytest.mark.parametrize("free", [False, True], ids=["frozen", "set free"])
def test_a_part_may_be_frozen_or_set_free_between_two_fits(tmp_path, trainer, free):
    task, data = tiny(), make_data(tmp_path)
    model, ema = task.model, EMA()
    model.latent_decoder.requires_grad_(not free)
    first = make_trainer(tmp_path, [ema], max_steps=3)
    first.fit(task, data)
    model.latent_decoder.requires_grad_(free)
    held = weights(model)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    if trainer == "new":
        ema = EMA()
        first = make_trainer(tmp_path, [ema], max_steps=1)
    start = again(first, task, data, 4 if trainer == "same" else 1)
    assert ema.averages.keys() == ema.live.keys() == trained
    frozen = {name: value for name, value in weights(model).items() if name not in trained}
    assert same(frozen, {name: held[name] for name in frozen})
    assert len(start.weights) == 2


def test_a_run_resumed_at_its_last_step_ends_with_the_averaged_weights(fitted, tmp_path):
    task, data, trainer, ema = fitted
    model = task.model
    file = saved(trainer, tmp_path / "three.ckpt")
    again = tiny(seed=5)
    second = make_trainer(tmp_path, [other := EMA()], max_steps=3)
    second.fit(again, data, ckpt_path=tmp_path / "three.ckpt")
    assert same(weights(again.model), weights(model))
    assert same(other.live, ema.live)
    again.model.save_pretrained(tmp_path / "export")
    assert same(weights(LDLM.from_pretrained(tmp_path / "export")), weights(model))
    resaved = saved(second, tmp_path / "again.ckpt")
    for key in ("state_dict", "raw_parameters"):
        assert same(resaved[key], file[key])


class Fails(L.Callback):
    def on_train_batch_end(self, trainer, model, outputs, batch, batch_idx):
        raise KeyError("somebody's callback")


def test_what_callbacks_put_in_place_does_not_outlive_a_fit_that_failed(tmp_path):
    task, data = tiny(), make_data(tmp_path)
    with pytest.raises(KeyError):
        make_trainer(tmp_path, [CacheHiddenStates(), Fails()]).fit(task, data)
    assert task.model.token_encoder.stored is not None
    with pytest.raises(ValueError, match="the data has sequence_length=9 and the model 8"):
        make_trainer(tmp_path, []).fit(task, make_data(tmp_path, sequence_length=9))
    assert task.model.token_encoder.stored is None


def test_half_a_step_of_a_fit_that_failed_is_not_in_the_next_fits_statistics(tmp_path):
    task, data = tiny(), make_data(tmp_path)
    with pytest.raises(KeyError):
        make_trainer(tmp_path, [Fails()], accumulate_grad_batches=2).fit(task, data)
    make_trainer(tmp_path, [], max_steps=1).fit(task, data)
    timesteps = task.model.timesteps
    assert not isinstance(timesteps, UniformTimesteps)
    assert timesteps.den.sum().item() == pytest.approx(4, rel=1e-12)  # the rows of one step
