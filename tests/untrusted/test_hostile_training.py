"""What a checkpoint says of its training, made to do harm or to make no sense: refused in one sentence, nothing run."""

import copy
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from helpers.command import complaint
from helpers.recipe import RECIPE
from helpers.tiny import make_home
from helpers.untrusted import nested, one_sentence, save_deep

from ldlm.checkpoints.integrity import digest_file
from ldlm.cli import main as cli
from ldlm.objective import JointObjective, TokenObjective
from ldlm.training.task import LDLMTask

pytestmark = pytest.mark.filterwarnings("ignore")
Change = Callable[[dict[str, Any]], Any]
JOINT, HARM = "ldlm.JointObjective", {"class_path": "os.system", "init_args": {"command": "touch was_run"}}


def section(value: Any) -> Change:
    """The whole section is something else."""
    return lambda about: about.update(training=value)


def task(**changes: Any) -> Change:
    """Other arguments of the task."""
    return lambda about: about["training"]["init_args"].update(changes)


def objective(class_path: Any, init_args: Any) -> Change:
    return task(objective={"class_path": class_path, "init_args": init_args})


def parts(depth: int) -> Any:
    part: Any = {"class_path": JOINT, "init_args": {}}
    for _ in range(depth):
        part = {"class_path": JOINT, "init_args": {"token_weight": part}}
    return part


# Refused by whoever makes the task, and by whoever compares it with another.
HOSTILE: dict[str, Change] = {
    "missing": lambda about: about.pop("training"),
    "nothing": section(None),
    "a list": section([]),
    "a text": section("ldlm.LDLMTask"),
    "a number": section(3),
    "empty": section({}),
    "no arguments": section({"class_path": "ldlm.LDLMTask", "init_args": None}),
    "a list of arguments": section({"class_path": "ldlm.LDLMTask", "init_args": [1, 2]}),
    "harm as the arguments": section({"class_path": "ldlm.LDLMTask", "init_args": "__import__('os').mkdir('was_run')"}),
    "an unknown argument": task(no_such_argument=1),
    "self": task(self=3),
    "a dunder": task(__class__="os.system"),
    "a numbered argument": lambda about: about["training"]["init_args"].update({1: 2}),
    "an argument with line feeds": task(**{"a\nb": 1}),
    "an argument of a long name": task(**{"x" * 10**6: 1}),
    "many unknown arguments": task(**{f"argument{i}": "x" * 300 for i in range(10_000)}),
    "objective a number": task(objective=3),
    "objective a text": task(objective=JOINT),
    "objective a list": task(objective=[JOINT, {}]),
    "objective empty": task(objective={}),
    "objective half": task(objective={"class_path": JOINT}),
    "harm": task(objective=HARM),
    "harm where a number is": task(weight_decay_of=HARM, eps=HARM),
    "harm within": objective(JOINT, {"token_weight": HARM}),
    "an import": objective("__import__('os').system", {"command": "touch was_run"}),
    "an import of builtins": objective("builtins.__import__", {"name": "antigravity"}),
    "eval": objective("builtins.eval", {"source": "open('was_run', 'w')"}),
    "exec by a module of ours": objective("ldlm.objective.__builtins__", {}),
    "a module of ours": objective("ldlm.objective.torch", {}),
    "a function of ours": objective("ldlm._files.write_atomically", {"path": "was_run"}),
    "a module that is not imported": objective("antigravity.Objective", {}),
    "a module that is not there": objective("no.such.Objective", {}),
    "no module": objective("JointObjective", {}),
    "a class with a dunder": objective("ldlm.JointObjective.__init__", {}),
    "a class of a long name": objective("ldlm." + "x" * 10**6, {}),
    "a class of a module of a long name": objective("x" * 10**6 + ".Objective", {}),
    "a long path": task(eps="/etc/" + "x" * 10**6),
    "an abstract objective": objective("ldlm.Objective", {}),
    "a model": objective("ldlm.LDLM", {}),
    "a task": objective("ldlm.LDLMTask", {"warmup_steps": 0}),
    "a callback": objective("ldlm.EMA", {}),
    "a grid": objective("ldlm.UniformGrid", {}),
    "a class that is a number": objective(3, {}),
    "a class that is a list": objective(["os", "system"], {}),
    "a class with line feeds": objective("ldlm.\nJointObjective\n", {}),
    "objective without arguments": objective(JOINT, None),
    "objective with a list": objective(JOINT, [1]),
    "objective with a text": objective(JOINT, "token_weight"),
    "objective with numbered arguments": objective(JOINT, {1: 2}),
    "objective with an unknown argument": objective(JOINT, {"speed": 1}),
    "objective with self": objective(JOINT, {"self": 1}),
    "a text for a weight": objective(JOINT, {"token_weight": "1.0"}),
    "a long text for a weight": objective(JOINT, {"token_weight": "1\n" * 10**6}),
    "a list for a weight": objective(JOINT, {"token_weight": [1.0]}),
    "bytes for a weight": objective(JOINT, {"token_weight": b"1"}),
    "a complex weight": objective(JOINT, {"token_weight": 1j}),
    "a tensor for a weight": objective(JOINT, {"token_weight": torch.ones(3)}),
    "a negative weight": objective(JOINT, {"token_weight": -1.0}),
    "a weight that is not finite": objective(JOINT, {"token_weight": float("nan")}),
    "a weight beyond all": objective(JOINT, {"token_weight": 10**400}),
    "a weight beyond all printing": objective(JOINT, {"token_weight": -(10**10_000)}),
    "a share above one": objective(JOINT, {"token_fraction": 1e308}),
    "a text for a switch": objective(JOINT, {"token_gradient": "yes"}),
    "a part for a weight": objective(JOINT, {"token_weight": {"class_path": "ldlm.UniformGrid", "init_args": {}}}),
    "a part that takes memory": task(eps={"class_path": "ldlm.AdaptiveTimesteps", "init_args": {"bins": 10**12}}),
    "a part that asks the hub": task(eps={"class_path": "ldlm.PretrainedTokenEncoder", "init_args": {"model": "a/b"}}),
    "a seed that is a text": task(seed="0"),
    "a seed that is bytes": task(seed=b"0"),
    "a seed that is a list": task(seed=[0]),
    "a seed beyond all": task(seed=10**400),
    "betas that are one": task(betas=[0.9]),
    "betas that are texts": task(betas=["a", "b"]),
    "statistics of a text": task(statistics_rows="many"),
    "a path": task(eps="/etc/passwd"),
    "lists without end": task(objective=nested(20_000, list)),
    "dictionaries without end": section(nested(20_000, dict)),
    "objectives without end": task(objective=parts(20_000)),
    "objectives within objectives": task(objective=parts(100)),
}
# A resumed run takes its own, or says what changes; the others make a task of it and refuse.
OWN: dict[str, Change] = {
    "a rate that is a text": task(learning_rate="fast"),
    "a rate that is not positive": task(learning_rate=0.0),
    "a rate beyond all": task(learning_rate=10**400),
    "a warm-up that is a text": task(warmup_steps="__import__('os')"),
    "a negative warm-up": task(warmup_steps=-1),
    "a warm-up beyond all": task(warmup_steps=10**400),
    "no warm-up": lambda about: about["training"]["init_args"].pop("warmup_steps"),
    "a refresh that is none": task(timestep_refresh=0),
    "a decay that is a list": task(lr_decay=[0.5]),
}


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    """A folder with a recipe and a checkpoint of its run, by the command."""
    folder = tmp_path_factory.mktemp("home")
    make_home(folder)
    recipe = copy.deepcopy(RECIPE)
    recipe["training"]["objective"] = {"class_path": "JointObjective"}
    recipe["trainer"]["logger"] = False
    recipe["trainer"]["callbacks"][-1]["init_args"]["dirpath"] = "kept"
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        cli.main(["fit", "--config", "recipe.yaml", "--trainer.max_steps", "2"])
    return folder


@pytest.fixture
def here(home, tmp_path, monkeypatch) -> Path:
    """A folder like it, without the checkpoint."""
    for name in ("encoder", "text.txt", "cache", "recipe.yaml"):
        (tmp_path / name).symlink_to(home / name)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def hostile(home: Path, change: Change) -> None:
    """The checkpoint, altered, as ``bad.ckpt``."""
    content = torch.load(home / "kept" / "last.ckpt", weights_only=True)
    change(content["ldlm"])
    save_deep(content, Path("bad.ckpt"))


VALIDATE = ("validate", "--ckpt_path", "bad.ckpt", "--data.dataset", "text.txt", "--data.batch_size", "4")
FIT = ("fit", "--config", "recipe.yaml", "--ckpt_path", "bad.ckpt", "--trainer.max_steps", "3")
EVERY = 9  # the others need the same code and take a second each


def some(names: dict[str, Change]) -> list[Any]:
    return [
        name if index % EVERY == 0 else pytest.param(name, marks=pytest.mark.slow) for index, name in enumerate(names)
    ]


@pytest.mark.parametrize("name", HOSTILE | OWN)
def test_a_task_is_made_of_no_hostile_section(home, here, name):
    hostile(home, (HOSTILE | OWN)[name])
    before = set(sys.modules)
    with pytest.raises(ValueError, match=r"bad\.ckpt|the checkpoint does not say how") as caught:
        LDLMTask.load_from_checkpoint("bad.ckpt")
    assert len(" ".join(str(caught.value).split())) < 1000
    assert "antigravity" not in set(sys.modules) - before
    assert not Path("was_run").exists()


@pytest.mark.parametrize("name", some(HOSTILE | OWN))
def test_validating_refuses_a_hostile_section_in_a_sentence(home, here, capsys, name):
    hostile(home, (HOSTILE | OWN)[name])
    assert len(complaint(capsys, *VALIDATE)) < 1000
    assert not Path("was_run").exists()


@pytest.mark.parametrize("name", some(HOSTILE))
def test_a_resumed_run_refuses_a_hostile_section_in_a_sentence_before_the_first_step(home, here, capsys, name):
    hostile(home, HOSTILE[name])
    assert len(complaint(capsys, *FIT)) < 4000
    assert not Path("was_run").exists()
    assert not list(here.glob("kept/*.ckpt"))
    assert "antigravity" not in sys.modules


@pytest.mark.parametrize("name", some(OWN))
def test_a_resumed_run_goes_by_its_own_rates_whatever_the_file_says(home, here, name):
    hostile(home, OWN[name])
    cli.main([*FIT])
    made = LDLMTask.load_from_checkpoint("kept/last.ckpt")
    assert (made.learning_rate, made.warmup_steps, made.timestep_refresh) == (3e-4, 2, 1)


def test_a_file_cannot_allow_what_its_reader_did_not(home, here):
    hostile(home, task(allow_changes=["sigma_dec", "data"], model="gpt2"))
    assert LDLMTask.load_from_checkpoint("bad.ckpt").allow_changes == ()


def test_a_section_that_is_whole_makes_its_task_again(home, here):
    hostile(home, objective("ldlm.TokenObjective", {"token_fraction": 0.5}))
    made = LDLMTask.load_from_checkpoint("bad.ckpt")
    assert isinstance(made.objective, TokenObjective)
    assert made.objective.token_fraction == 0.5
    assert isinstance(LDLMTask.load_from_checkpoint(home / "kept" / "last.ckpt").objective, JointObjective)
    cli.main([*VALIDATE])


def test_the_digest_of_a_file_is_looked_at_before_what_it_says(home, here, capsys):
    hostile(home, task(objective=HARM))
    digest_file(Path("bad.ckpt")).write_bytes(digest_file(home / "kept" / "last.ckpt").read_bytes())
    assert "bad.ckpt was altered" in complaint(capsys, *VALIDATE)
    with pytest.raises(ValueError, match="was altered") as caught:
        LDLMTask.load_from_checkpoint("bad.ckpt")
    one_sentence(caught.value)
