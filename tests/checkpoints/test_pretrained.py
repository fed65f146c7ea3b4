"""A model saved by a Trainer or exported to a folder comes back whole, and speaks without the encoder's files."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from helpers.tiny import (
    LENGTH,
    VOCAB,
    make_data,
    make_model,
    make_pretrained,
    make_task,
    make_tokenizer,
    make_trainer,
    rows,
)
from lightning.pytorch.callbacks import ModelCheckpoint
from safetensors.torch import load_file

from ldlm.checkpoints.description import describe_model
from ldlm.diffusion.grids import LogSNRGrid, MixedGrid, UniformGrid
from ldlm.diffusion.samplers import DPMSolver2M
from ldlm.diffusion.schedules import CosineSchedule
from ldlm.model import LDLM
from ldlm.nn.token_encoders import PretrainedTokenEncoder
from ldlm.training.callbacks.ema import EMA
from ldlm.training.task import LDLMTask


def trained(folder: Path, steps: int = 2, more=(), **changes) -> LDLMTask:
    task = make_task(tokenizer=make_tokenizer(), warmup_steps=4, timestep_refresh=1, **changes)
    trainer = make_trainer(folder, [EMA(), *more], max_steps=steps, enable_checkpointing=bool(more))
    trainer.fit(task, make_data(folder))
    return task


def assert_same_model(first: LDLM, second: LDLM) -> None:
    one, other = first.state_dict(), second.state_dict()
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert describe_model(first) == describe_model(second)
    for temperature in (0.0, 1.0):
        arguments = {"nfe": 5, "seed": 3, "batch_size": 4, "temperature": temperature}
        assert torch.equal(first.sample_tokens(6, **arguments), second.sample_tokens(6, **arguments))
    assert first.generate(3, nfe=4) == second.generate(3, nfe=4)
    assert torch.equal(first.encode(rows(3)), second.encode(rows(3)))


GRID = MixedGrid(UniformGrid(0.05), LogSNRGrid(), 0.3)
CHANGES = {"sampler": DPMSolver2M(1.0), "grid": GRID, "seed": 5, "sigma_dec": 2, "schedule": CosineSchedule()}


def test_a_trainers_checkpoint_is_the_model(tmp_path):
    task = trained(tmp_path, **CHANGES)
    task.trainer.save_checkpoint(tmp_path / "model.ckpt")
    model, loaded = task.model, LDLM.load_from_checkpoint(tmp_path / "model.ckpt")
    assert_same_model(model.eval(), loaded)
    assert not loaded.training
    assert loaded.tokenizer.get_vocab() == model.tokenizer.get_vocab()
    assert loaded.timesteps.den.sum() > 0
    assert loaded.token_encoder.statistics_rows == 8


def test_an_exported_folder_is_the_model(tmp_path):
    model = trained(tmp_path, **CHANGES).model
    model.save_pretrained(tmp_path / "export")
    assert_same_model(model.eval(), LDLM.from_pretrained(tmp_path / "export"))
    names = {path.name for path in (tmp_path / "export").iterdir()}
    assert {"model.safetensors", "ldlm.json", "tokenizer.json", "tokenizer_config.json"} <= names
    stored = load_file(tmp_path / "export" / "model.safetensors")
    assert stored.keys() == model.state_dict().keys()
    about = json.loads((tmp_path / "export" / "ldlm.json").read_text())
    assert about["model"]["init_args"]["sigma_dec"] == 2
    everything = b"".join(path.read_bytes() for path in (tmp_path / "export").iterdir())
    assert str(tmp_path).encode() not in everything


def test_an_export_of_a_loaded_checkpoint_is_the_model_again(tmp_path):
    task = trained(tmp_path)
    task.trainer.save_checkpoint(tmp_path / "model.ckpt")
    LDLM.load_from_checkpoint(tmp_path / "model.ckpt").save_pretrained(tmp_path / "export")
    assert_same_model(task.model.eval(), LDLM.from_pretrained(tmp_path / "export"))


def test_a_model_without_a_tokenizer_is_saved_without_one(tmp_path):
    model = make_model()
    model.save_pretrained(tmp_path)
    loaded = LDLM.from_pretrained(tmp_path)
    assert loaded.tokenizer is None
    assert torch.equal(loaded.sample_tokens(3, nfe=4), model.sample_tokens(3, nfe=4))


def test_a_checkpoint_has_neither_frozen_weights_nor_paths_and_loads_as_weights_only(tmp_path):
    make_pretrained("bert", tmp_path / "secret" / "encoder")
    encoder = PretrainedTokenEncoder(str(tmp_path / "secret" / "encoder"), layer=2)
    trained(tmp_path, token_encoder=encoder).trainer.save_checkpoint(tmp_path / "model.ckpt")
    saved = torch.load(tmp_path / "model.ckpt", weights_only=True)
    table = encoder.embeddings()
    tensors = [t for part in ("state_dict", "raw_parameters") for t in saved[part].values()]
    assert not any(t.shape == table.shape and torch.equal(t, table) for t in tensors)
    named = {name for name in saved["state_dict"] if name.startswith("token_encoder")}
    assert named == {"token_encoder.mean", "token_encoder.std", "token_encoder.statistics_rows"}
    about = saved["ldlm"]["model"]["init_args"]["token_encoder"]["init_args"]
    assert about["model"] == "./encoder"
    assert len(about["sha256"]) == 64
    assert str(tmp_path).encode() not in (tmp_path / "model.ckpt").read_bytes()


def test_a_model_generates_after_the_encoders_files_are_gone_and_says_what_encoding_needs(tmp_path):
    make_pretrained("bert", tmp_path / "encoder")
    task = trained(tmp_path, token_encoder=PretrainedTokenEncoder(str(tmp_path / "encoder"), layer=-2))
    task.trainer.save_checkpoint(tmp_path / "model.ckpt")
    model = task.model
    model.save_pretrained(tmp_path / "export")
    want = model.eval().generate(5, nfe=6)
    latents = model.encode(rows(2))
    shutil.move(tmp_path / "encoder", tmp_path / "elsewhere")
    for loaded in (LDLM.load_from_checkpoint(tmp_path / "model.ckpt"), LDLM.from_pretrained(tmp_path / "export")):
        assert loaded.generate(5, nfe=6) == want
        with pytest.raises(
            ValueError, match=r"model='./encoder' is neither a folder here nor .*path of a local folder"
        ):
            loaded.encode(rows(2))
        loaded.token_encoder.model = str(tmp_path / "elsewhere")
        assert torch.equal(loaded.encode(rows(2)), latents)


def test_each_checkpoint_of_a_run_loads_as_the_average_of_its_own_step(tmp_path):
    keep = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=2, save_last=True, save_top_k=-1)
    trained(tmp_path, steps=5, more=[keep])
    two, four, last = (LDLM.load_from_checkpoint(tmp_path / f"{name}.ckpt") for name in ("step=2", "step=4", "last"))
    short = trained(tmp_path, steps=2).model
    assert torch.equal(two.token_decoder.head.weight, short.token_decoder.head.weight)
    assert torch.equal(last.token_decoder.head.weight, four.token_decoder.head.weight)
    assert not torch.equal(two.token_decoder.head.weight, four.token_decoder.head.weight)


def test_weights_that_do_not_fit_the_description_are_named_with_the_file(tmp_path):
    make_model().save_pretrained(tmp_path)
    about = json.loads((tmp_path / "ldlm.json").read_text())
    about["model"]["init_args"]["token_decoder"]["init_args"]["vocab_size"] = VOCAB
    about["model"]["init_args"]["denoiser"]["init_args"]["layers"] = 2
    (tmp_path / "ldlm.json").write_text(json.dumps(about))
    with pytest.raises(ValueError, match=rf"{tmp_path.name} does not fit this model: it lacks denoiser\.blocks\.1"):
        LDLM.from_pretrained(tmp_path)


def test_a_folder_of_something_else_or_a_damaged_one_is_told(tmp_path):
    with pytest.raises(ValueError, match=r"holds no ldlm\.json: it is not an exported ldlm model"):
        LDLM.from_pretrained(tmp_path)
    make_model().save_pretrained(tmp_path)
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"model\.safetensors was altered after the export: export the model again"):
        LDLM.from_pretrained(tmp_path)
    weights.unlink()
    with pytest.raises(ValueError, match=r"lacks model\.safetensors, which belongs to the model"):
        LDLM.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"model='nobody/nothing' is neither a folder here"):
        LDLM.from_pretrained("nobody/nothing")


def test_a_checkpoint_of_another_library_is_refused(tmp_path):
    torch.save({"state_dict": {}, "pytorch-lightning_version": "2.6"}, tmp_path / "other.ckpt")
    with pytest.raises(ValueError, match="is of something else"):
        LDLM.load_from_checkpoint(tmp_path / "other.ckpt")


def test_an_export_that_fails_leaves_no_half_written_weights(tmp_path, monkeypatch):
    model = make_model()
    monkeypatch.setattr("ldlm.checkpoints.pretrained.save", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        model.save_pretrained(tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_subclass_loads_as_itself(tmp_path):
    class Mine(LDLM):
        pass

    make_model().save_pretrained(tmp_path)
    loaded = Mine.from_pretrained(tmp_path)
    assert type(loaded) is Mine
    assert loaded.sequence_length == LENGTH
