"""Hidden states of a small corpus, computed once and read from disk ever after.

In: a Trainer with a `PackedTextDataModule`, its task, whose model has a frozen token encoder. Out: a file beside the
packed tokens, and a token encoder that reads from it.
No section of the paper.
"""

import hashlib
import json
import shutil
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor

from ldlm._files import sweep, verify_blocks, visible, write_atomically
from ldlm.checkpoints.description import describe
from ldlm.data.datamodule import PackedTextDataModule
from ldlm.data.rows import PackedRows
from ldlm.nn.token_encoders import DTYPES, FrozenTokenEncoder, TokenEncoder
from ldlm.training.outputs import model_of
from ldlm.training.preemption import check_signals
from ldlm.training.records import Recorded, tensor_bytes

STATISTICS = ("mean", "std", "statistics_rows")  # of the normalisation, which comes after what is stored
TOKENS = 2**14  # in a batch while the file is written, each of which has a digest


class CacheHiddenStates(Recorded):
    """Computes the frozen encoder's hidden states of all training rows before the first step, once for all runs.

    For small corpora and many epochs: a token takes h numbers, 1,536 bytes at GPT-2's width in bfloat16, so that
    OpenWebText would take 14 TB. Steps find their rows by a digest of the tokens, which on a GPU costs a wait for the
    device in each; rows that are not there, such as validation's, are computed. States are computed in the encoder's
    own dtype, outside the trainer's autocast.

    The file is verified against a SHA-256 for each of its blocks when a machine meets it first, and at each start with
    ``PackedTextDataModule(verify="full")``. Another encoder or corpus has another file; those of earlier ones stay
    until somebody deletes them (NAME-states-KEY.bin, .json and .verified), and the log says how much they take.

    Args:
        folder: Where the file is kept; None for the folder of the packed tokens.
        dtype: float32, bfloat16 or float16; None for the encoder's own, which loses nothing.
        max_gb: Size above which the file is refused, in 10⁹ bytes.

    Raises:
        ValueError: If an argument is out of range. When the fit starts, if the encoder learns, the data are not a
            `PackedTextDataModule`'s, the file was altered, or it would be too large for ``max_gb`` or for the disk.
    """

    def __init__(self, folder: str | None = None, dtype: str | None = None, max_gb: float = 20.0) -> None:
        if dtype not in (None, *DTYPES):
            raise ValueError(f"dtype={dtype!r} is not one of {', '.join(DTYPES)}, or None for the encoder's own")
        if not max_gb > 0:
            raise ValueError(f"max_gb={max_gb} must be above 0")
        self.folder = folder
        self.dtype = dtype
        self.max_gb = max_gb

    def settings(self) -> dict[str, Any]:
        """The dtype in which states are kept, unless it is the encoder's own, which changes nothing."""
        return {} if self.dtype is None else {"dtype": self.dtype}

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """One process of each machine writes the file if it is not there; all of them map it."""
        encoder, data = model_of(pl_module).token_encoder, trainer.datamodule  # type: ignore[attr-defined]
        if any(p.requires_grad for p in encoder.parameters()):
            raise ValueError(f"CacheHiddenStates is for a frozen token encoder, and {type(encoder).__name__} learns")
        if not isinstance(data, PackedTextDataModule):
            raise ValueError("CacheHiddenStates reads the rows of a PackedTextDataModule: give trainer.fit one")
        rows = data.train_dataset
        own = encoder.dtype if isinstance(encoder, FrozenTokenEncoder) else "float32"
        dtype = DTYPES[self.dtype or own]
        shape = (len(rows), rows.sequence_length, encoder.hidden_size)
        size = shape[0] * shape[1] * shape[2] * dtype.itemsize
        folder = Path(self.folder or data.folder)
        key = _key(rows, encoder, dtype)
        path = folder / f"{rows.path.stem}-states-{key[:16]}.bin"
        if not (path.exists() and path.with_suffix(".json").exists()):
            folder.mkdir(parents=True, exist_ok=True)
            free = shutil.disk_usage(folder).free
            if size > min(free, self.max_gb * 1e9):
                raise ValueError(
                    f"the hidden states of {shape[0]:,} rows of {shape[1]} tokens take {size / 1e9:,.3g} GB in "
                    f"{str(dtype).removeprefix('torch.')}, but max_gb={self.max_gb:g} and {free / 1e9:,.3g} GB are "
                    f"free in {folder}{_others(folder, path)}: leave CacheHiddenStates out, or raise max_gb, or name "
                    "another folder"
                )
            if trainer.local_rank == 0:
                rank_zero_info(
                    f"computing the hidden states of {shape[0]:,} rows ({size / 1e9:,.3g} GB) into "
                    f"{visible(path)}{visible(_others(folder, path))}"
                )
                sweep(folder)
                _write(path, key, rows, encoder, dtype, trainer)
        elif trainer.local_rank == 0:
            _verify(path, key, size, _rows_of_batch(rows) * size // len(rows), full=data.verify == "full")
        trainer.strategy.barrier("hidden states")
        states = torch.from_file(str(path), shared=False, size=size // dtype.itemsize, dtype=dtype)
        encoder.stored = StoredStates(states.view(shape), rows, encoder)

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Compute hidden states again."""
        model_of(pl_module).token_encoder.stored = None


class StoredStates:
    """`TokenEncoder.hidden_states` of known rows read from a file, and of others computed.

    Args:
        states: Hidden states of the rows [r n h], mapped.
        rows: The rows, r of n tokens.
        encoder: What computes the others.
    """

    def __init__(self, states: Tensor, rows: PackedRows, encoder: TokenEncoder) -> None:
        self.states, self.encoder = states, encoder
        self.places = {digest: place for place, digest in enumerate(d for t in _batches(rows) for d in _digests(t))}

    def __call__(self, tokens: Tensor) -> Tensor:
        """Token ids [b n] -> raw hidden states [b n h], in the file's dtype or the encoder's."""
        places = [self.places.get(digest, -1) for digest in _digests(tokens)]
        return self.encoder.hidden_states(tokens) if -1 in places else self.states[places].to(tokens.device)


def _digests(tokens: Tensor) -> list[bytes]:
    """16 bytes for each row of token ids [b n]."""
    return [hashlib.blake2b(row.tobytes(), digest_size=16).digest() for row in tokens.cpu().numpy()]


def _rows_of_batch(rows: PackedRows) -> int:
    return max(1, TOKENS // rows.sequence_length)


def _batches(rows: PackedRows) -> Iterator[Tensor]:
    """All rows in order, some at a time."""
    count = _rows_of_batch(rows)
    for start in range(0, len(rows), count):
        yield rows[list(range(start, min(start + count, len(rows))))]


@torch.no_grad()
def _write(
    path: Path, key: str, rows: PackedRows, encoder: TokenEncoder, dtype: torch.dtype, trainer: L.Trainer
) -> None:
    """Write the file, and then its header: without one it is never used."""
    blocks = []
    with write_atomically(path) as file:
        for tokens in _batches(rows):
            check_signals(trainer)  # this may take hours
            content = tensor_bytes(encoder.hidden_states(tokens.to(encoder.mean.device)).to(dtype))
            blocks.append(hashlib.sha256(content).hexdigest())
            file.write(content)
    with write_atomically(path.with_suffix(".json")) as file:
        file.write(json.dumps({"key": key, "blocks": blocks}).encode())


def _verify(path: Path, key: str, size: int, block: int, full: bool) -> None:
    """ValueError if a file is not whole, or holds the states of other rows or of another encoder."""
    header = path.with_suffix(".json")
    remedy = f"delete it and {header.name}, and it is made again"
    if path.stat().st_size != size:
        raise ValueError(f"{path} has {path.stat().st_size} bytes and not {size}: {remedy}")
    try:
        told = json.loads(header.read_text(encoding="utf-8"))
        found, blocks = told["key"], told["blocks"]
    except (ValueError, TypeError, KeyError, RecursionError):
        raise ValueError(f"the header of {path} is not whole: {remedy}") from None
    if found != key:
        raise ValueError(f"{path} stands where other hidden states belong: {remedy}")
    verify_blocks(path, blocks, block, full)


def _others(folder: Path, path: Path) -> str:
    """What to say of files that stay when encoder or corpus change."""
    sizes = []
    for file in folder.glob("*-states-*.bin"):
        with suppress(FileNotFoundError):
            sizes += [file.stat().st_size] if file != path else []
    told = f" (hidden states of other runs take {sum(sizes) / 1e9:,.3g} GB there, in {len(sizes)} files *-states-*.bin)"
    return told if sizes else ""


def _key(rows: PackedRows, encoder: TokenEncoder, dtype: torch.dtype) -> str:
    """A digest of all that the hidden states depend on: the rows, and the encoder's arguments and weights."""
    weights = hashlib.sha256()
    if isinstance(encoder, FrozenTokenEncoder):
        encoder.frozen()  # writes the digest of its weights into its arguments
    for name, tensor in [*encoder.named_parameters(), *encoder.named_buffers()]:
        if name not in STATISTICS:
            weights.update(name.encode() + tensor_bytes(tensor))
    blocks = json.loads(rows.path.with_suffix(".json").read_text(encoding="utf-8"))["blocks"]
    about = [blocks, rows.sequence_length, rows.frame, describe(encoder), weights.hexdigest(), str(dtype), TOKENS]
    return hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()
