"""Recipes that mislead, are odd or were altered: refused in one sentence or read rightly, and none is run."""

import json
import os
import random
import signal
from pathlib import Path

import pytest
import yaml
from helpers.command import complaint
from helpers.recipe import RECIPE
from helpers.tiny import make_home
from helpers.untrusted import one_sentence

from ldlm.cli import main as cli
from ldlm.cli.fit import Fit
from ldlm.presets import CONFIGS, recipe_file
from ldlm.recipes import checked


class Parsed(Exception):
    pass


BOMB = "n0: &n0 [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"n{i}: &n{i} [{', '.join([f'*n{i - 1}'] * 9)}]\n" for i in range(1, 40)
)
GOOD = yaml.safe_dump(RECIPE)
MISLEADING_RECIPES = {
    "a bomb": BOMB,
    "a bomb in the model": "model:\n" + "".join(f"  {line}\n" for line in BOMB.splitlines()),
    "a bomb as a value": f"{BOMB}tokenizer: *n39\n",
    "not UTF-8": GOOD.encode() + b"# \xff",
    "UTF-16": GOOD.encode("utf-16"),
    "a tab": f"{GOOD}\n\tx: 1\n",
    "a key twice": f"{GOOD}\nsequence_length: 9\n",
    "a key twice within": GOOD.replace("trainer:", "trainer:\n  max_steps: 99"),
    "lists without end": "x: " + "[" * 50_000,
    "closed lists without end": "x: " + "[" * 5000 + "]" * 5000,
    "maps without end": "model: " + "{a: " * 5000 + "1" + "}" * 5000,
    "forty levels": "x: " + "[" * 40 + "]" * 40,
    "itself": "x: &x [*x]\n",
    "itself in the model": "model: &x {a: *x}\n",
    "an alias of nothing": "x: *nothing\n",
    "a NUL": "tokenizer: \0\n",
    "two documents": f"{GOOD}\n---\na: 1\n",
}
ODD_RECIPES = {
    "python": "tokenizer: !!python/object/apply:os.system ['touch was_run']\n",
    "python alone": "!!python/object/apply:os.system ['touch was_run']\n",
    "a python name": "tokenizer: !!python/name:os.system\n",
    "nothing": "",
    "a list": "- 1\n",
    "a word": "hello\n",
    "a number as a key": "1: 2\n",
    "no key": "null: 2\n",
    "a list as a key": "? [a, b]\n: 2\n",
    "harm as a class": GOOD.replace("class_path: DiT", "class_path: os.system"),
    "a list as a class": GOOD.replace("class_path: DiT", "class_path: [1]"),
    "harm as a callback": "trainer: {callbacks: [{class_path: os.system, init_args: {command: touch was_run}}]}\n",
    "a huge number": "sequence_length: " + "9" * 5000 + "\n",
    "itself as its config": "config: bad.yaml\n",
}


@pytest.mark.parametrize("name", MISLEADING_RECIPES)
def test_a_misleading_recipe_is_refused_before_it_is_read(tmp_path, name):
    content = MISLEADING_RECIPES[name]
    (tmp_path / "bad.yaml").write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError, match=r"bad\.yaml cannot be read as a recipe: ") as caught:
        recipe_file(str(tmp_path / "bad.yaml"))
    one_sentence(caught.value)


def test_the_shipped_recipes_are_far_from_what_is_refused():
    for file in [*Path(str(CONFIGS)).glob("*.yaml"), *Path(str(CONFIGS)).glob("*/*.yaml")]:
        assert checked(str(file)) == str(file)


@pytest.mark.parametrize("name", ODD_RECIPES)
def test_an_odd_recipe_is_refused_in_a_sentence_and_runs_nothing(tmp_path, monkeypatch, capsys, name):
    monkeypatch.chdir(tmp_path)
    content = ODD_RECIPES[name]
    Path("bad.yaml").write_bytes(content if isinstance(content, bytes) else content.encode())
    complaint(capsys, "fit", "--config", "bad.yaml")
    assert os.listdir() == ["bad.yaml"]


def test_what_yaml_allows_and_does_no_harm_is_read(tmp_path, monkeypatch):
    def stop(_):
        raise Parsed

    monkeypatch.setattr(Fit, "instantiate_classes", stop)
    for content in (GOOD, f"\ufeff{GOOD}", GOOD.replace("\n", "\r\n"), f"# ש 👩‍👧\n{GOOD}", f"---\n{GOOD}...\n"):
        (tmp_path / "good.yaml").write_text(content, newline="")
        with pytest.raises(Parsed):
            cli.main(["fit", "--config", str(tmp_path / "good.yaml")])


WRONG = [None, True, -1, 0, 3.5, "text", "", [], [1], {}, {"a": 1}, {"class_path": "os.system"}, 10**30, float("nan")]


def mutated(dice: random.Random) -> str:
    """The recipe with one or two of its values, keys or letters altered, for better or worse."""
    recipe = json.loads(json.dumps(RECIPE))
    for _ in range(dice.randint(0, 2)):
        place, way = recipe, dice.randrange(4)
        while True:
            keys = list(place) if isinstance(place, dict) else list(range(len(place)))
            if not keys:
                break
            key = dice.choice(keys)
            if isinstance(place[key], dict | list) and place[key] and dice.random() < 0.8:
                place = place[key]
                continue
            if way == 0:
                del place[key]
            elif way == 1 and isinstance(place, dict):
                place[f"{key}x"] = place.pop(key)
            elif way == 2 and isinstance(place[key], int | float):
                place[key] = place[key] * dice.choice([2, 0.5, 1]) + dice.choice([0, 1])
            else:
                place[key] = dice.choice(WRONG)
            break
    text = yaml.safe_dump(recipe)
    if dice.random() < 0.2:
        at = dice.randrange(len(text))
        text = text[:at] + dice.choice(["\t", "\0", "*", "&", "!", "{", "]", ":", "\n", "é", "\u2028", " "]) + text[at:]
    return text


def mutations(count: int, seed: int, folder: Path, capsys, *words: str) -> tuple[int, int]:
    """How many mutated recipes were refused, each in a sentence, and how many were read."""
    dice, told, read = random.Random(seed), 0, 0
    for case in range(count):
        before, code = told, 0
        (folder / "bad.yaml").write_text(mutated(dice), encoding="utf-8")
        try:
            cli.main(["fit", "--config", "bad.yaml", *words])
            read += 1
        except Parsed:
            read += 1
        except SystemExit as stop:
            code = stop.code
            told += 1
        said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("ldlm: ")]
        assert told + read == case + 1
        assert len(said) == told - before, (folder / "bad.yaml").read_text()
        assert told == before or code == 2
    return told, read


def test_mutated_recipes_are_refused_in_a_sentence_or_read(tmp_path, monkeypatch, capsys):
    def stop(_):
        raise Parsed

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(Fit, "instantiate_classes", stop)
    told, read = mutations(12, 0, tmp_path, capsys)
    assert told + read == 12


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_many_mutated_recipes_are_refused_in_a_sentence_or_trained_by(tmp_path, monkeypatch, capsys):
    signal.alarm(900)
    monkeypatch.chdir(tmp_path)
    make_home(tmp_path)
    told, read = mutations(150, 1, tmp_path, capsys, "--trainer.max_steps", "1")
    assert told >= 50
    assert read >= 20
    assert not (tmp_path / "was_run").exists()
