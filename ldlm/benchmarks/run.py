"""What ``ldlm bench`` does: one of the benchmarks, a table, and a file of JSON with what it takes to repeat it.

In: options. Out: printed and written results. No section of the paper.
"""

import argparse
import json
import logging
import os
import sys
import time

import torch
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table
from rich.text import Text

from ldlm._files import check_output, short, visible, write_atomically
from ldlm.benchmarks.packing import bench_packing
from ldlm.benchmarks.sampling import bench_sampling
from ldlm.benchmarks.training import PrepareFit, bench_training


def run_bench(options: argparse.Namespace, prepare_fit: PrepareFit) -> None:
    """Measure, print a table, and write the numbers where the options say.

    Args:
        options: The command's, from `bench_options`.
        prepare_fit: Makes of ``ldlm fit``'s words what it would run.

    Raises:
        ValueError: If an input is at fault, or more memory is wanted than there is.
    """
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    check_output(options.output)
    if options.threads:
        torch.set_num_threads(options.threads)
        os.environ["RAYON_NUM_THREADS"] = str(options.threads)  # the tokenizer's, which reads it when it starts them
    command = " ".join(["ldlm bench", *map(short, options.words)])
    start, worked = time.perf_counter(), time.process_time()
    result = {"benchmark": options.benchmark, "command": command, "seconds_of": options.seconds_of}
    if options.benchmark == "training":
        result |= bench_training(options, prepare_fit)
    else:
        result |= {"sampling": bench_sampling, "packing": bench_packing}[options.benchmark](options)
    # Well below the number of threads, on a CPU: somebody else had the machine, and only the quotients mean something.
    result["cores_had"] = (time.process_time() - worked) / (time.perf_counter() - start)
    if options.output:
        with write_atomically(options.output) as file:
            file.write((json.dumps(result, indent=2) + "\n").encode())
    where = result["surroundings"]
    caption = f"{result['seconds_of']} on {where['device']} ({where['cpu']}), {where['threads']} threads, "
    caption += f"{result['cores_had']:.2f} cores had"
    title = Text(visible(command), "table.title")
    shown = Table("", title=title, caption=Text(visible(caption), "table.caption"), box=SIMPLE)
    columns = ("median", "min", "max")
    for column in columns:
        shown.add_column(column, justify="right", no_wrap=True)
    for name, found in result["measures"].items():
        numbers = found if isinstance(found, dict) else {"median": found}
        shown.add_row(
            Text(visible(name.replace("_", " "))), *(f"{numbers[key]:.4g}" if key in numbers else "" for key in columns)
        )
    Console(width=None if sys.stdout.isatty() else 120).print(shown)
