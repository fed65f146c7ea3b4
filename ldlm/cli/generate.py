"""What ``ldlm generate`` does once its words are read.

In: options. Out: printed texts, or a file of JSON lines; with ``--trace`` a page on which the first one takes shape.
No section of the paper.
"""

import argparse
import json
from collections.abc import Iterable, Iterator
from contextlib import ExitStack

from torch import Tensor

from ldlm._files import check_output, short, visible, write_atomically
from ldlm.evaluation.sampling import prepare, sample
from ldlm.evaluation.trace import Recorder, write_trace
from ldlm.model import LDLM


def write_texts(options: argparse.Namespace) -> None:
    """Generate texts and write each batch as soon as it is there.

    Args:
        options: The command's, by the names that ``ldlm generate --help`` shows.
    """
    model, sampler, grid = prepare(options)
    write_batches(model, sample(model, options, options.seed, sampler, grid), options)


def write_batches(model: LDLM, batches: Iterable[Tensor], options: argparse.Namespace) -> None:
    """Print the texts of batches of token ids [b n], or write them where ``--output`` says."""
    with ExitStack() as stack:
        # The file appears under its name when it is complete.
        file = stack.enter_context(write_atomically(options.output)) if options.output else None
        number = 0
        for tokens in batches:
            for row in model.to_lines(tokens):
                if file is None:
                    print(f"[{number}] {visible(row['text'])}\n", flush=True)
                else:
                    line = json.dumps({"index": number, **row}, ensure_ascii=False)
                    file.write(f"{line}\n".encode())
                number += 1
    if options.output:
        print(f"{options.num_samples} texts are in {visible(options.output)}")


def write_traced_texts(options: argparse.Namespace) -> None:
    """Generate texts as `write_texts` does, and write the page of the first one.

    Args:
        options: The command's, by the names that ``ldlm generate --help`` shows.
    """
    check_output(options.trace, "--trace")
    model, sampler, grid = prepare(options)
    recorder = Recorder(model)
    firsts: list[Tensor] = []

    def noted(batches: Iterable[Tensor]) -> Iterator[Tensor]:
        for tokens in batches:
            firsts.append(tokens[0])
            yield tokens

    write_batches(model, noted(sample(model, options, options.seed, sampler, grid, recorder)), options)
    write_trace(options.trace, recorder.trace(firsts[0], grid, options.trace_steps), short(options.checkpoint))
    print(f"text 0 takes shape in {visible(options.trace)}")
