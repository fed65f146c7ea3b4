"""Shipped recipes, overlays and studies by name.

In: a name. Out: a file; or the nearest known name. No section of the paper. Nothing heavy is imported here.
"""

import difflib
import os
from collections.abc import Sequence
from importlib.resources import files
from importlib.resources.abc import Traversable

CONFIGS = files("ldlm") / "configs"


def first_line(file: Traversable) -> str:
    """What a shipped file says of itself in its first line, a comment."""
    return file.read_text(encoding="utf-8").splitlines()[0].lstrip("# ")


def preset_names(folder: str = "") -> list[str]:
    """Names of the shipped recipes, or of what is in a folder beside them."""
    files = (CONFIGS / folder).iterdir() if folder else CONFIGS.iterdir()
    return sorted(path.name.removesuffix(".yaml") for path in files if path.name.endswith(".yaml"))


def recipe_file(name: str) -> str:
    """The path of a config file, or of the shipped recipe or overlay of that name.

    Raises:
        ValueError: If there is neither.
    """
    if os.path.isfile(name):
        from ldlm.recipes import checked

        return checked(name)
    for folder in ("", "overlays"):
        if name in preset_names(folder):
            return str(CONFIGS / folder / f"{name}.yaml")
    known = [*preset_names(), *preset_names("overlays")]
    raise ValueError(f"--config {name}: there is no such file and no such recipe{nearest(name, known)}")


def nearest(word: str, known: Sequence[str]) -> str:
    """A hint at the known word most like the given one, or at all of them if they are few."""
    close = difflib.get_close_matches(word, known, n=1, cutoff=0.5)
    if close:
        return f"; did you mean {close[0]!r}?"
    return f"; there are {', '.join(known)}" if len(known) <= 12 else ""
