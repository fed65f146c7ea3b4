"""Words from a shell, and one sentence about what is wrong with them.

In: words. Out: options; or a sentence on standard error and exit status 2.
No section of the paper. Nothing heavy is imported here: `main.py` reads its words before it knows what it needs.
"""

import argparse
import re
import sys
from contextlib import suppress
from typing import NoReturn

from ldlm._files import visible
from ldlm.presets import nearest

REQUIRED = {
    "training.warmup_steps": "it is the length of the diffusion-to-encoder warm-up in optimizer steps, 0 for none (the "
    "paper's worst row)",
    "stage.checkpoint": "it is the checkpoint for whose latents a token decoder is trained",
}


class Fault(Exception):
    """Something the user can mend; its text is the one sentence that is printed."""


def fail(sentence: str, status: int = 2) -> NoReturn:
    """Print one sentence on standard error, if that can be written to, and exit."""
    with suppress(OSError):
        print(f"ldlm: {visible(' '.join(sentence.split()))}", file=sys.stderr, flush=True)
    raise SystemExit(status)


class Parser(argparse.ArgumentParser):
    """argparse with one-sentence errors that offer the nearest option."""

    def error(self, message: str) -> NoReturn:
        """Exit with status 2."""
        if message.startswith("unrecognized arguments: "):
            word = message.split()[2]
            options = [option for action in self._actions for option in action.option_strings]
            message = f"there is no option {word.partition('=')[0]}{nearest(word, options)}"
        fail(f"{self.prog.removeprefix('ldlm ')}: {message}")


def numbers(word: str) -> list[int]:
    """Whole numbers between commas, each once.

    >>> numbers("8,16,16")
    [8, 16]
    """
    try:
        return list(dict.fromkeys(int(part) for part in word.split(",")))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{word!r} is not whole numbers between commas, as in 8,64") from None


def explain(message: str, options: list[str], classes: list[str]) -> str:
    """One of jsonargparse's messages as one sentence, with the nearest option or class where a name is unknown."""
    if found := re.search(r"arguments are required: (?:\w+\.)?([\w.]+)", message):
        return f"--{found[1]} is required; {REQUIRED.get(found[1], 'the command with --help says what it is')}"
    key = re.search(r'[Kk]ey "([\w.]+)"', message)
    option = f"--{key[1]}: " if key else ""
    if found := re.search(r"[Uu]nrecognized arguments: (--?[\w.]+)", message):
        return f"there is no option {found[1]}{known_option(found[1], options)}"
    if found := re.search(r"(Group|Subcommand) '([\w.]+)' does not accept option '([\w.]+)'", message):  # in a recipe
        name = f"--{found[2]}.{found[3]}" if found[1] == "Group" else f"--{found[3]}"
        return f"there is no option {name}{known_option(name, options)}"
    if found := re.search(r"Option '([\w.]+)' is not accepted", message):
        names = sorted({name.lstrip("-") for name in options})
        if "." not in found[1]:
            names = sorted({name.rpartition(".")[2] for name in names})
        return f"{option}there is no option {found[1]!r}{known_option(found[1], names)}"
    if found := re.search(r"Expected an instantiatable class, but ([\w.]*) ?is abstract", message):
        how = f", as in --{key[1]} CLASS" if key else ""
        return f"{option}{found[1] or 'it'} is abstract: name a class of that kind first{how}"
    if found := re.search(r"(?:dot import path string: |given class_path ')([\w.]+)", message):
        if found[1] in classes:
            return f"{option}{found[1]} is a class of another kind"
        hint = nearest(found[1].rpartition(".")[2], classes)
        return f"{option}there is no class {found[1]!r}; give module.Class, the module in the current folder{hint}"
    # A union lists what each of its types objects to; what None objects to helps nobody.
    _, union, errors = message.partition("Errors:")
    lines = [line.strip(" -") for line in (errors if union else message).splitlines()]
    kept = [line for line in lines if line and not line.startswith(("Expected a <class 'NoneType'>", "Given value"))]
    return f"{option if union else ''}{' '.join(kept)}"


def known_option(name: str, options: list[str]) -> str:
    """A hint at the one option that has the same last name elsewhere, or at the option most like it."""
    same = [option for option in options if option.rpartition(".")[2] == name.rpartition(".")[2]]
    return f"; did you mean {same[0]!r}?" if len(same) == 1 else nearest(name, options)


def value_of(option: str, words: list[str]) -> str | None:
    """The last value given for an option, as ``--option value`` or ``--option=value``."""
    value = None
    for word, following in zip(words, [*words[1:], ""], strict=True):
        if word == option:
            value = following
        elif word.startswith(f"{option}="):
            value = word.partition("=")[2]
    return value
