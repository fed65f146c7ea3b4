"""Rows read from a flat file of tokens, and the order in which ranks and steps get them.

In: the path of packed tokens and a row length; a seed and an optimizer step. Out: int64 tokens [n] or [b n]; indices.
App. C: fixed-length chunks of one stream without padding ("Data preprocessing"), batches of 512 rows ("Optimization"),
here over all devices. The order has no state: it is a pure function of (seed, step), so a run goes on from any step and
on any number of ranks.
"""

import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad
from torch.utils.data import DataLoader, Dataset, DistributedSampler

from ldlm.rng import generator


class PackedRows(Dataset[Tensor]):
    """Rows of a packed file: row i is [BOS] + stream[i(n-2) : (i+1)(n-2)] + [EOS], or n bare tokens of the stream.

    The file is mapped on first use and again in each loader worker; pickling carries only its path.

    Args:
        path: the `.bin`.
        dtype: `uint16` or `uint32`, as its header says.
        tokens: how many it holds.
        sequence_length: n.
        frame: (BOS, EOS) to put around each row, None for none.
        limit: keep only so many rows, spread evenly over the file.

    Raises:
        ValueError: the file holds less than one row.
    """

    def __init__(
        self,
        path: str | Path,
        dtype: str,
        tokens: int,
        sequence_length: int,
        frame: tuple[int, int] | None,
        limit: int | None = None,
    ) -> None:
        self.path, self.dtype, self.tokens = Path(path), dtype, tokens
        self.sequence_length, self.frame = sequence_length, frame
        self.body = sequence_length - (2 if frame else 0)
        self.rows = tokens // self.body  # what is left at the very end is shorter than a row and unused
        if self.rows == 0:
            raise ValueError(
                f"{self.path.name} holds {tokens} tokens, but one row of sequence_length={sequence_length} needs "
                f"{self.body}; give more text or shorter rows; if this is the validation part, hold out more, "
                "or make more documents of a .txt file: one a paragraph, or one a line with text_unit='line'"
            )
        self.found = self.rows
        if limit is not None:
            self.rows = min(self.rows, limit)
        self._stream: np.ndarray[Any, Any] | None = None

    def __len__(self) -> int:
        """Count the rows."""
        return self.rows

    def __getitem__(self, index: int | list[int]) -> Tensor:
        """Return row `index` as [n] int64, or the rows of a list of indices as [b n]."""
        if self._stream is None:
            self._stream = np.memmap(self.path, np.dtype(self.dtype).newbyteorder("<"), "r", shape=(self.tokens,))
        chosen = np.asarray(index, dtype=np.int64)
        if chosen.size and (chosen.min() < 0 or chosen.max() >= self.rows):
            raise IndexError(f"row index {index} is outside [0, {self.rows})")
        within = self._stream[: self.tokens // self.body * self.body].reshape(-1, self.body)
        rows = torch.from_numpy(within[chosen * self.found // self.rows].astype(np.int64))
        if self.frame is None:
            return rows
        begin, end = self.frame
        return pad(pad(rows, (1, 0), value=begin), (0, 1), value=end)

    def __getstate__(self) -> dict[str, Any]:
        """Leave the mapped file behind, or pickling would copy it whole."""
        return {**self.__dict__, "_stream": None}


class ShuffledOrder:
    """Which rows each optimizer step trains on: position g of the endless order is row permutation_{g // R}[g mod R].

    Step s takes positions [s·B, (s + 1)·B) of it, whatever ran before and however the batch is divided. The permutation
    of an epoch depends on (seed, epoch) alone. With R < B a batch wraps around and repeats rows.

    Args:
        rows: R, rows of the data set.
        batch_size: B, rows of a global batch.
        seed: of the order.
    """

    def __init__(self, rows: int, batch_size: int, seed: int) -> None:
        self.rows, self.batch_size, self.seed = rows, batch_size, seed
        self._epoch, self._permutation = -1, torch.empty(0, dtype=torch.int64)

    def batch(self, step: int) -> list[int]:
        """Return the row indices of the global batch of optimizer step `step`, counted from 0."""
        indices: list[int] = []
        position = step * self.batch_size
        while len(indices) < self.batch_size:
            epoch, inside = divmod(position, self.rows)
            if epoch != self._epoch:  # kept until the next epoch: 70M rows take seconds to permute
                order = generator(self.seed, "order", epoch)
                self._epoch, self._permutation = epoch, torch.randperm(self.rows, generator=order)
            taken = self._permutation[inside : inside + self.batch_size - len(indices)].tolist()
            indices += taken
            position += len(taken)
        return indices


class ShuffledRows(DistributedSampler[list[int]]):
    """Give this rank's index lists, one for each training call, from the step at which training stands.

    It is a `DistributedSampler` so that Lightning leaves it alone. It has no state: when iteration begins, it asks
    `step` how many optimizer steps are done and gives as many calls as a whole epoch has from there on, across the end
    of the permutation. Lightning takes of them what its own progress has not counted yet, so a resumed run goes on in
    mid-epoch, and epochs that `limit_train_batches` makes shorter follow each other without a gap.

    Args:
        dataset: the rows.
        order: which of them each step takes.
        step: returns the number of optimizer steps done.
        rank: this process.
        world_size: number of processes.
        micro_steps: calls per optimizer step.
    """

    def __init__(
        self,
        dataset: PackedRows,
        order: ShuffledOrder,
        step: Callable[[], int],
        rank: int = 0,
        world_size: int = 1,
        micro_steps: int = 1,
    ) -> None:
        super().__init__(dataset, num_replicas=world_size, rank=rank, shuffle=False)
        batch_slice(order.batch_size, rank, world_size, 0, micro_steps)  # an uneven division is refused at once
        self.order, self.step, self.micro_steps = order, step, micro_steps
        self.steps_per_epoch = max(1, len(dataset) // order.batch_size)

    def __len__(self) -> int:
        """Count the calls of a whole epoch."""
        return self.steps_per_epoch * self.micro_steps

    def __iter__(self) -> Iterator[list[int]]:
        """Give the index lists from the current step on."""
        first = self.step()
        for step in range(first, first + self.steps_per_epoch):
            batch = self.order.batch(step)
            for micro_step in range(self.micro_steps):
                yield batch[batch_slice(len(batch), self.rank, self.num_replicas, micro_step, self.micro_steps)]


class RowsInOrder(DistributedSampler[list[int]]):
    """Give this rank's index lists for evaluation: every row once, in order.

    The last batch may be smaller; it is divided as `torch.tensor_split` does, so each rank gets equally many lists and
    some may be empty: a row given twice to fill them would count twice in a metric.

    Args:
        dataset: the rows.
        batch_size: rows of a batch over all ranks.
        rank: this process.
        world_size: number of processes.
    """

    def __init__(self, dataset: PackedRows, batch_size: int, rank: int = 0, world_size: int = 1) -> None:
        super().__init__(dataset, num_replicas=world_size, rank=rank, shuffle=False)
        self.rows, self.batch_size = len(dataset), batch_size

    def __len__(self) -> int:
        """Count the batches, the same on every rank."""
        return -(-self.rows // self.batch_size)

    def __iter__(self) -> Iterator[list[int]]:
        """Give the index lists from the first row to the last."""
        for start in range(0, self.rows, self.batch_size):
            batch = torch.arange(start, min(start + self.batch_size, self.rows))
            yield batch.tensor_split(self.num_replicas)[self.rank].tolist()


class ResumableLoader(DataLoader[Tensor]):
    """A loader with nothing to save, which says so: Lightning warns of any other when it resumes in mid-epoch."""

    def state_dict(self) -> dict[str, Any]:
        """Return nothing: where to go on follows from the optimizer step."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take nothing."""


def outlive_signals(worker: int) -> None:
    """Let a loader process live on while the run it works for saves: SLURM signals all processes of a step alike."""
    for name in {"SIGTERM", "SIGUSR1"} & signal.Signals.__members__.keys():
        # A loader that is really to end has ten minutes, after which SIGALRM ends it.
        signal.signal(signal.Signals[name], lambda *_: signal.alarm(600))


def batch_slice(rows: int, rank: int, world_size: int, micro_step: int, micro_steps: int) -> slice:
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

    >>> batch_slice(12, rank=1, world_size=2, micro_step=1, micro_steps=3)
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
