"""A run that was interrupted and goes on in a new process is the run that was not, bit for bit; no other goes on."""

from pathlib import Path
from typing import Any

import pytest
from helpers.runs import assert_same_run, run
from helpers.tiny import WORDS, make_data, make_task, make_tokenizer, make_trainer, rows
from jsonargparse import ArgumentParser
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy
from torch.utils.data import DataLoader

from ldlm.training.task import LDLMTask

STEPS = 9  # 6 an epoch; the warm-up takes 5, bins are refreshed after 3, 6 and 9


def task(**changes: Any) -> LDLMTask:
    return make_task(**{"warmup_steps": 4, "timestep_refresh": 2} | changes)


CASES = [(0, 1), (0, 2), (2, 1), (2, 2)]  # loader processes, accumulated batches
STOPS = [1, 2, 3, 4, 6, 7, 8]


@pytest.mark.slow
def test_a_run_goes_on_in_a_new_process_from_any_step_with_any_workers_and_accumulation(tmp_path):
    common = [{"workers": workers, "accumulated": accumulated, "max_steps": STEPS} for workers, accumulated in CASES]
    whole = [tmp_path / f"whole{index}" for index in range(len(CASES))]
    run(*({"folder": str(folder), **arguments} for folder, arguments in zip(whole, common, strict=True)))
    rests = {(case, stop): tmp_path / f"rest{case}-{stop}" for case in range(len(CASES)) for stop in STOPS}
    run(
        *(
            {"folder": str(folder), **common[case], "resume": str(whole[case] / f"step={stop}.ckpt")}
            for (case, stop), folder in rests.items()
        )
    )
    for (case, stop), folder in rests.items():
        assert_same_run(whole[case], folder, stop, STEPS)


@pytest.mark.slow
def test_checkpoints_of_an_epochs_end_and_of_amid_a_step_go_on_at_a_whole_step(tmp_path):
    # Lightning 2.6.6 trains a batch of the old epoch once more after the first, unless the loader knows where it
    # stands, and makes a step of what is left of the accumulated batches after the second.
    epochs = {"max_steps": 14, "epochs": True}
    amid = [{"max_steps": STEPS, "accumulated": 4, "between": step} for step in (3, 6)]
    run(
        {"folder": str(tmp_path / "a"), "max_steps": 14},
        {"folder": str(tmp_path / "a-first"), **epochs, "max_steps": 6},
        {"folder": str(tmp_path / "b"), **amid[0]},
        {"folder": str(tmp_path / "c"), **amid[1]},
    )
    run(
        {"folder": str(tmp_path / "a-rest"), "max_steps": 14, "resume": str(tmp_path / "a-first" / "step=6.ckpt")},
        {"folder": str(tmp_path / "b-rest"), **amid[0], "resume": str(tmp_path / "b" / "between.ckpt")},
        {"folder": str(tmp_path / "c-rest"), **amid[1], "resume": str(tmp_path / "c" / "between.ckpt")},
    )
    for name, start, end in [("a", 6, 14), ("b", 3, STEPS), ("c", 6, STEPS)]:
        assert_same_run(tmp_path / name, tmp_path / f"{name}-rest", start, end)


@pytest.mark.parametrize("every", [{"every_n_epochs": 1}, {"every_n_train_steps": 4}])
def test_an_epoch_that_ended_on_fewer_accumulated_batches_is_not_begun_anew(tmp_path, every):
    loader = DataLoader(rows(28), batch_size=4)  # 7 batches: steps on 2, 2, 2 and 1
    keep = ModelCheckpoint(tmp_path, filename="{step}", save_top_k=-1, **every)
    arguments = {"max_steps": -1, "accumulate_grad_batches": 2, "enable_checkpointing": True}
    make_trainer(tmp_path, [keep], max_epochs=1, **arguments).fit(task(), loader)
    trainer = make_trainer(tmp_path, [], max_epochs=2, **arguments)
    trainer.fit(task(), loader, ckpt_path=tmp_path / "step=4.ckpt")
    assert trainer.global_step == 8


# --- another run


@pytest.fixture
def stopped(tmp_path):
    """A checkpoint after two steps."""
    trainer = make_trainer(tmp_path, [], max_steps=2)
    trainer.fit(task(), make_data(tmp_path, seed=1))
    trainer.save_checkpoint(tmp_path / "two.ckpt")
    return tmp_path / "two.ckpt"


def other_words(folder: Path) -> str:
    (folder / "other.txt").write_text("\n\n".join(" ".join(WORDS[i : i + 5]) for i in range(30)))
    return str(folder / "other.txt")


CHANGES = {
    "data": ({"dataset": other_words}, r"data of sha256 \w{16} .* with of sha256 \w{16}:"),
    "special_tokens": ({"special_tokens": False}, "special_tokens True and this one would go on with False:"),
    "batch_size": ({"batch_size": 8}, "batch_size 4 and this one would go on with 8:"),
    "seed": ({"seed": 2}, "seed 1 and this one would go on with 2:"),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_run_goes_on_with_other_rows_only_if_that_is_insisted_on_by_name(stopped, tmp_path, name):
    changes, message = CHANGES[name]
    changes = {"seed": 1} | {key: value(tmp_path) if callable(value) else value for key, value in changes.items()}
    with pytest.raises(
        ValueError, match=rf"the checkpoint's run has {message} give the same.*allow_changes '\[{name}\]'"
    ):
        make_trainer(tmp_path, [], max_steps=3).fit(task(), make_data(tmp_path, **changes), ckpt_path=stopped)
    trainer = make_trainer(tmp_path, [], max_steps=3)
    trainer.fit(task(allow_changes=[name]), make_data(tmp_path, **changes), ckpt_path=stopped)
    assert trainer.global_step == 3


def test_another_tokenizer_row_length_or_seed_of_the_noise_is_refused_too(stopped, tmp_path):
    padded = make_tokenizer()  # a new word changes ids; a token for padding would not
    padded.add_tokens(["word1x"])
    data = make_data(tmp_path, seed=1, tokenizer=padded)
    with pytest.raises(ValueError, match=r"has (data|tokenizer) of sha256 (\w+) and .* with of sha256 (?!\2)\w+"):
        make_trainer(tmp_path, [], max_steps=3).fit(task(), data, ckpt_path=stopped)
    data = make_data(tmp_path, seed=1, sequence_length=9)
    with pytest.raises(ValueError, match="sequence_length 8 and this one would go on with 9"):
        make_trainer(tmp_path, [], max_steps=3).fit(task(sequence_length=9), data, ckpt_path=stopped)
    for allowed in (["batch_size"], ["seed"]):
        other = task(allow_changes=allowed)
        other.seed = 5
        data = make_data(tmp_path, seed=1)
        trainer = make_trainer(tmp_path, [], max_steps=3)
        if allowed == ["seed"]:
            trainer.fit(other, data, ckpt_path=stopped)
            assert trainer.global_step == 3
        else:
            with pytest.raises(ValueError, match="seed 0 and this one would go on with 5"):
                trainer.fit(other, data, ckpt_path=stopped)


def test_validating_and_a_loader_of_ones_own_are_not_asked(stopped, tmp_path):
    data = make_data(tmp_path, batch_size=8, special_tokens=False)
    assert make_trainer(tmp_path, []).validate(task(), data, ckpt_path=stopped, verbose=False)
    trainer = make_trainer(tmp_path, [], max_steps=2)
    trainer.fit(task(), DataLoader(rows(40), batch_size=4))
    trainer.save_checkpoint(tmp_path / "own.ckpt")
    trainer = make_trainer(tmp_path, [], max_steps=3)
    trainer.fit(task(), DataLoader(rows(40), batch_size=5), ckpt_path=tmp_path / "own.ckpt")
    assert trainer.global_step == 3


def test_a_name_that_nothing_has_is_refused(stopped, tmp_path):
    other, data = task(allow_changes=["seed", "batchsize"]), make_data(tmp_path, seed=1)
    with pytest.raises(ValueError, match=r"names \['batchsize'\], but there are only .*batch_size, .*seed"):
        make_trainer(tmp_path, [], max_steps=3).fit(other, data, ckpt_path=stopped)


def test_the_command_line_takes_the_names():
    parser = ArgumentParser()
    parser.add_class_arguments(LDLMTask, "training", skip={"model"}, instantiate=False)
    words = ["--training.warmup_steps=4", "--training.allow_changes=[batch_size, schedule.d]"]
    given = vars(parser.instantiate(parser.parse_args(words)).training)
    assert task(**given).allow_changes == ("batch_size", "schedule.d")


@pytest.mark.parametrize("strategy", [FSDPStrategy, ModelParallelStrategy, DeepSpeedStrategy])
def test_strategies_that_cut_the_parameters_up_are_refused_in_one_sentence(tmp_path, strategy):
    trainer, refused = make_trainer(tmp_path, []), task()
    refused.trainer = trainer
    # Neither can be had on a CPU: Lightning's Trainer refuses the first two, and the third wants its package.
    trainer._accelerator_connector.strategy = object.__new__(strategy)
    with pytest.raises(ValueError, match=rf"{strategy.__name__} cuts the parameters up.*: use strategy='ddp'"):
        refused.setup("fit")
