"""How fast texts become packed rows, beside the tokenizer alone, and how fast rows are read.

In: options of ``ldlm bench packing``. Out: numbers.
Paper: App. C, "Data preprocessing".
"""

import argparse
import json
import os
from collections import deque
from collections.abc import Callable
from functools import partial
from itertools import count
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from ldlm.benchmarks.timing import Numbers, Run, interleave, quotients, rate, surroundings
from ldlm.data.corpus import Corpus, open_corpus
from ldlm.data.datamodule import PackedTextDataModule
from ldlm.data.packing import batches
from ldlm.evaluation.evaluate import identity
from ldlm.tokenizer import load_tokenizer, name_tokenizer, token_id_function


def bench_packing(options: argparse.Namespace) -> Numbers:
    """Texts on their way into a packed file, beside the tokenizer's batch call; rows on their way out of the file."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    tokenizer, device = load_tokenizer(options.tokenizer), torch.device("cpu")
    documents = excerpt(open_corpus(options.source, options.text_column), round(options.megabytes * 1e6))
    with TemporaryDirectory() as folder:
        file, turn = Path(folder) / "texts.jsonl", count()
        file.write_text("".join(json.dumps({"text": text}) + "\n" for text in documents))

        def packed() -> PackedTextDataModule:
            cache = f"{folder}/{next(turn)}"  # a turn must not find the last one's work
            n, rows, workers = options.sequence_length, options.batch_size, options.num_workers
            data = PackedTextDataModule(
                str(file), tokenizer, n, rows, validation=None, cache_dir=cache, num_workers=workers
            )
            data.prepare_data()
            return data

        def tokenised(call: Callable[[list[str]], object]) -> None:
            for texts in batches(documents):
                call(texts)

        data = packed()
        rows = data.train_dataloader()
        alone, usual = (
            token_id_function(tokenizer),
            {"add_special_tokens": False, "split_special_tokens": True, "verbose": False},
        )
        runs: dict[str, Run] = {
            "packing": packed,
            "tokenizer": partial(tokenised, alone),
            "transformers": partial(tokenised, lambda texts: tokenizer(texts, **usual)["input_ids"]),
            "reading": lambda: deque(rows, maxlen=0),
        }
        seconds = interleave(runs, options.repeats, device, options.clock)
        tokens, read = data.train_dataset.tokens, len(rows) * options.batch_size * options.sequence_length
    size = sum(len(text.encode()) for text in documents)
    measures = {
        "tokens_per_second": rate(tokens, seconds["packing"]),
        "megabytes_per_second": rate(size / 1e6, seconds["packing"]),
        "tokenizer_tokens_per_second": rate(tokens, seconds["tokenizer"]),
        "packing_over_tokenizer": quotients(seconds["tokenizer"], seconds["packing"]),
        "packing_over_transformers": quotients(seconds["transformers"], seconds["packing"]),
        "read_tokens_per_second": rate(read, seconds["reading"]),
    }
    settings: Numbers = {"source": identity(options.source), "tokenizer": name_tokenizer(tokenizer), "bytes": size}
    settings |= {"documents": len(documents), "tokens": tokens}
    settings |= {name: vars(options)[name] for name in ("sequence_length", "batch_size", "num_workers", "repeats")}
    return {"measures": measures, "settings": settings, "surroundings": surroundings(device)}


def excerpt(corpus: Corpus, size: int) -> list[str]:
    """The first documents of so many bytes of text; if all have fewer, all of them again and again."""
    found, taken = [], 0
    for text in corpus:
        found.append(text)
        taken += len(text.encode())
        if taken >= size:
            return found
    if not taken:
        raise ValueError(f"{corpus.stem} holds no text: name a file or a data set with some")
    return found * -(-size // taken)
