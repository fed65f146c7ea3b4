"""``ldlm bench training``: a step of a recipe's Trainer beside the same step without one.

In: a recipe, as ``ldlm fit`` takes it. Out: milliseconds, tokens a second, their quotient, FLOPs, memory.
Paper: App. C (what was trained for how long).

The model, the precision, the clipping, the accumulation and the callbacks are the recipe's; tokens are random and in
memory. Nothing is validated, logged or saved.
"""

import argparse
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from functools import partial
from itertools import chain, cycle, repeat
from tempfile import TemporaryDirectory

import lightning as L
import torch
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.cli import SaveConfigCallback
from lightning.pytorch.loggers.logger import DummyLogger
from torch import Tensor
from torch.nn.utils import clip_grad_norm_, clip_grad_value_
from torch.utils.data import DataLoader
from transformers import AutoConfig, AutoModel, GPT2Config

from ldlm.benchmarks.timing import (
    Clock,
    Numbers,
    count_flops,
    fitting,
    matmul_rate,
    peak_memory,
    quotients,
    rate,
    spread,
    surroundings,
    synchronize,
    utilisation,
)
from ldlm.data.datamodule import PackedTextDataModule
from ldlm.hub import local_folder
from ldlm.rng import generator
from ldlm.training.callbacks.visualisation import ShowSamples
from ldlm.training.task import LDLMTask

WARMUP = 3  # steps: the optimizer makes its states in the first, and after two memory has been used as it will be
# One device and nothing but steps; a warm-up changes what gamma is, not what it costs.
WORDS = {
    "trainer.devices": 1,
    "trainer.num_nodes": 1,
    "trainer.limit_val_batches": 0,
    "trainer.num_sanity_val_steps": 0,
    "trainer.enable_progress_bar": "false",
    "trainer.enable_model_summary": "false",
    "training.warmup_steps": 0,
}

PrepareFit = Callable[
    [list[str]], tuple[LDLMTask, L.Trainer, PackedTextDataModule]
]  # ``ldlm fit``'s words -> what it would run


class Turns(L.Callback):
    """Lets the Trainer make some calls and bare loops as many, in turn, and times them from end to end.

    Args:
        loops: Loops by name; each makes a number of calls.
        calls: Of a turn.
        warmup: Of the first turn, which is not to count.
        device: Waited for.
        clock: Tells the time, in seconds.
    """

    def __init__(
        self,
        loops: Mapping[str, Callable[[int], object]],
        calls: int,
        warmup: int,
        device: torch.device,
        clock: Clock,
    ) -> None:
        self.loops, self.calls, self.device, self.clock = loops, calls, device, clock
        self.left = self.warmup = warmup
        self.seconds: dict[str, list[float]] = {name: [] for name in ("trainer", *loops)}
        self._start = 0.0

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: object, batch: Tensor, batch_idx: int
    ) -> None:
        """The end of a turn is here, so that all that a Trainer does between two calls is in it."""
        self.left -= 1
        if self.left:
            return
        self.seconds["trainer"].append(self._lap())
        for name, loop in self.loops.items():
            loop(self.calls if batch_idx >= self.warmup else self.warmup)
            self.seconds[name].append(self._lap())
        self.left = self.calls

    def _lap(self) -> float:
        synchronize(self.device)
        before, self._start = self._start, self.clock()
        return self._start - before


def bench_training(options: argparse.Namespace, prepare_fit: PrepareFit) -> Numbers:
    """A step of the recipe's Trainer beside forward, backward, clipping and optimizer step alone."""
    with ExitStack() as stack:
        words = [f"--{name}={value}" for name, value in WORDS.items()]
        words.append(f"--trainer.max_steps={WARMUP + options.repeats * options.steps}")
        if options.random_encoder:
            folder = stack.enter_context(TemporaryDirectory())
            write_random_encoder(options.random_encoder, folder)
            encoder = "--model.token_encoder.init_args"
            words += [f"{encoder}.model={folder}", f"{encoder}.revision=null", f"{encoder}.sha256=null"]
        task, trainer, data = prepare_fit([*options.recipe, *words])
        warnings.filterwarnings("ignore", message=".*no `val_dataloader`.*|.*smaller than the logging interval.*")
        # Whatever writes files or prints goes; what acts in a step stays, and a logger that keeps nothing.
        unwanted = (Checkpoint, SaveConfigCallback, ShowSamples)
        callbacks: list[L.Callback] = trainer.callbacks  # type: ignore[attr-defined]
        callbacks[:] = [one for one in callbacks if not isinstance(one, unwanted)]
        trainer.loggers = [DummyLogger()]
        data.batch_size = options.batch_size
        sizes = f"{options.batch_size} rows a call, of {task.model.sequence_length} tokens,"
        stack.enter_context(fitting(sizes, "lower --batch_size"))
        return measure(task, trainer, data, options)


def write_random_encoder(name: str, folder: str) -> None:
    """Put an untrained transformer into a folder: GPT-2 small, or what another folder's ``config.json`` describes."""
    known = name == "gpt2"
    config = GPT2Config() if known else AutoConfig.from_pretrained(local_folder(name, None, "config.json"))
    AutoModel.from_config(config).save_pretrained(folder)


def measure(task: LDLMTask, trainer: L.Trainer, data: PackedTextDataModule, options: argparse.Namespace) -> Numbers:
    """Run the Trainer on random tokens, with turns of a bare loop in between."""
    model, repeats, steps = task.model, options.repeats, options.steps
    device, micro_steps = trainer.strategy.root_device, trainer.accumulate_grad_batches
    source = generator(0, "bench", device=device)
    calls = (WARMUP + repeats * steps) * micro_steps
    shape = calls, options.batch_size, model.sequence_length
    tokens = torch.randint(model.token_encoder.vocab_size, shape, generator=source, device=device)
    task.to(device)
    model.token_encoder.fit_statistics(tokens[:1], options.batch_size)

    def backward(batch: Tensor) -> None:
        with trainer.precision_plugin.forward_context():
            u = model.timesteps.sample(len(batch), source).to(device)
            loss = task.objective(model, batch, u, task.gamma, source).total / micro_steps
        loss.backward()  # type: ignore[no-untyped-call]

    def bare(batches: Iterator[Tensor], calls: int) -> None:
        (optimizer,) = trainer.optimizers
        for _ in range(calls // micro_steps):
            optimizer.zero_grad()
            for _ in range(micro_steps):
                backward(next(batches))
            if trainer.gradient_clip_val:
                clip = clip_grad_value_ if trainer.gradient_clip_algorithm == "value" else clip_grad_norm_
                clip(model.parameters(), trainer.gradient_clip_val)
            optimizer.step()

    waits: list[float] = []

    def arriving() -> Iterator[Tensor]:
        batches = chain.from_iterable(repeat(data.train_dataloader()))
        while True:
            start = options.clock()
            batch = next(batches).to(device)
            waits.append(options.clock() - start)
            yield batch

    flops = count_flops(partial(backward, tokens[0]))
    model.zero_grad()
    low = {"bf16": torch.bfloat16, "16-m": torch.float16}
    best = matmul_rate(device, low.get(str(trainer.precision)[:4], torch.float32), options.clock)
    loops = {"bare": partial(bare, cycle(tokens))} | ({"data": partial(bare, arriving())} if options.data else {})
    turns = Turns(loops, steps * micro_steps, WARMUP * micro_steps, device, options.clock)
    callbacks: list[L.Callback] = trainer.callbacks  # type: ignore[attr-defined]
    loader: DataLoader[Tensor] = DataLoader(tokens, batch_size=None)  # type: ignore[arg-type]
    callbacks.append(turns)
    memory = peak_memory(lambda: trainer.fit(task, train_dataloaders=loader), device)
    seconds, a_call = {name: laps[1:] for name, laps in turns.seconds.items()}, tokens[0].numel()
    measures: Numbers = {
        "step_ms": spread(seconds["trainer"], 1e3 / steps),
        "bare_step_ms": spread(seconds["bare"], 1e3 / steps),
        "step_over_bare": quotients(seconds["trainer"], seconds["bare"]),
        "tokens_per_second": rate(turns.calls * a_call, seconds["trainer"]),
        "flops_per_token": flops / a_call,
        **utilisation(turns.calls * flops, seconds["trainer"], best),
        **memory,
    }
    if options.data:
        ends = range(turns.warmup + turns.calls, calls + 1, turns.calls)
        waited = [sum(waits[end - turns.calls : end]) for end in ends]
        measures["data_ms_per_step"] = spread(waited, 1e3 / steps)
        measures["data_share"] = quotients(waited, seconds["data"])
    used: list[L.Callback] = trainer.callbacks  # type: ignore[attr-defined]  # with those that the task brought
    settings = {
        "rows_per_call": options.batch_size,
        "calls_per_step": micro_steps,
        "sequence_length": model.sequence_length,
        "precision": str(trainer.precision),
        "steps": steps,
        "repeats": repeats,
        "trainable_parameters": sum(p.numel() for p in model.parameters() if p.requires_grad),
        "callbacks": [type(one).__name__ for one in used if one is not turns],
    }
    return {"measures": measures, "settings": settings, "surroundings": surroundings(device)}
