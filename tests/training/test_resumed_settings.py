"""A resumed run says what it is: what changes its result is refused, or used from there on and logged."""

import shutil
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
from helpers.tiny import FixedTokenEncoder, TimeOnlyDenoiser, make_data, make_pretrained, make_task, make_trainer, rows
from torch.utils.data import DataLoader

from ldlm.diffusion.grids import LogSNRGrid
from ldlm.diffusion.samplers import DDIM
from ldlm.diffusion.schedules import TangentSchedule
from ldlm.diffusion.timesteps import AdaptiveTimesteps, UniformTimesteps
from ldlm.nn.token_encoders import PretrainedTokenEncoder
from ldlm.objective import TokenObjective
from ldlm.training.callbacks.ema import EMA
from ldlm.training.callbacks.hidden_state_cache import CacheHiddenStates
from ldlm.training.callbacks.warmup import DiffusionToEncoderWarmup
from ldlm.training.stages import FixedLatents, token_decoder_stage
from ldlm.training.task import LDLMTask

SCHEDULE = {"warmup_steps": 4, "timestep_refresh": 2}
RATES = {"lr_warmup_steps": 4, "learning_rate": 1e-3, **SCHEDULE}


def callbacks(
    decay: float | None = 0.9, warmup: dict[str, Any] | None = None, more: tuple[L.Callback, ...] = ()
) -> list[L.Callback]:
    ema = [] if decay is None else [EMA(decay)]
    own = [] if warmup is None else [DiffusionToEncoderWarmup(4, **warmup)]
    return [*more, *own, *ema]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A checkpoint after two steps, ``two.ckpt``, and one of a run without averages, ``bare.ckpt``."""
    folder = tmp_path_factory.mktemp("settings")
    for name, decay in (("two", 0.9), ("bare", None)):
        trainer = make_trainer(folder, callbacks(decay), max_steps=2)
        trainer.fit(make_task(**RATES), make_data(folder))
        trainer.save_checkpoint(folder / f"{name}.ckpt")
    return folder


class Rates(L.Callback):
    """The options of the optimizer in each step."""

    def __init__(self) -> None:
        self.groups: dict[int, dict[str, Any]] = {}

    def on_before_zero_grad(self, trainer, model, optimizer):
        group = optimizer.param_groups[0]
        self.groups[trainer.global_step] = {name: group[name] for name in ("lr", "betas", "eps", "weight_decay")}


def resume(
    folder: Path, task: LDLMTask, recipe: list[L.Callback], file: str = "two.ckpt", steps: int = 3, **changes
) -> Rates:
    rates = Rates()
    trainer = make_trainer(folder, [*recipe, rates], max_steps=steps, **changes)
    trainer.fit(task, make_data(folder), ckpt_path=folder / file)
    assert trainer.global_step == steps
    trainer.save_checkpoint(folder / "next.ckpt")
    return rates


# name: (arguments of `make_task`, arguments of `callbacks`, what is said)
REFUSED: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "sigma_dec": ({"sigma_dec": 2.0}, {}, "sigma_dec 1.0 and this one would go on with 2.0"),
    "self_conditioning": ({"self_conditioning": 0.0}, {}, "self_conditioning 0.5 and"),
    "objective.token_fraction": ({"token_fraction": 0.5}, {}, "objective.token_fraction 1.0 and"),
    "objective.token_gradient": ({"token_gradient": True}, {}, "objective.token_gradient False and"),
    "objective.diffusion_weight": ({"diffusion_weight": 0.5}, {}, "objective.diffusion_weight 1.0 and"),
    "objective.hidden_masking": ({"hidden_masking": 0.2}, {}, "objective.hidden_masking 0.0 and"),
    "statistics_rows": ({"statistics_rows": 16}, {}, "statistics_rows 8 and"),
    "lr_warmup_steps": ({"lr_warmup_steps": 5}, {}, "lr_warmup_steps 4 and"),
    "betas": ({"betas": (0.8, 0.9)}, {}, r"betas \[0.9, 0.98\] and this one would go on with \[0.8, 0.9\]"),
    "eps": ({"eps": 1e-6}, {}, "eps 1e-08 and"),
    "token_encoder.seed": ({"token_encoder": FixedTokenEncoder(seed=3)}, {}, "token_encoder.seed 0 and"),
    "schedule.d": ({"schedule": TangentSchedule(1.0)}, {}, "schedule.d 3.0 and"),
    "timesteps.floor": ({"timesteps": AdaptiveTimesteps(floor=0.5)}, {}, "timesteps.floor 0.001 and"),
    "EMA.decay": ({}, {"decay": 0.5}, "EMA.decay 0.9 and"),
    "DiffusionToEncoderWarmup.steps": ({"warmup_steps": 40}, {}, "steps 4 and"),
    "DiffusionToEncoderWarmup.gamma_min": ({}, {"warmup": {"gamma_min": 0.5}}, "gamma_min 0.0 and"),
    "DiffusionToEncoderWarmup.k": ({}, {"warmup": {"k": 5.0}}, "k 10.0 and"),
    "DiffusionToEncoderWarmup.c": ({}, {"warmup": {"c": 0.5}}, "c 0.8 and"),
    "AdaptiveTimestepUpdate.every_n_steps": ({"timestep_refresh": 3}, {}, "every_n_steps 2 and"),
    "CacheHiddenStates.dtype": ({}, {"more": (CacheHiddenStates(dtype="float16"),)}, "dtype None and"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_changes_the_result_changes_only_if_it_is_insisted_on_by_name(folder, name):
    arguments, recipe, said = REFUSED[name]
    with pytest.raises(ValueError, match=rf"the checkpoint's run has .*{said}.*--training.allow_changes '\[{name}\]'"):
        resume(folder, make_task(**RATES | arguments), callbacks(**recipe))
    resume(folder, make_task(**RATES | arguments, allow_changes=[name]), callbacks(**recipe))


@pytest.mark.parametrize(
    ("part", "name"), [(UniformTimesteps(), "timesteps"), (TimeOnlyDenoiser(), "denoiser")], ids=["times", "denoiser"]
)
def test_a_part_of_another_class_is_one_difference_and_not_one_for_each_argument(folder, part, name):
    with pytest.raises(ValueError, match=rf"has {name} \S+ and this .* with \S+: .* '\[{name}\]'$"):
        resume(folder, make_task(**RATES | {name: part}), callbacks())


def test_all_that_differs_is_said_at_once(folder):
    task = make_task(**RATES | {"sigma_dec": 2.0, "eps": 1e-6}, allow_changes=["eps"])
    with pytest.raises(
        ValueError, match=r"sigma_dec 1.0 .* '\[sigma_dec, EMA.decay\]'; different too: EMA.decay \(0.9, 0.5\)$"
    ):
        resume(folder, task, callbacks(0.5))


def test_a_setting_of_numpys_is_a_number_and_can_be_read(folder):
    resume(folder, make_task(**RATES), callbacks(np.float64(0.9)))
    resume(folder, make_task(**RATES), callbacks(), "next.ckpt", steps=4)
    with pytest.raises(ValueError, match=r"EMA\.decay is a float32, which a checkpoint cannot describe"):
        resume(folder, make_task(**RATES), callbacks(np.float32(0.9)))


def test_a_loader_of_ones_own_changes_nothing_of_this(folder):
    trainer = make_trainer(folder, callbacks(), max_steps=3)
    with pytest.raises(ValueError, match=r"sigma_dec 1\.0 and this one would go on with 2\.0"):
        trainer.fit(make_task(**RATES, sigma_dec=2.0), DataLoader(rows(16), 4), ckpt_path=folder / "two.ckpt")


def test_solver_and_grid_may_change_since_training_does_not_use_them(folder):
    resume(folder, make_task(**RATES, sampler=DDIM(), grid=LogSNRGrid()), callbacks())


def test_averaging_may_begin_with_a_resumed_run_and_says_so(folder, monkeypatch):
    said: list[str] = []
    monkeypatch.setattr("ldlm.training.resuming.rank_zero_info", said.append)
    resume(folder, make_task(**RATES), callbacks(0.9), "bare.ckpt")
    assert "EMA.decay: None in the checkpoint's run, 0.9 from here on" in said


APPLIED = [
    ({"learning_rate": 5e-4}, {}, "learning_rate: 0.001 in the checkpoint's run, 0.0005 from here on"),
    ({"weight_decay": 0.3}, {}, "weight_decay: 0.01 in the checkpoint's run, 0.3 from here on"),
    ({"lr_decay": 1.0}, {}, "lr_decay: 0.0 in the checkpoint's run, 1.0 from here on"),
    ({}, {"gradient_clip_val": 0.5}, "gradient_clip_val: None in the checkpoint's run, 0.5 from here on"),
    ({}, {"accumulate_grad_batches": 2}, "accumulate_grad_batches: 1 in the checkpoint's run, 2 from here on"),
    ({}, {"precision": "bf16-mixed"}, "precision: 32-true in the checkpoint's run, bf16-mixed from here on"),
]


@pytest.mark.parametrize(("arguments", "options", "said"), APPLIED, ids=[said.split(":")[0] for *_, said in APPLIED])
def test_what_may_change_is_used_from_there_on_and_logged_with_both_values(
    folder, monkeypatch, arguments, options, said
):
    heard: list[str] = []
    monkeypatch.setattr("ldlm.training.resuming.rank_zero_info", heard.append)
    resumed = resume(folder, make_task(**RATES | arguments), callbacks(), steps=6, **options)
    assert {said, "max_steps: 2 in the checkpoint's run, 6 from here on"} == set(heard)
    whole = Rates()  # torch's own optimizer and schedule, in a run that had these arguments from the start
    make_trainer(folder, [*callbacks(), whole], max_steps=6, **options).fit(
        make_task(**RATES | arguments), make_data(folder)
    )
    assert resumed.groups == {step: group for step, group in whole.groups.items() if step in resumed.groups}
    assert len(resumed.groups) == 4
    saved = torch.load(folder / "next.ckpt", weights_only=True)
    claimed = saved["ldlm"]["training"]["init_args"]
    group = saved["optimizer_states"][0]["param_groups"][0]
    assert (claimed["learning_rate"], claimed["weight_decay"]) == (group["initial_lr"], group["weight_decay"])
    assert saved["lr_schedulers"][0]["base_lrs"] == [claimed["learning_rate"]]


@pytest.mark.parametrize(("name", "value"), [("betas", (0.8, 0.9)), ("eps", 1e-6), ("lr_warmup_steps", 40)])
def test_what_is_insisted_on_is_used_too(folder, name, value):
    resumed = resume(folder, make_task(**RATES | {name: value}, allow_changes=[name]), callbacks())
    if name == "lr_warmup_steps":
        assert resumed.groups[2]["lr"] == pytest.approx(1e-8 + 2 / 40 * (1e-3 - 1e-8), rel=1e-12)
    else:
        assert resumed.groups[2][name] == value


def test_another_part_frozen_than_in_the_checkpoints_run_is_said_in_one_sentence(folder):
    task = make_task(**RATES)
    task.model.latent_encoder.requires_grad_(False)
    with pytest.raises(ValueError, match=r"optimizer has \d+ parameters and this model trains \d+: freeze the same"):
        resume(folder, task, callbacks(None), "bare.ckpt")


# --- frozen weights, wherever they are kept


@pytest.fixture(scope="module")
def homes(tmp_path_factory):
    """The same encoder in two folders, another in a third; a checkpoint of a run with the first."""
    home = tmp_path_factory.mktemp("homes")
    make_pretrained("bert", home / "encoder")
    shutil.copytree(home / "encoder", home / "moved")
    other = make_pretrained("bert", home / "other" / "encoder")
    with torch.no_grad():
        next(other.parameters()).add_(1)
    other.save_pretrained(home / "other" / "encoder")
    trainer = make_trainer(home, callbacks(), max_steps=2)
    trainer.fit(make_task(**SCHEDULE, token_encoder=PretrainedTokenEncoder(str(home / "encoder"))), make_data(home))
    trainer.save_checkpoint(home / "two.ckpt")
    return home


def test_an_encoder_that_was_moved_is_the_same_encoder(homes):
    resume(homes, make_task(**SCHEDULE, token_encoder=PretrainedTokenEncoder(str(homes / "moved"))), callbacks())


@pytest.mark.parametrize(
    ("place", "options", "said"),
    [
        ("other/encoder", {}, r"token_encoder.sha256 \w{64} and this one would go on with \w{64}"),
        ("encoder", {"layer": -2}, "token_encoder.layer -3 and this one would go on with -2"),
        ("encoder", {"dtype": "bfloat16"}, "token_encoder.dtype float32 and this one would go on with bfloat16"),
    ],
)
def test_other_hidden_states_are_refused_though_folder_and_shapes_agree(homes, place, options, said):
    encoder = PretrainedTokenEncoder(str(homes / place), **options)
    with pytest.raises(ValueError, match=said):
        resume(homes, make_task(**SCHEDULE, token_encoder=encoder), callbacks())


# --- two stages


@pytest.mark.parametrize("stage", ["fixed", "decoder"])
def test_a_second_stage_is_resumed_with_the_first_stage_it_began_with_wherever_that_is_kept(folder, tmp_path, stage):
    shutil.copy(folder / "two.ckpt", tmp_path / "moved.ckpt")
    shutil.copy(folder / "two.ckpt.sha256", tmp_path / "moved.ckpt.sha256")

    def fit(first: Path, steps: int, **resumed) -> None:
        if stage == "fixed":
            task = make_task(**SCHEDULE, reconstruction_weight=0.0, token_weight=0.0)
            recipe = [FixedLatents(str(first))]
        else:
            model, recipe = token_decoder_stage(str(first), layers=0), []
            task = make_task(**SCHEDULE, model=model, objective=TokenObjective())
        trainer = make_trainer(tmp_path, [*recipe, *callbacks()], max_steps=steps)
        trainer.fit(task, make_data(tmp_path), **resumed)
        trainer.save_checkpoint(tmp_path / f"{steps}.ckpt")

    fit(folder / "two.ckpt", 1)
    fit(tmp_path / "moved.ckpt", 2, ckpt_path=tmp_path / "1.ckpt")
    name = "FixedLatents.checkpoint" if stage == "fixed" else "frozen"
    with pytest.raises(ValueError, match=rf"{name} of sha256 (\w+) and this one would go on with of sha256 (?!\1)"):
        fit(folder / "bare.ckpt", 3, ckpt_path=tmp_path / "2.ckpt")
