"""What ``ldlm generate`` does: texts from noise, streamed to the terminal or to a file.

In: a checkpoint, an exported folder or a hub id. Out: texts on standard output, or JSON lines in a file.
Paper: section 4.3 (sampling) and App. C: neither token encoder nor latent encoder is used.
"""

import difflib
import json
import logging
from contextlib import ExitStack
from pathlib import Path
from typing import Any, BinaryIO

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
    Sampler,
    TimeGrid,
    UniformGrid,
)

SAMPLERS = (EulerMaruyama, Ancestral, DDIM, DPMSolver2M)
GRIDS = (UniformGrid, LogSNRGrid, AdaptedGrid)


def load(source: str) -> LDLM:
    """A model from a ``.ckpt`` file, an exported folder or a hub id."""
    if source.endswith(".ckpt") or Path(source).is_file():
        return LDLM.load_from_checkpoint(source)
    return LDLM.from_pretrained(source)


def named(name: str | None, known: tuple[type, ...]) -> Any:
    """A sampler or grid by the name of its class, with its defaults; None for None.

    Raises:
        ValueError: If there is none of that name.
    """
    if name is None:
        return None
    kinds = {kind.__name__: kind for kind in known}
    if name not in kinds:
        close = difflib.get_close_matches(name, kinds, n=1)
        raise ValueError(
            f"there is no {name!r} among {', '.join(kinds)}" + (f"; did you mean {close[0]}?" if close else "")
        )
    return kinds[name]()


def write_texts(
    source: str,
    num_samples: int,
    nfe: int,
    seed: int,
    batch_size: int,
    temperature: float,
    sampler: str | None,
    grid: str | None,
    output: str | None,
    device: str | None,
    bf16: bool,
) -> None:
    """Generate texts and write each batch as soon as it is there.

    Args:
        source: Checkpoint, exported folder or hub id.
        num_samples: Texts.
        nfe: Calls of the denoiser per text.
        seed: Of the noise.
        batch_size: Rows sampled together.
        temperature: Of the choice of tokens.
        sampler: Class in `ldlm.samplers`; None takes the model's.
        grid: Likewise.
        output: File of JSON lines; None prints. The file appears when it is complete.
        device: Torch device; None takes a GPU if there is one.
        bf16: Whether to compute in bfloat16 autocast.
    """
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    where = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if where.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"--device {device}: this PyTorch sees no GPU; use --device cpu")
    solver: Sampler | None = named(sampler, SAMPLERS)
    times: TimeGrid | None = named(grid, GRIDS)
    model = load(source).to(where)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with ExitStack() as stack:
        file = stack.enter_context(write_atomically(output)) if output else None
        bar = stack.enter_context(Progress(*columns, console=Console(stderr=True), transient=True))
        stack.enter_context(torch.autocast(where.type, torch.bfloat16, enabled=bf16))
        task = bar.add_task("denoiser calls", total=-(-num_samples // batch_size) * nfe)
        written = 0
        for tokens in model.sample_batches(
            num_samples, nfe, solver, times, seed, batch_size, temperature, lambda _: bar.advance(task)
        ):
            for text in model.to_text(tokens):
                emit(text, written, file)
                written += 1
    if output:
        print(f"{written} texts are in {output}")


def emit(text: str, number: int, file: BinaryIO | None) -> None:
    """One text, as a JSON line of a file or as a paragraph on standard output."""
    if file is None:
        print(f"[{number}] {text}\n", flush=True)
    else:
        file.write((json.dumps({"index": number, "text": text}, ensure_ascii=False) + "\n").encode())
