"""An export over another is the new one alone, and what is read from a folder is what an export put there."""

import errno
import functools
import hashlib
import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from helpers.tiny import WORDS, make_model, make_tokenizer
from safetensors.torch import save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from ldlm.model import LDLM

TOKENIZER = ("tokenizer.json", "tokenizer_config.json")


def backwards() -> PreTrainedTokenizerBase:
    """The words of `make_tokenizer` in the opposite order, and a file that its own has not."""
    ids = {token: i for i, token in enumerate(["<unk>", "<s>", "</s>", *reversed(WORDS)])}
    words = Tokenizer(WordLevel(ids, unk_token="<unk>"))
    words.pre_tokenizer = WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>", bos_token="<s>", eos_token="</s>")
    tokenizer.chat_template = "{{ messages }}"
    return tokenizer


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def weight(model: LDLM) -> torch.Tensor:
    return model.token_decoder.head.weight


def test_an_export_over_another_leaves_nothing_of_it(tmp_path):
    make_model(tokenizer=backwards()).save_pretrained(tmp_path / "export")
    assert "chat_template.jinja" in names(tmp_path / "export")
    new = make_model(seed=1, tokenizer=make_tokenizer())
    for folder in ("export", "fresh"):
        new.save_pretrained(tmp_path / folder)
    assert names(tmp_path / "export") == names(tmp_path / "fresh")
    for name in names(tmp_path / "fresh"):
        assert (tmp_path / "export" / name).read_bytes() == (tmp_path / "fresh" / name).read_bytes()


def test_an_export_without_a_tokenizer_over_one_with_it_has_none(tmp_path):
    make_model(tokenizer=make_tokenizer()).save_pretrained(tmp_path)
    make_model(seed=1).save_pretrained(tmp_path)
    assert names(tmp_path) == {"model.safetensors", "ldlm.json"}
    assert LDLM.from_pretrained(tmp_path).tokenizer is None


@pytest.mark.parametrize("lost", ["model.safetensors", *TOKENIZER])
def test_a_file_of_an_export_that_is_lost_is_missed_by_name(tmp_path, lost):
    make_model(tokenizer=make_tokenizer()).save_pretrained(tmp_path)
    (tmp_path / lost).unlink()
    with pytest.raises(ValueError, match=f"lacks {lost}, which belongs to the model"):
        LDLM.from_pretrained(tmp_path)


@pytest.mark.parametrize("with_tokenizer", [True, False], ids=["with a tokenizer", "without"])
def test_files_that_no_export_wrote_are_not_used(tmp_path, with_tokenizer):
    tokenizer = make_tokenizer() if with_tokenizer else None
    make_model(tokenizer=tokenizer).save_pretrained(tmp_path / "export")
    theirs = backwards()
    theirs.save_pretrained(tmp_path / "theirs")
    for file in (tmp_path / "theirs").iterdir():
        if not (tmp_path / "export" / file.name).exists():
            shutil.copy(file, tmp_path / "export")
    (tmp_path / "export/added_tokens.json").write_text('{"<intruder>": 5}')
    (tmp_path / "export/config.json").write_text('{"model_type": "gpt2"}')
    (tmp_path / "export/vocab.json").write_text('{"intruder": 0}')
    (tmp_path / "export/special_tokens_map.json").write_text('{"eos_token": "word1"}')
    loaded = LDLM.from_pretrained(tmp_path / "export").tokenizer
    if tokenizer is None:
        assert loaded is None
    else:
        assert loaded.get_vocab() == tokenizer.get_vocab()
        assert (loaded.eos_token, loaded.chat_template) == ("</s>", None)


def test_what_else_is_in_a_folder_stays(tmp_path):
    (tmp_path / "README.md").write_text("mine")
    (tmp_path / ".git").mkdir()
    (tmp_path / ".git/config").write_text("mine")
    for seed in (0, 1):
        make_model(seed=seed, tokenizer=make_tokenizer()).save_pretrained(tmp_path)
        assert (tmp_path / "README.md").read_text() == (tmp_path / ".git/config").read_text() == "mine"
    assert torch.equal(weight(LDLM.from_pretrained(tmp_path)), weight(make_model(seed=1)))


@pytest.mark.parametrize("name", ["model.safetensors", *TOKENIZER, "ldlm.json"])
def test_a_folder_that_holds_something_else_under_the_same_name_is_not_destroyed(tmp_path, name):
    if name == "model.safetensors":
        save_file({"x": torch.ones(3)}, tmp_path / name)
    else:
        (tmp_path / name).write_text("{}")
    before = (tmp_path / name).read_bytes()
    with pytest.raises(ValueError, match=name):
        make_model(tokenizer=make_tokenizer()).save_pretrained(tmp_path)
    assert (tmp_path / name).read_bytes() == before
    assert names(tmp_path) == {name}


def test_a_file_is_no_folder_to_export_to(tmp_path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(ValueError, match="file is no folder, and an export is one"):
        make_model().save_pretrained(tmp_path / "file")
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.parametrize(
    "name", ["../notes.txt", "/etc/hostname", "..", ".", "", "a/b", "x" * 300, "a\0b", "ldlm.json"]
)
@pytest.mark.parametrize("known", [True, False], ids=["with its digest", "with another"])
def test_a_folder_can_name_no_file_elsewhere_to_be_read_or_removed(tmp_path, name, known):
    folder, notes = tmp_path / "export", tmp_path / "notes.txt"
    notes.write_text("mine")
    make_model().save_pretrained(folder)
    about = json.loads((folder / "ldlm.json").read_text())
    about["sha256"][name] = hashlib.sha256(notes.read_bytes()).hexdigest() if known else "0" * 64
    (folder / "ldlm.json").write_text(json.dumps(about))
    with pytest.raises(ValueError, match=r"names .* which is no file of an export"):
        LDLM.from_pretrained(folder)
    with pytest.raises(ValueError, match=r"names .* which is no file of an export"):
        make_model(seed=1).save_pretrained(folder)
    assert notes.read_text() == "mine"


def test_a_file_that_was_changed_since_the_export_is_not_removed_with_it(tmp_path):
    make_model(tokenizer=backwards()).save_pretrained(tmp_path)
    (tmp_path / "chat_template.jinja").write_text("mine now")
    make_model(tokenizer=make_tokenizer()).save_pretrained(tmp_path)
    assert (tmp_path / "chat_template.jinja").read_text() == "mine now"
    assert LDLM.from_pretrained(tmp_path).tokenizer.chat_template is None


@pytest.mark.parametrize("digests", [None, [], {}, {"model.safetensors": 3}, {"tokenizer.json": "0" * 64}])
def test_a_description_that_names_no_weights_is_refused(tmp_path, digests):
    make_model().save_pretrained(tmp_path)
    about = json.loads((tmp_path / "ldlm.json").read_text())
    about["sha256"] = digests
    (tmp_path / "ldlm.json").write_text(json.dumps(about))
    with pytest.raises(ValueError, match=r"export .*the model again"):
        LDLM.from_pretrained(tmp_path)


def test_an_export_that_does_not_fit_on_the_disk_leaves_the_earlier_one(tmp_path, monkeypatch):
    make_model(tokenizer=make_tokenizer()).save_pretrained(tmp_path)

    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("ldlm._files.os.fsync", full)
    with pytest.raises(OSError, match="No space left"):
        make_model(seed=1, tokenizer=backwards()).save_pretrained(tmp_path)
    monkeypatch.undo()
    assert torch.equal(weight(LDLM.from_pretrained(tmp_path)), weight(make_model()))


class Killed(BaseException):
    pass


def killed_at(moment: int, monkeypatch, model: LDLM, folder: Path) -> bool:
    """Export a model and die at so many steps to the disk; whether it came to that."""
    steps = [0]

    def count(real, *arguments, **rest):
        if steps[0] == moment:
            raise Killed
        steps[0] += 1
        return real(*arguments, **rest)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", functools.partial(count, os.replace))
        patch.setattr(os, "fsync", functools.partial(count, os.fsync))
        patch.setattr(Path, "unlink", functools.partialmethod(functools.partial(count, Path.unlink)))
        try:
            model.save_pretrained(folder)
        except Killed:
            return True
    return False


def test_a_kill_at_any_step_of_an_export_leaves_the_old_one_the_new_one_or_none_and_the_next_one_cleans_up(
    tmp_path, monkeypatch
):
    old, new = make_model(tokenizer=backwards()), make_model(seed=1, tokenizer=make_tokenizer())
    old.save_pretrained(tmp_path / "old")
    new.save_pretrained(tmp_path / "new")
    seen = []
    for moment in range(60):
        folder = tmp_path / str(moment)
        shutil.copytree(tmp_path / "old", folder)
        dead = killed_at(moment, monkeypatch, new, folder)
        if (folder / "ldlm.json").read_text() == (tmp_path / "old/ldlm.json").read_text():
            seen.append("old")
            one, other = LDLM.from_pretrained(folder), old
        elif "model" in json.loads((folder / "ldlm.json").read_text()):
            seen.append("new")
            one, other = LDLM.from_pretrained(folder), new
        else:
            seen.append("none")
            with pytest.raises(ValueError, match="cut short"):
                LDLM.from_pretrained(folder)
            one, other = old, old
        assert torch.equal(weight(one), weight(other))
        assert one.tokenizer.get_vocab() == other.tokenizer.get_vocab()
        new.save_pretrained(folder)
        assert {name for name in names(folder) if not name.endswith(".tmp")} == names(tmp_path / "new")
        if not dead:
            break
    assert not dead
    assert list(dict.fromkeys(seen)) == ["old", "none", "new"]  # in this order, and never back
