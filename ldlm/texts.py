"""What ``ldlm generate`` does: texts from noise, streamed to the terminal or to a file.

In: a checkpoint, an exported folder or a hub id. Out: texts on standard output, or JSON lines in a file.
Paper: section 4.3 (sampling) and App. C: neither token encoder nor latent encoder is used.
"""

import argparse
import difflib
import json
import logging
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from ldlm.files import write_atomically
from ldlm.module import LDLM
from ldlm.samplers import (
    DDIM,
    AdaptedGrid,
    Ancestral,
    DPMSolver2M,
    EulerMaruyama,
    LogSNRGrid,
    MixedGrid,
    Sampler,
    TimeGrid,
    UniformGrid,
)

SAMPLERS = (EulerMaruyama, Ancestral, DDIM, DPMSolver2M)
GRIDS = (UniformGrid, LogSNRGrid, AdaptedGrid, MixedGrid)


def load(source: str) -> LDLM:
    """A model from a ``.ckpt`` file, an exported folder or a hub id."""
    if source.endswith(".ckpt") or Path(source).is_file():
        return LDLM.load_from_checkpoint(source)
    return LDLM.from_pretrained(source)


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


def write_texts(options: argparse.Namespace) -> None:
    """Generate texts and write each batch as soon as it is there.

    Args:
        options: The command's, by the names that ``ldlm generate --help`` shows.
    """
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    device = find_device(options.device)
    if options.output and Path(options.output).is_dir():
        raise ValueError(f"--output {options.output} is a folder; give the name of a file in it")
    sampler: Sampler | None = named(options.sampler, SAMPLERS)
    grid: TimeGrid | None = named(options.grid, GRIDS)
    model = load(options.checkpoint).to(device)
    count, size, nfe = options.num_samples, options.batch_size, options.nfe
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with ExitStack() as stack:
        # The file appears under its name when it is complete.
        file = stack.enter_context(write_atomically(options.output)) if options.output else None
        bar = stack.enter_context(Progress(*columns, console=Console(stderr=True), transient=True))
        stack.enter_context(torch.autocast(device.type, torch.bfloat16, enabled=options.precision == "bf16"))
        task = bar.add_task("denoiser calls", total=-(-count // size) * nfe)
        batches = model.sample_batches(
            count, nfe, sampler, grid, options.seed, size, options.temperature, lambda _: bar.advance(task)
        )
        for number, text in enumerate(text for tokens in batches for text in model.to_text(tokens)):
            if file is None:
                print(f"[{number}] {text}\n", flush=True)
            else:
                file.write((json.dumps({"index": number, "text": text}, ensure_ascii=False) + "\n").encode())
    if options.output:
        print(f"{count} texts are in {options.output}")
