"""The ``ldlm`` command.

In: words from a shell. Out: trained models, texts, one clear sentence and exit status 2 where something is wrong.
No section of the paper; the recipes in ``configs/`` say which of its numbers they carry.

``fit``, ``fit-decoder``, ``validate``, ``test`` and ``predict`` are LightningCLI's (`fit.py`); the others are plain
functions here, and nothing heavy is imported before one is known to need it.
"""

import argparse
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import NoReturn

from ldlm import __version__
from ldlm._files import exit_on_signal, visible
from ldlm.cli.arguments import Fault, Parser, fail, numbers
from ldlm.cli.modules import IMPORTED, NamedModules, import_modules
from ldlm.presets import CONFIGS, first_line, nearest, preset_names

LIGHTNING = {
    "fit": "train a model: ldlm fit --config quickstart",
    "fit-decoder": "train another token decoder on fixed latents: --stage.checkpoint CKPT",
    "validate": "measure losses and reconstruction: ldlm validate --ckpt_path CKPT --data.dataset FILE",
    "test": "the same on the test rows",
    "predict": "write held-out rows beside their reconstructions, as JSON lines",
}


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command. Exits with status 2 and one sentence if the input is at fault or nothing can be written.

    Other statuses are those of the system's own tools: 130 after Ctrl-C, 143 after SIGTERM and 129 after SIGHUP, all
    of which leave no temporary file, and 141, without a word, if whoever read the output has enough of it.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    if argv is None:  # what a command starts is not to look into the current folder for Python's own modules either
        os.environ.setdefault("PYTHONSAFEPATH", "1")
    if NamedModules not in sys.meta_path:
        sys.meta_path.append(NamedModules)
    with ending_on_signals():
        try:
            try:
                dispatch(words)
            finally:
                sys.stdout.flush()
        except BrokenPipeError:
            leave_quietly()
        except KeyboardInterrupt:
            fail("interrupted", 130)
        except SystemExit as end:
            if isinstance(end.__context__, KeyboardInterrupt):  # a Trainer ends with status 1
                fail("interrupted", 130)
            if isinstance(end.__context__, BrokenPipeError):  # and so does rich
                leave_quietly()
            raise
        except (Fault, ValueError, OSError) as error:
            if os.environ.get("LDLM_TRACEBACK"):
                raise
            fail(sentence(error))


def dispatch(words: list[str]) -> None:
    """Run one command."""
    words = import_modules(words)
    command = words[0] if words else "--help"
    if command in OURS:
        OURS[command](words[1:])
    elif command in LIGHTNING:
        from ldlm.cli.fit import run

        run(words)
    elif command == "--version":
        print(f"ldlm {__version__}")
    elif command in ("--help", "-h"):
        print(overview())
    else:
        raise Fault(f"there is no command {command!r}{nearest(command, [*LIGHTNING, *OURS])}")


@contextmanager
def ending_on_signals() -> Iterator[None]:
    """Let SIGTERM and SIGHUP end the process by way of its clean-up, unless something else was arranged for them.

    A fit puts its own handler in the place of this one once it has something to save.
    """
    ours: list[int] = []
    try:
        if threading.current_thread() is threading.main_thread():
            for signum in {"SIGTERM", "SIGHUP"} & signal.Signals.__members__.keys():
                if signal.getsignal(signal.Signals[signum]) is signal.SIG_DFL:
                    signal.signal(signal.Signals[signum], exit_on_signal)
                    ours.append(signal.Signals[signum])
        yield
    finally:
        for number in ours:
            signal.signal(number, signal.SIG_DFL)


def sentence(error: Exception) -> str:
    """What is wrong, in one sentence; for an error of the system, which file and why."""
    if not isinstance(error, OSError) or error.strerror is None:
        return str(error)
    name = error.filename
    if name is None:
        try:
            print(flush=True)  # fails, too, if this is what could not be written
        except OSError:
            abandon_output()
            name = "standard output"
    return f"{name}: {error.strerror}" if name else error.strerror


def leave_quietly() -> NoReturn:
    """End as the system ends a tool whose reader has closed the pipe."""
    abandon_output()
    raise SystemExit(141)


def abandon_output() -> None:
    """Let what is still to be printed go nowhere, or the interpreter would complain of it on its way out."""
    with suppress(OSError, ValueError):  # no file behind it, as in a notebook
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, sys.stdout.fileno())
        os.close(nowhere)


def overview() -> str:
    """What ``ldlm --help`` prints."""
    ours = {name: str(function.__doc__).splitlines()[0].rstrip(".") for name, function in OURS.items()}
    lines = [f"  {name:<12}{text[0].lower()}{text[1:]}" for name, text in (LIGHTNING | ours).items()]
    return "\n".join(
        [
            f"ldlm {__version__}: latent diffusion language models trained jointly with their latent space",
            "",
            "usage: ldlm COMMAND ...     (ldlm COMMAND --help says more)",
            "",
            *lines,
            "",
            "--import MODULE, anywhere, imports a module of your own first, for checkpoints that use its classes.",
            "LDLM_TRACEBACK=1 shows where an error came from.",
        ]
    )


def presets(words: Sequence[str]) -> None:
    """List the shipped recipes, overlays and studies."""
    parser = Parser("ldlm presets", description="List the shipped recipes, overlays and studies.")
    parser.parse_args(words)
    for folder, title in [
        ("", "Recipes: ldlm fit --config NAME"),
        ("overlays", "Overlays, on top of a recipe: ldlm fit --config owt128 --config NAME"),
        ("studies", "Studies, tables of such runs: ldlm study NAME --scale laptop|paper"),
    ]:
        print(f"{title}")
        for name in preset_names(folder):
            print(f"  {name:<22}{first_line(CONFIGS / folder / f'{name}.yaml')}")


def export(words: Sequence[str]) -> None:
    """Write a checkpoint as a folder of safetensors and JSON."""
    parser = Parser("ldlm export", description=export.__doc__)
    parser.add_argument("checkpoint", help="a .ckpt file")
    parser.add_argument("folder", help="folder to write, for LDLM.from_pretrained and ldlm generate")
    options = parser.parse_args(words)
    from ldlm.model import LDLM

    LDLM.load_from_checkpoint(options.checkpoint).save_pretrained(options.folder)
    print(f"{visible(options.folder)} holds model.safetensors, ldlm.json and the tokenizer's files")


def sampling_options(parser: Parser, num_samples: int, batch_size: int) -> None:
    """The options by which texts are sampled from a model, but for ``--nfe``."""
    parser.add_argument("-n", "--num_samples", type=int, default=num_samples, help="texts (default: %(default)s)")
    parser.add_argument("--batch_size", type=int, default=batch_size, help="sampled together (default: %(default)s)")
    parser.add_argument("--temperature", type=float, default=0.0, help="of the choice of tokens; 0 is the argmax")
    parser.add_argument("--sampler", help="class in ldlm.diffusion.samplers (default: the model's)")
    parser.add_argument("--grid", help="time grid, a class in ldlm.diffusion.grids (default: the model's)")
    parser.add_argument("--device", help="cpu, cuda, ... (default: a GPU if there is one)")
    parser.add_argument("--precision", choices=["32", "bf16"], default="32", help="of the weights (default: 32)")
    compiling = "torch.compile the denoiser's blocks; reduce-overhead, for small batches on a GPU, captures CUDA graphs"
    parser.add_argument("--compile", nargs="?", const="default", metavar="MODE", help=compiling)


def check_sampling(options: argparse.Namespace) -> None:
    """Fault if an option of `sampling_options` is out of its range."""
    calls = min(options.nfe) if isinstance(options.nfe, list) else options.nfe
    for name, count in [("-n", options.num_samples), ("--nfe", calls), ("--batch_size", options.batch_size)]:
        if count < 1:
            raise Fault(f"{name} {count} must be at least 1")
    if not 0 <= options.temperature < float("inf"):
        raise Fault(f"--temperature {options.temperature} must be 0 (argmax) or a larger number")


def generate(words: Sequence[str]) -> None:
    """Write texts from noise: ldlm generate CKPT -n 8 --nfe 64."""
    parser = Parser("ldlm generate", description="Write texts from noise.")
    parser.add_argument("checkpoint", help="a .ckpt file, an exported folder, or a hub id")
    sampling_options(parser, num_samples=8, batch_size=16)
    parser.add_argument("--nfe", type=int, default=64, help="calls of the denoiser per text (default: 64)")
    parser.add_argument("--seed", type=int, default=0, help="same seed and batch size, same texts (default: 0)")
    parser.add_argument("--output", help="file of JSON lines to write instead of printing")
    parser.add_argument("--trace", help="page (.html) to write as well, on which the first text takes shape")
    parser.add_argument("--trace_steps", type=int, default=16, help="predictions it shows (default: %(default)s)")
    options = parser.parse_args(words)
    check_sampling(options)
    if options.trace_steps < 1:
        raise Fault(f"--trace_steps {options.trace_steps} must be at least 1")

    if options.trace:
        from ldlm.cli.generate import write_traced_texts

        write_traced_texts(options)
    else:
        from ldlm.cli.generate import write_texts

        write_texts(options)


def evaluate(words: Sequence[str]) -> None:
    """Score models or files of samples: ldlm evaluate CKPT --nfe 8,64."""
    parser = Parser("ldlm evaluate", description="Perplexity, entropy, n-gram diversity and MAUVE of generated texts.")
    parser.add_argument("source", nargs="+", help="a .ckpt file, exported folder or hub id; samples, as .jsonl or .txt")
    parser.add_argument("--reference", help="file of real texts to score as well and to compare with by MAUVE")
    parser.add_argument("--training", help="training text, file or hub data set: how much of it comes back, in 4-grams")
    parser.add_argument("--text_column", default="text", help="field of all files that holds the text (%(default)s)")
    parser.add_argument("--scorer", default="gpt2-large", help="hub id, folder or .gguf file (default: gpt2-large)")
    parser.add_argument("--protocol", default="mdlm", help="mdlm (default), plain, hf_mean, tencdm or flow_matching")
    parser.add_argument("--max_length", type=int, help="scorer's tokens read of a text (default: its context)")
    parser.add_argument("--tokenizer", help="whose ids and special tokens a file has that says neither (the scorer's)")
    parser.add_argument("--output", help="file of JSON to write, with all that is needed to repeat this")
    parser.add_argument("--report", help="page (.html) to write, that stands alone: tables, figures, texts")
    parser.add_argument("--figures", metavar="FOLDER", help="folder for figures, each as .png and .pdf")
    latents = "models' latents of the reference as well: interpolation, loss over time, noise, spectrum"
    parser.add_argument("--measure", action="store_true", help=latents)
    theirs = "the paper's table of other models to add to figure and JSON, marked as such (default: none)"
    parser.add_argument("--published", choices=["owt", "lm1b", "none"], default="none", help=theirs)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="one set of texts each (default: 0)")
    parser.add_argument("--nfe", type=numbers, default=[64], metavar="N[,N...]", help="denoiser calls per text (64)")
    sampling_options(parser, num_samples=256, batch_size=64)
    options = parser.parse_args(words)
    check_sampling(options)
    options.words, options.seeds = words, list(dict.fromkeys(options.seeds))  # the same set twice has no deviation

    from ldlm.evaluation.evaluate import write_scores

    write_scores(options)


def study(words: Sequence[str]) -> None:
    """Train, score and tabulate one of the paper's tables: ldlm study table1 --scale laptop."""
    parser = Parser("ldlm study", description="Train, score and tabulate the cells of one of the paper's tables.")
    parser.add_argument("name", help="a study that ldlm presets lists, or a YAML file like them")
    parser.add_argument("--scale", choices=["laptop", "paper"], required=True, help="size of the runs")
    parser.add_argument("--seeds", type=int, default=1, help="training seeds a cell (default: 1)")
    parser.add_argument("--only", nargs="+", metavar="CELL", help="run these cells alone")
    parser.add_argument("--config", action="append", default=[], help="a recipe on top of every cell's")
    parser.add_argument("--output", default="ldlm_results", help="folder of tables and finished cells (%(default)s)")
    parser.add_argument("--work", default="ldlm_runs/studies", help="folder of checkpoints and logs (%(default)s)")
    parser.add_argument("--jobs", type=int, help="cells side by side (default: one a GPU, or as many as cores allow)")
    parser.add_argument("--threads", type=int, help="threads a cell without a GPU (default: 1)")
    options = parser.parse_args(words)
    for name, count in [("--seeds", options.seeds), ("--jobs", options.jobs), ("--threads", options.threads)]:
        if count is not None and count < 1:
            raise Fault(f"{name} {count} must be at least 1")

    from ldlm.studies.scheduler import run_study

    options.imports = IMPORTED
    run_study(options)


def bench(words: Sequence[str]) -> None:
    """Time sampling, training or packing: ldlm bench sampling --precision bf16."""
    from ldlm.cli.bench import bench_options

    options = bench_options(words)
    from ldlm.benchmarks.run import run_bench
    from ldlm.cli.fit import prepare_fit, quiet

    quiet()
    run_bench(options, prepare_fit)


OURS: dict[str, Callable[[Sequence[str]], None]] = {
    "generate": generate,
    "evaluate": evaluate,
    "study": study,
    "bench": bench,
    "export": export,
    "presets": presets,
}
