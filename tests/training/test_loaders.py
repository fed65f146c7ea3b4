"""Loaders that are not ours: whatever holds token ids is trained on, and anything else is refused by name."""

import json
from pathlib import Path

import lightning as L
import pytest
import torch
from helpers.tiny import VOCAB, make_data, make_task, make_tokenizer, make_trainer, rows
from lightning.pytorch.callbacks import GradientAccumulationScheduler
from lightning.pytorch.utilities import CombinedLoader
from torch.utils.data import DataLoader, IterableDataset, TensorDataset
from transformers import BatchEncoding

from ldlm.training.callbacks.ema import EMA
from ldlm.training.callbacks.likelihood_bound import LikelihoodBound
from ldlm.training.callbacks.predictions import ReconstructionWriter
from ldlm.training.callbacks.visualisation import FigureLogger, SampleLogger, ShowSamples, Throughput
from ldlm.training.stability import SkippedSteps
from ldlm.training.task import LDLMTask

TOKENS = rows(18)


class Stream(IterableDataset):
    """Has no length, and begins anew each time."""

    def __init__(self, items: list) -> None:
        self.items = items

    def __iter__(self):
        return iter(self.items)


class OwnLoader:
    """Somebody's own loader, which is no DataLoader and has no length."""

    def __iter__(self):
        return iter(TOKENS.split(4))


def coded(batch: list) -> BatchEncoding:
    tokens = torch.stack(batch)
    return BatchEncoding({"input_ids": tokens, "attention_mask": torch.ones_like(tokens)})


LOADERS = {
    "a data set of tuples": lambda: DataLoader(TensorDataset(TOKENS), batch_size=4),
    "tuples": lambda: DataLoader(TOKENS, batch_size=4, collate_fn=lambda batch: (torch.stack(batch),)),
    "dictionaries": lambda: DataLoader([{"input_ids": row, "text": "words"} for row in TOKENS], batch_size=4),
    "a tokenizer's batches": lambda: DataLoader(TOKENS, batch_size=4, collate_fn=coded),
    "int32": lambda: DataLoader(TOKENS.int(), batch_size=4),
    "uint8": lambda: DataLoader(TOKENS.byte(), batch_size=4),
    "a stream": lambda: DataLoader(Stream(list(TOKENS)), batch_size=4),
    "a stream of dictionaries": lambda: DataLoader(Stream([{"input_ids": row} for row in TOKENS.int()]), batch_size=4),
    "a loader of one's own": OwnLoader,
}


def recipe(**changes: object) -> LDLMTask:
    return make_task(warmup_steps=5, timestep_refresh=3, **changes)


def fit(folder: Path, loader: object, *more: L.Callback, **changes: object) -> tuple[L.Trainer, dict]:
    task, ema = recipe(lr_warmup_steps=3), EMA()
    trainer = make_trainer(folder, [ema, *more], **({"max_steps": -1, "max_epochs": 2} | changes))
    trainer.fit(task, loader)
    return trainer, task.state_dict() | ema.live


@pytest.fixture(scope="module")
def plain(tmp_path_factory) -> dict:
    """What a loader of int64 trains: five batches an epoch, the last of two rows."""
    trainer, state = fit(tmp_path_factory.mktemp("plain"), DataLoader(TOKENS, batch_size=4))
    assert trainer.global_step == 10
    return state


@pytest.mark.parametrize("kind", LOADERS)
def test_a_loader_of_any_kind_trains_what_a_loader_of_int64_trains(tmp_path, kind, plain):
    trainer, state = fit(tmp_path, LOADERS[kind]())
    assert trainer.global_step == 10
    assert plain.keys() == state.keys()
    assert all(torch.equal(value, state[name]) for name, value in plain.items())


def test_a_smaller_last_batch_and_accumulated_batches_go_together(tmp_path):
    trainer, state = fit(tmp_path, DataLoader(TOKENS, batch_size=4), accumulate_grad_batches=2)
    assert trainer.global_step == 6  # of 8, 8 and 2 rows
    assert all(value.isfinite().all() for value in state.values())


@pytest.mark.parametrize("kind", LOADERS)
def test_a_loader_of_any_kind_is_validated_tested_and_predicted_like_int64(tmp_path, kind):
    task, plain = make_task(), DataLoader(TOKENS, batch_size=4)
    trainer = make_trainer(tmp_path, [LikelihoodBound(tau=0.5)])
    for call in (trainer.validate, trainer.test):
        assert call(task, LOADERS[kind](), verbose=False) == call(task, plain, verbose=False)
    got, want = (torch.cat(trainer.predict(task, loader)) for loader in (LOADERS[kind](), plain))
    assert torch.equal(got, want)


@pytest.mark.parametrize("kind", LOADERS)
def test_callbacks_are_given_the_token_ids_of_any_loader(tmp_path, kind):
    file = tmp_path / "out.jsonl"
    task = make_task(tokenizer=make_tokenizer())
    make_trainer(tmp_path, [ReconstructionWriter(str(file))]).predict(task, LOADERS[kind]())
    assert [json.loads(line)["text"] for line in file.read_text().splitlines()] == task.model.to_text(TOKENS)


class Counted(Throughput):
    """Counts tokens and never reports them."""

    seen = 0

    def on_train_batch_end(self, *arguments):
        super().on_train_batch_end(*arguments)
        self.seen = self._tokens


class Elsewhere(LDLMTask):
    """Knows where somebody's loader has the token ids."""

    def on_before_batch_transfer(self, batch, dataloader_idx):
        return batch["tokens"]


class ElsewhereData(L.LightningDataModule):
    """The same as a data module, with a loader for everything."""

    def __init__(self) -> None:
        super().__init__()
        self.loader = DataLoader([{"tokens": row} for row in TOKENS.int()], batch_size=4)

    def train_dataloader(self):
        return self.loader

    def predict_dataloader(self):
        return self.loader

    def on_before_batch_transfer(self, batch, dataloader_idx):
        return {"input_ids": batch["tokens"]}


@pytest.mark.parametrize("where", ["task", "data module"])
def test_token_ids_that_stand_elsewhere_are_taken_out_by_lightnings_own_hook(tmp_path, where, plain):
    task, data, ema = recipe(lr_warmup_steps=3), ElsewhereData(), EMA()
    if where == "task":
        task.__class__, data = Elsewhere, data.loader
    trainer = make_trainer(tmp_path, [ema], max_steps=-1, max_epochs=2)
    trainer.fit(task, data)
    assert all(torch.equal(value, plain[name]) for name, value in (task.state_dict() | ema.live).items())
    assert torch.cat(trainer.predict(task, data)).shape == TOKENS.shape


def test_a_run_with_a_data_module_is_not_warned_of_hooks(tmp_path, recwarn):
    make_trainer(tmp_path, [EMA()], max_steps=2).fit(recipe(), make_data(tmp_path))
    assert [str(warning.message) for warning in recwarn if "overridden" in str(warning.message)] == []


@pytest.mark.parametrize("kind", ["a tokenizer's batches", "a stream of dictionaries"])
def test_watchers_count_the_tokens_and_show_the_texts_of_any_loader(tmp_path, kind, capsys):
    counted, task = Counted(10**9), recipe(tokenizer=make_tokenizer())
    watchers = [EMA(), counted, FigureLogger(), SampleLogger(2, 2), ShowSamples(2, 2)]
    arguments = {"max_steps": 5, "logger": True, "val_check_interval": 5, "log_every_n_steps": 1}
    make_trainer(tmp_path, watchers, **arguments).fit(task, LOADERS[kind](), LOADERS[kind]())
    assert counted.seen == TOKENS.numel()
    assert task.model.to_text(TOKENS[:1])[0].split()[0] in capsys.readouterr().out


@pytest.mark.parametrize(
    ("items", "told"),
    [
        (list(TOKENS.float()), r"a batch is a float32 tensor \[4, 8\]"),
        (list(TOKENS > 5), r"a batch is a bool tensor \[4, 8\]"),
        (list(TOKENS[:, :7]), r"a batch is an int64 tensor \[4, 7\]"),
        (list(TOKENS[:, 0]), r"a batch is an int64 tensor \[4\]"),
        ([(row, row) for row in TOKENS], r"a batch is a list of 2 items"),
        (
            [{"input_ids": row.tolist()} for row in TOKENS],
            r"a batch is a dictionary with 'input_ids' a list of 8 items",
        ),
        ([{"tokens": row} for row in TOKENS], r"a batch is a dictionary with the keys 'tokens'"),
        (["some text"] * 18, r"a batch is a list of 4 items"),
        ([{"input_ids": r, "attention_mask": r > 3} for r in TOKENS], r"its attention_mask has zeros"),
        (list(TOKENS - 100), r"token ids from -100 to"),
        (list(TOKENS + VOCAB), rf"token ids from {VOCAB} to"),
    ],
)
def test_what_is_no_token_ids_is_named_before_anything_is_measured(tmp_path, items, told):
    task = recipe()
    before = {name: value.clone() for name, value in task.state_dict().items()}
    trainer = make_trainer(tmp_path, [EMA()])
    for call in (trainer.validate, trainer.test, trainer.predict, trainer.fit):
        with pytest.raises(ValueError, match=told):
            call(task, DataLoader(items, batch_size=4))
    assert all(torch.equal(value, before[name]) for name, value in task.state_dict().items())


@pytest.mark.parametrize(
    "loader",
    [
        DataLoader([], batch_size=4),
        DataLoader(Stream([]), batch_size=4),
        DataLoader(TOKENS[:3], batch_size=4, drop_last=True),
        DataLoader([TOKENS[:0]], batch_size=None),
    ],
)
def test_a_loader_without_rows_is_refused_and_leaves_the_model_as_it_was(tmp_path, loader):
    task = recipe()
    before = {name: value.clone() for name, value in task.state_dict().items()}
    with pytest.raises(ValueError, match="the training loader gives no rows"):
        make_trainer(tmp_path, [EMA()]).fit(task, loader)
    assert all(torch.equal(value, before[name]) for name, value in task.state_dict().items())


def test_a_fit_limited_to_no_batches_measures_nothing(tmp_path):
    task = recipe()
    with pytest.raises(ValueError, match="the training loader gives no rows"):
        make_trainer(tmp_path, [EMA()], limit_train_batches=0).fit(task, DataLoader(TOKENS, batch_size=4))
    assert task.model.token_encoder.std.isfinite().all()


@pytest.mark.parametrize("several", [list, lambda pair: dict(zip("ab", pair, strict=True)), CombinedLoader])
def test_several_training_loaders_are_refused(tmp_path, several):
    loaders = several([DataLoader(TOKENS, batch_size=4), DataLoader(TOKENS, batch_size=2)])
    with pytest.raises(ValueError, match="2 training loaders together: give one"):
        make_trainer(tmp_path, [EMA()]).fit(recipe(), loaders)


def test_each_of_several_held_out_loaders_is_validated_as_it_is_alone(tmp_path):
    task, loaders = make_task(), [DataLoader(rows(8, seed), batch_size=4) for seed in (1, 2)]
    trainer = make_trainer(tmp_path, [FigureLogger()])
    alone = [trainer.validate(task, loader, verbose=False)[0] for loader in loaders]
    for call in (trainer.validate, trainer.test):
        both = call(task, loaders, verbose=False)
        for index, wanted in enumerate(alone):
            got = {name.removesuffix(f"/dataloader_idx_{index}"): value for name, value in both[index].items()}
            assert got == pytest.approx(wanted, rel=1e-6)
    assert trainer.predict(task, loaders, return_predictions=False) is None
    first, second = trainer.predict(task, loaders)
    assert torch.equal(torch.cat(first), torch.cat(trainer.predict(task, loaders[0])))
    assert torch.equal(torch.cat(second), torch.cat(trainer.predict(task, loaders[1])))


@pytest.mark.parametrize("bad", [3, 4], ids=["a whole batch", "the small one"])
def test_a_bad_step_beside_a_smaller_batch_is_reported_with_its_own_times(tmp_path, bad):
    times = {}

    class Spoil(L.Callback):
        def on_train_start(self, trainer, task):
            objective = task.objective

            def spoiled(model, tokens, u, *rest):
                found = objective(model, tokens, u, *rest)
                times[trainer.global_step] = u.clone()
                return found._replace(total=found.total * (torch.nan if trainer.global_step == bad else 1))

            task.objective = spoiled

    with pytest.raises(ValueError, match="updates in a row were left out") as raised:
        fit(tmp_path, DataLoader(TOKENS, batch_size=4), Spoil(), SkippedSteps(1, 1))
    told = str(raised.value).partition("at the times u = ")[2].partition(" on ")[0]
    assert json.loads(told) == [round(value, 4) for value in times[bad].tolist()]


@pytest.mark.parametrize("data", [None, make_data], ids=["a loader", "our data"])
def test_accumulation_that_varies_over_epochs_is_refused(tmp_path, data):
    loader = DataLoader(TOKENS, batch_size=4) if data is None else data(tmp_path)
    with pytest.raises(ValueError, match=r"GradientAccumulationScheduler.*accumulate_grad_batches"):
        fit(tmp_path, loader, GradientAccumulationScheduler({0: 1, 1: 2}))
