"""Tasks, models, callbacks and trainers that are used twice."""

import lightning as L
import pytest
import torch
from helpers.tiny import make_data, make_model, make_task, make_trainer, rows
from torch import Tensor, nn
from torch.utils.data import DataLoader

from ldlm.objective import JointObjective
from ldlm.training.callbacks.ema import EMA
from ldlm.training.callbacks.timesteps import AdaptiveTimestepUpdate
from ldlm.training.callbacks.warmup import DiffusionToEncoderWarmup
from ldlm.training.task import LDLMTask


def loader() -> DataLoader:
    return DataLoader(rows(8), batch_size=4)


def moved(part: nn.Module, before: list[Tensor]) -> bool:
    return any(not torch.equal(p, old) for p, old in zip(part.parameters(), before, strict=True))


def copy(part: nn.Module) -> list[Tensor]:
    return [p.detach().clone() for p in part.parameters()]


def test_what_one_objective_freezes_the_next_one_trains(tmp_path):
    model = make_model()  # an autoencoder first, then a diffusion model of its latents, as in Table 2
    stages = [
        (JointObjective(diffusion_weight=0.0), "latent_encoder", "denoiser"),
        (JointObjective(reconstruction_weight=0.0, token_weight=0.0), "denoiser", "token_decoder"),
    ]
    for objective, trained, frozen in stages:
        task = make_task(model=model, objective=objective)
        assert all(p.requires_grad for p in model.parameters())  # a task that is made changes nothing
        learns, stands = (model.get_submodule(name) for name in (trained, frozen))
        first, second = copy(learns), copy(stands)
        make_trainer(tmp_path, [], max_steps=2).fit(task, loader())
        assert moved(learns, first)
        assert not moved(stands, second)


def test_a_part_that_came_frozen_stays_frozen_and_is_named(tmp_path, monkeypatch):
    model, said = make_model(), []
    model.denoiser.requires_grad_(False)
    monkeypatch.setattr("ldlm.training.task.rank_zero_info", said.append)
    make_trainer(tmp_path, [], max_steps=1).fit(make_task(model=model), loader())
    assert not any(p.requires_grad for p in model.denoiser.parameters())
    assert said == ["not trained, as they came frozen: denoiser"]


class Fails(L.Callback):
    def on_train_batch_end(self, trainer, task, outputs, batch, batch_idx):
        if trainer.global_step == 2:
            raise RuntimeError("power cut")


def test_averages_are_of_one_model_alone(tmp_path):
    ema = EMA()
    trainer = make_trainer(tmp_path, [ema, Fails()], max_steps=4)
    with pytest.raises(RuntimeError, match="power cut"):
        trainer.fit(make_task(seed=0), loader())
    other = make_task(seed=1)
    trainer.fit_loop.epoch_loop.max_steps = 3
    trainer.callbacks[:] = [callback for callback in trainer.callbacks if not isinstance(callback, Fails)]
    start = {name: p.detach().clone() for name, p in other.model.named_parameters()}
    trainer.fit(other, loader())  # one step, from step 2 of this trainer
    for name, average in ema.averages.items():
        assert (average - start[name]).abs().max() < 0.01  # the first model's are off by more than 1


class OwnFields(DiffusionToEncoderWarmup):
    """Sets its fields itself."""

    def __init__(self) -> None:
        self.steps, self.gamma_min, self.k, self.c = 5, 0.25, 10.0, 0.8


def test_a_warm_up_with_a_constructor_of_its_own_takes_the_tasks_place(tmp_path):
    trainer, task = make_trainer(tmp_path, [OwnFields()], max_steps=1), make_task(warmup_steps=7)
    trainer.fit(task, loader())
    assert [type(one) for one in trainer.callbacks if isinstance(one, DiffusionToEncoderWarmup)] == [OwnFields]
    assert task.gamma == 0.25


def test_a_task_whose_arguments_change_between_two_fits_goes_by_the_new_ones(tmp_path):
    trainer, task = make_trainer(tmp_path, [], max_steps=1), make_task(warmup_steps=0, timestep_refresh=5)
    trainer.fit(task, loader())
    task.warmup_steps, task.timestep_refresh = 1000, 2
    trainer.fit_loop.epoch_loop.max_steps = 2
    trainer.fit(task, loader())
    (warmup,) = [one for one in trainer.callbacks if isinstance(one, DiffusionToEncoderWarmup)]
    (refresh,) = [one for one in trainer.callbacks if isinstance(one, AdaptiveTimestepUpdate)]
    assert (warmup.steps, refresh.every_n_steps) == (1000, 2)


class LossAlone(LDLMTask):
    def training_step(self, batch, batch_idx):
        return super().training_step(batch, batch_idx)["loss"]


class Discriminated(LDLMTask):
    def __init__(self, *arguments, **options) -> None:
        super().__init__(*arguments, **options)
        self.discriminator = nn.Linear(2, 2)


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        (LossAlone, "training_step returned nothing as .*rows.*: return what LDLMTask.training_step returned"),
        (Discriminated, "Discriminated has weights of its own, discriminator.weight, which no checkpoint would hold"),
    ],
)
def test_a_subclass_that_callbacks_or_checkpoints_could_not_serve_is_told_so(tmp_path, kind, said):
    with pytest.raises(ValueError, match=said):
        make_trainer(tmp_path, [], max_steps=1).fit(kind(make_model(), warmup_steps=0), make_data(tmp_path))


class Settled(LDLMTask):
    """Takes no objective."""

    def __init__(self, model, *, warmup_steps, timestep_refresh=5000, statistics_rows=8, learning_rate=1e-3, seed=0,
                 betas=(0.9, 0.98), eps=1e-8, weight_decay=0.0, lr_warmup_steps=0, lr_decay=0.0) -> None:  # fmt: skip
        objective = JointObjective(token_weight=0.5)
        super().__init__(model, objective, warmup_steps=warmup_steps, timestep_refresh=timestep_refresh,
                         statistics_rows=statistics_rows, learning_rate=learning_rate, seed=seed, betas=betas, eps=eps,
                         weight_decay=weight_decay, lr_warmup_steps=lr_warmup_steps, lr_decay=lr_decay)  # fmt: skip


def test_a_subclass_that_settles_its_objective_comes_back_from_its_checkpoint(tmp_path):
    trainer = make_trainer(tmp_path, [], max_steps=1)
    trainer.fit(Settled(make_model(), warmup_steps=3), loader())
    trainer.save_checkpoint(tmp_path / "settled.ckpt")
    loaded = Settled.load_from_checkpoint(tmp_path / "settled.ckpt")
    assert (loaded.objective.token_weight, loaded.warmup_steps) == (0.5, 3)


def test_a_task_says_what_it_trains_and_how_though_a_part_could_not_be_described():
    task = make_task(warmup_steps=7, token_weight=0.5)
    del task.model.latent_encoder.width
    told = repr(task)
    assert "LDLMTask with JointObjective(" in told
    assert "token_weight=0.5" in told
    assert "warmup_steps=7" in told
    assert f"denoiser: DiT, {sum(p.numel() for p in task.model.denoiser.parameters()):,} parameters" in told
