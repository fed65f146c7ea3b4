"""Recipes of others, looked at before they are believed.

In: the path of a YAML file, or YAML text. Out: the same path, or what is in it; or one sentence about what is wrong.
No section of the paper. A recipe can name any class and is therefore code: this is no protection from one that means
harm. What YAML allows and no recipe needs is refused where it would mislead (a key given twice, of
which the first is forgotten) or never end (aliases of aliases, nesting without end).
"""

from typing import Any, TextIO

import yaml

MOST, DEEPEST = 10_000, 30  # values with aliases written out, and levels; the shipped recipes have about 200 and 7


def checked(path: str) -> str:
    """The path again, if the file can be read as a recipe.

    Raises:
        ValueError: If it is not UTF-8 or not YAML, gives a key twice, or means more than anybody wrote.
    """
    try:
        with open(path, encoding="utf-8-sig") as file:
            check(file)
    except (ValueError, yaml.YAMLError) as error:
        raise ValueError(f"{path} cannot be read as a recipe: {' '.join(str(error).split())}") from None
    return path


def check(text: str | TextIO) -> None:
    """Look at YAML text before it is read.

    Raises:
        ValueError: If it gives a key twice, or means more than anybody wrote.
        yaml.YAMLError: If it is not YAML.
    """
    try:
        root = yaml.compose(text, Loader=yaml.SafeLoader)
        if root is not None and _size(root, {}, 0) > MOST:
            raise ValueError(f"with its aliases written out it has more than {MOST:,} values")
    except RecursionError:
        raise ValueError(f"it is more than {DEEPEST} levels deep") from None


def read(path: str) -> Any:
    """What a YAML file says, once it is `checked`; ValueError if it is not YAML, or a value in it is impossible."""
    with open(checked(path), encoding="utf-8-sig") as file:
        try:
            return yaml.safe_load(file)
        except (ValueError, yaml.YAMLError) as error:  # a date that is none, a list as a key
            raise ValueError(f"{path} cannot be read as a recipe: {' '.join(str(error).split())}") from None


def _size(node: yaml.Node, sizes: dict[yaml.Node, int], depth: int) -> int:
    """How many values a node stands for, each node being looked at once."""
    if depth > DEEPEST:
        raise ValueError(f"line {node.start_mark.line + 1} is more than {DEEPEST} levels deep")
    if node not in sizes:
        inside = node.value if isinstance(node, yaml.SequenceNode) else []
        if isinstance(node, yaml.MappingNode):
            names = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
            if twice := {name for name in names if names.count(name) > 1}:
                raise ValueError(f"{min(twice)!r} is given twice below line {node.start_mark.line}")
            inside = [part for pair in node.value for part in pair]
        sizes[node] = 1 + sum(_size(part, sizes, depth + 1) for part in inside)
    return sizes[node]
