"""YAML of others: every file of it is checked before it is read, names no function, and an odd study is refused."""

import contextlib
import io
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from helpers.command import complaint
from helpers.recipe import RECIPE
from helpers.tiny import make_home

from ldlm.cli import main as cli
from ldlm.cli.fit import Command
from ldlm.data.corpus import lm1b_detokenizer
from ldlm.data.datamodule import PackedTextDataModule
from ldlm.studies.plan import content, find_study, plan


class Parsed(Exception):
    """Raised where classes would be made; holds the configuration."""


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A folder with a recipe; commands end when they have read their configuration."""

    def stop(command: Command) -> None:
        raise Parsed(command.config.fit)

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(Command, "instantiate_classes", stop)
    monkeypatch.setattr(sys, "path", [*sys.path])
    Path("tiny.yaml").write_text(yaml.safe_dump(RECIPE))
    return tmp_path


def parsed(*words: str) -> Any:
    with pytest.raises(Parsed) as stop:
        cli.main(["fit", "--config", "tiny.yaml", *words])
    return stop.value.args[0]


# --- files within files

BOMB = "n0: &n0 [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"n{i}: &n{i} [{', '.join([f'*n{i - 1}'] * 9)}]\n" for i in range(1, 40)
)
PARTS = {
    "data": RECIPE["data"],
    "model": RECIPE["model"],
    "trainer": RECIPE["trainer"],
    "training": RECIPE["training"],
    "model.denoiser": RECIPE["model"]["denoiser"],
    "trainer.logger": RECIPE["trainer"]["logger"],
}
MISLEADING = {
    "a bomb": lambda text: BOMB,
    "a bomb at its end": lambda text: (
        text + (f"x:\n{BOMB}" if not text.startswith("-") else BOMB).replace("\n", "\n  ")
    ),
    "a key twice": lambda text: "a: 1\na: 2\n" if text.startswith("-") else text + text,
    "forty levels": lambda text: "x: " + "[" * 40 + "]" * 40,
    "itself": lambda text: "x: &x [*x]\n",
}


def as_option(part: str, file: str) -> list[str]:
    return [f"--{part}", file]


def in_a_recipe(part: str, file: str) -> list[str]:
    recipe = json.loads(json.dumps(RECIPE))
    place = recipe
    for key in part.split(".")[:-1]:
        place = place[key]
    place[part.split(".")[-1]] = file
    Path("outer.yaml").write_text(yaml.safe_dump(recipe))
    return ["--config", "outer.yaml"]


@pytest.mark.parametrize("way", [as_option, in_a_recipe], ids=lambda way: way.__name__)
@pytest.mark.parametrize(
    "part", [part if part == "data" else pytest.param(part, marks=pytest.mark.slow) for part in PARTS]
)
def test_a_file_that_a_recipe_or_an_option_names_is_checked_as_the_recipe_is(here, capsys, part, way):
    whole = yaml.safe_dump(PARTS[part])
    Path("part.yaml").write_text(whole)
    parsed(*way(part, "part.yaml"))  # it is read where nothing is wrong with it
    for name, change in MISLEADING.items() if part != "data" else [*MISLEADING.items()][1:3]:
        Path("part.yaml").write_text(change(whole))
        said = complaint(capsys, "fit", "--config", "tiny.yaml", *way(part, "part.yaml"))
        assert "twice" in said or "levels deep" in said or "values" in said or "cannot be read" in said, (name, said)
        assert len(said) < 600


# --- functions

FUNCTIONS = [
    "subprocess.getoutput",
    "os.system",
    "shutil.rmtree",
    "os.path.expanduser",
    "builtins.eval",
    "importlib.import_module",
    "ldlm._files.sha256",
    "ldlm.data.datamodule.open_corpus",
    "their_words.shout",
    "getoutput",
    "gpt2",
    "lm1b.",
]


def test_a_recipe_names_no_function_that_documents_are_given_to(here, capsys):
    Path("their_words.py").write_text("open('was_imported', 'w')\n")
    for name in FUNCTIONS:
        recipe = RECIPE | {"data": RECIPE["data"] | {"detokenize": name}}
        Path("shell.yaml").write_text(yaml.safe_dump(recipe))
        said = complaint(capsys, "fit", "--config", "shell.yaml")
        assert f"detokenize={name!r} must be 'lm1b', or a function of a module" in said
        assert "--import" in said
    for odd in ({"class_path": "subprocess.Popen", "init_args": {"args": ["touch", "was_run"]}}, ["lm1b"], 3, True):
        Path("shell.yaml").write_text(yaml.safe_dump(RECIPE | {"data": RECIPE["data"] | {"detokenize": odd}}))
        complaint(capsys, "fit", "--config", "shell.yaml")
    assert not {"was_run", "was_imported"} & {path.name for path in here.iterdir()}


def test_a_detokenizer_is_named_or_of_a_module_that_was_imported(here):
    Path("my_words.py").write_text("def shout(text):\n    return text.upper()\n")
    assert parsed("--data.detokenize", "lm1b").data.detokenize == "lm1b"
    found = parsed("--import", "my_words", "--data.detokenize", "my_words.shout").data.detokenize
    assert found("word") == "WORD"
    Path("text.txt").write_text("word1 word2")
    arguments: dict[str, Any] = {"dataset": "text.txt", "tokenizer": "gpt2", "sequence_length": 8, "batch_size": 1}
    assert PackedTextDataModule(**arguments, detokenize="lm1b").detokenize is lm1b_detokenizer
    assert PackedTextDataModule(**arguments, detokenize=found).detokenize is found
    with pytest.raises(ValueError, match=r"detokenize='ptb' must be 'lm1b', or a function of a module"):
        PackedTextDataModule(**arguments, detokenize="ptb")
    del sys.modules["my_words"]


def test_what_a_run_keeps_of_its_configuration_names_the_function_again(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    make_home(tmp_path)
    Path("my_words.py").write_text("def shout(text):\n    return text.upper().lower()\n")
    Path("tiny.yaml").write_text(yaml.safe_dump(RECIPE))
    words = ["--import", "my_words", "fit", "--config", "tiny.yaml", "--data.detokenize", "my_words.shout"]
    cli.main([*words, "--trainer.max_steps", "1"])
    kept = yaml.safe_load(Path("runs/tiny/version_0/config.yaml").read_text())
    assert kept["data"]["detokenize"] == "my_words.shout"
    cli.main(["--import", "my_words", "fit", "--config", "runs/tiny/version_0/config.yaml"])
    del sys.modules["my_words"]


def test_the_shipped_recipe_for_lm1b_names_its_detokenizer():
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), pytest.raises(SystemExit):
        cli.main(["fit", "--config", "lm1b", "--print_config"])
    assert yaml.safe_load(printed.getvalue())["data"]["detokenize"] == "lm1b"


# --- studies

SMALL: dict[str, Any] = {"base": {"laptop": []}, "cells": {"a": {}}, "tables": {"T": {"r": {"cell": "a"}}}}


def changed(**changes: Any) -> str:
    return yaml.safe_dump(SMALL | changes)


def named(name: Any) -> str:
    return changed(cells={name: {}}, tables={"T": {"r": {"cell": name}}})


def celled(**about: Any) -> str:
    return changed(cells={"b": {}, "a": about})


def rowed(**about: Any) -> str:
    return changed(tables={"T": {"r": {"cell": "a", **about}}})


ODD_STUDIES = {
    "nothing": "",
    "a list": "- 1\n",
    "a word": "word\n",
    "a number": "3\n",
    "null": "null\n",
    "no YAML": "a: [\n",
    "a tab": "\tcells: {}\n",
    "not UTF-8": b"\xff",
    "UTF-16": changed().encode("utf-16"),
    "a NUL": "a: \0\n",
    "a key twice": changed() + "cells: {b: {}}\n",
    "a bomb": BOMB,
    "itself": "x: &x [*x]\n",
    "lists without end": "x: " + "[" * 50_000,
    "python": "!!python/object/apply:os.system ['touch was_run']\n",
    "a date that is none": "base: 2020-99-99\n",
    "a list as a key": "? [a]\n: 1\n",
    "base null": changed(base=None),
    "base a list": changed(base=[]),
    "base of another scale": changed(base={"huge": []}),
    "base without lists": changed(base={"laptop": None}),
    "base of text": changed(base={"laptop": "x"}),
    "base of numbers": changed(base={"laptop": [1]}),
    "base of a number": changed(base={1: []}),
    "base unknown": changed(base={"laptop": ["no-such"]}),
    "base of ../": changed(base={"laptop": ["../../x"]}),
    "cells null": changed(cells=None),
    "cells a list": changed(cells=["a"]),
    "no cells": changed(cells={}),
    "a cell null": changed(cells={"a": None}),
    "a cell a list": changed(cells={"a": []}),
    "a cell a text": changed(cells={"a": "fit"}),
    "an unknown key": celled(confgs=[]),
    "a number as a key": celled(**{"1": 2}),
    "numbers as keys": changed(cells={"a": {1: 2}}),
    "null as a key": changed(cells={"a": {None: 2}}),
    "configs a text": celled(configs="x"),
    "configs of numbers": celled(configs=[1]),
    "configs null": celled(configs=None),
    "configs of lists": celled(configs=[["x"]]),
    "configs unknown": celled(configs=["no-such"]),
    "options of numbers": celled(laptop=["--model.sigma_dec", 0.5]),
    "options null": celled(laptop=None),
    "options a mapping": celled(laptop={"a": 1}),
    "another command": celled(command="generate"),
    "a command of the system": celled(command="../../bin/sh"),
    "a command a number": celled(command=3),
    "a command a list": celled(command=["fit"]),
    "from a text": celled(**{"from": "b"}),
    "from a list": celled(**{"from": ["b"]}),
    "from without an option": celled(**{"from": {"cell": "b"}}),
    "from of a number": celled(**{"from": {"cell": "b", "option": 3}}),
    "from itself": celled(**{"from": {"cell": "a", "option": "--latents"}}),
    "from lists": celled(**{"from": {"cell": ["b"], "option": "--latents"}}),
    "fit_only a text": celled(fit_only="yes"),
    "up": named("../a"),
    "far up": named("../../../a"),
    "from the root": named("/tmp/a"),
    "a folder": named("a/b"),
    "dots": named(".."),
    "a dot": named("."),
    "hidden": named(".a"),
    "no name": named(""),
    "a space": named(" "),
    "a NUL in a name": named("a\0b"),
    "a newline": named("a\nb"),
    "a tab in a name": named("a\tb"),
    "a backslash": named("..\\a"),
    "an option": named("--output"),
    "a star": named("*"),
    "a name too long": named("a" * 300),
    "a variable": named("$HOME"),
    "a number as a name": named(1),
    "a fraction as a name": named(0.5),
    "null as a name": named(None),
    "true": named(True),
    "an escape": named("\x1b[31ma"),
    "two by case": changed(cells={"a": {}, "A": {}}),
    "two by Unicode": changed(cells={"a": {}, "\u00e9": {}, "e\u0301": {}}),
    "a drive": named("c:a"),
    "tables null": changed(tables=None),
    "tables a list": changed(tables=[1]),
    "a table null": changed(tables={"T": None}),
    "a table a list": changed(tables={"T": ["a"]}),
    "a row null": changed(tables={"T": {"r": None}}),
    "a row a text": changed(tables={"T": {"r": "a"}}),
    "a row of nothing": changed(tables={"T": {"r": {}}}),
    "a row of a list": changed(tables={"T": {"r": {"cell": ["a"]}}}),
    "a row named by a number": changed(tables={"T": {1: {"cell": "a"}}}),
    "a table named by a number": changed(tables={1: {"r": {"cell": "a"}}}),
    "a cell it lacks": changed(tables={"T": {"r": {"cell": "z"}}}),
    "a number alone": rowed(perplexity=3),
    "numbers of text": rowed(perplexity=["a", "b"]),
    "three numbers": rowed(mauve=[1, 2, 3]),
    "numbers null": rowed(entropy=None),
    "an empty pair": rowed(entropy=[]),
    "truths": rowed(entropy=[True, False]),
    "real a list": changed(real=[1]),
    "real of numbers": changed(real={"entropy": 3}),
    "real null": changed(real=None),
    "published a list": changed(published=["x"]),
    "published null": changed(published=None),
    "curves a list": changed(curves=["a"]),
    "curves null": changed(curves=None),
    "curves of lists": changed(curves={"x": ["a"]}),
    "curves of none": changed(curves={"x": "z"}),
    "curves by number": changed(curves={1: "a"}),
}


@pytest.mark.parametrize("name", ODD_STUDIES)
def test_an_odd_study_is_refused_in_a_sentence_and_writes_nothing(tmp_path, monkeypatch, capsys, name):
    (tmp_path / "in" / "it").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "in" / "it")
    text = ODD_STUDIES[name]
    Path("odd.yaml").write_bytes(text if isinstance(text, bytes) else text.encode())
    said = complaint(capsys, "study", "odd.yaml", "--scale", "laptop", "--output", "out", "--work", "work")
    assert len(said) < 500
    assert said.isprintable()
    assert [str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file()] == ["in/it/odd.yaml"]


def test_a_plain_study_is_planned_and_its_files_are_in_its_folders(tmp_path):
    (tmp_path / "plain.yaml").write_text(named("a.B_c+d=1-2"))
    study = find_study(str(tmp_path / "plain.yaml"))
    (cell,) = plan(study, "laptop", 1, tmp_path / "out", tmp_path / "work", [])
    assert cell.result == tmp_path / "out" / "a.B_c+d=1-2-seed0.json"
    assert cell.work == tmp_path / "work" / "a.B_c+d=1-2-seed0"


@pytest.mark.parametrize("text", ["1: 2\na: 3\n", "a: 2020-01-01\n", "a: 1\na: 2\n", "? [a]\n: 1\n", "a: 2020-99-99\n"])
def test_a_recipe_on_top_of_a_study_is_checked_too(tmp_path, monkeypatch, capsys, text):
    monkeypatch.chdir(tmp_path)
    Path("top.yaml").write_text(text)
    said = complaint(capsys, "study", "table1", "--scale", "laptop", "--config", "top.yaml")
    assert "top.yaml" in said
    assert content("quickstart") == content("quickstart")
