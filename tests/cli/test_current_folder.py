"""What lies in the current folder, or is written in a checkpoint, is no code of the command and none of its options.

The folder holds a module for each name that the interpreter, or any installed package, could import; each leaves a
marker when it is run.
"""

import json
import os
import subprocess
import sys
from importlib.metadata import packages_distributions
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from helpers.recipe import RECIPE
from helpers.tiny import HIDDEN, VOCAB, make_home, make_model, make_scorer_folder, make_tokenizer

from ldlm.checkpoints.description import describe_model
from ldlm.checkpoints.integrity import write
from ldlm.cli import main as cli
from ldlm.nn.token_encoders import EmbeddingTokenEncoder

LAST = "runs/tiny/version_0/checkpoints/last.ckpt"
# Packages that others look for, without their being installed.
OPTIONAL = [
    "apex", "bitsandbytes", "deepspeed", "flash_attn", "jax", "keras", "kernels", "litlogger", "litmodels", "mlflow",
    "neptune", "numba", "omegaconf", "onnx", "optimum", "orjson", "peft", "ruamel", "scipy", "sitecustomize", "sklearn",
    "tensorboardX", "tensorflow", "torch_xla", "torchao", "torchaudio", "torchvision", "triton", "usercustomize",
    "wandb", "xformers",
]  # fmt: skip
# What ``python -m`` imports from the folder before anything of ours can say no; ``python -P -m`` does not.
LOADED = [sys.executable, "-c", "import sys, runpy, pkgutil, warnings, contextlib; print(*sys.modules)"]
INTERPRETERS = {"ldlm", "sitecustomize", "usercustomize"} | {
    name.partition(".")[0] for name in subprocess.run(LOADED, capture_output=True, text=True, check=True).stdout.split()
}


def set_traps(folder: Path) -> None:
    """Put a module of each name into a folder, which leaves a marker and is of no use."""
    names = {*sys.stdlib_module_names, *packages_distributions(), *OPTIONAL}
    marker = str(folder / "was_run")
    for name in filter(str.isidentifier, names):
        (folder / f"{name}.py").write_text(f"with open({marker!r}, 'a') as file:\n    file.write('{name} ')\n")
    assert (folder / "yaml.py").exists()
    assert (folder / "safetensors.py").exists()


def start(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTHONSAFEPATH")}
    return subprocess.run(words, cwd=folder, capture_output=True, text=True, env=environment, timeout=300)


SCRIPT = [str(Path(sys.executable).with_name("ldlm"))]
MODULE = [sys.executable, "-m", "ldlm"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A downloaded folder: a model, its scorer, texts, a recipe and the traps."""
    here = tmp_path_factory.mktemp("downloaded")
    make_home(here)
    model = make_model(token_encoder=EmbeddingTokenEncoder(HIDDEN, VOCAB), tokenizer=make_tokenizer())
    model.save_pretrained(here)
    make_scorer_folder(here / "scorer")
    content = {"state_dict": model.state_dict(), "ldlm": describe_model(model)}
    write(content, here / "model.ckpt")
    recipe = RECIPE | {"trainer": RECIPE["trainer"] | {"max_steps": 1}}
    (here / "tiny.yaml").write_text(yaml.safe_dump(recipe))
    set_traps(here)
    return here


FAST = [[*SCRIPT, "presets"], [*MODULE, "presets"]]
SCORE = ["evaluate", ".", "-n", "4", "--nfe", "1", "--scorer", "./scorer", "--output", "out.json"]
SLOW = [
    [*SCRIPT, "generate", ".", "-n", "1", "--nfe", "1"],
    [*MODULE, "generate", ".", "-n", "1", "--nfe", "1"],
    [*SCRIPT, "evaluate", *SCORE[1:]],
    [*SCRIPT, "export", "model.ckpt", "out"],
    [*MODULE, "export", "model.ckpt", "out2"],
    [*SCRIPT, "fit", "--config", "tiny.yaml"],
    [*MODULE, "fit", "--config", "tiny.yaml", "--data.num_workers", "1"],
    [*SCRIPT, "fit", "--config", "quickstart", "--print_config"],
    [*SCRIPT, "bench", "packing", "--help"],
    [*SCRIPT, "study", "table1", "--help"],
]


@pytest.mark.parametrize(
    "words",
    [*FAST, *(pytest.param(words, marks=pytest.mark.slow) for words in SLOW)],
    ids=lambda words: " ".join(Path(word).name for word in words[:4]),
)
def test_a_command_runs_nothing_of_the_folder_that_it_is_started_in(folder, words):
    for name in INTERPRETERS:
        (folder / f"{name}.py").unlink(missing_ok=True)
        if words[1] != "-m":
            (folder / f"{name}.py").write_text((folder / "yaml.py").read_text())
    (folder / "was_run").unlink(missing_ok=True)
    done = start(folder, *words)
    run = (folder / "was_run").read_text() if (folder / "was_run").exists() else ""
    assert run == ""
    assert done.returncode == 0, done.stderr[-2000:]


def test_the_traps_are_run_where_the_folder_comes_first(folder, tmp_path):
    (tmp_path / "was_run").unlink(missing_ok=True)
    set_traps(tmp_path)
    start(tmp_path, sys.executable, "-c", "import yaml, safetensors, rich")
    assert (tmp_path / "was_run").read_text().split()[-3:] == ["yaml", "safetensors", "rich"]


def test_what_a_command_starts_does_not_look_into_the_folder_either(tmp_path, monkeypatch):
    monkeypatch.delenv("PYTHONSAFEPATH", raising=False)
    monkeypatch.setattr(sys, "argv", ["ldlm", "presets"])
    cli.main()
    assert os.environ["PYTHONSAFEPATH"] == "1"
    (tmp_path / "yaml.py").write_text("raise SystemExit(9)")
    words = [sys.executable, "-c", "import yaml"]
    assert subprocess.run(words, cwd=tmp_path, timeout=60).returncode == 0
    monkeypatch.delenv("PYTHONSAFEPATH")
    assert subprocess.run(words, cwd=tmp_path, timeout=60).returncode == 9


@pytest.fixture
def modules(tmp_path, monkeypatch):
    """A user's modules, and one that nobody named; the path is as it was afterwards."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setattr(cli.NamedModules, "names", set())
    one = "from ldlm.nn.denoiser import DiT\nclass TheirDiT(DiT):\n    pass\n"
    Path("my_part_one.py").write_text(f"{one}def helper():\n    import my_part_two\n    return my_part_two.VALUE\n")
    Path("my_part_two.py").write_text("VALUE = 3\n")
    for name in ("tensorflow", "yaml", "my_part_three"):
        Path(f"{name}.py").write_text(f"open('{name}_was_run', 'w')")
    make_home(tmp_path)
    yield [*sys.path]
    for name in ("my_part_one", "my_part_two"):
        sys.modules.pop(name, None)


WORDS = ["fit", "--config", "tiny.yaml", "--trainer.max_steps", "1"]
NAMING = {
    "--import": ["--import", "my_part_one", "presets"],
    "an option": [*WORDS, "--model.denoiser.class_path", "my_part_one.TheirDiT"],
    "a short option": [*WORDS, "--model.denoiser=my_part_one.TheirDiT"],
    "a recipe": ["fit", "--config", "named.yaml", "--trainer.max_steps", "1"],
    "a part of a recipe": [*WORDS, "--model.denoiser", "part.yaml"],
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "way", [way if way == "a recipe" else pytest.param(way, marks=pytest.mark.slow) for way in NAMING]
)
def test_a_module_that_the_user_names_is_found_in_the_folder_after_all_others(modules, monkeypatch, way):
    recipe = json.loads(json.dumps(RECIPE))
    Path("tiny.yaml").write_text(yaml.safe_dump(recipe))
    recipe["model"]["denoiser"]["class_path"] = "my_part_one.TheirDiT"
    Path("named.yaml").write_text(yaml.safe_dump(recipe))
    Path("part.yaml").write_text(yaml.safe_dump(recipe["model"]["denoiser"]))
    cli.main(NAMING[way])
    assert sys.path == [*modules, str(Path.cwd())]
    assert sys.modules["my_part_one"].helper() == 3  # what it imports later is found, too
    assert not [*Path().glob("*_was_run")]


@pytest.mark.filterwarnings("ignore")
def test_the_folder_is_not_on_the_path_where_the_user_names_no_module_of_his_own(modules):
    Path("tiny.yaml").write_text(yaml.safe_dump(RECIPE))
    cli.main(["presets"])
    cli.main(WORDS)
    assert sys.path == modules
    assert not [*Path().glob("*_was_run")]


# --- what a checkpoint says of options


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A folder with a recipe, the checkpoint of its run, and a module that a checkpoint might name."""
    here = tmp_path_factory.mktemp("home")
    make_home(here)
    (here / "gift.py").write_text("from ldlm.nn.denoiser import DiT\nopen('was_run', 'w')\nclass X(DiT):\n    pass\n")
    (here / "tiny.yaml").write_text(yaml.safe_dump(RECIPE))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(here)
        cli.main(["fit", "--config", "tiny.yaml"])
    return here


GIFTS: dict[str, dict[str, Any]] = {
    "a class of a part": {"token_encoder": {"class_path": "gift.X", "init_args": {}}},
    "a class of the model": {"_class_path": "gift.X"},
    "an instantiator": {"_instantiator": "gift.X", "learning_rate": 123.0},
    "a number": {"learning_rate": 123.0},
    "no argument": {"no_such_argument": 1},
    "no mapping": [1],  # type: ignore[dict-item]
}
RESUMED = ["fit", "--config", "tiny.yaml", "--trainer.max_steps", "4", "--ckpt_path", "gift.ckpt"]
STAGE = [
    "fit-decoder",
    "--config",
    "tiny.yaml",
    "--stage.layers",
    "1",
    "--stage.heads",
    "2",
    "--trainer.max_steps",
    "1",
]
FIXED = ["fit", "--config", "tiny.yaml", "--training.objective", "JointObjective"]
FIXED += [f"--training.objective.init_args.{loss}_weight=0" for loss in ("reconstruction", "token")]
COMMANDS = {
    "fit": RESUMED,
    "a recipe": ["fit", "--config", "resume.yaml"],
    "validate": ["validate", "--config", "tiny.yaml", "--ckpt_path", "gift.ckpt"],
    "test": ["test", "--config", "tiny.yaml", "--ckpt_path", "gift.ckpt"],
    "predict": ["predict", "--config", "tiny.yaml", "--ckpt_path", "gift.ckpt"],
    "fit-decoder": [*STAGE, "--stage.checkpoint", "gift.ckpt"],
    "latents": [*FIXED, "--training.warmup_steps", "0", "--latents", "gift.ckpt"],
    "generate": ["generate", "gift.ckpt", "-n", "1", "--nfe", "1"],
    "export": ["export", "gift.ckpt", "out"],
}
FAST_COMMANDS = [("fit", "a class of a part"), ("fit", "a number"), ("validate", "a class of the model")]
SLOW_COMMANDS = [(c, g) for c in COMMANDS for g in GIFTS if (c, g) not in FAST_COMMANDS]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("command", "gift"), [*FAST_COMMANDS, *(pytest.param(*case, marks=pytest.mark.slow) for case in SLOW_COMMANDS)]
)
def test_a_checkpoints_hyperparameters_are_no_options(home, monkeypatch, command, gift):
    monkeypatch.chdir(home)
    content = torch.load(LAST, weights_only=True)
    content["hyper_parameters"] = content["datamodule_hyper_parameters"] = GIFTS[gift]
    write(content, Path("gift.ckpt"))
    Path("resume.yaml").write_text(yaml.safe_dump(RECIPE | {"ckpt_path": "gift.ckpt"}))
    runs = {*Path("runs").rglob("last.ckpt")}
    cli.main(COMMANDS[command])
    assert not Path("was_run").exists()
    assert "gift" not in sys.modules
    for path in {*Path("runs").rglob("last.ckpt")} - runs:
        described = torch.load(path, weights_only=True)["ldlm"]
        assert described["training"]["init_args"]["learning_rate"] == 3e-4
        assert described["model"]["init_args"]["token_encoder"]["class_path"].endswith("PretrainedTokenEncoder")
