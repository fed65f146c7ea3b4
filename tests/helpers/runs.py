"""Runs in processes of their own, and what they leave compared."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from helpers import ROOT


def run(*runs: dict[str, Any]) -> None:
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, sys.path)])}
    done = subprocess.run(
        [sys.executable, str(ROOT / "tests/helpers/fit.py"), json.dumps(runs)],
        capture_output=True,
        text=True,
        env=environment,
        timeout=900,
    )
    assert done.returncode == 0, done.stderr[-3000:]


def differences(first: Any, second: Any, name: str = "") -> list[str]:
    """Where two nested states differ."""
    if isinstance(first, Tensor):
        return [] if torch.equal(first, second) else [name]
    if isinstance(first, dict):
        if first.keys() != second.keys():
            return [f"{name}: {first.keys() ^ second.keys()}"]
        return [d for key in first for d in differences(first[key], second[key], f"{name}.{key}")]
    if isinstance(first, list | tuple):
        pairs = zip(first, second, strict=True)
        return [d for index, (one, other) in enumerate(pairs) for d in differences(one, other, f"{name}.{index}")]
    return [] if first == second else [f"{name}: {first} {second}"]


def assert_same_run(whole: Path, rest: Path, start: int, end: int) -> None:
    """All checkpoints and losses of the steps after `start` are the same."""
    for step in range(start + 1, end + 1):
        one, other = (torch.load(folder / f"step={step}.ckpt", weights_only=True) for folder in (whole, rest))
        for key in ("state_dict", "raw_parameters", "optimizer_states", "lr_schedulers", "global_step", "epoch"):
            assert differences(one[key], other[key], key) == []
    lines, again = (
        [line for line in (folder / "losses.txt").read_text().splitlines() if start < int(line.split()[0]) <= end]
        for folder in (whole, rest)
    )
    assert lines == again != []
