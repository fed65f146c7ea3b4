"""The ``ldlm`` command.

In: words from a shell. Out: trained models, texts, one clear sentence and exit status 2 where something is wrong.
No section of the paper; the recipes in ``configs/`` say which of its numbers they carry.

``fit``, ``validate``, ``test`` and ``predict`` are LightningCLI's (`training.py`); the others are plain functions here,
and nothing heavy is imported before one is known to need it.
"""

import argparse
import difflib
import importlib
import os
import sys
from collections.abc import Callable, Sequence
from importlib.resources import files
from typing import NoReturn

from ldlm import __version__

LIGHTNING = {
    "fit": "train a model: ldlm fit --config quickstart",
    "validate": "measure losses and reconstruction: ldlm validate --ckpt_path CKPT --data.dataset FILE",
    "test": "the same on the test rows",
    "predict": "write held-out rows beside their reconstructions, as JSON lines",
}
CONFIGS = files("ldlm") / "configs"


class Fault(Exception):
    """Something the user can mend; its text is the one sentence that is printed."""


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command. Exits with status 2 and one sentence if the input is at fault."""
    words = list(sys.argv[1:] if argv is None else argv)
    sys.path.insert(0, os.getcwd())  # a console script does not look here, and the user's my_encoder.py is here
    try:
        words = import_modules(words)
        command = words[0] if words else "--help"
        if command in OURS:
            OURS[command](words[1:])
        elif command in LIGHTNING:
            from ldlm.training import run

            run(words)
        elif command == "--version":
            print(f"ldlm {__version__}")
        elif command in ("--help", "-h"):
            print(overview())
        else:
            raise Fault(f"there is no command {command!r}{nearest(command, [*LIGHTNING, *OURS])}")
    except (Fault, ValueError, FileNotFoundError) as error:
        if os.environ.get("LDLM_TRACEBACK"):
            raise
        fail(str(error))


def fail(sentence: str) -> NoReturn:
    """Print one sentence on standard error and exit with status 2."""
    print(f"ldlm: {' '.join(sentence.split())}", file=sys.stderr)
    raise SystemExit(2)


def nearest(word: str, known: Sequence[str]) -> str:
    """A hint at the known word most like the given one, or at all of them if they are few."""
    close = difflib.get_close_matches(word, known, n=1, cutoff=0.5)
    if close:
        return f"; did you mean {close[0]!r}?"
    return f"; there are {', '.join(known)}" if len(known) <= 12 else ""


def overview() -> str:
    """What ``ldlm --help`` prints."""
    ours = {name: str(function.__doc__).splitlines()[0].rstrip(".") for name, function in OURS.items()}
    lines = [f"  {name:<10}{text[0].lower()}{text[1:]}" for name, text in (LIGHTNING | ours).items()]
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


def import_modules(words: list[str]) -> list[str]:
    """Import what ``--import`` names, and return the other words."""
    rest: list[str] = []
    queue = iter(words)
    for word in queue:
        if word != "--import" and not word.startswith("--import="):
            rest.append(word)
            continue
        name = word.partition("=")[2] or next(queue, "")
        try:
            importlib.import_module(name)
        except (ImportError, ValueError) as error:
            raise Fault(f"--import {name}: {error}; it is looked for in the current folder, too") from error
    return rest


class Parser(argparse.ArgumentParser):
    """argparse with one-sentence errors that offer the nearest option."""

    def error(self, message: str) -> NoReturn:
        """Exit with status 2."""
        if message.startswith("unrecognized arguments: "):
            word = message.split()[2]
            options = [option for action in self._actions for option in action.option_strings]
            message = f"there is no option {word.partition('=')[0]}{nearest(word, options)}"
        fail(f"{self.prog.removeprefix('ldlm ')}: {message}")


def presets(words: Sequence[str]) -> None:
    """List the shipped recipes."""
    parser = Parser("ldlm presets", description="List the shipped recipes, for ldlm fit --config NAME.")
    parser.parse_args(words)
    for name in preset_names():
        first = (CONFIGS / f"{name}.yaml").read_text(encoding="utf-8").splitlines()[0]
        print(f"{name:<12}{first.lstrip('# ')}")


def preset_names() -> list[str]:
    """Names of the shipped recipes."""
    return sorted(path.name.removesuffix(".yaml") for path in CONFIGS.iterdir() if path.name.endswith(".yaml"))


def export(words: Sequence[str]) -> None:
    """Write a checkpoint as a folder of safetensors and JSON."""
    parser = Parser("ldlm export", description=export.__doc__)
    parser.add_argument("checkpoint", help="a .ckpt file")
    parser.add_argument("folder", help="folder to write, for LDLM.from_pretrained and ldlm generate")
    options = parser.parse_args(words)
    from ldlm.module import LDLM

    LDLM.load_from_checkpoint(options.checkpoint).save_pretrained(options.folder)
    print(f"{options.folder} holds model.safetensors, ldlm.json and the tokenizer's files")


def generate(words: Sequence[str]) -> None:
    """Write texts from noise: ldlm generate CKPT -n 8 --nfe 64."""
    parser = Parser("ldlm generate", description="Write texts from noise.")
    parser.add_argument("checkpoint", help="a .ckpt file, an exported folder, or a hub id")
    parser.add_argument("-n", "--num_samples", type=int, default=8, help="texts (default: 8)")
    parser.add_argument("--nfe", type=int, default=64, help="calls of the denoiser per text (default: 64)")
    parser.add_argument("--seed", type=int, default=0, help="same seed and batch size, same texts (default: 0)")
    parser.add_argument("--batch_size", type=int, default=16, help="rows sampled together (default: 16)")
    parser.add_argument("--temperature", type=float, default=0.0, help="of the choice of tokens; 0 is the argmax")
    parser.add_argument("--sampler", help="class in ldlm.samplers (default: the model's)")
    parser.add_argument("--grid", help="time grid, a class in ldlm.samplers (default: the model's)")
    parser.add_argument("--output", help="file of JSON lines to write instead of printing")
    parser.add_argument("--device", help="cpu, cuda, ... (default: a GPU if there is one)")
    parser.add_argument("--precision", choices=["32", "bf16"], default="32", help="arithmetic (default: 32)")
    options = parser.parse_args(words)
    for name, count in [("-n", options.num_samples), ("--nfe", options.nfe), ("--batch_size", options.batch_size)]:
        if count < 1:
            raise Fault(f"{name} {count} must be at least 1")
    if options.temperature < 0:
        raise Fault(f"--temperature {options.temperature} must be 0 (argmax) or more")

    from ldlm.texts import write_texts

    write_texts(options)


OURS: dict[str, Callable[[Sequence[str]], None]] = {"generate": generate, "export": export, "presets": presets}
