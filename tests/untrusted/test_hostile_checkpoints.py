"""Checkpoints and exports made to do harm or to make no sense: refused in one sentence, and nothing in them is run."""

import json
import os
import pickle
import random
import shutil
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from helpers.command import complaint
from helpers.tiny import make_tokenizer
from helpers.untrusted import LOADERS, flipped, nested, one_sentence, refused, save_deep

from ldlm.checkpoints.description import build
from ldlm.checkpoints.pretrained import read_checkpoint
from ldlm.model import LDLM
from ldlm.tokenizer import pack_tokenizer, unpack_tokenizer


def zipped(path: Path, content: bytes, compression: int = zipfile.ZIP_STORED, **files: bytes) -> None:
    """An archive as torch writes it, around any pickle."""
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, value in {"data.pkl": content, "version": b"3\n", "byteorder": b"little", **files}.items():
            archive.writestr(f"archive/{name}", value)


class Runs:
    def __init__(self, function, *arguments) -> None:
        self.function, self.arguments = function, arguments

    def __reduce__(self):
        return (self.function, self.arguments)


@pytest.mark.filterwarnings("ignore:.*(has no .*sha256 beside it|passed over).*")
def test_pickles_that_would_run_something_are_refused_unrun(saved, tmp_path):
    marker, path = tmp_path / "was_run", tmp_path / "bad.ckpt"
    content = read_checkpoint(saved / "whole.ckpt")
    harmful = [
        Runs(os.system, f"touch {marker}"),
        Runs(open, str(marker), "w"),
        Runs(eval, f"open({str(marker)!r}, 'w')"),
        Runs(exec, f"open({str(marker)!r}, 'w')"),
        Runs(os.mkdir, str(marker)),
    ]
    for harm in harmful:
        places = [harm, {**content, "extra": harm}, {**content, "state_dict": harm}]
        places += [{**content, "tokenizer": {"a": harm}}, {**content, "ldlm": {**content["ldlm"], "model": harm}}]
        for place in places:
            torch.save(place, path)
            assert all(refused(path, loader) for loader in LOADERS)
            path.write_bytes(pickle.dumps(place if place is harm else {"state_dict": harm}))
            assert refused(path, read_checkpoint)
            zipped(path, pickle.dumps(harm))
            assert refused(path, read_checkpoint)
    torch.jit.script(torch.nn.Linear(2, 2)).save(path)
    assert refused(path, read_checkpoint)
    assert not marker.exists()
    zipped(path, pickle.dumps(harmful[1]))
    torch.load(path, weights_only=False)
    assert marker.exists()  # they do run where they are let


@pytest.mark.filterwarnings("ignore:.*(has no .*sha256 beside it|passed over).*")
def test_archives_that_unfold_and_pickles_that_make_no_sense_are_refused(tmp_path):
    path, dice = tmp_path / "bad.ckpt", random.Random(7)
    zipped(path, pickle.dumps({"state_dict": {}}), zipfile.ZIP_DEFLATED, bomb=bytes(10**7))
    assert path.stat().st_size < 20_000
    assert refused(path, read_checkpoint)
    start = pickle.dumps({"state_dict": {}, "ldlm": [1.0, "text", (2, 3)]}, protocol=2)
    for case in range(300):
        zipped(path, dice.randbytes(dice.randrange(200)) if case % 3 == 0 else flipped(dice, flipped(dice, start)))
        assert refused(path, read_checkpoint)


PART = "ldlm.UniformGrid"
HOSTILE = {
    "os.system": {"class_path": "os.system", "init_args": {"command": "touch was_run"}},
    "a function of ours": {"class_path": "ldlm._files.write_atomically", "init_args": {"path": "was_run"}},
    "an import of ours": {"class_path": "ldlm.checkpoints.description.os", "init_args": {}},
    "a class of ours that is no part": {"class_path": "ldlm.LDLM", "init_args": {}},
    "a dunder": {"class_path": "ldlm.diffusion.grids.__class__", "init_args": {}},
    "a dunder of a class": {"class_path": "ldlm.UniformGrid.__init__", "init_args": {}},
    "a dunder module": {"class_path": "__main__.__builtins__", "init_args": {}},
    "an abstract class": {"class_path": "ldlm.Sampler", "init_args": {}},
    "a module that is not there": {"class_path": "no.such.Thing", "init_args": {}},
    "no module": {"class_path": "", "init_args": {}},
    "a number": {"class_path": 3, "init_args": {}},
    "a list": {"class_path": ["os", "system"], "init_args": {}},
    "no arguments": {"class_path": PART, "init_args": None},
    "a list of arguments": {"class_path": PART, "init_args": [1]},
    "numbered arguments": {"class_path": PART, "init_args": {1: 2}},
    "an argument too many": {"class_path": PART, "init_args": {"t_min": 0.1, "self": 3}},
    "a text for a number": {"class_path": PART, "init_args": {"t_min": "a"}},
    "a list for a number": {"class_path": PART, "init_args": {"t_min": [1]}},
    "a part for a number": {"class_path": PART, "init_args": {"t_min": {"class_path": PART, "init_args": {}}}},
    "a negative size": {"class_path": "ldlm.DiT", "init_args": {"latent_size": -1, "num_latents": 8}},
    "more than all memory": {"class_path": "ldlm.DiT", "init_args": {"latent_size": 2**60, "num_latents": 8}},
    "no heads": {"class_path": "ldlm.DiT", "init_args": {"latent_size": 12, "num_latents": 8, "heads": 0}},
    "harm within a part": {
        "class_path": "ldlm.MixedGrid",
        "init_args": {"first": {"class_path": "os.system", "init_args": {"command": "touch was_run"}}},
    },
    "a part of another kind within a part": {
        "class_path": "ldlm.MixedGrid",
        "init_args": {"first": {"class_path": "ldlm.DDIM", "init_args": {}}},
    },
    "lists without end": nested(20_000, list),
    "dictionaries without end": nested(20_000, dict),
    "parts without end": None,
}  # fmt: skip


@pytest.mark.filterwarnings("ignore:.*has no .*sha256 beside it.*")
@pytest.mark.parametrize("name", HOSTILE)
def test_a_description_that_says_more_than_a_model_is_refused_in_a_sentence(saved, tmp_path, monkeypatch, capsys, name):
    monkeypatch.chdir(tmp_path)
    hostile = HOSTILE[name]
    if name == "parts without end":
        hostile = {"class_path": PART, "init_args": {}}
        for _ in range(20_000):
            hostile = {"class_path": "ldlm.MixedGrid", "init_args": {"first": hostile}}
    content = read_checkpoint(saved / "whole.ckpt")
    for place in ("grid", "denoiser"):
        content["ldlm"]["model"]["init_args"][place] = hostile
        save_deep(content, Path("bad.ckpt"))
        assert len(complaint(capsys, "generate", "bad.ckpt", "-n", "1", "--nfe", "1")) < 600
    shutil.copytree(saved / "export", "export")
    about = json.loads(Path("export/ldlm.json").read_text())
    if "without end" not in name:
        about["model"]["init_args"]["grid"] = hostile
        Path("export/ldlm.json").write_text(json.dumps(about))
        complaint(capsys, "generate", "export", "-n", "1", "--nfe", "1")
    assert not Path("was_run").exists()


@pytest.mark.filterwarnings("ignore:.*has no .*sha256 beside it.*")
@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("grid", {"class_path": "ldlm.DDIM", "init_args": {}}),
        ("schedule", {"class_path": PART, "init_args": {}}),
        ("token_encoder", 3),
        ("denoiser", None),
        ("sigma_dec", "a"),
        ("self_conditioning", []),
        ("sequence_length", "8"),
        ("sigma_dec", 10**400),
        ("tokenizer", "gpt2"),
        ("no_such_argument", 1),
        ("__class__", 1),
    ],
)
def test_a_model_that_cannot_be_made_is_refused_in_a_sentence(saved, tmp_path, capsys, key, value):
    content = read_checkpoint(saved / "whole.ckpt")
    if key == "tokenizer":  # the file's own tokenizer is taken, whatever name stands there
        content["ldlm"]["model"]["init_args"][key] = value
        torch.save(content, tmp_path / "bad.ckpt")
        assert len(LDLM.load_from_checkpoint(tmp_path / "bad.ckpt").tokenizer) == 40
        return
    content["ldlm"]["model"]["init_args"][key] = value
    torch.save(content, tmp_path / "bad.ckpt")
    complaint(capsys, "generate", str(tmp_path / "bad.ckpt"))


@pytest.mark.filterwarnings("ignore:.*has no .*sha256 beside it.*")
@pytest.mark.parametrize(
    "state",
    [
        [1, 2],
        {"a": 3},
        "a text",
        "sparse",
        "complex",
        "meta",
    ],
)
def test_weights_that_are_none_are_refused_in_a_sentence(saved, tmp_path, capsys, state):
    content = read_checkpoint(saved / "whole.ckpt")
    whole = content["state_dict"]
    if state == "sparse":
        state = {name: value.to_sparse() if value.dim() == 2 else value for name, value in whole.items()}
    elif state == "a text":
        state = {name: value if i else "text" for i, (name, value) in enumerate(whole.items())}
    elif state == "complex":
        state = {name: torch.zeros(3, dtype=torch.complex64) for name in whole}
    elif state == "meta":
        state = {name: value.to("meta") for name, value in whole.items()}
    content["state_dict"] = state
    torch.save(content, tmp_path / "bad.ckpt")
    complaint(capsys, "export", str(tmp_path / "bad.ckpt"), str(tmp_path / "export"))
    assert not (tmp_path / "export").exists()


def text(content: str) -> torch.Tensor:
    return torch.frombuffer(bytearray(content.encode()), dtype=torch.uint8)


@pytest.mark.parametrize(
    "files",
    [
        {"": text("a")},
        {"..": text("a")},
        {"a\0b": text("a")},
        {"x" * 300: text("a")},
        {"\ud800": text("a")},
        {3: text("a")},
        {"tokenizer.json": "text"},
        {"tokenizer.json": text("{")},
        {"tokenizer.json": text("[" * 1_000_000)},
        {"tokenizer.json": text('{"version": "1.0", "model": {"type": "BPE", "vocab": [], "merges": 3}}')},
        {"tokenizer_config.json": text("[" * 1_000_000)},
        {"tokenizer_config.json": text("3")},
        {},
        [],
        3,
    ],
)
def test_what_is_no_tokenizer_is_refused_in_a_sentence(tmp_path, monkeypatch, files):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    if isinstance(files, dict) and "tokenizer.json" not in files and files:
        files = {**pack_tokenizer(make_tokenizer()), **files}
    with pytest.raises(ValueError, match=r"^(the tokenizer of )?x\.ckpt (holds no files|could not be read)") as caught:
        unpack_tokenizer(files, "x.ckpt")
    one_sentence(caught.value)
    assert not list(tmp_path.iterdir())


def test_a_tokenizers_own_code_is_never_run_and_its_files_stay_in_their_folder(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    files = pack_tokenizer(make_tokenizer())
    config = json.loads(files["tokenizer_config.json"].numpy().tobytes())
    config |= {"auto_map": {"AutoTokenizer": ["evil.Tokenizer", "evil.Tokenizer"]}, "trust_remote_code": True}
    evil = f"open({str(tmp_path / 'was_run')!r}, 'w')\n"
    files |= {"evil.py": text(evil), "../../was_run": text("a"), str(tmp_path / "anywhere"): text("a")}
    before = set(sys.modules)
    for kind in (config["tokenizer_class"], "Tokenizer", None, "os.system", "evil.Tokenizer"):
        files["tokenizer_config.json"] = text(json.dumps(config | {"tokenizer_class": kind}))
        try:
            unpack_tokenizer(files, "x.ckpt")
        except ValueError as error:
            one_sentence(error)
    assert not [name for name in set(sys.modules) - before if "evil" in name]
    assert not list(tmp_path.iterdir())
    assert not (tmp_path.parent / "was_run").exists()


@pytest.mark.parametrize("content", ["[" * 1_000_000, "{", "3", "null", "\x00", '{"format": 1}', '{"a": NaN'])
def test_an_export_whose_json_is_odd_is_refused_in_a_sentence(saved, tmp_path, capsys, content):
    shutil.copytree(saved / "export", tmp_path / "export")
    (tmp_path / "export" / "ldlm.json").write_text(content)
    complaint(capsys, "generate", str(tmp_path / "export"))


def test_plain_data_with_what_looks_like_a_part_is_built_as_far_as_it_is_one():
    assert build({"class_path": 1}) == {"class_path": 1}
    assert build({"class_path": PART, "init_args": {}, "more": 1})["more"] == 1
