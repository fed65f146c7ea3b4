"""What is not finite is refused before training and before a save: weights, optimizer states, statistics."""

import math
import re

import lightning as L
import pytest
import torch
from helpers.tiny import FixedTokenEncoder, Given, generator, make_data, make_task, make_trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor

from ldlm.checkpoints.integrity import read
from ldlm.checkpoints.io import CheckpointFiles
from ldlm.nn.token_decoders import LinearTokenDecoder

INF = torch.tensor([1.0, math.inf])


# --- what a checkpoint holds


@pytest.mark.parametrize(
    ("content", "name"),
    [
        ({"optimizer_states": [{"state": {0: {"exp_avg": 1.0}, 3: {"exp_avg_sq": INF}}}]}, "0.state.3.exp_avg_sq"),
        ({"optimizer_states": [{"state": {}}, {"param_groups": [{"lr": float("nan")}]}]}, "1.param_groups.0.lr"),
        ({"lr_schedulers": [{"base_lrs": [1e-3, float("inf")]}]}, "0.base_lrs.1"),
        ({"MixedPrecision": {"scale": float("inf"), "_growth_tracker": 3}}, "scale"),
    ],
)
def test_every_state_that_a_run_would_resume_with_is_asked_whether_it_is_finite(tmp_path, content, name):
    files, (part,) = CheckpointFiles(), content
    with pytest.warns(UserWarning, match=re.escape(f"({part}.{name} is not finite)")):
        files.save_checkpoint({"global_step": 1, **content}, tmp_path / "last.ckpt")
    assert not list(tmp_path.iterdir())
    # what has saved nothing yet has an infinite score
    files.save_checkpoint({"global_step": 1, "callbacks": {"ModelCheckpoint": {"kth_value": INF}}}, tmp_path / "a.ckpt")
    assert files.failures == 0


def test_an_infinite_optimizer_state_never_takes_the_place_of_a_good_one(tmp_path):
    saver = ModelCheckpoint(tmp_path / "runs", every_n_train_steps=2)

    class Poison(L.Callback):
        def on_train_batch_end(self, trainer, *_):
            if trainer.global_step == 4:
                next(iter(trainer.optimizers[0].state.values()))["exp_avg_sq"][0] = math.inf

    trainer = make_trainer(tmp_path, [Poison(), saver], max_steps=5, enable_checkpointing=True)
    said = r"step 4 was not written \(optimizer_states\.0\.state\.0\.exp_avg_sq is not finite\)"
    with pytest.warns(UserWarning, match=said), pytest.raises(OSError, match="the last checkpoint of this run was not"):
        trainer.fit(make_task(), make_data(tmp_path))
    assert {read(file)["global_step"] for file in (tmp_path / "runs").glob("*.ckpt")} == {2}


# --- the statistics of hidden states


@pytest.mark.parametrize("wrong", [math.nan, math.inf, -math.inf, 1e40, 1e200])
def test_hidden_states_that_are_not_finite_are_refused_and_leave_the_statistics_as_they_were(wrong):
    hidden = torch.randn(10, 5, generator=generator(), dtype=torch.float64)
    encoder = Given(hidden)
    encoder.fit_statistics([torch.arange(10)[None]], rows=1)
    before = {name: value.clone() for name, value in encoder.state_dict().items()}
    hidden[7, 3] = wrong
    with pytest.raises(
        ValueError, match=r"^Given gives hidden states that are not finite.* 1 of 5 features, of which 3"
    ):
        encoder.fit_statistics([torch.arange(10)[None]], rows=1)
    assert all(torch.equal(value, before[name]) for name, value in encoder.state_dict().items())


def test_a_run_whose_token_encoder_gives_infinities_ends_before_its_first_step(tmp_path):
    encoder = FixedTokenEncoder()
    encoder.table[:, 3] = math.inf
    trainer = make_trainer(tmp_path, [])
    with pytest.raises(ValueError, match="FixedTokenEncoder gives hidden states that are not finite"):
        trainer.fit(make_task(token_encoder=encoder), make_data(tmp_path))
    assert trainer.global_step == 0
    assert encoder.mean.isfinite().all()
    assert encoder.statistics_rows == 0


def test_a_token_decoder_that_starts_at_infinite_embeddings_is_refused(tmp_path):
    class Infinite(FixedTokenEncoder):
        def embeddings(self) -> Tensor:
            return self.table / 0

    decoder = LinearTokenDecoder(16, 40, from_embeddings=True)
    with pytest.raises(ValueError, match=r"token_decoder\.\S+ is not finite before training"):
        make_trainer(tmp_path, []).fit(make_task(token_encoder=Infinite(), token_decoder=decoder), make_data(tmp_path))
