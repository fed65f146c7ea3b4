"""What ``ldlm generate`` does: texts from noise, streamed to the terminal or to a file.

In: a checkpoint, an exported folder or a hub id. Out: texts on standard output, or JSON lines in a file: index, text,
and what an evaluation reads of it besides, its token ids and its documents (`LDLM.to_lines`).
Paper: section 4.3 (sampling) and App. C: neither token encoder nor latent encoder is used.
"""

import argparse
import difflib
import json
import logging
import os
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor

from ldlm.compiling import compile_blocks
from ldlm.files import is_special, visible, write_atomically
from ldlm.grids import AdaptedGrid, LogSNRGrid, MixedGrid, TimeGrid, UniformGrid
from ldlm.module import LDLM
from ldlm.samplers import DDIM, Ancestral, DPMSolver2M, EulerMaruyama, OnStep, Sampler

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
        on_step: As in `Generation.sample_batches`.
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


def write_texts(options: argparse.Namespace) -> None:
    """Generate texts and write each batch as soon as it is there.

    Args:
        options: The command's, by the names that ``ldlm generate --help`` shows.
    """
    model, sampler, grid = prepare(options)
    write_batches(model, sample(model, options, options.seed, sampler, grid), options)


def write_batches(model: LDLM, batches: Iterable[Tensor], options: argparse.Namespace) -> None:
    """Print the texts of batches of token ids [b n], or write them where ``--output`` says."""
    with ExitStack() as stack:
        # The file appears under its name when it is complete.
        file = stack.enter_context(write_atomically(options.output)) if options.output else None
        number = 0
        for tokens in batches:
            for row in model.to_lines(tokens):
                if file is None:
                    print(f"[{number}] {visible(row['text'])}\n", flush=True)
                else:
                    line = json.dumps({"index": number, **row}, ensure_ascii=False)
                    file.write(f"{line}\n".encode())
                number += 1
    if options.output:
        print(f"{options.num_samples} texts are in {visible(options.output)}")


def check_output(output: str | None, option: str = "--output") -> None:
    """ValueError if the file to be written is a folder, or cannot be made where it is to stand."""
    if not output:
        return
    if Path(output).is_dir():
        raise ValueError(f"{option} {output} is a folder; give the name of a file in it")
    if is_special(output):
        if not os.access(output, os.W_OK):
            raise ValueError(f"{option} {output} cannot be written: there is no permission to; give another name")
        return
    there = next(folder for folder in Path(os.path.realpath(output)).parents if folder.exists())
    if not there.is_dir() or not os.access(there, os.W_OK):
        what = "a folder without permission to write" if there.is_dir() else "a file"
        raise ValueError(f"{option} {output} cannot be written: {there} is {what}; give another name")
