"""What ``ldlm study`` does: the cells of one of the paper's tables trained, sampled, scored and put side by side.

In: a study, a scale, how many seeds. Out: a JSON file a cell, one Markdown table, figures.
Paper: Tables 1, 2, 4-7, Fig. 3 and Fig. 4.

Cells run side by side, one a GPU, or one for so many cores. One that fails is told of and does not stop the others.
"""

import argparse
import importlib.util
import os
import re
import signal
import sys
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from queue import Queue
from typing import Any, NoReturn

import torch
from rich.console import Console
from rich.text import Text

from ldlm._files import visible
from ldlm.hub import local_folder, resolve
from ldlm.presets import nearest
from ldlm.studies.plan import SCALES, Cell, find_study, plan
from ldlm.studies.run import Slot, claim, finished, run_cell
from ldlm.studies.summary import write_summary


def run_study(options: argparse.Namespace) -> None:
    """Run what is not finished, and write the table of what is.

    Raises:
        ValueError: If the study, a cell or a recipe does not exist, a finished cell was run with other settings, or a
            cell is being run by another process.
        SystemExit: With status 1 if a cell failed, 130 if the study was interrupted, 143 after SIGTERM.
    """
    console = Console(stderr=True, highlight=False)

    def tell(line: str) -> None:
        console.print(Text(visible(line)), soft_wrap=True)

    study = find_study(options.name)
    label = f"{Path(options.name).stem}-{options.scale}"
    output, work = Path(options.output) / label, Path(options.work) / label
    before = [int(found[1]) for path in output.glob("*.json") if (found := re.search(r"-seed(\d+)\.json$", path.name))]
    seeds = max([options.seeds, *(seed + 1 for seed in before)])
    cells = plan(study, options.scale, seeds, output, work, options.config)
    for name in options.only or []:
        if name not in study["cells"]:
            raise ValueError(f"--only {name}: the study has no such cell{nearest(name, [*study['cells']])}")
        if study["cells"][name].get("fit_only"):
            raise ValueError(f"--only {name}: this cell is trained for others alone, and with them; name one of those")
    chosen = [cell for cell in cells if cell.seed < options.seeds and (not options.only or cell.name in options.only)]
    unfinished = [
        cell for cell in cells if not cell.fit_only and finished(cell) is None
    ]  # all: now, not after training
    pending = [cell for cell in chosen if cell in unfinished]
    if pending:
        check_instruments(SCALES[options.scale].scorer)
    output.mkdir(parents=True, exist_ok=True)
    locks = {cell.title: _claim(cell) for cell in pending}
    slots = make_slots(options.jobs, options.threads, tell, options.imports)
    tell(f"{label}: {len(pending)} cells to run, {len(slots)} at a time; logs are in {work}")
    failed, interrupted = run_all(pending, slots, locks)
    for lock in locks.values():
        os.close(lock)

    results = [result for cell in cells if (result := finished(cell)) is not None]
    write_summary(study, label, results, failed, output)
    for title, reason in failed.items():
        tell(f"{title} failed: {reason}")
    tell(f"{len(results)} finished cells are in {output}/table.md")
    if failed or interrupted:
        raise SystemExit(interrupted or 1)


def check_instruments(scorer: str) -> None:
    """Fetch the scorer and look for MAUVE before hours of training, not after them; ValueError if one is missing."""
    if importlib.util.find_spec("mauve") is None:
        raise ValueError('a study computes MAUVE, which needs mauve-text: pip install "ldlm[eval]"')
    if scorer.endswith(".gguf"):
        if importlib.util.find_spec("gguf") is None:
            raise ValueError(f'the scorer {scorer} needs gguf and accelerate: pip install "ldlm[eval]"')
        resolve(scorer)
    else:
        local_folder(scorer, None, "*.json", "*.txt", "*.model", "*.safetensors")


def _claim(cell: Cell) -> int:
    """Keep other processes from the cell's files."""
    try:
        return claim(cell.work / "cell.lock", wait=False)
    except BlockingIOError:
        raise ValueError(
            f"{cell.work} is being written by another ldlm study: wait for it, or give another --work and --output"
        ) from None


def make_slots(jobs: int | None, threads: int | None, tell: Any, imports: Sequence[str] = ()) -> list[Slot]:
    """One slot a GPU; without GPUs, one for every so many cores.

    Args:
        jobs: How many at most; None for as many as there are.
        threads: Threads a cell on a CPU; None for one, with which small models make the most of a core.
        tell: Prints a line.
        imports: Modules that each command imports first.
    """
    failed: set[str] = set()
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    devices = visible.split(",") if visible else [str(index) for index in range(torch.cuda.device_count())]
    if torch.cuda.is_available():
        return [Slot(os.environ | {"CUDA_VISIBLE_DEVICES": device}, tell, failed, imports) for device in devices[:jobs]]
    per_cell = 1 if threads is None else threads
    cores = len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1
    count = max(1, cores // per_cell) if jobs is None else jobs
    return [Slot(os.environ | {"OMP_NUM_THREADS": str(per_cell)}, tell, failed, imports) for _ in range(count)]


def run_all(cells: list[Cell], slots: list[Slot], locks: dict[str, int]) -> tuple[dict[str, str], int]:
    """Run cells on slots, locks given by title; why those that failed did, and the status of an interrupt or 0."""
    free: Queue[Slot] = Queue()
    for slot in slots:
        free.put(slot)

    def one(cell: Cell) -> None:
        slot = free.get()
        try:
            run_cell(cell, slot, locks[cell.title])
        finally:
            free.put(slot)

    numbers = [int(signal.SIGINT)]

    def interrupt(number: int, frame: Any) -> NoReturn:
        numbers.append(number)
        raise KeyboardInterrupt

    failed: dict[str, str] = {}
    usual = signal.signal(signal.SIGTERM, interrupt)
    executor = ThreadPoolExecutor(len(slots))
    futures: list[tuple[Cell, Future[None]]] = [(cell, executor.submit(one, cell)) for cell in cells]
    try:
        for cell, future in futures:
            error = future.exception()
            if error is not None:
                failed[cell.title] = " ".join(str(error).split())
    except KeyboardInterrupt:
        executor.shutdown(wait=False, cancel_futures=True)
        for slot in slots:
            slot.stop()
        executor.shutdown()
        return failed, 128 + numbers[-1]  # finished cells are kept, and the same command goes on
    finally:
        signal.signal(signal.SIGTERM, usual)
    return failed, 0
