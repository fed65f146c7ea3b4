"""A small study, and somebody else who does the work of its commands."""

import json
import re
import sys
import threading
import time
from pathlib import Path
from typing import Any

from torch.utils.tensorboard import SummaryWriter

from ldlm.studies.run import Slot

PERPLEXITY = {"a": [100.0, 110.0], "b": [50.0, 54.0], "c": [20.0, 22.0], "d": [30.0, 31.0]}
SMALL = {
    "published": "nowhere",
    "base": {"laptop": []},
    "cells": {
        "a": {"laptop": ["--model.sigma_dec=2"]},
        "b": {"configs": ["mine.yaml"]},
        "first": {"fit_only": True},
        "c": {"from": {"cell": "first", "option": "--latents"}},
        "d": {"from": {"cell": "first", "option": "--latents"}},
    },
    "tables": {
        "Block": {
            "row a": {"cell": "a", "perplexity": [100.0, 1.0]},
            "row b": {"cell": "b", "perplexity": [50.0, 1.0]},
            "row c": {"cell": "c"},
            "row d": {"cell": "d"},
        }
    },
    "curves": {"run a": "a"},
}


def scores(values: list[float]) -> dict[str, Any]:
    """What ldlm evaluate writes, of which the study reads a part."""
    of = {"mean": sum(values) / len(values), "std": None, "per_seed": values, "interval_95": [0.0, 1.0]}
    rest = {
        "entropy": {"per_seed": [4.0, 4.2]},
        "diversity": {"per_seed": [0.5, 0.6]},
        "mauve": {"per_seed": [0.8, 0.9]},
    }
    return {
        "perplexity": of,
        **rest,
        "texts": 256,
        "reference": {"perplexity": {"mean": 25.0}, "entropy": {"mean": 4.3}},
    }


class FakeSlot(Slot):
    """Writes the files that the commands would write."""

    def __init__(self, hub: "Hub", failed: set[str]) -> None:
        super().__init__({"OMP_NUM_THREADS": "1"}, hub.told.append, failed)
        self.hub = hub

    def run(self, words, log, locks):
        assert words[:4] == [sys.executable, "-P", "-m", "ldlm"]
        command = words[4:]
        work = Path(log.name).parent
        cell, seed = re.fullmatch(r"(.+)-seed(\d+)", work.name).groups()
        with self.hub.lock:
            self.hub.calls.append((cell, int(seed), command))
        last = work / "fit" / "checkpoints" / "last.ckpt"
        if command[0] == "fit":
            assert command[command.index("--trainer.logger.save_dir") + 1] == str(work)
            if "--latents" in command:
                assert Path(command[command.index("--latents") + 1]).is_file()
            last.parent.mkdir(parents=True, exist_ok=True)
            if cell in self.hub.killed:
                last.write_text("half")
                return -9
            time.sleep(self.hub.seconds)
            with SummaryWriter(str(work / "fit")) as writer:
                for step in range(3):
                    writer.add_scalar("train/diffusion", 1.0 / (step + 1), step)
                    writer.add_scalar("train/latent_std", 0.5 * step, step)
                writer.add_scalar("validation/accuracy", 0.75, 3)
            last.write_text("whole")
        elif command[0] == "predict":
            assert last.read_text() == "whole"
            Path(command[command.index("--output") + 1]).write_text('{"text": "real"}\n')
        else:
            if cell in self.hub.broken:
                log.write("ldlm: the sky fell\n")
                return 2
            assert (work / "real.jsonl").is_file()
            Path(command[command.index("--output") + 1]).write_text(json.dumps(scores(PERPLEXITY[cell])))
        return 0


class Hub:
    """What the fake slots share."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, int, list[str]]] = []
        self.told: list[str] = []
        self.lock = threading.Lock()
        self.killed: set[str] = set()
        self.broken: set[str] = set()
        self.seconds = 0.0
        self.slots = 2

    def fits(self) -> list[str]:
        return sorted(cell for cell, _, command in self.calls if command[0] == "fit")


STUDY = ("study", "small.yaml", "--scale", "laptop", "--output", "out", "--work", "work")
OUT = Path("out/small-laptop")


def result(name: str) -> dict[str, Any]:
    return json.loads((OUT / f"{name}-seed0.json").read_text())
