"""Hidden states read from a file against those computed, and files that must not be used or made."""

import hashlib
import json
import os
import random
import re
import shutil
import signal
from collections import namedtuple
from pathlib import Path

import lightning as L
import pytest
import torch
from helpers.tiny import (
    HIDDEN,
    LENGTH,
    VOCAB,
    FixedTokenEncoder,
    make_data,
    make_pretrained,
    make_task,
    make_trainer,
    rows,
)
from lightning.pytorch.strategies import SingleDeviceStrategy
from torch import Tensor
from torch.utils.data import DataLoader

from ldlm.model import LDLM
from ldlm.nn.token_encoders import EmbeddingTokenEncoder, PretrainedTokenEncoder, TokenEncoder
from ldlm.training.callbacks import hidden_state_cache as cache
from ldlm.training.callbacks.hidden_state_cache import CacheHiddenStates, StoredStates


class CountingTokenEncoder(FixedTokenEncoder):
    """Knows how many rows it was asked for."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__(seed=seed)
        self.rows = 0

    def hidden_states(self, tokens: Tensor) -> Tensor:
        self.rows += len(tokens)
        return super().hidden_states(tokens)


class Losses(L.Callback):
    """The loss of each step."""

    def __init__(self) -> None:
        self.seen: list[float] = []

    def on_train_batch_end(self, trainer, model, outputs, batch, batch_idx):
        self.seen.append(trainer.callback_metrics["train/loss"].item())


def fit(folder: Path, encoder: TokenEncoder, *more: L.Callback, **changes) -> tuple[LDLM, list[float]]:
    losses, task = Losses(), make_task(token_encoder=encoder, warmup_steps=4, timestep_refresh=2)
    arguments = {"max_steps": 8, "limit_val_batches": 0, "enable_checkpointing": True}
    make_trainer(folder, [losses, *more], **(arguments | changes)).fit(task, make_data(folder))
    return task.model, losses.seen


def states_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.rglob("*-states-*.bin"))


def test_a_run_on_stored_states_is_the_run_on_computed_ones_and_a_second_computes_none(tmp_path):
    _, plain = fit(tmp_path, FixedTokenEncoder())
    first, second = CountingTokenEncoder(), CountingTokenEncoder()
    model, losses = fit(tmp_path, first, CacheHiddenStates())
    assert losses == plain
    assert len(plain) == 8
    assert first.rows == len(make_data(tmp_path).train_dataset)
    assert fit(tmp_path, second, CacheHiddenStates())[1] == plain
    assert second.rows == 0
    fit(tmp_path, second, CacheHiddenStates())  # its statistics are known by now, and change nothing that is stored
    assert second.rows == 0
    assert len(states_in(tmp_path)) == 1
    assert model.token_encoder.stored is None  # the fit is over


def test_rows_that_are_not_in_the_file_are_computed(tmp_path):
    first, second = CountingTokenEncoder(), CountingTokenEncoder()
    fit(tmp_path, first, CacheHiddenStates())
    fit(tmp_path, second, CacheHiddenStates(), max_steps=6, limit_val_batches=None)
    validation = make_data(tmp_path).validation_dataset
    assert second.rows == len(validation) > 0
    known = make_data(tmp_path).train_dataset
    stored = StoredStates(torch.zeros(len(known), LENGTH, HIDDEN), known, second)
    mixed = torch.stack([known[1], validation[0]])
    assert torch.equal(stored(mixed), second.table[mixed])
    assert torch.equal(stored(known[[2, 0]]), torch.zeros(2, LENGTH, HIDDEN))


def test_the_states_of_a_pre_trained_encoder_in_bfloat16_are_stored_as_they_are(tmp_path, monkeypatch):
    make_pretrained("gpt2", tmp_path / "gpt2")
    encoder = PretrainedTokenEncoder(str(tmp_path / "gpt2"), layer=2, dtype="bfloat16")
    monkeypatch.setattr(CacheHiddenStates, "teardown", lambda *_, stage: None)
    monkeypatch.setattr(cache, "TOKENS", 4 * LENGTH)
    fit(tmp_path, encoder, CacheHiddenStates())
    data = make_data(tmp_path).train_dataset
    batch = data[[0, 1, 2, 3]]
    assert encoder.stored(batch).dtype == torch.bfloat16
    assert torch.equal(encoder.stored(batch), encoder.hidden_states(batch))
    (file,) = tmp_path.rglob("*-states-*.bin")
    assert file.stat().st_size == len(data) * LENGTH * HIDDEN * 2


def test_bfloat16_halves_the_file_and_moves_the_losses_by_its_rounding(tmp_path):
    _, plain = fit(tmp_path, FixedTokenEncoder(), CacheHiddenStates())
    _, halved = fit(tmp_path, FixedTokenEncoder(), CacheHiddenStates(dtype="bfloat16"))
    assert halved == pytest.approx(plain, rel=2**-8)
    assert halved != plain
    small, large = sorted(path.stat().st_size for path in tmp_path.rglob("*-states-*.bin"))
    assert 2 * small == large


def test_another_encoder_and_another_corpus_make_another_file(tmp_path):
    fit(tmp_path, FixedTokenEncoder(), CacheHiddenStates())
    fit(tmp_path, FixedTokenEncoder(seed=1), CacheHiddenStates())
    assert len(states_in(tmp_path)) == 2
    changed = FixedTokenEncoder()  # the same arguments, other weights
    changed.table[0, 0] += 1
    fit(tmp_path, changed, CacheHiddenStates())
    assert len(states_in(tmp_path)) == 3
    (tmp_path / "texts.txt").write_text((tmp_path / "texts.txt").read_text() * 2)
    fit(tmp_path, FixedTokenEncoder(), CacheHiddenStates())
    assert len(states_in(tmp_path)) == 4
    fit(tmp_path, FixedTokenEncoder(), CacheHiddenStates())
    assert len(states_in(tmp_path)) == 4


def test_other_tokens_under_the_same_name_have_another_key(tmp_path):
    data = make_data(tmp_path).train_dataset
    before = cache._key(data, FixedTokenEncoder(), torch.float32)
    header = data.path.with_suffix(".json")
    (block,) = json.loads(header.read_text())["blocks"]
    header.write_text(header.read_text().replace(block, block[::-1]))
    assert cache._key(data, FixedTokenEncoder(), torch.float32) != before


def test_a_file_that_would_be_too_large_is_refused_with_its_size(tmp_path, monkeypatch):
    size = len(make_data(tmp_path).train_dataset) * LENGTH * HIDDEN * 4
    with pytest.raises(ValueError, match=rf"rows of 8 tokens take {size / 1e9:.3g} GB in float32, but max_gb=1e-06"):
        fit(tmp_path, FixedTokenEncoder(), CacheHiddenStates(max_gb=1e-6))
    usage = namedtuple("usage", ["total", "used", "free"])
    monkeypatch.setattr(cache.shutil, "disk_usage", lambda folder: usage(10**9, 10**9 - size + 1, size - 1))
    with pytest.raises(ValueError, match=rf"{(size - 1) / 1e9:.3g} GB are free in .*name another folder"):
        fit(tmp_path, FixedTokenEncoder(), CacheHiddenStates())
    assert states_in(tmp_path) == []
    monkeypatch.setattr(cache.shutil, "disk_usage", lambda folder: usage(10**9, 10**9 - size, size))
    fit(tmp_path, FixedTokenEncoder(), CacheHiddenStates(str(tmp_path / "elsewhere")))
    assert len(states_in(tmp_path / "elsewhere")) == 1


def test_an_interrupted_file_is_no_file_and_a_damaged_one_is_refused(tmp_path, monkeypatch):
    class Failing(CountingTokenEncoder):
        def hidden_states(self, tokens):
            if self.rows:
                raise KeyError("power cut")
            return super().hidden_states(tokens)

    monkeypatch.setattr(cache, "TOKENS", 4 * LENGTH)
    with pytest.raises(KeyError):
        fit(tmp_path, Failing(), CacheHiddenStates())
    assert states_in(tmp_path) == []
    fit(tmp_path, FixedTokenEncoder(), CacheHiddenStates())
    (file,) = tmp_path.rglob("*-states-*.bin")
    file.write_bytes(file.read_bytes()[:-4])
    with pytest.raises(ValueError, match=r"bytes and not \d+: delete it"):
        fit(tmp_path, FixedTokenEncoder(), CacheHiddenStates())


def stored(folder: Path) -> Path:
    fit(folder, FixedTokenEncoder(), CacheHiddenStates())
    (file,) = folder.rglob("*-states-*.bin")
    return file


def test_a_hundred_flipped_bits_in_stored_states_are_all_found(tmp_path, monkeypatch):
    monkeypatch.setattr(cache, "TOKENS", 4 * LENGTH)  # several blocks
    file = stored(tmp_path)
    header = json.loads(file.with_suffix(".json").read_text())
    rows = len(make_data(tmp_path).train_dataset)
    block = 4 * LENGTH * HIDDEN * 4
    whole = file.read_bytes()
    wanted = [hashlib.sha256(whole[i : i + block]).hexdigest() for i in range(0, len(whole), block)]
    assert header["blocks"] == wanted
    assert len(wanted) == -(-rows // 4)
    cache._verify(file, header["key"], len(whole), block, full=False)  # and this is noted
    dice = random.Random(3)
    for _ in range(100):
        place = dice.randrange(len(whole))
        file.write_bytes(whole[:place] + bytes([whole[place] ^ 1 << dice.randrange(8)]) + whole[place + 1 :])
        with pytest.raises(
            ValueError, match=rf"was altered after it was written \(block {place // block} of.*made again"
        ):
            cache._verify(file, header["key"], len(whole), block, full=False)
    with pytest.raises(ValueError, match="was altered"):
        fit(tmp_path, FixedTokenEncoder(), CacheHiddenStates())


def test_what_was_altered_below_the_file_system_is_found_where_packed_files_are_verified_in_full(tmp_path, monkeypatch):
    file = stored(tmp_path)
    fit(tmp_path, FixedTokenEncoder(), CacheHiddenStates())  # verified, and noted
    note = json.loads(file.with_suffix(".verified").read_text())
    file.write_bytes(file.read_bytes()[:-1] + b"x")
    there = file.stat()
    now = [there.st_size, there.st_ino, there.st_mtime_ns, there.st_ctime_ns]
    file.with_suffix(".verified").write_text(json.dumps([note[0], *now]))  # as if nothing had touched it
    fit(tmp_path, FixedTokenEncoder(), CacheHiddenStates())
    task = make_task(token_encoder=FixedTokenEncoder(), warmup_steps=4, timestep_refresh=2)
    trainer = make_trainer(tmp_path, [CacheHiddenStates()])
    with pytest.raises(ValueError, match="was altered"):
        trainer.fit(task, make_data(tmp_path, verify="full"))


@pytest.mark.parametrize(
    "content", ["", "{", "[]", "{}", '{"key": 1}', '{"key": "KEY"}', '{"key": "KEY", "blocks": []}']
)
def test_a_header_of_stored_states_that_is_not_whole_is_refused(tmp_path, content):
    file = stored(tmp_path)
    header = file.with_suffix(".json")
    header.write_text(content.replace("KEY", json.loads(header.read_text())["key"]))
    with pytest.raises(ValueError, match="is made again"):
        fit(tmp_path, FixedTokenEncoder(), CacheHiddenStates())


def test_whole_states_of_another_encoder_under_this_ones_name_are_refused(tmp_path):
    file = stored(tmp_path)
    fit(tmp_path, FixedTokenEncoder(seed=1), CacheHiddenStates())
    (other,) = (path for path in tmp_path.rglob("*-states-*.bin") if path != file)
    for suffix in (".bin", ".json"):
        shutil.copy(other.with_suffix(suffix), file.with_suffix(suffix))
    with pytest.raises(ValueError, match="stands where other hidden states belong"):
        fit(tmp_path, FixedTokenEncoder(), CacheHiddenStates())


def test_states_without_a_header_are_made_again(tmp_path):
    fit(tmp_path, CountingTokenEncoder(), CacheHiddenStates())
    (file,) = tmp_path.rglob("*-states-*.bin")
    whole = file.read_bytes()
    file.with_suffix(".json").unlink()
    file.write_bytes(b"\0" * len(whole))  # as a power cut between the two may leave it
    encoder = CountingTokenEncoder()
    fit(tmp_path, encoder, CacheHiddenStates())
    assert encoder.rows == len(make_data(tmp_path).train_dataset)
    assert file.read_bytes() == whole


def test_writing_states_sweeps_what_killed_writers_left_and_says_what_earlier_files_take(tmp_path, caplog):
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    left, old = elsewhere / ".ldlm-123-0123456789ab.tmp", elsewhere / "old-train-1-states-2.bin"
    left.write_bytes(b"half")
    os.utime(left, (0, 0))
    with old.open("wb") as file:
        file.truncate(3 * 10**9)  # a hole: it takes no room
    said = r"\(hidden states of other runs take 3 GB there, in 1 files"
    with pytest.raises(ValueError, match=rf"GB are free in .*elsewhere {said}"):
        fit(tmp_path, FixedTokenEncoder(), CacheHiddenStates(str(elsewhere), max_gb=1e-6))
    with caplog.at_level("INFO", "lightning.pytorch"):
        fit(tmp_path, FixedTokenEncoder(), CacheHiddenStates(str(elsewhere)))
    assert re.search(said, caplog.text)
    assert not left.exists()
    assert old.exists()  # somebody may still want it


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_while_states_are_written_ends_the_run_with_the_batch_and_leaves_no_file(
    tmp_path, monkeypatch, signum
):
    class Told(CountingTokenEncoder):
        def hidden_states(self, tokens):
            if self.rows == 0:
                os.kill(os.getpid(), signum)
            return super().hidden_states(tokens)

    monkeypatch.setattr(cache, "TOKENS", 4 * LENGTH)
    encoder = Told()
    before = [signal.signal(s, signal.SIG_DFL) for s in (signal.SIGTERM, signal.SIGUSR1)]
    try:
        with pytest.raises(SystemExit) as stop:
            fit(tmp_path, encoder, CacheHiddenStates())
        assert stop.value.code == 143
        assert signal.getsignal(signum) == signal.SIG_DFL
    finally:
        for s, handler in zip((signal.SIGTERM, signal.SIGUSR1), before, strict=True):
            signal.signal(s, handler)
    assert encoder.rows == 4
    assert [path for path in tmp_path.rglob("*") if "states" in path.name or path.suffix == ".tmp"] == []


def test_a_checkpoint_says_nothing_of_stored_states(tmp_path):
    fit(tmp_path, FixedTokenEncoder(), default_root_dir=str(tmp_path / "plain"))
    fit(tmp_path, FixedTokenEncoder(), CacheHiddenStates(), default_root_dir=str(tmp_path / "stored"))
    plain, stored = (
        torch.load(next((tmp_path / name).rglob("*.ckpt")), weights_only=True) for name in ("plain", "stored")
    )
    assert plain.keys() == stored.keys()
    assert plain["ldlm"] == stored["ldlm"]
    assert plain["state_dict"].keys() == stored["state_dict"].keys()
    assert "CacheHiddenStates" not in str(stored["callbacks"])


def test_an_encoder_that_learns_and_rows_of_unknown_origin_are_refused(tmp_path):
    with pytest.raises(ValueError, match="for a frozen token encoder, and EmbeddingTokenEncoder learns"):
        fit(tmp_path, EmbeddingTokenEncoder(HIDDEN, VOCAB), CacheHiddenStates())
    trainer = make_trainer(tmp_path, [CacheHiddenStates()])
    with pytest.raises(ValueError, match="rows of a PackedTextDataModule"):
        trainer.fit(make_task(timestep_refresh=2), DataLoader(rows(16), batch_size=4))


@pytest.mark.parametrize(("arguments", "message"), [({"dtype": "int8"}, "dtype='int8'"), ({"max_gb": 0}, "max_gb=0")])
def test_arguments_that_cannot_work_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        CacheHiddenStates(**arguments)


def test_the_second_rank_of_a_machine_waits_for_the_first_ones_file(tmp_path, monkeypatch):
    first, second = CountingTokenEncoder(), CountingTokenEncoder()

    def wait(strategy: object, name: str | None = None) -> None:
        if name == "hidden states" and first.rows == 0:
            with monkeypatch.context() as other:
                other.setattr(L.Trainer, "local_rank", 0)
                fit(tmp_path, first, CacheHiddenStates())

    monkeypatch.setattr(SingleDeviceStrategy, "barrier", wait)
    monkeypatch.setattr(L.Trainer, "local_rank", 1)
    fit(tmp_path, second, CacheHiddenStates())
    assert first.rows == len(make_data(tmp_path).train_dataset)
    assert second.rows == 0


@pytest.mark.slow
def test_two_ranks_train_on_one_file_as_they_do_without(tmp_path):
    models = [
        fit(tmp_path, FixedTokenEncoder(), *more, devices=2, strategy="ddp_spawn", max_steps=3)[0]
        for more in ([], [CacheHiddenStates()])
    ]
    assert len(states_in(tmp_path)) == 1
    for name, value in models[0].state_dict().items():
        assert torch.equal(value, models[1].state_dict()[name]), name
