"""The scripts of examples/ and the code of docs/extending.md run as they stand, at a tiny size."""

import importlib
import re
import sys
from pathlib import Path

import pytest
import yaml
from helpers import ROOT
from helpers.texts import own_text

import ldlm.cli
from ldlm.model import LDLM

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
    for name in ("my_encoder", "custom_encoder", "train_on_own_text", "window", "test_window"):
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
    ldlm.cli.main.main(["fit", "--config", "tiny.yaml", *FAST, "--trainer.default_root_dir", "runs"])
    checkpoint = str(next(Path("runs").rglob("*.ckpt")))
    ldlm.cli.main.main(["generate", checkpoint, "--import", "my_encoder", "-n", "2", "--nfe", "2", "--batch_size", "2"])
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


def test_the_encoder_of_the_extending_page_keeps_its_contract_and_trains_from_yaml(folder):
    blocks = extending()
    assert blocks.keys() == {"window.py", "test_window.py", "window.yaml"}
    assert 15 <= len([line for line in blocks["window.py"].splitlines() if line]) <= 22  # "in twenty lines"
    for title, code in blocks.items():
        Path(title).write_text(code)
    importlib.import_module("test_window").test_window_encoder()
    callbacks = [{"class_path": "ModelCheckpoint", "init_args": {"every_n_train_steps": 1}}]
    small = {
        "data": {"dataset": "my_text.txt", "batch_size": 4, "validation_rows": 4},
        "warmup": {"steps": 0},
        "trainer": {"callbacks": callbacks},
        "model": {"timesteps": {"class_path": "UniformTimesteps"}, "statistics_rows": 8},
    }
    Path("small.yaml").write_text(yaml.safe_dump(small))
    recipes = ["--config", "quickstart", "--config", "window.yaml", "--config", "small.yaml"]
    ldlm.cli.main.main(["fit", *recipes, *FAST])
    model = LDLM.load_from_checkpoint(next(Path("ldlm_runs").rglob("*.ckpt")))
    assert type(model.latent_encoder) is sys.modules["window"].WindowEncoder
    assert (model.latent_encoder.window, model.latent_encoder.sequence_length) == (7, 32)
