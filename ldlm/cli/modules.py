"""Modules of the user's own, named in a command or in a recipe, and found in the current folder.

In: words from a shell. Out: imported modules. No section of the paper.
"""

import importlib
import os
import re
import sys
from collections.abc import Sequence
from importlib.machinery import PathFinder
from types import ModuleType
from typing import Any, ClassVar

from ldlm.cli.arguments import Fault

IMPORTED: list[str] = []  # what --import named, for commands that start others


def import_modules(words: list[str]) -> list[str]:
    """Import what ``--import`` names, and return the other words."""
    IMPORTED.clear()
    rest: list[str] = []
    queue = iter(words)
    for word in queue:
        if word != "--import" and not word.startswith("--import="):
            rest.append(word)
            continue
        name = word.partition("=")[2] or next(queue, "")
        try:
            NamedModules.take(f"{name}.")
            importlib.import_module(name)
        except (ImportError, ValueError) as error:
            raise Fault(f"--import {name}: {error}; it is looked for in the current folder, too") from error
        IMPORTED.append(name)
    return rest


class NamedModules:
    """Finds modules in the current folder, if the user has named them and they are nowhere else.

    A user's ``my_encoder.py`` is there. So may be, in a folder that was downloaded, a module of any name that some
    package looks for. The first that is found so puts the folder at the end of the path, for what it imports itself.
    """

    names: ClassVar[set[str]] = set()

    @classmethod
    def find_spec(cls, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None) -> Any:
        """The module's place in the current folder; None for modules in packages, and for those that nobody named."""
        here = os.getcwd()
        spec = PathFinder.find_spec(name, [here]) if path is None and name in cls.names else None
        if spec is not None and here not in sys.path:
            sys.path.append(here)
        return spec

    @classmethod
    def take(cls, text: str) -> None:
        """Note the modules that a user's words or recipe may name, as the first part of a name with dots."""
        cls.names.update(re.findall(r"(?<![\w.])([^\W\d]\w*)(?=\.)", text))
