"""Running a cell of a study: each of its commands as a process of its own.

In: a cell, a device or some cores. Out: a JSON file with its settings, scores, loss curves, time and versions.
Paper: the rows of Tables 1, 2 and 4-7; Fig. 3 (curves).

What is finished has a JSON file, and is never run again nor overwritten; what was interrupted goes on from its last
checkpoint.
"""

import fcntl
import json
import os
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from itertools import zip_longest
from pathlib import Path
from typing import IO, Any

import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from ldlm._files import write_atomically
from ldlm.evaluation.environment import device_name, versions
from ldlm.studies.plan import Cell, checkpoint

CURVES = ("train/diffusion", "train/reconstruction", "train/token", "train/latent_std", "train/gamma")
MEASURED = tuple(
    f"validation/{name}"
    for name in ("accuracy", "accuracy_noised", "reconstruction", "diffusion", "token_bound", "token_bound_error")
)
CURVE_POINTS = 200


class Slot:
    """A device, or some cores, on which one command runs at a time.

    Args:
        environment: Of the processes.
        tell: Prints a line.
        failed: Titles of the cells whose training has failed, shared by the slots of a study.
        imports: Modules that each command is to import first, as ``--import`` names them.
    """

    def __init__(
        self, environment: dict[str, str], tell: Callable[[str], None], failed: set[str], imports: Sequence[str] = ()
    ) -> None:
        self.environment = environment
        self.imports = imports
        self.tell = tell
        self.failed = failed
        self.process: subprocess.Popen[bytes] | None = None
        self._stopped, self._starting = False, threading.Lock()

    def run(self, words: list[str], log: IO[str], locks: Sequence[int]) -> int:
        """Run a process to its end, which holds these locks too; its exit status. Nothing starts after `stop`."""
        with self._starting:
            if self._stopped:
                return -signal.SIGTERM
            self.process = subprocess.Popen(words, stdout=log, stderr=log, env=self.environment, pass_fds=locks)
        return self.process.wait()

    def stop(self) -> None:
        """End the process that is running, if any, and start no other."""
        with self._starting:
            self._stopped = True
            if self.process is not None and self.process.poll() is None:
                self.process.terminate()


def claim(path: Path, wait: bool) -> int:
    """Lock a file, made if need be; its descriptor, which is the lock until `os.close`.

    The system frees the lock when the last process that has the descriptor ends: a training that outlives its killed
    study keeps others out of its folder.

    Raises:
        BlockingIOError: If somebody has the lock and ``wait`` is false.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        raise
    return descriptor


def finished(cell: Cell) -> dict[str, Any] | None:
    """What an earlier run found for a cell, None if it is not finished.

    Raises:
        ValueError: If it was run with other settings.
    """
    if not cell.result.is_file():
        return None
    found: dict[str, Any] = json.loads(cell.result.read_text(encoding="utf-8"))
    compare(found["settings"], cell.settings(), cell, cell.result)
    return found


def compare(found: dict[str, Any], wanted: dict[str, Any], cell: Cell, file: Path) -> None:
    """ValueError if the settings that a file was made with are not the cell's."""
    for key, value in wanted.items():
        if found.get(key) != value:
            was, now = found.get(key), value
            if key == "commands":  # the first word that differs says it
                words = zip_longest(*(shlex.split(" ".join(commands)) for commands in (was or [], now)))
                was, now = next((pair for pair in words if pair[0] != pair[1]), (was, now))
            raise ValueError(
                f"{file} holds the cell {cell.title}, run with other settings: of its {key}, {was} is now {now}; "
                "finished cells are not overwritten: give another --output and --work, or remove the file"
            )


def run_cell(cell: Cell, slot: Slot, lock: int) -> None:
    """Train, sample and score one cell, and write its JSON.

    Args:
        cell: The cell.
        slot: Where it runs.
        lock: The descriptor that keeps others out of its folder.

    Raises:
        ValueError: If a command fails; the sentence is the command's own.
    """
    seconds = {"fit": fit(cell, slot, [lock])}
    if cell.fit_only:
        return
    for command in cell.commands[1:]:
        seconds[command[0]] = execute(cell, command, slot, [lock])
    accumulator = EventAccumulator(str(cell.work / "fit"), size_guidance={"scalars": 0})
    accumulator.Reload()
    there = accumulator.Tags()["scalars"]
    curves = {}
    for name in CURVES:
        events = accumulator.Scalars(name) if name in there else []
        last = sorted({event.step: event.value for event in events}.items())  # a resumed run did some steps twice
        kept = last[:: max(1, len(last) // CURVE_POINTS)]
        curves[name.removeprefix("train/")] = [[step, round(value, 5)] for step, value in kept]
    result = {
        "cell": cell.name,
        "seed": cell.seed,
        "settings": cell.settings(),
        "seconds": seconds,
        "versions": versions(),
        "device": device_name(torch.device("cuda" if torch.cuda.is_available() else "cpu")),
        "threads": slot.environment.get("OMP_NUM_THREADS"),
        "validation": {name: accumulator.Scalars(name)[-1].value for name in MEASURED if name in there},
        "scores": json.loads((cell.work / "scores.json").read_text(encoding="utf-8")),
        "curves": curves,
    }
    with write_atomically(cell.result) as file:
        file.write((json.dumps(result, indent=1) + "\n").encode())


def fit(cell: Cell, slot: Slot, locks: list[int]) -> float:
    """Train a cell, after the one it starts from, or do nothing if it is trained; the seconds of all attempts."""
    if cell.needs is not None:
        fit(cell.needs, slot, locks)
    lock = claim(cell.work / "fit.lock", wait=True)  # two cells may start from this one
    try:
        note, wanted = cell.work / "fit.json", cell.settings(fit_only=True)
        state: dict[str, Any] = {"settings": wanted, "attempts": [], "done": False}
        if note.is_file():
            state = json.loads(note.read_text(encoding="utf-8"))
            compare(state["settings"], wanted, cell, note)
        if cell.title in slot.failed:  # those that start from this one need not find that out each
            raise ValueError(f"{cell.title}, which this cell starts from, has failed")
        if not state["done"]:
            _write(note, state)
            last = checkpoint(cell.work)
            resume = ("--ckpt_path", str(last)) if last.is_file() else ()
            start = time.monotonic()
            try:
                execute(cell, (*cell.commands[0], *resume), slot, [*locks, lock])
                # Lightning numbers its last checkpoint anew where a run was resumed under another name of its folder.
                for newer in sorted(last.parent.glob("last-v*.ckpt"), key=os.path.getmtime):
                    os.replace(newer, last)
                state["done"] = True
            except ValueError:
                slot.failed.add(cell.title)
                raise
            finally:
                state["attempts"].append(round(time.monotonic() - start, 1))
                _write(note, state)
        return float(sum(state["attempts"]))
    finally:
        os.close(lock)


def _write(path: Path, content: dict[str, Any]) -> None:
    with write_atomically(path) as file:
        file.write((json.dumps(content, indent=1) + "\n").encode())


def execute(cell: Cell, command: tuple[str, ...], slot: Slot, locks: list[int]) -> float:
    """Run one ``ldlm`` command, its output in a log file; the seconds it took."""
    origin = str(cell.needs.work) if cell.needs else ""
    words = [word.replace("WORK", str(cell.work)).replace("FROM", origin) for word in command]
    imports = [word for name in slot.imports for word in ("--import", name)]
    log = cell.work / f"{command[0]}.log"
    start = time.monotonic()
    with log.open("a", encoding="utf-8") as file:
        status = slot.run([sys.executable, "-P", "-m", "ldlm", *imports, *words], file, locks)
    seconds = time.monotonic() - start
    if status != 0:
        lines = [line for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
        raise ValueError(f"{command[0]} ended with status {status} ({lines[-1] if lines else 'silent'}); see {log}")
    slot.tell(f"{cell.title}: {command[0]} took {seconds:.0f} s")
    return round(seconds, 1)
