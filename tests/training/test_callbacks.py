"""Warm-up, timesteps and averages under a real Trainer, against closed forms and against runs without interruption."""

import math
import warnings
from pathlib import Path

import lightning as L
import numpy as np
import pytest
import torch
from helpers.tiny import TimeOnlyDenoiser, generator, make_data, make_trainer, rows
from helpers.tiny import make_task as make_any_task
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor
from torch.utils.data import DataLoader

from ldlm.diffusion.timesteps import AdaptiveTimesteps, UniformTimesteps
from ldlm.model import LDLM
from ldlm.nn.token_decoders import LinearTokenDecoder
from ldlm.training.callbacks.ema import EMA
from ldlm.training.callbacks.timesteps import AdaptiveTimestepUpdate
from ldlm.training.callbacks.warmup import DiffusionToEncoderWarmup
from ldlm.training.outputs import StepOutput, model_of, task_of
from ldlm.training.task import LDLMTask


def trainable(model: LDLM) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


def same(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


class Recorder(L.Callback):
    """What the parameters were after each step and during each validation."""

    def __init__(self) -> None:
        self.raw: dict[int, dict[str, Tensor]] = {}
        self.validated: dict[int, dict[str, Tensor]] = {}
        self.averaged: dict[int, dict[str, Tensor]] = {}
        self.gammas: list[float] = []
        self.densities: dict[int, Tensor] = {}

    def on_train_batch_end(self, trainer, task, outputs, batch, batch_idx):
        self.raw[trainer.global_step] = trainable(task.model)
        self.gammas.append(task.gamma.item())
        for ema in (callback for callback in trainer.callbacks if isinstance(callback, EMA)):
            self.averaged[trainer.global_step] = {name: a.clone() for name, a in ema.averages.items()}
        self.densities[trainer.global_step] = task.model.timesteps.density.clone()

    def on_validation_batch_end(self, trainer, task, outputs, batch, batch_idx, dataloader_idx=0):
        self.validated[trainer.global_step] = trainable(task.model)


def make_task(**changes) -> LDLMTask:
    return make_any_task(**({"warmup_steps": 4, "timestep_refresh": 2} | changes))


# --- warm-up


def equation_30(s: float, total: int, gamma_min: float, k: float, c: float) -> float:
    def sigma(x: float) -> float:
        return 1 / (1 + np.exp(-k * (x / total - c)))

    return gamma_min + (1 - gamma_min) * (sigma(s) - sigma(0)) / (sigma(total) - sigma(0)) if s < total else 1.0


@pytest.mark.parametrize(("gamma_min", "k", "c"), [(0.0, 10.0, 0.8), (0.2, 4.0, 0.5)])
def test_gamma_follows_equation_30(gamma_min, k, c):
    warmup = DiffusionToEncoderWarmup(1000, gamma_min, k, c)
    for s in (0, 1, 250, 500, 799, 800, 999, 1000, 1001, 10**6):
        assert warmup.gamma(s) == pytest.approx(equation_30(s, 1000, gamma_min, k, c), abs=1e-12)
    assert warmup.gamma(0) == pytest.approx(gamma_min, abs=1e-15)


def test_a_warm_up_of_no_steps_is_1_from_the_start():
    assert [DiffusionToEncoderWarmup(0).gamma(s) for s in (0, 1, 5)] == [1.0, 1.0, 1.0]


def test_the_model_trains_with_the_gamma_of_its_step_also_when_batches_are_accumulated(tmp_path):
    recorder = Recorder()
    trainer = make_trainer(tmp_path, [recorder], max_steps=6, accumulate_grad_batches=2)
    trainer.fit(make_task(), make_data(tmp_path))
    want = [equation_30(s, 4, 0.0, 10.0, 0.8) for s in (0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5)]
    assert recorder.gammas == pytest.approx(want, abs=1e-6)


def test_a_warm_up_longer_than_the_run_warns_of_the_gamma_it_ends_with(tmp_path):
    with pytest.warns(UserWarning, match="warm-up of 100 steps is longer than the run of 1: gamma ends at 4e-05 and"):
        make_trainer(tmp_path, [], max_steps=1).fit(make_task(warmup_steps=100), make_data(tmp_path))
    assert equation_30(1, 100, 0.0, 10.0, 0.8) == pytest.approx(4e-5, rel=0.01)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*longer than the run.*")
        make_trainer(tmp_path, [], max_steps=1).fit(make_task(warmup_steps=1), make_data(tmp_path))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: DiffusionToEncoderWarmup(-1), "steps=-1"),
        (lambda: DiffusionToEncoderWarmup(1, gamma_min=1.5), r"gamma_min=1\.5"),
        (lambda: AdaptiveTimestepUpdate(0), "every_n_steps=0"),
        (lambda: EMA(1.0), r"decay=1\.0"),
        (lambda: EMA(-0.1), r"decay=-0\.1"),
        (lambda: make_task(warmup_steps=-1), "warmup_steps=-1 must be 0"),
        (lambda: make_task(timestep_refresh=0), "timestep_refresh=0 must be at least 1"),
        (lambda: model_of(L.LightningModule()), "not for a LightningModule"),
        (lambda: task_of(L.LightningModule()), "not for a LightningModule"),
    ],
)
def test_arguments_that_cannot_work_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


# --- adaptive timesteps


def test_the_density_changes_at_multiples_of_the_interval_and_only_there(tmp_path):
    recorder = Recorder()
    # The last look at a step's density is taken within the next step, when all callbacks have had their turn.
    trainer = make_trainer(tmp_path, [recorder], max_steps=7, accumulate_grad_batches=2)
    trainer.fit(make_task(timestep_refresh=3), make_data(tmp_path))
    steps = sorted(recorder.densities)
    uniform = torch.full((100,), 0.01, dtype=torch.float64)
    changed = [
        step
        for before, step in zip([0, *steps], steps, strict=False)
        if not torch.equal(recorder.densities[step], recorder.densities.get(before, uniform))
    ]
    assert changed == [3, 6]


def quiet_task(**changes) -> LDLMTask:
    """A task none of whose losses depends on the noise drawn, so that only the rows and their times matter."""
    return make_task(denoiser=TimeOnlyDenoiser(), sigma_dec=0.0, **changes)


def test_two_accumulated_halves_train_like_one_whole_batch(tmp_path):
    results = []
    for accumulated in (1, 2):
        task = quiet_task(timestep_refresh=7)
        trainer = make_trainer(tmp_path, [], max_steps=7, accumulate_grad_batches=accumulated)
        trainer.fit(task, make_data(tmp_path, batch_size=8))
        results.append((trainable(task.model), task.model.timesteps))
    (whole, times), (halves, times_of_halves) = results
    for name, value in whole.items():
        torch.testing.assert_close(halves[name], value, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(times_of_halves.num, times.num, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(times_of_halves.den, times.den, rtol=1e-12, atol=0)
    torch.testing.assert_close(times_of_halves.density, times.density, rtol=1e-4, atol=1e-6)
    assert times.den.sum().item() == pytest.approx(8 * 7, rel=1e-12)


# --- what comes with the task


class OwnWarmup(DiffusionToEncoderWarmup):
    """Somebody's own."""


class OwnUpdate(AdaptiveTimestepUpdate):
    """Somebody's own."""


def brought(trainer: L.Trainer) -> list[L.Callback]:
    kinds = (DiffusionToEncoderWarmup, AdaptiveTimestepUpdate)
    return [callback for callback in trainer.callbacks if isinstance(callback, kinds)]


def test_the_warm_up_and_the_refresh_come_with_the_task_once(tmp_path):
    trainer, task, data = make_trainer(tmp_path, [], max_steps=1), make_task(), make_data(tmp_path)
    trainer.validate(task, data, verbose=False)
    assert brought(trainer) == []  # they are for fitting
    for steps in (1, 2):
        trainer.fit_loop.epoch_loop.max_steps = steps
        trainer.fit(task, data)
        warmup, update = brought(trainer)
        assert (type(warmup), warmup.settings()) == (DiffusionToEncoderWarmup, DiffusionToEncoderWarmup(4).settings())
        assert (type(update), update.settings()) == (AdaptiveTimestepUpdate, {"every_n_steps": 2})
    uniform = make_trainer(tmp_path, [], max_steps=1)
    uniform.fit(make_task(timesteps=UniformTimesteps()), make_data(tmp_path))
    assert len(brought(uniform)) == 2


@pytest.mark.parametrize("own", [DiffusionToEncoderWarmup, OwnWarmup, AdaptiveTimestepUpdate, OwnUpdate])
def test_an_instance_or_a_subclass_of_ones_own_takes_the_place_of_its_like_alone(tmp_path, own):
    gammas: list[float] = []

    class Watch(L.Callback):
        def on_train_batch_end(self, trainer, task, outputs, batch, batch_idx):
            gammas.append(outputs["gamma"].item())

    mine = own(2, gamma_min=0.25) if issubclass(own, DiffusionToEncoderWarmup) else own(3)
    trainer, task = make_trainer(tmp_path, [mine, Watch()], max_steps=3), make_task(timestep_refresh=9)
    trainer.fit(task, make_data(tmp_path))
    one, other = brought(trainer)
    assert one is mine
    density = task.model.timesteps.density
    if isinstance(mine, DiffusionToEncoderWarmup):
        assert (type(other), other.every_n_steps) == (AdaptiveTimestepUpdate, 9)
        assert gammas[0] == 0.25
        assert gammas[2] == 1
        assert torch.equal(density, AdaptiveTimesteps().density)
    else:
        assert (type(other), other.steps) == (DiffusionToEncoderWarmup, 4)
        assert gammas[0] == 0
        assert 0 < gammas[2] < 1
        assert not torch.equal(density, AdaptiveTimesteps().density)


# --- averages


def brute_force_averages(start: dict[str, Tensor], raw: dict[int, dict[str, Tensor]], decay: float, steps: int):
    averages = {name: value.double() for name, value in start.items()}
    for n in range(1, steps + 1):
        now = min(decay, (1 + n) / (10 + n))
        averages = {name: now * a + (1 - now) * raw[n][name].double() for name, a in averages.items()}
    return averages


@pytest.mark.parametrize(("decay", "accumulated"), [(0.9999, 1), (0.3, 1), (0.9999, 2)])
def test_the_averages_are_those_of_a_loop_over_the_recorded_weights(tmp_path, decay, accumulated):
    recorder, ema, task = Recorder(), EMA(decay), make_task()
    start = trainable(task.model)
    trainer = make_trainer(tmp_path, [recorder, ema], max_steps=8, accumulate_grad_batches=accumulated)
    trainer.fit(task, make_data(tmp_path))
    want = brute_force_averages(start, recorder.raw, decay, 8)
    assert ema.averages.keys() == start.keys()
    for name, value in want.items():
        torch.testing.assert_close(ema.averages[name].double(), value, rtol=1e-5, atol=1e-7)
        assert not torch.equal(ema.averages[name], recorder.raw[8][name])
    assert same(trainable(task.model), ema.averages)  # the fitted model is the averaged one
    assert same(ema.live, recorder.raw[8])


def test_sgd_on_a_parabola_gives_the_closed_form_of_the_average():
    # w_n = w_0 (1 − lr)^n, averaged by hand with decays 2/11, 3/12, 4/13; the callback runs without a Trainer
    class At:
        def __init__(self, step: int) -> None:
            self.global_step = step

    task, ema, rate = make_task(), EMA(0.9999), 0.1
    start = trainable(task.model)
    ema.setup(At(0), task, "fit")
    for n in (1, 2, 3):
        with torch.no_grad():
            for parameter in task.parameters():
                parameter.mul_(1 - rate)
        outputs = dict.fromkeys(StepOutput.__required_keys__) | {"skipped": torch.zeros(())}
        ema.on_train_batch_end(At(n), task, outputs, None, 0)
    factor = 1.0
    for n, decay in ((1, 2 / 11), (2, 3 / 12), (3, 4 / 13)):
        factor = decay * factor + (1 - decay) * (1 - rate) ** n
    for name, average in ema.averages.items():
        torch.testing.assert_close(average, factor * start[name], rtol=1e-5, atol=1e-7)


def test_validation_sees_the_averages_and_training_goes_on_with_the_raw_weights(tmp_path):
    recorder, plain = Recorder(), Recorder()
    for watch, more in ((recorder, [EMA()]), (plain, [])):
        trainer = make_trainer(tmp_path, [*more, watch], max_steps=6, val_check_interval=2)
        trainer.fit(make_task(), make_data(tmp_path))
    assert sorted(recorder.validated) == [2, 4, 6]
    for step, weights in recorder.validated.items():
        assert same(weights, recorder.averaged[step])
        assert not same(weights, recorder.raw[step])
    for step in range(1, 7):
        assert same(recorder.raw[step], plain.raw[step])  # averaging changes nothing of the training


def test_buffers_are_current_and_never_averaged(tmp_path):
    ema, task = EMA(), make_task()
    trainer = make_trainer(tmp_path, [ema], max_steps=5)
    trainer.fit(task, make_data(tmp_path))
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    saved = torch.load(tmp_path / "last.ckpt", weights_only=True)
    assert set(saved["raw_parameters"]) == set(ema.averages) == set(dict(task.model.named_parameters()))
    for name, buffer in task.model.state_dict().items():
        if name not in ema.averages:
            assert torch.equal(saved["state_dict"][name], buffer)
    assert saved["state_dict"]["timesteps.den"].sum() > 0


class Interrupts(L.Callback):
    def on_validation_batch_end(self, *_, **__):
        raise KeyError("somebody's validation callback")


def test_an_exception_in_validation_leaves_the_raw_weights_in_place(tmp_path):
    recorder, ema, task = Recorder(), EMA(), make_task()
    trainer = make_trainer(tmp_path, [ema, recorder, Interrupts()], max_steps=6, val_check_interval=3)
    with pytest.raises(KeyError):
        trainer.fit(task, make_data(tmp_path))
    assert same(recorder.validated[3], recorder.averaged[3])
    assert same(trainable(task.model), recorder.raw[3])
    assert ema.live is None


def test_after_the_fit_validate_and_test_and_a_second_validate_all_see_the_averages(tmp_path):
    recorder, task = Recorder(), make_task()
    data = make_data(tmp_path)
    trainer = make_trainer(tmp_path, [EMA(), recorder], max_steps=3, limit_val_batches=0)
    trainer.fit(task, data)
    trainer.limit_val_batches = 1.0
    first = trainer.validate(task, data, verbose=False)
    assert same(trainable(task.model), recorder.averaged[3])
    assert trainer.validate(task, data, verbose=False) == first
    trainer.test(task, data, verbose=False)
    assert same(trainable(task.model), recorder.averaged[3])
    trainer.fit_loop.max_epochs, trainer.fit_loop.epoch_loop.max_steps = -1, 4
    trainer.fit(task, data)  # goes on from the raw weights
    assert not same(recorder.raw[4], recorder.averaged[4])
    assert same(trainable(task.model), recorder.averaged[4])


def test_the_average_starts_where_training_starts_and_not_before_the_head_is_filled(tmp_path):
    task, ema = make_task(token_decoder=LinearTokenDecoder(16, 40, from_embeddings=True), learning_rate=1e-12), EMA()
    trainer = make_trainer(tmp_path, [ema], max_steps=1)
    trainer.fit(task, make_data(tmp_path))
    want = task.model.token_encoder.table * task.model.token_encoder.std
    torch.testing.assert_close(ema.averages["token_decoder.head.weight"], want, rtol=1e-6, atol=1e-6)


# --- checkpoints and resuming


def checkpoint_every(steps: int, folder: Path, **changes) -> ModelCheckpoint:
    return ModelCheckpoint(folder, filename="{step}", every_n_train_steps=steps, save_top_k=-1, **changes)


def test_a_checkpoint_holds_the_averages_and_beside_them_the_raw_weights(tmp_path):
    recorder = Recorder()
    callbacks = [EMA(), recorder, checkpoint_every(3, tmp_path)]
    make_trainer(tmp_path, callbacks, max_steps=6, enable_checkpointing=True).fit(make_task(), make_data(tmp_path))
    for step in (3, 6):
        saved = torch.load(tmp_path / f"step={step}.ckpt", weights_only=True)
        assert same(saved["raw_parameters"], recorder.raw[step])
        assert same({name: saved["state_dict"][name] for name in recorder.raw[step]}, recorder.averaged[step])
        loaded = LDLM.load_from_checkpoint(tmp_path / f"step={step}.ckpt")
        assert same(trainable(loaded), recorder.averaged[step])
        assert not any("table" in name for name in saved["state_dict"] | saved["raw_parameters"])


def test_a_checkpoint_of_weights_only_holds_the_averages_too(tmp_path):
    recorder = Recorder()
    callbacks = [EMA(), recorder, checkpoint_every(3, tmp_path, save_weights_only=True)]
    trainer = make_trainer(tmp_path, callbacks, max_steps=4, enable_checkpointing=True)
    trainer.fit(make_task(), make_data(tmp_path))
    assert "optimizer_states" not in torch.load(tmp_path / "step=3.ckpt", weights_only=True)
    assert same(trainable(LDLM.load_from_checkpoint(tmp_path / "step=3.ckpt")), recorder.averaged[3])


def assert_same_state(first, second) -> None:
    if isinstance(first, Tensor):
        assert torch.equal(first, second)
    elif isinstance(first, dict):
        assert first.keys() == second.keys()
        for key in first:
            assert_same_state(first[key], second[key])
    elif isinstance(first, list | tuple):
        assert len(first) == len(second)
        for one, other in zip(first, second, strict=True):
            assert_same_state(one, other)
    else:
        assert first == second


@pytest.mark.parametrize("accumulated", [1, 2])
def test_a_resumed_run_equals_the_uninterrupted_one_bit_for_bit(tmp_path, accumulated):
    # 6 steps an epoch: step 4 lies inside the first, step 9 inside the second
    arguments = {"max_steps": 9, "accumulate_grad_batches": accumulated, "enable_checkpointing": True}
    for name, changes in (("whole", {}), ("rest", {"ckpt_path": tmp_path / "whole" / "step=4.ckpt"})):
        keep = checkpoint_every(1, tmp_path / name)
        task = make_task(seed=0 if name == "whole" else 7, lr_warmup_steps=20)
        make_trainer(tmp_path, [EMA(), keep], **arguments).fit(task, make_data(tmp_path), **changes)
    for step in (5, 6, 7, 9):
        whole, rest = (
            torch.load(tmp_path / name / f"step={step}.ckpt", weights_only=True) for name in ("whole", "rest")
        )
        for key in ("raw_parameters", "state_dict", "optimizer_states", "lr_schedulers", "global_step"):
            assert_same_state(whole[key], rest[key])


def test_the_fitted_models_own_object_can_be_fitted_again_from_one_of_its_checkpoints(tmp_path):
    ema, task, data = EMA(), make_task(), make_data(tmp_path)
    keep = checkpoint_every(1, tmp_path)
    make_trainer(tmp_path, [ema, keep], max_steps=2, enable_checkpointing=True).fit(task, data)
    live = ema.live
    again = EMA()
    trainer = make_trainer(tmp_path, [again], max_steps=2)
    trainer.fit(task, make_data(tmp_path), ckpt_path=tmp_path / "step=1.ckpt")  # step 1 was the last one trained
    assert same(again.live, live)
    make_trainer(tmp_path, [EMA()], max_steps=1).fit(task, make_data(tmp_path))
    make_trainer(tmp_path, [EMA()], max_steps=1).fit(task, make_data(tmp_path))


def test_averaging_that_begins_with_a_resumed_run_begins_at_its_weights(tmp_path):
    keep = checkpoint_every(4, tmp_path)
    make_trainer(tmp_path, [keep], max_steps=4, enable_checkpointing=True).fit(make_task(), make_data(tmp_path))
    start = trainable(LDLM.load_from_checkpoint(tmp_path / "step=4.ckpt"))
    recorder, ema = Recorder(), EMA()
    trainer = make_trainer(tmp_path, [ema, recorder], max_steps=5)
    trainer.fit(make_task(seed=7), make_data(tmp_path), ckpt_path=tmp_path / "step=4.ckpt")
    for name, average in ema.averages.items():
        want = 6 / 15 * start[name] + 9 / 15 * recorder.raw[5][name]
        torch.testing.assert_close(average, want, rtol=1e-5, atol=1e-6)


def test_a_checkpoint_with_averages_is_not_resumed_without_averaging(tmp_path):
    keep = checkpoint_every(2, tmp_path)
    callbacks = [EMA(), keep]
    make_trainer(tmp_path, callbacks, max_steps=2, enable_checkpointing=True).fit(make_task(), make_data(tmp_path))
    trainer = make_trainer(tmp_path, [], max_steps=4)
    with pytest.raises(ValueError, match=r"holds averaged weights.*add EMA\(\)"):
        trainer.fit(make_task(), make_data(tmp_path), ckpt_path=tmp_path / "step=2.ckpt")


def test_the_statistics_are_measured_once_and_never_on_resume(tmp_path):
    keep = checkpoint_every(2, tmp_path)
    task = make_task()
    model = task.model
    make_trainer(tmp_path, [keep], max_steps=2, enable_checkpointing=True).fit(task, make_data(tmp_path))
    assert model.token_encoder.statistics_rows == 8
    hidden = model.token_encoder.table[torch.cat(list(make_data(tmp_path).train_dataloader())[:2])].double()
    torch.testing.assert_close(model.token_encoder.mean, hidden.mean((0, 1)).float())
    again = make_task(seed=3)
    again.model.token_encoder.table.mul_(100)
    trainer = make_trainer(tmp_path, [], max_steps=3)
    trainer.fit(again, make_data(tmp_path), ckpt_path=tmp_path / "step=2.ckpt")
    assert torch.equal(again.model.token_encoder.mean, model.token_encoder.mean)


def test_a_loader_of_tensors_needs_no_data_module(tmp_path):
    task = make_task()
    loader = DataLoader(rows(16), batch_size=4)
    make_trainer(tmp_path, [EMA()], max_steps=4).fit(task, loader)
    draw = generator()
    u = task.model.timesteps.sample(4, draw)
    assert torch.isfinite(task.objective(task.model, rows(4), u, task.gamma, draw).total)
    assert math.isclose(task.gamma.item(), equation_30(3, 4, 0, 10, 0.8), rel_tol=1e-6)


def test_a_trainer_that_fits_another_task_takes_the_warm_up_and_the_refresh_of_that_one(tmp_path):
    trainer = make_trainer(tmp_path, [], max_steps=2)
    for steps, task in ((4, make_task(warmup_steps=4, timestep_refresh=3)), (9, make_task(warmup_steps=9))):
        trainer.fit(task, DataLoader(rows(8), batch_size=4))
        (warmup,) = [one for one in trainer.callbacks if isinstance(one, DiffusionToEncoderWarmup)]
        (refresh,) = [one for one in trainer.callbacks if isinstance(one, AdaptiveTimestepUpdate)]
        assert (warmup.steps, refresh.every_n_steps) == (steps, task.timestep_refresh)
        trainer.fit_loop.epoch_loop.max_steps += 2
