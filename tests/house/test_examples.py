"""The scripts of examples/ and the code of docs/extending.md run as they stand, at a tiny size."""

import importlib
import re
import sys
from pathlib import Path

import lightning as L
import pytest
import torch
import yaml
from helpers import ROOT
from helpers.texts import own_text
from helpers.tiny import make_model, make_task, make_trainer, rows

from ldlm.cli.main import main
from ldlm.model import LDLM
from ldlm.objective import JointObjective
from ldlm.rng import generator
from ldlm.training.callbacks.warmup import DiffusionToEncoderWarmup
from ldlm.training.task import LDLMTask

FAST = ["--trainer.max_steps", "2", "--trainer.accelerator", "cpu"]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A fresh current folder with a text file and a copy of the examples, from which modules are imported."""
    for path in (ROOT / "examples").iterdir():
        if path.is_file():
            (tmp_path / path.name).write_text(path.read_text())
    (tmp_path / "my_text.txt").write_text(own_text())
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("LDLM_CACHE", str(tmp_path / "cache"))
    yield tmp_path
    for name in ("my_encoder", "custom_encoder", "train_on_own_text", "window", "test_window", "scale", "linear"):
        sys.modules.pop(name, None)
    for path in tmp_path.rglob("*.ckpt"):  # pytest keeps the folders of its last runs
        path.unlink()


def test_training_on_own_text_prints_texts_and_leaves_a_model(folder):
    texts = importlib.import_module("train_on_own_text").main("my_text.txt", 2, batch_size=4, width=16, nfe=3)
    assert len(texts) == 4
    assert LDLM.from_pretrained("own_text_model").generate(4, 3, batch_size=4) == texts


def test_a_custom_encoder_trains_from_python_and_its_checkpoint_knows_it(folder):
    texts = importlib.import_module("custom_encoder").main("my_text.txt", 2, batch_size=4, nfe=2)
    assert len(texts) == 4
    again = LDLM.load_from_checkpoint("custom_encoder.ckpt")
    assert type(again.token_encoder) is sys.modules["my_encoder"].NeighbourEncoder
    assert again.generate(4, 2, batch_size=4) == texts


def test_a_custom_encoder_trains_from_yaml_and_generates_with_import(folder, capsys):
    recipe = yaml.safe_load(Path("custom_encoder.yaml").read_text())
    recipe["trainer"]["callbacks"].pop()  # printing texts takes longer than training two steps
    recipe["data"] |= {"dataset": "my_text.txt", "batch_size": 4}
    Path("tiny.yaml").write_text(yaml.safe_dump(recipe))
    main(["fit", "--config", "tiny.yaml", *FAST, "--trainer.default_root_dir", "runs"])
    checkpoint = str(next(Path("runs").rglob("*.ckpt")))
    main(["generate", checkpoint, "--import", "my_encoder", "-n", "2", "--nfe", "2", "--batch_size", "2"])
    assert re.findall(r"^\[\d\]", capsys.readouterr().out, re.M) == ["[0]", "[1]"]


def test_both_ways_of_training_the_custom_encoder_say_the_same(folder):
    recipe = yaml.safe_load(Path("custom_encoder.yaml").read_text())
    encoder = importlib.import_module("my_encoder").NeighbourEncoder(**recipe["model"]["token_encoder"]["init_args"])
    assert vars(encoder).keys() == vars(type(encoder)()).keys()
    assert (encoder.hidden_size, encoder.vocab_size, encoder.reach) == (96, 30522, 2)
    source = Path("custom_encoder.py").read_text()
    assert f'"{recipe["data"]["dataset"]}"' in source
    assert f"max_steps: int = {recipe['trainer']['max_steps']}" in source


def extending() -> dict[str, str]:
    """The titled code blocks of docs/extending.md, by title."""
    page = (ROOT / "docs" / "extending.md").read_text()
    return dict(re.findall(r'```\w+ title="([\w.]+)"\n(.*?)```', page, re.S))


@pytest.fixture
def blocks(folder):
    """These blocks, each written into the current folder under its title."""
    found = extending()
    assert list(found) == [
        "window.py",
        "test_window.py",
        "window.yaml",
        "scale.py",
        "scale.yaml",
        "linear.py",
        "linear.yaml",
    ]
    for title, code in found.items():
        Path(title).write_text(code)
    return found


def fit_quickstart(overlay: str, **training: int) -> Path:
    """The checkpoint of two steps of the quickstart on `my_text.txt` with an overlay."""
    small = {
        "data": {"dataset": "my_text.txt", "batch_size": 4, "validation_rows": 4},
        "training": {"statistics_rows": 8} | training,
        "trainer": {"callbacks": [{"class_path": "ModelCheckpoint", "init_args": {"every_n_train_steps": 1}}]},
        "model": {"timesteps": {"class_path": "UniformTimesteps"}},
    }
    Path("small.yaml").write_text(yaml.safe_dump(small))
    recipes = [word for name in ("quickstart", "small.yaml", overlay) for word in ("--config", name)]
    main(["fit", *recipes, *FAST])
    return next(Path("ldlm_runs").rglob("*.ckpt"))


def test_the_encoder_of_the_extending_page_keeps_its_contract_and_trains_from_yaml(blocks):
    assert 15 <= len([line for line in blocks["window.py"].splitlines() if line]) <= 22  # "in twenty lines"
    importlib.import_module("test_window").test_window_encoder()
    model = LDLM.load_from_checkpoint(fit_quickstart("window.yaml", warmup_steps=0))
    assert type(model.latent_encoder) is sys.modules["window"].WindowEncoder
    assert (model.latent_encoder.window, model.latent_encoder.sequence_length) == (7, 32)


def test_the_objective_of_the_extending_page_trains_from_yaml_and_is_in_the_checkpoint(blocks):
    objective = LDLMTask.load_from_checkpoint(fit_quickstart("scale.yaml", warmup_steps=0)).objective
    assert type(objective) is sys.modules["scale"].ScaleObjective
    assert (objective.weight, objective.target) == (0.5, 1.0)


def test_the_objective_of_the_extending_page_is_the_papers_and_what_its_page_says(blocks):
    objective = importlib.import_module("scale").ScaleObjective(weight=0.5, target=2.0)
    model, tokens, u = make_model(), rows(6), torch.linspace(0.1, 0.9, 6)
    losses = objective(model, tokens, u, 0.3, generator(1))
    paper = JointObjective()(model, tokens, u, 0.3, generator(1))
    squares = (model.encode(tokens).detach().double().numpy() ** 2).reshape(6, -1).mean(1)
    want = ((squares - 2.0) ** 2).mean()
    assert losses.terms["scale"].item() == pytest.approx(want, rel=1e-5)
    assert losses.total.item() == pytest.approx(paper.total.item() + 0.5 * want, rel=1e-5)
    assert losses.terms.keys() == paper.terms.keys() | {"scale"}
    weight = model.latent_encoder.resampler.out.weight
    assert torch.autograd.grad(losses.terms["scale"], weight)[0].any()


def test_the_warm_up_of_the_extending_page_takes_the_place_of_the_tasks(blocks):
    warmup = importlib.import_module("linear").LinearWarmup(4)
    seen = []
    note = L.pytorch.callbacks.LambdaCallback(
        on_train_batch_end=lambda trainer, task, output, batch, index: seen.append(output["gamma"].item())
    )
    trainer = make_trainer(Path("."), [warmup, note], max_steps=6)
    trainer.fit(make_task(warmup_steps=100), torch.utils.data.DataLoader(rows(24), batch_size=4))
    assert [callback for callback in trainer.callbacks if isinstance(callback, DiffusionToEncoderWarmup)] == [warmup]
    assert seen == [0.0, 0.25, 0.5, 0.75, 1.0, 1.0]


def test_the_warm_up_of_the_extending_page_is_added_to_a_recipes_callbacks(blocks):
    about = torch.load(fit_quickstart("linear.yaml", warmup_steps=100), weights_only=True)["ldlm"]
    assert about["run"]["LinearWarmup.steps"] == 1000
    assert not [name for name in about["run"] if name.startswith("DiffusionToEncoderWarmup")]
