"""What an evaluation reads, and all that can be found wrong with it before anything is sampled.

In: the command's options. Out: texts of files, models; one sentence where something is at fault.
No section of the paper.
"""

import argparse
import importlib.util
import shlex
import zipfile
from pathlib import Path

import torch

from ldlm._files import check_output, is_special, short
from ldlm.data.corpus import SUFFIXES, has_known_suffix
from ldlm.evaluation.sampling import load
from ldlm.evaluation.scores import Texts, read_texts
from ldlm.hub import resolve
from ldlm.model import LDLM


def check_files(options: argparse.Namespace) -> None:
    """ValueError if a source is given twice, or if what is to be written cannot be or would replace another file."""
    taken: set[Path] = set()
    for source in options.source:
        if Path(source).resolve() in taken:
            raise ValueError(f"{source} is given twice")
        taken.add(Path(source).resolve())
    taken |= {Path(resolve(name)).resolve() for name in (options.reference, options.training) if name}
    for option, name in (("--output", options.output), ("--report", options.report)):
        check_output(name, option)
        if name and Path(name).resolve() in taken and not is_special(name):
            raise ValueError(f"{option} {name} would replace another file of this command; give another name")
        if name:
            taken.add(Path(name).resolve())
    check_output(options.figures and f"{options.figures}/frontier.png", "--figures")


def read_sources(options: argparse.Namespace) -> dict[str, Texts | None]:
    """The texts of each source, None for a model; ValueError if one of them cannot be used."""
    found: dict[str, Texts | None] = {}
    for source in options.source:
        path = Path(source)
        if source.endswith(".ckpt") and not path.is_file():
            raise ValueError(f"there is no file {source}")
        samples = has_known_suffix(source)
        if path.is_file() and not samples and not zipfile.is_zipfile(path):
            raise ValueError(f"{source} is no whole checkpoint, and samples have names in {', '.join(SUFFIXES)}")
        found[source] = read_texts(source, None, options.text_column) if samples else None
    if options.measure and not options.reference:
        raise ValueError("--measure needs real texts to encode: add --reference FILE")
    if options.measure and None not in found.values():
        raise ValueError("--measure is for models, and there are only files of samples")
    for source in found if len(found) > 1 else []:
        if found[source] is None:  # what is wrong with the last model is better told before the first is sampled
            load_model(source, torch.device("cpu"), "32")
    return found


def load_model(source: str, device: torch.device, precision: str, compile_mode: str | None = None) -> LDLM:
    """A model; ValueError if it is not to be had, or makes no text."""
    model = load(source, device, precision, compile_mode)
    if model.tokenizer is None:
        raise ValueError(f"{source} has no tokenizer to make text with: give LDLM(tokenizer=...)")
    return model


def read_references(options: argparse.Namespace, count: int) -> Texts:
    """The first ``count`` real texts; ValueError if there are fewer, or if nothing is there to compare them by."""
    if importlib.util.find_spec("mauve") is None:
        raise ValueError('--reference is for MAUVE, which needs mauve-text: pip install "ldlm[eval]"')
    real = read_texts(options.reference, count, options.text_column)
    if len(real.documents) < count:
        told = f"--reference {options.reference} holds {len(real.documents)} texts for {count} samples"
        raise ValueError(f"{told}: MAUVE compares as many with as many; give more, or take fewer samples")
    return real


def command(words: list[str], names: dict[str, str]) -> str:
    """The command as it can be typed again, without folders of this machine.

    Args:
        words: As they were given.
        names: What each source is called.

    >>> command(["/home/me/a/last.ckpt", "--output=/home/me/my scores.json"], {"/home/me/a/last.ckpt": "a/last.ckpt"})
    "ldlm evaluate a/last.ckpt '--output=my scores.json'"
    """
    told = []
    for word in words:
        option, equals, value = word.partition("=") if word.startswith("--") else ("", "", word)
        told.append(option + equals + (names.get(value, short(value)) if Path(value).is_absolute() else value))
    return shlex.join(["ldlm", "evaluate", *told])
