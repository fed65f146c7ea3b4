"""The house keeps its order: which folder imports which, how long files are, and what a light command may load."""

import ast
import os
import re
import subprocess
import sys
import time
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest
from helpers import ROOT

import ldlm

PACKAGE = ROOT / "ldlm"
# Folders and files of the package, those above importing from those below. Neighbours do not know each other.
LEVELS = [
    ["__main__"],
    ["cli"],
    ["studies", "benchmarks"],
    ["baselines"],
    ["training", "evaluation"],
    ["likelihood"],
    ["objective"],
    ["model", "testing"],
    ["checkpoints"],
    ["diffusion", "metrics"],
    ["nn", "data"],
    ["tokenizer"],
    ["hub", "presets", "plots"],
    ["_files", "_sizes", "rng", "recipes"],
]
LEVEL = {room: height for height, rooms in enumerate(reversed(LEVELS)) for room in rooms}
HEAVY = ("torch", "lightning", "transformers", "datasets", "numpy", "matplotlib", "jsonargparse")


def module_of(path: Path) -> str:
    """The name by which a file of the package is imported."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


FILES = {module_of(path): path for path in sorted(PACKAGE.rglob("*.py"))}
INSIDE = sorted(set(FILES) - {"ldlm"})  # ldlm/__init__.py holds nothing but names of what stands in the others
TESTS = sorted((ROOT / "tests").rglob("*.py"))


def room_of(module: str) -> str:
    """The folder, or the file beside the folders, that a module of the package belongs to."""
    return module.split(".")[1]


def modules_imported(path: Path) -> list[tuple[str, str]]:
    """Which modules of the package a file imports, and in which function each time; "" at the top of the file."""
    found = []

    def look(node: ast.AST, function: str) -> None:
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names if alias.name.startswith("ldlm.")]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} line {node.lineno}: import by full name"
            if node.module == "ldlm" or node.module.startswith("ldlm."):
                # What is imported is a file of that folder, a public name of the package, or something in that file.
                whole = {alias.name: f"{node.module}.{alias.name}" for alias in node.names}
                homes = ldlm._HOMES if node.module == "ldlm" else {}
                names = [
                    name if name in FILES else homes.get(alias, node.module)
                    for alias, name in whole.items()
                    if not alias.startswith("__")
                ]
        found.extend((name, function) for name in names)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            function = node.name
        for child in ast.iter_child_nodes(node):
            look(child, function)

    look(ast.parse(path.read_text(encoding="utf-8")), "")
    return found


IMPORTS = {module: modules_imported(FILES[module]) for module in INSIDE}


# --- who imports whom


def test_every_folder_and_every_file_beside_them_has_its_level():
    assert {room_of(module) for module in INSIDE} == set(LEVEL)


@pytest.mark.parametrize("module", INSIDE)
def test_a_file_imports_only_from_its_own_folder_and_from_levels_below(module):
    room = room_of(module)
    for name, _ in IMPORTS[module]:
        assert name != "ldlm", f"{module} imports from ldlm what is not public"
        below = LEVEL[room_of(name)] < LEVEL[room]
        assert below or room_of(name) == room, f"{module} imports {name}, which does not stand below {room}"


def test_no_file_imports_itself_by_way_of_others():
    graph = {module: {name for name, _ in IMPORTS[module]} - {module} for module in INSIDE}
    try:
        order = list(TopologicalSorter(graph).static_order())
    except CycleError as error:
        pytest.fail(" -> ".join(error.args[1]))
    assert sorted(set(order) - {"ldlm"}) == INSIDE
    assert sum(map(len, graph.values())) > 200  # else the contract is kept for want of imports


@pytest.mark.parametrize("module", [module for module in INSIDE if room_of(module) != "cli"])
def test_imports_are_at_the_top_but_in_commands_which_are_dispatched_before_anything_heavy_is_loaded(module):
    inside = {function for _, function in IMPORTS[module] if function}
    assert inside <= ({"recipe_file"} if module == "ldlm.presets" else set())


# --- files


@pytest.mark.parametrize("path", [*FILES.values(), *TESTS], ids=lambda path: str(path.relative_to(ROOT)))
def test_a_file_has_at_most_500_lines_and_a_docstring(path):
    text = path.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 500
    assert ast.get_docstring(ast.parse(text))


@pytest.mark.parametrize("module", FILES)
def test_no_file_asks_an_object_what_it_has(module):
    assert "hasattr(" not in FILES[module].read_text(encoding="utf-8")


def test_there_is_no_room_for_odds_and_ends():
    odds = {"utils", "common", "base", "types", "registry", "helpers", "misc"}
    assert odds.isdisjoint(word for module in INSIDE for word in module.split("."))


def test_no_test_file_imports_from_another_and_no_two_have_one_name():
    for path in TESTS:
        found = re.findall(r"^ *(?:from|import) (?:tests\b|test_).*", path.read_text(encoding="utf-8"), re.M)
        assert not found, f"{path}: {found}"
    names = [path.name for path in TESTS if path.name.startswith("test_")]
    assert len(names) == len(set(names))


def test_tests_stand_in_folders_named_as_the_packages():
    folders = {path.parent.name for path in TESTS if path.parent != ROOT / "tests"}
    ours = {room_of(module) for module in INSIDE if FILES[module].parent != PACKAGE}
    assert folders - ours == {"helpers", "house", "untrusted"}


# --- what is loaded when


def python(*words: str) -> str:
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, sys.path)])}
    return subprocess.run([sys.executable, *words], capture_output=True, text=True, check=True, env=environment).stdout


def test_the_command_loads_nothing_heavy_before_it_needs_to():
    loaded = python("-c", "import sys, ldlm.cli.main, ldlm.cli.bench; print(*sys.modules)").split()
    assert "ldlm.cli.bench" in loaded
    assert [name for name in HEAVY if name in loaded] == []


def test_listing_the_recipes_takes_less_than_a_second():
    seconds = []
    for _ in range(3):  # the best of three: the machine may be busy
        start = time.perf_counter()
        printed = python("-m", "ldlm", "presets")
        seconds.append(time.perf_counter() - start)
    assert "quickstart" in printed
    assert min(seconds) < 1


def test_the_package_itself_is_imported_in_a_tenth_of_a_second_and_without_torch():
    code = (
        "import sys, time; start = time.perf_counter(); import ldlm; print(time.perf_counter() - start, *sys.modules)"
    )
    seconds = []
    for _ in range(5):  # the best of five: the machine may be busy
        took, *loaded = python("-c", code).split()
        assert "ldlm" in loaded
        assert [name for name in HEAVY if name in loaded] == []
        seconds.append(float(took))
    assert min(seconds) < 0.1


# --- public names


def test_every_public_name_is_found_and_is_listed():
    assert len(ldlm.__all__) == len(set(ldlm.__all__)) > 50
    for name in ldlm._HOMES:
        found = getattr(ldlm, name)
        assert found.__name__ == name
        assert found.__module__ == ldlm._HOMES[name], f"ldlm.{name} stands in {found.__module__}"
    for name in ldlm._MODULES:
        assert getattr(ldlm, name).__name__ == f"ldlm.{name}"
    assert sorted([*ldlm._HOMES, *ldlm._MODULES]) == sorted(ldlm.__all__)
    assert set(ldlm.__all__) <= set(dir(ldlm))


def test_a_name_that_is_not_public_is_refused_by_name():
    with pytest.raises(AttributeError, match="module 'ldlm' has no attribute 'nowhere'"):
        _ = ldlm.nowhere


def test_type_checkers_are_told_of_the_same_names_at_the_same_places():
    tree = ast.parse(FILES["ldlm"].read_text(encoding="utf-8"))
    (block,) = (node for node in tree.body if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING")
    told = {}
    for node in block.body:
        assert isinstance(node, ast.ImportFrom)
        for alias in node.names:
            assert alias.asname == alias.name  # which mypy takes for an export
            told[alias.name] = node.module
    assert told == ldlm._HOMES | dict.fromkeys(ldlm._MODULES, "ldlm")
