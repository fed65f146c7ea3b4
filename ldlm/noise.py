"""Random numbers as functions of what they are for, and the rows of a global batch that one call gets.

In: a seed and a key such as ("noise", step). Out: a `torch.Generator`, one for each row, numbers, or a slice of rows.
Everything is a function of its key, so a resumed run draws what the uninterrupted one would have drawn, and a row of a
global batch gets the same noise on any rank and in any accumulated batch. No section of the paper.
"""

import hashlib
import json
from collections.abc import Callable

import torch
from torch import Tensor


def generator(seed: int, *key: int | str, device: torch.device | str = "cpu") -> torch.Generator:
    """Make a generator whose stream is a pure function of `(seed, *key)` and of the device's kind.

    The 64-bit seed is a BLAKE2b digest, so neighbouring keys give unrelated streams. (PyTorch's CPU generator uses the
    low 32 of these bits, its CUDA generator all 64.)

    Args:
        seed: the run's seed.
        *key: what the numbers are for; 1 and "1" are different keys.
        device: where the numbers will be drawn.

    Returns:
        A fresh generator on `device`.
    """
    digest = hashlib.blake2b(json.dumps([seed, *key]).encode(), digest_size=8).digest()
    return torch.Generator(device).manual_seed(int.from_bytes(digest, "little"))


class RowNoise:
    """The random numbers of some rows of a global batch: a generator for each row, keyed by the row's index.

    What a row is given then depends neither on the number of ranks nor on how a batch is split into calls.

    Args:
        seed: the run's seed.
        *key: what the numbers are for.
        rows: indices in the global batch.
        total: rows of the global batch; None for rows that follow each other without end, as in a validation.
        device: where the numbers are drawn.
    """

    def __init__(
        self, seed: int, *key: int | str, rows: range, total: int | None = None, device: torch.device | str = "cpu"
    ) -> None:
        self.rows, self.total = rows, total
        self.device = torch.device(device)
        self.generators = [generator(seed, *key, row, device=device) for row in rows]


Source = torch.Generator | RowNoise


def normal(shape: tuple[int, ...], source: Source, dtype: torch.dtype = torch.float32) -> Tensor:
    """Standard normal numbers [b ...] on the source's device; row i comes from the i-th generator of a `RowNoise`."""
    return _filled(shape, source, dtype, torch.Tensor.normal_)


def uniform(shape: tuple[int, ...], source: Source, dtype: torch.dtype = torch.float32) -> Tensor:
    """Numbers in [0, 1), else as `normal`."""
    return _filled(shape, source, dtype, torch.Tensor.uniform_)


def _filled(shape: tuple[int, ...], source: Source, dtype: torch.dtype, fill: Callable[..., Tensor]) -> Tensor:
    numbers = torch.empty(shape, dtype=dtype, device=source.device)
    if isinstance(source, torch.Generator):
        return fill(numbers, generator=source)
    for row, own in zip(numbers, source.generators, strict=True):
        fill(row, generator=own)
    return numbers


def share(rows: int, rank: int, world_size: int, micro_step: int, micro_steps: int) -> slice:
    """Say which contiguous rows of the global batch one call gets.

    Calls are numbered micro-step first, call = micro_step · world_size + rank, and call c gets rows
    [c·k, (c + 1)·k) with k = rows / (world_size · micro_steps).

    Args:
        rows: rows of the global batch, that is of one optimizer step over all ranks.
        rank: this process, in [0, world_size).
        world_size: number of processes.
        micro_step: this call of the optimizer step, in [0, micro_steps).
        micro_steps: calls per optimizer step (gradient accumulation).

    Returns:
        The slice of the global batch.

    Raises:
        ValueError: the rows do not divide evenly, or a rank or micro-step is out of range.

    >>> share(12, rank=1, world_size=2, micro_step=1, micro_steps=3)
    slice(6, 8, None)
    """
    if not (0 <= rank < world_size and 0 <= micro_step < micro_steps):
        raise ValueError(
            f"rank={rank} of world_size={world_size} and micro_step={micro_step} of micro_steps={micro_steps}: "
            "each must count from 0 and lie below its total"
        )
    calls = world_size * micro_steps
    if rows < 1 or rows % calls:
        raise ValueError(
            f"batch_size={rows} rows per optimizer step do not divide evenly over {world_size} ranks x {micro_steps} "
            f"accumulated batches; make batch_size a multiple of {calls}"
        )
    size = rows // calls
    start = (micro_step * world_size + rank) * size
    return slice(start, start + size)
