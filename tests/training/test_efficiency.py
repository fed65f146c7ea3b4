"""What is compiled or computed again trains as it would otherwise, and no step waits for the device."""

from pathlib import Path

import lightning as L
import pytest
import torch
from helpers.tiny import (
    HIDDEN,
    LATENT,
    LENGTH,
    VOCAB,
    TanhBlock,
    generator,
    make_data,
    make_model,
    make_pretrained,
    make_task,
    make_tokenizer,
    make_trainer,
    rows,
)
from helpers.waits import Waits
from lightning.pytorch.callbacks import LearningRateMonitor, ModelCheckpoint
from lightning.pytorch.loggers import TensorBoardLogger
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from ldlm.model import LDLM
from ldlm.nn.denoiser import DiT
from ldlm.nn.layers import Block
from ldlm.nn.token_decoders import TransformerTokenDecoder
from ldlm.nn.token_encoders import PretrainedTokenEncoder
from ldlm.objective import JointObjective
from ldlm.training.callbacks.efficiency import CompileBlocks, RecomputeActivations
from ldlm.training.callbacks.ema import EMA
from ldlm.training.callbacks.likelihood_bound import LikelihoodBound
from ldlm.training.callbacks.visualisation import FigureLogger, SampleLogger, SaveAtEnd, Throughput

RECIPE = {"warmup_steps": 4, "timestep_refresh": 2}


def deep_model(**changes) -> LDLM:
    """A tiny model whose parts have several layers each."""
    torch.manual_seed(1)
    parts = {"denoiser": DiT(LATENT, LENGTH, width=16, layers=4, heads=2)}
    parts["token_decoder"] = TransformerTokenDecoder(HIDDEN, VOCAB, layers=2, heads=2)
    return make_model(**(parts | changes))


def blocks(model: torch.nn.Module) -> list[Block]:
    return [block for block in model.modules() if isinstance(block, Block)]


def parameters(model: torch.nn.Module) -> Tensor:
    return torch.cat([p.detach().flatten() for p in model.parameters()])


class Seen(L.Callback):
    """What a block looks like while a fit lasts."""

    def __init__(self, of: object) -> None:
        self.of, self.values = of, []

    def on_train_batch_end(self, trainer, task, outputs, batch, batch_idx):
        self.values.append([self.of(block) for block in blocks(task)])


# --- computed again


def saved_bytes_and_gradients(model: LDLM, recompute: bool) -> tuple[int, Tensor]:
    for block in blocks(model):
        block.recompute = recompute
    draw = generator(3)
    u = model.timesteps.sample(32, draw)
    saved: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        if not isinstance(tensor, torch.nn.Parameter):
            saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        kept.append(tensor)  # so that no address is used twice
        return tensor

    kept: list[Tensor] = []
    with saved_tensors_hooks(keep, lambda tensor: tensor):
        total = JointObjective()(model, rows(32), u, 0.5, draw).total
    model.zero_grad()
    total.backward()
    return sum(saved.values()), torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


def test_gradients_of_layers_computed_again_are_the_same_and_less_is_kept_for_them():
    model = deep_model()
    plain, want = saved_bytes_and_gradients(model, recompute=False)
    fewer, got = saved_bytes_and_gradients(model, recompute=True)
    assert (got - want).norm() <= 1e-6 * want.norm()
    assert fewer < 0.35 * plain  # a block saves its input, and its 18 or so intermediate results no longer


def test_a_run_with_layers_computed_again_ends_where_one_without_does_and_leaves_no_trace(tmp_path):
    plain, again = (make_task(model=deep_model(), **RECIPE) for _ in range(2))
    seen = Seen(lambda block: block.recompute)
    make_trainer(tmp_path, [EMA()], max_steps=6).fit(plain, make_data(tmp_path))
    trainer = make_trainer(tmp_path, [EMA(), RecomputeActivations(), seen], max_steps=6)
    trainer.fit(again, make_data(tmp_path))
    torch.testing.assert_close(parameters(again), parameters(plain), rtol=1e-5, atol=1e-6)
    assert seen.values == [[True] * 8] * 6  # of one resampler block in each latent coder, 4 and 2
    assert [block.recompute for block in blocks(again)] == [False] * 8
    assert list(again.state_dict()) == list(plain.state_dict())


def test_layers_of_frozen_parts_are_not_computed_again(tmp_path):
    task = make_task(model=deep_model(), token_weight=0.0, **RECIPE)
    seen = Seen(lambda block: block.recompute)
    make_trainer(tmp_path, [EMA(), RecomputeActivations(), seen], max_steps=1).fit(task, make_data(tmp_path))
    assert seen.values == [[block not in blocks(task.model.token_decoder) for block in blocks(task)]]


def test_somebodys_own_layer_is_computed_again_too_and_only_where_there_is_a_backward_pass(monkeypatch):
    layer, x = TanhBlock(4), torch.ones(2, 4, requires_grad=True)
    calls: list[Tensor] = []
    layer.linear.register_forward_hook(lambda *_: calls.append(x))
    layer.recompute = True
    layer(x).sum().backward()
    assert len(calls) == 2
    monkeypatch.setattr("ldlm.nn.layers.checkpoint", None)
    with torch.no_grad():
        layer(x)
    assert len(calls) == 3


# --- compiled


def test_a_compiled_run_validates_averages_saves_and_resumes_as_an_uncompiled_one(tmp_path, graphs):
    ends, scores, keys, made = [], [], [], []

    class Count(L.Callback):
        def on_validation_end(self, trainer, task):
            made.append(len(graphs))

    for compiled in ([], [CompileBlocks()]):
        folder = tmp_path / str(len(compiled))
        keep = ModelCheckpoint(folder, filename="{step}", every_n_train_steps=4, save_top_k=-1)
        arguments = {"enable_checkpointing": True, "val_check_interval": 3}
        trainer = make_trainer(folder, [EMA(), *compiled, keep], max_steps=6, **arguments)
        trainer.fit(make_task(**RECIPE), make_data(tmp_path))
        task = make_task(seed=3, **RECIPE)
        trainer = make_trainer(folder, [EMA(), *compiled, Count()], max_steps=12, **arguments)
        trainer.fit(task, make_data(tmp_path), ckpt_path=folder / "step=4.ckpt")
        ends.append(parameters(task))
        scores.append({name: value.item() for name, value in trainer.callback_metrics.items()})
        saved = torch.load(folder / "step=4.ckpt", weights_only=True)
        keys.append([list(saved[part]) for part in ("state_dict", "raw_parameters")])
        assert not any(block._compiled_call_impl for block in blocks(task))  # the fit is over
        assert bool(graphs) == bool(compiled)
    torch.testing.assert_close(ends[1], ends[0], rtol=1e-5, atol=1e-6)
    assert scores[1] == pytest.approx(scores[0], rel=1e-4)
    assert keys[1] == keys[0]
    # 4 rows train, 3 rows validate: once both have been seen nothing more is compiled
    assert made[:3] == [0] * 3
    assert made[3:] == [made[3]] * 3


def test_a_pre_trained_encoders_layers_are_compiled_if_asked_for(tmp_path, monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    make_pretrained("gpt2", tmp_path / "gpt2")
    for asked in (False, True):
        encoder = PretrainedTokenEncoder(str(tmp_path / "gpt2"), layer=2)
        compiled: list[int] = []

        class Look(L.Callback):
            def on_train_batch_end(self, trainer, task, outputs, batch, batch_idx):
                layers = task.model.token_encoder.frozen().modules()
                compiled.append(sum(layer._compiled_call_impl is not None for layer in layers))  # noqa: B023

        trainer = make_trainer(tmp_path, [EMA(), CompileBlocks(token_encoder=asked), Look()], max_steps=1)
        trainer.fit(make_task(model=deep_model(token_encoder=encoder), **RECIPE), make_data(tmp_path))
        assert compiled == [2 * asked]
        assert not any(layer._compiled_call_impl for layer in encoder.frozen().modules())


def test_without_a_compiler_a_run_warns_and_goes_on(tmp_path, monkeypatch):
    monkeypatch.setattr("ldlm.nn.compile.obstacle", lambda device: "no compiler was found")
    plain, task = (make_task(model=deep_model(), **RECIPE) for _ in range(2))
    make_trainer(tmp_path, [EMA()], max_steps=2).fit(plain, make_data(tmp_path))
    with pytest.warns(UserWarning, match=r"nothing is compiled.*no compiler was found; install a C\+\+ compiler"):
        make_trainer(tmp_path, [EMA(), CompileBlocks()], max_steps=2).fit(task, make_data(tmp_path))
    assert torch.equal(parameters(task), parameters(plain))


def test_an_unknown_mode_is_refused_before_anything_runs():
    with pytest.raises(ValueError, match="mode='fastest'"):
        CompileBlocks("fastest")


# --- nothing in a step waits for the device


class Steps(Waits):
    """Notes the optimizer step of each of them, in training."""

    def __init__(self, trainer: L.Trainer) -> None:
        super().__init__()
        self.trainer, self.steps = trainer, []

    def hear(self, name: str) -> None:
        if self.trainer.training:
            self.steps.append(self.trainer.global_step)


def whole_recipe(folder: Path, *more: L.Callback) -> L.Trainer:
    """All that the recipes have, logging after steps 4, 8 and 12."""
    watching = [LearningRateMonitor(), Throughput(), FigureLogger(), SampleLogger(), LikelihoodBound(tau=1.0)]
    keep = ModelCheckpoint(folder, every_n_train_steps=100, save_last=True)
    callbacks = [EMA(), *watching, SaveAtEnd(), *more, keep]
    logger = TensorBoardLogger(folder, default_hp_metric=False)
    arguments = {"max_steps": 12, "log_every_n_steps": 4, "limit_val_batches": 0, "enable_checkpointing": True}
    arguments |= {"logger": logger, "gradient_clip_val": 1.0, "precision": "bf16-mixed"}
    return make_trainer(folder, callbacks, **arguments)


def test_a_step_without_logging_brings_no_number_from_the_device(tmp_path):
    trainer = whole_recipe(tmp_path)
    changes = {"token_fraction": 0.5, "hidden_masking": 0.1, "lr_decay": 0.5}
    task = make_task(tokenizer=make_tokenizer(), warmup_steps=8, timestep_refresh=3, **changes)
    with Steps(trainer) as waits:
        trainer.fit(task, make_data(tmp_path, batch_size=2))  # 13 steps an epoch
    assert {*waits.steps} == {0, 4, 8, 12}  # the order of rows is drawn, on the host; then logging


def test_what_a_step_logs_is_on_the_device_already(tmp_path, monkeypatch):
    logged: dict[str, set[type]] = {}
    log = L.LightningModule.log

    def note(self, name, value, *args, **kwargs):
        logged.setdefault(name, set()).add(type(value))
        log(self, name, value, *args, **kwargs)

    monkeypatch.setattr(L.LightningModule, "log", note)
    task = make_task(tokenizer=make_tokenizer(), warmup_steps=8, timestep_refresh=3)
    whole_recipe(tmp_path).fit(task, make_data(tmp_path))
    assert {"train/loss", "train/gamma", "train/grad_norm", "train/latent_std"} <= logged.keys()
    assert {*map(frozenset, logged.values())} == {frozenset([Tensor])}
