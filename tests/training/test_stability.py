"""Bad numbers change nothing and are counted; bad latents are named; nothing waits for a device."""

import json
import math
import re
import warnings

import lightning as L
import pytest
import torch
from helpers import ROOT
from helpers.faults import KINDS, Poison
from helpers.tiny import HIDDEN, LATENT, LENGTH, generator, make_data, make_model, make_trainer, rows
from helpers.tiny import make_task as make_any_task
from helpers.waits import Waits
from lightning.pytorch.callbacks import Checkpoint, ModelCheckpoint
from lightning.pytorch.plugins import MixedPrecision
from torch import Tensor
from torch.utils.data import DataLoader

from ldlm import rng
from ldlm.data.rows import ShuffledOrder, batch_slice
from ldlm.diffusion.schedules import TangentSchedule
from ldlm.nn.latent_coders import LatentEncoder
from ldlm.training.callbacks.ema import EMA
from ldlm.training.callbacks.warmup import warmup_gamma
from ldlm.training.preemption import StopOnSignal
from ldlm.training.stability import DeferredRead, LatentMonitor, SkippedSteps, diagnosis, spread_over_rows
from ldlm.training.task import LDLMTask

RESULTS = ROOT / "docs" / "results" / "table1-laptop"


def make_task(**changes) -> LDLMTask:
    return make_any_task(**({"warmup_steps": 4, "timestep_refresh": 2} | changes))


class Keep(Checkpoint):
    """All that training changes, after each step: as a `Checkpoint` it comes after those that the task brings."""

    def __init__(self) -> None:
        self.states: dict[int, dict[str, torch.Tensor]] = {}

    def on_train_batch_end(self, trainer, task, outputs, batch, batch_idx):
        (ema,) = (callback for callback in trainer.callbacks if isinstance(callback, EMA))
        self.states[trainer.global_step] = everything(task.model, ema.averages, trainer.optimizers[0])


def everything(model, averaged, optimizer) -> dict[str, torch.Tensor]:
    found = {f"model.{name}": value.clone() for name, value in model.state_dict().items()}
    found |= {f"averaged.{name}": value.clone() for name, value in averaged.items()}
    for index, state in enumerate(optimizer.state_dict()["state"].values()):
        found |= {f"optimizer.{index}.{name}": value.clone() for name, value in state.items()}
    return found


def by_hand(task, data, steps: int, left_out: set[int], accumulated: int) -> dict[str, torch.Tensor]:
    """The training as a plain loop that leaves steps out."""
    model = task.model
    order = ShuffledOrder(len(data.train_dataset), data.batch_size, data.seed)
    model.token_encoder.fit_statistics([data.train_dataset[order.batch(s)] for s in range(2)], task.statistics_rows)
    trainable = dict(model.named_parameters())
    averaged = {name: p.detach().clone() for name, p in trainable.items()}
    optimizer = torch.optim.AdamW(trainable.values(), 1e-3, (0.9, 0.98), 1e-8, weight_decay=0.01, fused=True)
    for step in range(steps):
        gamma = torch.tensor(warmup_gamma(step, 4))
        u = model.timesteps.sample(data.batch_size, rng.generator(task.seed, "times", step))
        batch = data.train_dataset[order.batch(step)]
        if step not in left_out:
            optimizer.zero_grad()
            for micro in range(accumulated):
                part = batch_slice(data.batch_size, 0, 1, micro, accumulated)
                mine = range(part.start, part.stop)
                draw = rng.RowNoise(task.seed, "noise", step, rows=mine, total=data.batch_size)
                losses = task.objective(model, batch[part], u[part], gamma, draw)
                (losses.total / accumulated).backward()
                model.timesteps.observe(u[part], losses.rows)
            torch.nn.utils.clip_grad_norm_(trainable.values(), 0.5)
            optimizer.step()
            model.timesteps.synchronize()
            decay = (2 + step) / (11 + step)
            for name, p in trainable.items():
                averaged[name] = torch.lerp(averaged[name], p.detach(), torch.tensor(1 - decay))
        if (step + 1) % 2 == 0:
            model.timesteps.refresh()
    return everything(model, averaged, optimizer)


@pytest.mark.parametrize("accumulated", [1, 2])
@pytest.mark.parametrize("kind", KINDS)
def test_a_run_with_a_bad_step_is_the_run_that_leaves_it_out(tmp_path, kind, accumulated):
    keep = Keep()
    callbacks = [EMA(), Poison(kind, {3}, micro_step=accumulated - 1), keep]
    arguments = {"max_steps": 7, "accumulate_grad_batches": accumulated, "gradient_clip_val": 0.5}
    trainer = make_trainer(tmp_path, callbacks, enable_checkpointing=True, **arguments)
    with pytest.warns(UserWarning, match="1 updates were left out so far .* the last of them step 3"):
        trainer.fit(make_task(), make_data(tmp_path))
    before, after, end = keep.states[3], keep.states[4], keep.states[7]
    changed = {name for name, value in before.items() if not torch.equal(value, after[name])}
    assert changed <= {"model.timesteps.density"}  # refreshed after step 4, from unchanged sums
    want = by_hand(make_task(), make_data(tmp_path), 7, {3}, accumulated)
    assert want.keys() == end.keys()
    assert {name for name in want if not torch.equal(want[name], end[name])} == set()
    assert trainer.callback_metrics["train/skipped_steps"] == 1
    assert {float(value) for name, value in end.items() if name.endswith(".step")} == {6.0}


def test_ten_bad_steps_in_a_row_end_the_run_with_step_times_and_rows(tmp_path):
    data, task = make_data(tmp_path), make_task()
    start = {name: p.clone() for name, p in task.named_parameters()}
    trainer = make_trainer(tmp_path, [EMA(), Poison("nan in the loss", set(range(2, 99)))], max_steps=80)
    with pytest.raises(ValueError, match="updates in a row were left out") as raised:
        trainer.fit(task, data)
    said = str(raised.value)
    assert trainer.global_step == 50  # sent off after 25 steps, read after 50
    step = int(re.search(r"The last was step (\d+), counted from 0", said)[1])
    assert step == 49
    u = task.model.timesteps.sample(4, rng.generator(0, "times", step))  # its density stands still since step 2
    assert f"at the times u = {[round(value, 4) for value in u.tolist()]} on" in said
    order = ShuffledOrder(len(data.train_dataset), 4, 0)
    assert f"on the rows {order.batch(step)} of texts-train" in said
    assert all(p.isfinite().all() for p in task.parameters())
    assert not all(torch.equal(start[name], p) for name, p in task.named_parameters())  # steps 0 and 1 were made


def test_a_run_shorter_than_the_interval_is_ended_too_and_a_loader_of_ones_own_is_named_as_such(tmp_path):
    callbacks = [EMA(), Poison("inf in the loss", {1, 2, 3}), SkippedSteps(max_in_a_row=3)]
    trainer = make_trainer(tmp_path, callbacks, max_steps=5)
    with pytest.raises(
        ValueError, match=r"3 updates in a row .*, 3 in all.* was step 3, .* of a loader whose rows are"
    ):
        trainer.fit(make_task(), DataLoader(rows(40), batch_size=4))


def test_bad_steps_with_good_ones_between_them_never_end_a_run(tmp_path):
    callbacks = [EMA(), Poison("nan in the loss", set(range(0, 30, 3)) | set(range(1, 30, 3)))]
    callbacks.append(SkippedSteps(max_in_a_row=3, every_n_steps=4))
    trainer = make_trainer(tmp_path, callbacks, max_steps=30, max_epochs=-1)
    trainer.fit(make_task(), make_data(tmp_path))
    assert trainer.callback_metrics["train/skipped_steps"] == 20
    assert sum(isinstance(callback, SkippedSteps) for callback in trainer.callbacks) == 1  # one's own takes the place


def test_an_error_lists_32_rows_of_a_large_batch(tmp_path):
    callbacks = [EMA(), Poison("nan in the loss", {0}), SkippedSteps(max_in_a_row=1)]
    with pytest.raises(ValueError, match=r"\] and 8 more on the rows .*\] and 8 more of texts-train"):
        make_trainer(tmp_path, callbacks, max_steps=1).fit(make_task(), make_data(tmp_path, batch_size=40))


def test_a_checkpoint_after_a_bad_step_is_finite_and_the_count_goes_on_after_resuming(tmp_path):
    keep = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=3, save_top_k=-1)
    callbacks = [EMA(), Poison("nan in one gradient", {2}), keep]
    make_trainer(tmp_path, callbacks, max_steps=3, enable_checkpointing=True).fit(make_task(), make_data(tmp_path))
    saved = torch.load(tmp_path / "step=3.ckpt", weights_only=True)
    tensors = [*saved["state_dict"].values(), *saved["raw_parameters"].values()]
    tensors += [t for state in saved["optimizer_states"][0]["state"].values() for t in state.values()]
    assert all(t.isfinite().all() for t in tensors)
    trainer = make_trainer(tmp_path, [EMA(), Poison("nan in one gradient", {4})], max_steps=6)
    trainer.fit(make_task(), make_data(tmp_path), ckpt_path=tmp_path / "step=3.ckpt")
    assert trainer.callback_metrics["train/skipped_steps"] == 2


def test_half_precision_skips_the_updates_that_its_loss_scaler_skips(tmp_path):
    keep, ema = Keep(), EMA()
    half = MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu"))  # the Trainer alone refuses it on a CPU
    arguments = {"max_steps": 6, "gradient_clip_val": 0.5, "plugins": [half], "enable_checkpointing": True}
    trainer = make_trainer(tmp_path, [ema, Poison("inf in the loss", {3}), keep], **arguments)
    trainer.fit(make_task(), make_data(tmp_path))
    changed = {name for name, value in keep.states[3].items() if not torch.equal(value, keep.states[4][name])}
    assert changed <= {"model.timesteps.density"}
    assert not torch.equal(
        keep.states[4]["averaged.token_decoder.head.weight"], ema.averages["token_decoder.head.weight"]
    )
    assert half.scaler.get_scale() == 2**15
    assert trainer.callback_metrics["train/skipped_steps"] == 1


@pytest.mark.parametrize("fused", [True, False])
def test_an_optimizer_of_ones_own_fused_or_not_leaves_out_bad_steps_too(tmp_path, fused):
    class Mine(LDLMTask):
        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9, fused=fused)

    task, keep = Mine(make_model(), warmup_steps=4, timestep_refresh=2), Keep()
    callbacks = [EMA(), Poison("nan in the loss", {2}), keep]
    make_trainer(tmp_path, callbacks, max_steps=4, enable_checkpointing=True).fit(task, make_data(tmp_path))
    changed = {name for name, value in keep.states[2].items() if not torch.equal(value, keep.states[3][name])}
    assert changed <= {"model.timesteps.density"}
    assert all(p.isfinite().all() for p in task.parameters())


# --- nothing waits


class Listen(L.Callback):
    """Listens to whole steps, other callbacks included: it is the first to start and the first of the next to end."""

    def __init__(self) -> None:
        self.waits: dict[int, list[str]] = {}
        self.mode: Waits | None = None

    def on_train_batch_start(self, trainer, model, batch, batch_idx):
        self.mode = Waits()
        self.mode.__enter__()

    def on_before_zero_grad(self, trainer, model, optimizer):
        self.waits[trainer.global_step] = self.mode.found


class Hush(Checkpoint):  # which comes after those that the task brings
    def __init__(self, listen: Listen) -> None:
        self.listen = listen

    def on_train_batch_end(self, trainer, model, outputs, batch, batch_idx):
        self.listen.mode.__exit__(None, None, None)


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_a_step_brings_no_number_from_the_device(tmp_path, precision):
    listen = Listen()
    callbacks = [listen, EMA(), SkippedSteps(every_n_steps=3), LatentMonitor(every_n_steps=3), StopOnSignal()]
    arguments = {"max_steps": 12, "gradient_clip_val": 1.0, "precision": precision, "max_epochs": -1}
    arguments |= {"enable_checkpointing": True}
    callbacks.append(Hush(listen))
    make_trainer(tmp_path, callbacks, **arguments).fit(make_task(), make_data(tmp_path))
    assert len(listen.waits) == 12
    assert {step: found for step, found in listen.waits.items() if found} == {}
    with Waits() as waits:  # it does hear
        torch.ones(()).item()
    assert waits.found == ["aten::_local_scalar_dense"]


def test_numbers_sent_later_are_those_of_the_time_they_were_sent():
    later, values = DeferredRead(), torch.tensor([1.0, 2.0])
    assert later.read() is None
    later.send(values)
    values.zero_()
    assert later.read() == [1.0, 2.0]


# --- latents


def test_the_diagnosis_names_the_three_collapsed_runs_of_the_study_and_no_other():
    ends = torch.tensor([0.01, 0.99], dtype=torch.float64)
    seen = tuple((3 * torch.tan(math.pi * ends / 2)).tolist())  # sigma/alpha of the tangent schedule
    assert (TangentSchedule().sigma(ends) / TangentSchedule().alpha(ends)).tolist() == pytest.approx(seen, rel=1e-9)
    found = {}
    for file in sorted(RESULTS.glob("*.json")):
        run = json.loads(file.read_text())
        sigma_dec = {"sigma-0.1": 0.1, "sigma-0.5": 0.5, "sigma-3": 3.0}.get(run["cell"], 1.0)
        gammas = dict(run["curves"]["gamma"])
        for step, std in run["curves"]["latent_std"]:
            warning = diagnosis(std, gammas[step], None, seen, sigma_dec, 256)
            if warning is not None:
                found.setdefault(run["cell"], (step, warning[0]))
    assert len(list(RESULTS.glob("*.json"))) == 13
    assert {cell: what for cell, (_, what) in found.items()} == dict.fromkeys(
        ["shallow", "sigma-3", "warmup-0"], "the latents have collapsed"
    )
    assert {cell: step for cell, (step, _) in found.items()} == {"shallow": 219, "sigma-3": 519, "warmup-0": 19}


@pytest.mark.parametrize(
    ("scale", "sigma_dec", "message"),
    [
        (
            1e-4,
            0.1,
            r"the latents have collapsed: their deviation \S+ lies below .* 0\.047 at t = 0\.01 \(cross-entropy at",
        ),
        (
            1.0,
            50.0,
            r"the latents have collapsed: at deviation \S+ under decoder noise of 50 they can tell at most 0\.00",
        ),
        (1e4, 1.0, r"the latents explode: .* 191 at t = 0\.99"),
    ],
)
def test_latents_that_collapse_or_explode_are_warned_about_once_with_a_remedy(tmp_path, scale, sigma_dec, message):
    task = make_task(sigma_dec=sigma_dec, learning_rate=1e-12, warmup_steps=0, timestep_refresh=9)
    last = list(task.model.latent_encoder.parameters())
    with torch.no_grad():
        for parameter in last[-2:]:
            parameter.mul_(scale)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer = make_trainer(tmp_path, [LatentMonitor(every_n_steps=2)], max_steps=9, max_epochs=-1)
        trainer.fit(task, make_data(tmp_path))
    said = [str(warning.message) for warning in caught if "the latents" in str(warning.message)]
    assert len(said) == 1
    assert re.search(message, said[0])
    assert said[0].startswith("step 4: ")  # sent off after 2, read after 4
    assert "learning rate" in said[0]


class SameForEveryText(LatentEncoder):
    """Answers with its queries, whatever it is given."""

    def __init__(self, hidden_size: int, latent_size: int, num_latents: int) -> None:
        super().__init__(hidden_size, latent_size, num_latents)
        self.queries = torch.nn.Parameter(torch.randn(num_latents, latent_size, generator=generator()))

    def forward(self, hidden: Tensor) -> Tensor:
        return self.queries + 0 * hidden.mean(dim=(1, 2), keepdim=True)


def test_latents_that_are_the_same_for_every_text_have_collapsed(tmp_path):
    task = make_task(latent_encoder=SameForEveryText(HIDDEN, LATENT, LENGTH))
    assert task.model.latent_encoder(torch.zeros(3, LENGTH, 1)).std(dim=(0, 1)).mean() > 0.5  # over rows and positions
    with pytest.warns(UserWarning, match=r"^step 2: the latents have collapsed: their deviation 0 lies below"):
        make_trainer(tmp_path, [EMA(), LatentMonitor(1)], max_steps=3).fit(task, make_data(tmp_path))


def test_the_spread_of_latents_is_the_root_mean_square_of_numpys_over_rows_and_none_of_one_row():
    z0 = torch.randn(5, LENGTH, LATENT, generator=generator(), dtype=torch.float64)
    want = math.sqrt((z0.numpy().std(axis=0, ddof=1) ** 2).mean())
    assert spread_over_rows(z0 + 7 * torch.arange(LENGTH)[:, None]).item() == pytest.approx(want)
    assert spread_over_rows(z0[:1]) is None


def test_batches_of_one_row_are_trained_on_and_not_watched(tmp_path):
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*latents.*")
        trainer = make_trainer(tmp_path, [EMA(), LatentMonitor(1)], max_steps=4)
        trainer.fit(make_task(), make_data(tmp_path, batch_size=1))
    assert trainer.global_step == 4
    assert "train/loss" in trainer.callback_metrics
    assert "train/latent_std" not in trainer.callback_metrics


def test_ordinary_latents_are_not_warned_about(tmp_path):
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*latents.*")
        task = make_task()
        with torch.no_grad():
            task.model.latent_encoder.resampler.out.weight.mul_(4)  # as far apart as those of a trained model
        make_trainer(tmp_path, [EMA(), LatentMonitor(1)], max_steps=6).fit(task, make_data(tmp_path))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: SkippedSteps(max_in_a_row=0), "max_in_a_row=0 must be at least 1"),
        (lambda: SkippedSteps(every_n_steps=0), "every_n_steps=0 must be at least 1"),
        (lambda: LatentMonitor(every_n_steps=0), "every_n_steps=0 must be at least 1"),
        (lambda: StopOnSignal(every_n_steps=0), "every_n_steps=0 must be at least 1"),
        (
            lambda: LatentMonitor().on_train_start(L.Trainer, L.LightningModule()),
            "for an LDLMTask, not for",
        ),
    ],
)
def test_arguments_that_cannot_work_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()
