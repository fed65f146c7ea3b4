"""What a run leaves to look at: numbers, figures and texts in TensorBoard, a table at the end, a file of texts."""

import json
import math
from pathlib import Path

import lightning as L
import pytest
import torch
from helpers.tiny import make_data, make_task, make_tokenizer, make_trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor

from ldlm.model import LDLM
from ldlm.training.callbacks import visualisation as watch
from ldlm.training.callbacks.ema import EMA
from ldlm.training.callbacks.predictions import ReconstructionWriter
from ldlm.training.callbacks.visualisation import (
    FigureLogger,
    SampleLogger,
    ShowSamples,
    Throughput,
    cell,
    checkpoint_path,
)
from ldlm.training.callbacks.warmup import DiffusionToEncoderWarmup
from ldlm.training.task import LDLMTask


def recipe(**changes: object) -> LDLMTask:
    return make_task(warmup_steps=4, timestep_refresh=2, **changes)


class Remembers(L.Callback):
    """The metrics of each step, as the Trainer has them, and what the averages generate."""

    def __init__(self, ema: EMA) -> None:
        self.ema = ema
        self.train: dict[int, dict[str, float]] = {}
        self.validation: dict[int, dict[str, float]] = {}
        self.texts: dict[int, list[str]] = {}

    def on_train_batch_end(self, trainer, model, outputs, batch, batch_idx):
        self.train[trainer.global_step - 1] = {n: v.item() for n, v in trainer.callback_metrics.items()}

    def on_validation_end(self, trainer, task):
        self.validation[trainer.global_step] = {n: v.item() for n, v in trainer.callback_metrics.items()}
        # The averages are what is validated; EMA has put the raw weights back by now.
        model = task.model
        raw = {n: p.detach().clone() for n, p in model.named_parameters()}
        model.load_state_dict(self.ema.averages, strict=False)
        self.texts[trainer.global_step] = model.generate(3, nfe=4, seed=5, batch_size=3)
        model.load_state_dict(raw, strict=False)


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> tuple[Remembers, EventAccumulator]:
    folder = tmp_path_factory.mktemp("run")
    logger = TensorBoardLogger(folder, default_hp_metric=False)
    remembers = Remembers(ema := EMA())
    watching = [ema, Throughput(every_n_steps=2), FigureLogger(), SampleLogger(3, nfe=4, seed=5), remembers]
    trainer = make_trainer(folder, watching, max_steps=6, val_check_interval=3, logger=logger, log_every_n_steps=1)
    trainer.fit(recipe(tokenizer=make_tokenizer(), lr_warmup_steps=2), make_data(folder))
    logger.finalize("success")
    events = EventAccumulator(logger.log_dir)
    events.Reload()
    return remembers, events


def test_every_number_of_the_run_is_in_tensorboard_as_the_trainer_had_it(run):
    remembers, events = run
    names = {"train/loss", "train/diffusion", "train/reconstruction", "train/token", "train/gamma", "train/latent_std"}
    for name in names:
        got = {event.step: event.value for event in events.Scalars(name)}
        assert sorted(got) == [0, 1, 2, 3, 4, 5]
        for step, value in got.items():
            assert value == pytest.approx(remembers.train[step][name], rel=1e-6)
    for name in ("diffusion", "reconstruction", "token", "accuracy", "accuracy_noised"):
        got = [event.value for event in events.Scalars(f"validation/{name}")]
        want = [remembers.validation[step][f"validation/{name}"] for step in (3, 6)]
        assert got == pytest.approx(want, rel=1e-6)
    assert [event.value for event in events.Scalars("train/gamma")][4:] == [1.0, 1.0]


def test_figures_and_texts_are_logged_after_each_validation(run):
    remembers, events = run
    assert {"loss over time", "warm-up"} <= set(events.Tags()["images"])
    for tag in ("loss over time", "warm-up"):
        assert [event.step for event in events.Images(tag)] == [3, 6]
    tables = {event.step: event.tensor_proto.string_val[0].decode() for event in events.Tensors("samples/text_summary")}
    assert sorted(tables) == [3, 6]
    for step, texts in remembers.texts.items():
        rows = [f"| {i} | {text} |" for i, text in enumerate(texts)]
        assert tables[step] == "\n".join(["| | generated |", "|---|---|", *rows])


def test_tokens_per_second_are_tokens_over_seconds(tmp_path, monkeypatch):
    clock = iter([100.0, 104.0, 112.0, 113.0, 115.0, 116.0])
    monkeypatch.setattr(watch.time, "monotonic", lambda: next(clock))
    seen: dict[int, float] = {}

    class Reads(L.Callback):
        def on_train_batch_end(self, trainer, model, outputs, batch, batch_idx):
            value = trainer.callback_metrics.get("train/tokens_per_second")
            seen[trainer.global_step] = math.nan if value is None else value.item()

    callbacks = [Throughput(every_n_steps=2), Reads()]
    trainer = make_trainer(tmp_path, callbacks, max_steps=4, limit_val_batches=0, accumulate_grad_batches=2)
    trainer.fit(recipe(), make_data(tmp_path))
    # two steps of four rows of 8 tokens: 64 tokens in 4 s, then 64 in 8 s
    assert seen[2] == pytest.approx(16.0)
    assert seen[4] == pytest.approx(8.0)


class Figures:
    """Stands for TensorBoard's writer."""

    def __init__(self) -> None:
        self.figures: dict[str, object] = {}

    def add_figure(self, tag, figure, step) -> None:
        self.figures[tag] = figure


def test_the_loss_figure_shows_the_mean_loss_of_each_bin_of_time(tmp_path, monkeypatch):
    writer = Figures()
    monkeypatch.setattr(watch, "tensorboard", lambda trainer: writer)
    collected: list[dict[str, Tensor]] = []

    class Collects(L.Callback):
        def on_validation_batch_end(self, trainer, model, outputs, batch, batch_idx, dataloader_idx=0):
            collected.append(outputs)

    task = make_task()
    trainer = make_trainer(tmp_path, [DiffusionToEncoderWarmup(10), FigureLogger(), Collects()])
    loader = torch.utils.data.DataLoader(torch.randint(0, 40, (50, 8)), batch_size=40)
    trainer.validate(task, loader, verbose=False)
    u, loss = (torch.cat([part[name] for part in collected]) for name in ("u", "loss"))
    bins = (u * 20).long()
    want = [(b.item() + 0.5, loss[bins == b].mean().item()) for b in bins.unique()]
    left, right = writer.figures["loss over time"].axes
    assert left.lines[0].get_xdata() == pytest.approx([b / 20 for b, _ in want])
    assert left.lines[0].get_ydata() == pytest.approx([mean for _, mean in want], rel=1e-5)
    assert right.lines[0].get_xdata() == pytest.approx([b / 20 for b, _ in want])  # F(u) = u before any refresh
    (curve,) = writer.figures["warm-up"].axes
    warmup = DiffusionToEncoderWarmup(10)
    steps = [round(0.12 * i) for i in range(101)]
    assert list(curve.lines[0].get_xdata()) == steps
    assert list(curve.lines[0].get_ydata()) == [warmup.gamma(step) for step in steps]


def test_the_end_of_a_fit_shows_generated_beside_real_texts_and_the_command_for_more(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    keep = ModelCheckpoint(tmp_path / "kept", filename="{step}", every_n_train_steps=2, save_last=True)
    task, logger = recipe(tokenizer=make_tokenizer()), TensorBoardLogger(tmp_path, name="logs", version=0)
    # whichever of the two comes first, the texts are those of the averaged weights
    callbacks = [ShowSamples(num_samples=2, nfe=4, seed=3), EMA(), keep]
    trainer = make_trainer(tmp_path, callbacks, max_steps=4, enable_checkpointing=True, logger=logger)
    data = make_data(tmp_path)
    trainer.fit(task, data)
    printed = capsys.readouterr().out
    assert "after 4 steps" in printed
    assert "ldlm generate kept/last.ckpt -n 8 --nfe 4\n" in printed
    assert "tensorboard --logdir" in printed
    for text in LDLM.load_from_checkpoint(tmp_path / "kept" / "last.ckpt").generate(2, 4, seed=3, batch_size=2):
        assert text in printed
    for text in task.model.to_text(data.validation_dataset[[0, 1]]):
        assert text in printed


def test_the_file_of_reconstructions_has_each_held_out_text_beside_its_own(tmp_path):
    task, data, file = make_task(tokenizer=make_tokenizer()), make_data(tmp_path), tmp_path / "out" / "texts.jsonl"
    trainer = make_trainer(tmp_path, [ReconstructionWriter(str(file))])
    predictions = trainer.predict(task, data)
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    tokens = data.validation_dataset[[0, 1, 2]]
    assert [line["text"] for line in lines] == task.model.to_text(tokens)
    assert [line["reconstruction"] for line in lines] == task.model.to_text(torch.cat(predictions))
    assert lines[0]["text"].startswith("word")
    trainer.predict(task, data)
    assert len(file.read_text().splitlines()) == 3  # a second run replaces the file


def test_without_tensorboard_or_tokenizer_nothing_is_drawn_and_nothing_breaks(tmp_path, capsys):
    logger = CSVLogger(tmp_path)
    callbacks = [FigureLogger(), SampleLogger(), ShowSamples(), Throughput(1)]
    trainer = make_trainer(tmp_path, callbacks, max_steps=2, logger=logger, log_every_n_steps=1, val_check_interval=1)
    trainer.fit(recipe(), make_data(tmp_path))
    assert "generated" not in capsys.readouterr().out
    metrics = (Path(logger.log_dir) / "metrics.csv").read_text()
    assert "validation/accuracy" in metrics.splitlines()[0]
    assert checkpoint_path(trainer) == ""


def test_a_text_in_a_table_keeps_to_its_cell():
    assert cell("a | b\n  c\td") == "a &#124; b c d"
