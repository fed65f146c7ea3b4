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
