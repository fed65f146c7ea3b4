"""Documents to batches of packed rows, as a Lightning data module.

In: a hub data set or the user's own files, a tokenizer, a row length. Out: loaders of int64 tokens [b n].
App. C "Data preprocessing": texts packed without padding (`packing.py`), read as rows in a stateless order (`rows.py`).
"""

import hashlib
import inspect
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import PreTrainedTokenizerBase

from ldlm.data.corpus import (
    MAX_DOCUMENT_BYTES,
    TEXT_UNITS,
    FileCorpus,
    is_local,
    lm1b_detokenizer,
    looks_like_path,
    open_corpus,
)
from ldlm.data.packing import VERIFICATIONS, open_packed, pack, read_header
from ldlm.data.rows import PackedRows, ResumableLoader, RowsInOrder, ShuffledOrder, ShuffledRows, outlive_signals
from ldlm.hub import resolve
from ldlm.tokenizer import load_tokenizer, tokenizer_digest, vocabulary_size

# What the order of training rests on; the number of ranks and of accumulated batches is not among it.
FINGERPRINT = ("data", "tokenizer", "sequence_length", "special_tokens", "batch_size", "seed")

DETOKENIZERS: dict[str, Callable[[str], str]] = {"lm1b": lm1b_detokenizer}  # a recipe's names for them


class PackedTextDataModule(L.LightningDataModule):
    """Text, packed once into rows of `sequence_length` tokens and served in a reproducible order.

    Args:
        dataset: a `.txt`, `.jsonl`, `.jsonl.gz` or `.parquet` file, a folder of them, `package:NAME/inner/path`, or the
            name of a data set on the Hugging Face hub.
        tokenizer: hub id, folder or `package:` name of a transformers tokenizer, or one that is built.
        sequence_length: n, tokens in a row, [BOS] and [EOS] included.
        batch_size: rows per optimizer step over all ranks and accumulated batches.
        text_column: the column with the text.
        validation: what is held out: a fraction in (0, 1) of the documents, spread evenly; an int, that many last
            documents; a str, another split of the hub data set or another file or folder; None, nothing.
        cache_dir: where packed files are kept; None means $LDLM_CACHE, else ~/.cache/ldlm.
        num_workers: loader processes; the batches are the same for any number.
        split: split of the hub data set to train on.
        revision: its branch, tag or commit.
        config_name: its configuration.
        detokenize: applied to each text first: "lm1b" for the One Billion Word corpus, or a named function of a module,
            which in a recipe is one that ``--import`` names.
        special_tokens: whether a row begins with [BOS] and ends with [EOS].
        text_unit: what a document of a `.txt` file is: "line", "paragraph" or "document".
        validation_rows: use only so many held-out rows, spread evenly over them.
        seed: of the batch order.
        verify: "once", packed files are read through the first time this machine meets them; "full", at each start.
        max_document_bytes: of a text, and of a line of a file; a longer one is an error that names it.

    Raises:
        ValueError: an argument is out of range, or the files cannot be read as asked.
        FileNotFoundError: no such file, data set or tokenizer.
    """

    def __init__(
        self,
        dataset: str,
        tokenizer: str | PreTrainedTokenizerBase,
        sequence_length: int,
        batch_size: int,
        text_column: str = "text",
        validation: int | float | str | None = 0.05,
        cache_dir: str | None = None,
        num_workers: int = 0,
        *,
        split: str = "train",
        revision: str | None = None,
        config_name: str | None = None,
        detokenize: str | Callable[[str], str] | None = None,
        special_tokens: bool = True,
        text_unit: str = "paragraph",
        validation_rows: int | None = None,
        seed: int = 0,
        verify: str = "once",
        max_document_bytes: int = MAX_DOCUMENT_BYTES,
    ) -> None:
        super().__init__()
        least = 3 if special_tokens else 1
        if sequence_length < least:
            raise ValueError(f"sequence_length={sequence_length} leaves no room for a token; give at least {least}")
        if batch_size < 1:
            raise ValueError(f"batch_size={batch_size} must be at least 1 row per optimizer step")
        if num_workers < 0:
            raise ValueError(f"num_workers={num_workers} must be 0 (load in this process) or more")
        if validation_rows is not None and validation_rows < 1:
            raise ValueError(f"validation_rows={validation_rows} must be at least 1, or None for all of them")
        if max_document_bytes < 1:
            raise ValueError(
                f"max_document_bytes={max_document_bytes} must be at least 1, such as {MAX_DOCUMENT_BYTES}"
            )
        if verify not in VERIFICATIONS:
            raise ValueError(f"verify={verify!r} must be one of {', '.join(VERIFICATIONS)}")
        if text_unit not in TEXT_UNITS:
            raise ValueError(f"text_unit={text_unit!r} must be one of {', '.join(TEXT_UNITS)}")
        for name, value in (("dataset", dataset), ("text_column", text_column), ("split", split)):
            if not value:
                raise ValueError(f"{name}={value!r} is empty; name one")
        if isinstance(validation, bool) or (isinstance(validation, int) and validation < 1):
            raise ValueError(f"validation={validation!r} must be at least 1 document, or None for no validation")
        if isinstance(validation, float) and not 0 < validation < 1:
            raise ValueError(
                f"validation={validation} must be a fraction between 0 and 1, or a whole number of documents"
            )
        detokenize = check_detokenizer(detokenize)
        if is_local(dataset):
            FileCorpus(resolve(dataset), text_column, text_unit)  # found and of a known kind, or refused now
        if isinstance(validation, str) and (is_local(dataset) or looks_like_path(validation)):
            FileCorpus(resolve(validation), text_column, text_unit)
        self.dataset, self.tokenizer, self.sequence_length = dataset, tokenizer, sequence_length
        self.batch_size, self.text_column, self.validation = batch_size, text_column, validation
        self.cache_dir, self.num_workers, self.split, self.revision = cache_dir, num_workers, split, revision
        self.config_name, self.detokenize, self.special_tokens = config_name, detokenize, special_tokens
        self.text_unit, self.validation_rows, self.seed, self.verify = text_unit, validation_rows, seed, verify
        self.max_document_bytes = max_document_bytes
        self._loaded_tokenizer: PreTrainedTokenizerBase | None = None
        self._names: dict[str, str] = {}
        self._rows: dict[str, PackedRows] = {}
        self._fingerprint: dict[str, object] = {}

    @property
    def loaded_tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer itself, loaded on first use."""
        if self._loaded_tokenizer is None:
            self._loaded_tokenizer = load_tokenizer(self.tokenizer)
        return self._loaded_tokenizer

    @property
    def folder(self) -> Path:
        """Where the packed files are."""
        return Path(self.cache_dir or os.environ.get("LDLM_CACHE") or Path.home() / ".cache" / "ldlm").expanduser()

    @property
    def train_dataset(self) -> PackedRows:
        """The rows to train on; they are packed and opened if that has not happened."""
        if not self._rows:
            self.setup()
        return self._rows["train"]

    @property
    def validation_dataset(self) -> PackedRows | None:
        """The held-out rows, None if `validation` is None."""
        if not self._rows:
            self.setup()
        return self._rows.get("validation")

    def prepare_data(self) -> None:
        """Pack the corpus, or verify the files that an earlier run packed from the same things."""
        corpus = open_corpus(
            self.dataset,
            self.text_column,
            self.text_unit,
            self.split,
            self.revision,
            self.config_name,
            self.max_document_bytes,
        )
        held_out = None if isinstance(self.validation, str) else self.validation
        parts: tuple[str, ...] = ("train",) if held_out is None else ("train", "validation")
        paths = pack(corpus, self.loaded_tokenizer, self.folder, parts, held_out, self.detokenize, self.verify)
        if isinstance(self.validation, str):
            # A folder that happens to be called "test" does not hide the split of a hub data set.
            local = is_local(self.dataset) or looks_like_path(self.validation)
            other = open_corpus(
                self.validation if local else self.dataset,
                self.text_column,
                self.text_unit,
                self.split if local else self.validation,
                self.revision,
                self.config_name,
                self.max_document_bytes,
            )
            paths |= pack(
                other, self.loaded_tokenizer, self.folder, ("validation",), None, self.detokenize, self.verify
            )
        self._names = {part: path.name for part, path in paths.items()}

    def setup(self, stage: str | None = None) -> None:
        """Open the packed files; outside a Trainer, `prepare_data` runs first if it has not."""
        if self.trainer is not None and self.trainer.world_size > 1:
            # prepare_data ran on one rank of each node; the names spare the others reading the corpus to find them.
            self._names = self.trainer.strategy.broadcast(self._names)
        if not self._names:
            self.prepare_data()
        self._rows = {
            part: open_packed(
                self.folder / name,
                self.loaded_tokenizer,
                self.sequence_length,
                self.special_tokens,
                self.validation_rows if part == "validation" else None,
            )
            for part, name in self._names.items()
        }
        self._fingerprint = {}

    def rows_of_step(self, step: int) -> list[int]:
        """Return the rows of `train_dataset` that optimizer step `step`, counted from 0, trains on."""
        return ShuffledOrder(len(self.train_dataset), self.batch_size, self.seed).batch(step)

    def state_dict(self) -> dict[str, Any]:
        """Return what the order of training rests on, for a resumed run to compare."""
        if not self._fingerprint and self._rows:
            blocks = read_header(self.train_dataset.path, self.loaded_tokenizer)["blocks"]
            digests = hashlib.sha256("".join(blocks).encode()).hexdigest(), tokenizer_digest(self.loaded_tokenizer)
            numbers = self.sequence_length, self.special_tokens, self.batch_size, self.seed
            values = [*(f"of sha256 {digest[:16]}" for digest in digests), *numbers]
            self._fingerprint = dict(zip(FINGERPRINT, values, strict=True))
        return dict(self._fingerprint)

    def train_dataloader(self) -> DataLoader[Tensor]:
        """Batches [batch_size / (ranks · accumulated batches), n] from the trainer's current step on.

        Raises:
            ValueError: `batch_size`, or an epoch cut short by `limit_train_batches`, does not divide evenly.
        """
        rows, trainer = self.train_dataset, self.trainer
        # Lightning would put a sampler of single rows in the place of ours.
        if trainer is not None and trainer.overfit_batches:  # type: ignore[attr-defined]
            raise ValueError("overfit_batches is not supported here; train on a file with so few rows instead")
        order = ShuffledOrder(len(rows), self.batch_size, self.seed)
        if trainer is None:
            return self._loader(rows, ShuffledRows(rows, order, lambda: 0))
        place = trainer.global_rank, trainer.world_size, trainer.accumulate_grad_batches
        sampler = ShuffledRows(rows, order, lambda: trainer.global_step, *place)
        limit, parts = trainer.limit_train_batches, trainer.accumulate_grad_batches
        calls = min(limit, len(sampler)) if isinstance(limit, int) else int(limit * len(sampler))
        if calls % parts:
            raise ValueError(
                f"limit_train_batches={limit} makes epochs of {calls} calls, which accumulate_grad_batches={parts} "
                f"does not divide: the last step of each would be of {calls % parts}; give a multiple of {parts}"
            )
        return self._loader(rows, sampler)

    def val_dataloader(self) -> DataLoader[Tensor] | list[DataLoader[Tensor]]:
        """The held-out rows in order, calls no larger than training's; an empty list if there are none."""
        rows, trainer = self.validation_dataset, self.trainer
        if rows is None:
            return []
        if trainer is None:
            return self._loader(rows, RowsInOrder(rows, self.batch_size))
        batch_size = -(-self.batch_size // trainer.accumulate_grad_batches)  # a call that fits in training fits here
        return self._loader(rows, RowsInOrder(rows, batch_size, trainer.global_rank, trainer.world_size))

    def test_dataloader(self) -> DataLoader[Tensor] | list[DataLoader[Tensor]]:
        """The held-out rows, as for validation; ValueError if there are none."""
        if self.validation is None:
            raise ValueError(
                "validation=None holds out no rows to test on; give a fraction, a number, a split or a file"
            )
        return self.val_dataloader()

    def predict_dataloader(self) -> DataLoader[Tensor] | list[DataLoader[Tensor]]:
        """The held-out rows, as for testing."""
        return self.test_dataloader()

    def __repr__(self) -> str:
        """The data set, the tokenizer, the rows' length and the step's size; how many rows, where that is known."""
        if isinstance(self.tokenizer, str):
            tokenizer = repr(self.tokenizer)
        else:
            tokenizer = f"{type(self.tokenizer).__name__} of {vocabulary_size(self.tokenizer):,} tokens"
        if self._rows:
            held_out = self._rows.get("validation")
            some = "none" if held_out is None else f"{len(held_out):,}"
            rows = f"{len(self._rows['train']):,} rows for training, {some} for validation"
        else:
            rows = "rows for training and validation: not known before they are packed"
        return "\n".join(
            [
                f"{type(self).__name__} of {self.dataset!r}",
                f"  tokenizer: {tokenizer}",
                f"  rows of {self.sequence_length} tokens, batches of {self.batch_size} rows",
                f"  {rows}",
            ]
        )

    def __str__(self) -> str:
        """The same: Lightning's would pack the corpus to count its rows."""
        return repr(self)

    def _loader(self, rows: PackedRows, sampler: ShuffledRows | RowsInOrder) -> DataLoader[Tensor]:
        if self.num_workers:
            # Workers never tokenise, so the tokenizer's warning on every fork would be noise.
            os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
        # batch_size=None: the sampler's lists go to the data set whole, one read for a batch.
        return ResumableLoader(
            rows,
            batch_size=None,
            sampler=sampler,
            num_workers=self.num_workers,
            worker_init_fn=outlive_signals if self.num_workers else None,
            pin_memory=torch.cuda.is_available(),
        )


def check_detokenizer(detokenize: str | Callable[[str], str] | None) -> Callable[[str], str] | None:
    """What is applied to each text; ValueError if there is none of that name, or its source cannot be told."""
    if isinstance(detokenize, str):
        if detokenize not in DETOKENIZERS:
            raise ValueError(
                f"detokenize={detokenize!r} must be {' or '.join(map(repr, DETOKENIZERS))}, or a function of a module "
                "of your own: in a recipe MODULE.FUNCTION, with --import MODULE"
            )
        return DETOKENIZERS[detokenize]
    if detokenize is not None and not _has_name_and_source(detokenize):
        raise ValueError(f"detokenize={detokenize!r} must be a function defined by name in a module")
    return detokenize


def _has_name_and_source(function: Callable[[str], str]) -> bool:
    """Say whether the packed file's fingerprint can tell a function from others; two lambdas would look the same."""
    try:
        return inspect.isfunction(function) and "<" not in function.__qualname__ and bool(inspect.getsource(function))
    except OSError:  # typed at a prompt
        return False
