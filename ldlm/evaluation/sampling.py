"""Sampling from a stored model, as ``ldlm generate`` and evaluations do it.

In: a checkpoint, an exported folder or a hub id; names of a sampler and a grid. Out: the model on its device; token
ids, batch by batch.
Paper: section 4.3 (sampling) and App. C: neither token encoder nor latent encoder is used.
"""

import argparse
import difflib
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor

from ldlm._files import check_output
from ldlm.diffusion.grids import AdaptedGrid, LogSNRGrid, MixedGrid, TimeGrid, UniformGrid
from ldlm.diffusion.samplers import DDIM, Ancestral, DPMSolver2M, EulerMaruyama, OnStep, Sampler
from ldlm.model import LDLM
from ldlm.nn.compile import compile_blocks

SAMPLERS = (EulerMaruyama, Ancestral, DDIM, DPMSolver2M)
GRIDS = (UniformGrid, LogSNRGrid, AdaptedGrid, MixedGrid)


def load(source: str, device: torch.device, precision: str = "32", compile_mode: str | None = None) -> LDLM:
    """A model from a ``.ckpt`` file, an exported folder or a hub id, to sample with.

    Args:
        source: Where it is.
        device: Where it is put.
        precision: "bf16" keeps all that samples in bfloat16.
        compile_mode: torch.compile's, for the blocks of the denoiser; None compiles nothing.
    """
    is_file = source.endswith(".ckpt") or Path(source).is_file()
    model = LDLM.load_from_checkpoint(source) if is_file else LDLM.from_pretrained(source)
    model = model.to(device).to_bfloat16() if precision == "bf16" else model.to(device)
    if compile_mode is not None:
        compile_blocks(model.denoiser, compile_mode)
    return model


def named(name: str | None, known: tuple[type, ...]) -> Any:
    """A sampler or grid by the name of its class, with its defaults; None for None, ValueError if there is none."""
    if name is None:
        return None
    kinds = {kind.__name__: kind for kind in known}
    if name not in kinds:
        close = difflib.get_close_matches(name, kinds, n=1)
        raise ValueError(
            f"there is no {name!r} among {', '.join(kinds)}{f'; did you mean {close[0]}?' if close else ''}"
        )
    return kinds[name]()


def find_device(name: str | None) -> torch.device:
    """The device of that name, or a GPU if there is one and no name; ValueError if it cannot be had."""
    try:
        device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
        torch.zeros(1, device=device, dtype=torch.float64).item()  # float64: the timesteps' statistics need it
    except (RuntimeError, AssertionError, TypeError, NotImplementedError) as error:
        raise ValueError(f"--device {name}: {str(error).splitlines()[0]}; --device cpu always works") from error
    return device


def sample(
    model: LDLM,
    options: argparse.Namespace,
    seed: int,
    sampler: Sampler | None,
    grid: TimeGrid | None,
    on_step: OnStep | None = None,
) -> Iterator[Tensor]:
    """Token ids of generated texts, batch by batch [b n], with a bar on standard error.

    Args:
        model: On the device it is to run on.
        options: The command's: num_samples, nfe, batch_size, temperature.
        seed: Of the noise.
        sampler: None for the model's.
        grid: None for the model's.
        on_step: As in `LDLM.sample_batches`.
    """
    count, size, nfe = options.num_samples, options.batch_size, options.nfe
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("denoiser calls", total=-(-count // size) * nfe)

        def advance(step: int, z0_hat: Tensor) -> None:
            bar.advance(task)
            if on_step is not None:
                on_step(step, z0_hat)

        yield from model.sample_batches(count, nfe, sampler, grid, seed, size, options.temperature, advance)


def prepare(options: argparse.Namespace) -> tuple[LDLM, Sampler | None, TimeGrid | None]:
    """The model on its device, the sampler and the grid that options name; what can be checked before loading is."""
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    device = find_device(options.device)
    check_output(options.output)
    sampler, grid = named(options.sampler, SAMPLERS), named(options.grid, GRIDS)
    return load(options.checkpoint, device, options.precision, options.compile), sampler, grid
