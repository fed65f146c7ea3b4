"""Checkpoints and exports that were altered, cut or swapped: found, or what is read equals what was saved."""

import random
import shutil
import zipfile

import pytest
import torch
from helpers.tiny import make_model, make_tokenizer
from helpers.untrusted import LOADERS, flipped, one_sentence, refused, same

from ldlm.checkpoints import pretrained
from ldlm.checkpoints.integrity import digest_file
from ldlm.checkpoints.pretrained import read_checkpoint
from ldlm.model import LDLM


def test_two_hundred_flipped_bits_in_a_checkpoint_are_all_found_with_its_digest(saved, tmp_path):
    data, dice = (saved / "whole.ckpt").read_bytes(), random.Random(4)
    path = tmp_path / "flipped.ckpt"
    shutil.copy(digest_file(saved / "whole.ckpt"), digest_file(path))
    for case in range(200):
        path.write_bytes(flipped(dice, data))
        assert refused(path, LOADERS[case % len(LOADERS)])
    path.write_bytes(data)
    assert not any(refused(path, loader) for loader in LOADERS)
    whole = digest_file(path).read_bytes()
    for _ in range(64):
        digest_file(path).write_bytes(flipped(dice, whole[:64]))
        assert refused(path, read_checkpoint)


@pytest.mark.filterwarnings("ignore:.*has no .*sha256 beside it.*")
def test_without_the_digest_a_flipped_bit_is_found_or_lies_where_nothing_is(saved, tmp_path):
    data, dice = (saved / "whole.ckpt").read_bytes(), random.Random(5)
    path = tmp_path / "flipped.ckpt"
    content = read_checkpoint(saved / "whole.ckpt")
    with zipfile.ZipFile(saved / "whole.ckpt") as archive:
        payload = sum(entry.file_size for entry in archive.infolist())
    found = 0
    for _ in range(200):
        path.write_bytes(flipped(dice, data))
        if refused(path, read_checkpoint):
            found += 1
        else:  # padding, or a field of the archive that nobody reads
            assert same(content, read_checkpoint(path))
    assert found >= 0.8 * 200 * payload / len(data)


@pytest.mark.filterwarnings("ignore:.*(has no .*sha256 beside it|passed over).*")
def test_cut_swapped_empty_and_foreign_files_are_refused(saved, tmp_path):
    data, dice = (saved / "whole.ckpt").read_bytes(), random.Random(6)
    path = tmp_path / "odd.ckpt"
    shutil.copy(saved / "export" / "model.safetensors", path)
    assert all(refused(path, loader) for loader in LOADERS)
    odd = [b"", b"PK\x05\x06" + bytes(18), bytes(1000), dice.randbytes(1000), b"{}", data[::-1], data[100:], data * 2]
    odd += [data[: dice.randrange(len(data))] for _ in range(100)]
    for content in odd[:-101] + odd[-100:]:
        path.write_bytes(content)
        assert refused(path, read_checkpoint)
    torch.save({"state_dict": {}, "ldlm": {}}, path)
    shutil.copy(digest_file(saved / "whole.ckpt"), digest_file(path))  # another's bytes beside this one's digest
    assert refused(path, read_checkpoint)
    path.unlink()
    path.mkdir()
    assert refused(path, read_checkpoint)


def test_flipped_bits_in_an_exports_weights_and_tokenizer_are_found(saved, tmp_path):
    shutil.copytree(saved / "export", tmp_path / "export")
    dice = random.Random(8)
    for name in ("model.safetensors", "tokenizer.json", "tokenizer_config.json"):
        file = tmp_path / "export" / name
        whole = file.read_bytes()
        for _ in range(30):
            file.write_bytes(flipped(dice, whole))
            with pytest.raises(ValueError, match=rf"{name} (was altered|could not be read)") as caught:
                LDLM.from_pretrained(tmp_path / "export")
            one_sentence(caught.value)
        file.write_bytes(whole)
    LDLM.from_pretrained(tmp_path / "export")


def test_an_export_that_was_cut_short_over_an_older_one_does_not_load(saved, tmp_path, monkeypatch):
    real, written = pretrained._write_json, []

    def cut(path, content):  # what is written last
        written.append(path)
        if len(written) == 2:
            raise ZeroDivisionError
        real(path, content)

    shutil.copytree(saved / "export", tmp_path / "export")
    monkeypatch.setattr("ldlm.checkpoints.pretrained._write_json", cut)
    with pytest.raises(ZeroDivisionError):
        make_model(seed=5, tokenizer=make_tokenizer()).save_pretrained(tmp_path / "export")
    monkeypatch.undo()
    with pytest.raises(ValueError, match="or its export was cut short: export the model again"):
        LDLM.from_pretrained(tmp_path / "export")
