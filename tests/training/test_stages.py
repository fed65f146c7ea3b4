"""Fixed latents and token decoders trained afterwards: what learns, what stands still, and what is refused."""

import lightning as L
import pytest
import torch
import torch.nn.functional as F
from helpers.tiny import (
    HIDDEN,
    LATENT,
    LENGTH,
    VOCAB,
    FixedTokenEncoder,
    TimeOnlyDenoiser,
    generator,
    make_data,
    make_model,
    make_pretrained,
    make_task,
    make_tokenizer,
    make_trainer,
    rows,
)
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from ldlm.checkpoints.description import describe_model
from ldlm.diffusion.samplers import DDIM
from ldlm.likelihood import likelihood_terms
from ldlm.model import LDLM
from ldlm.nn.latent_coders import PerceiverResamplerDecoder, PerceiverResamplerEncoder, SelfAttentionEncoder
from ldlm.nn.token_decoders import LinearTokenDecoder, TransformerTokenDecoder
from ldlm.nn.token_encoders import PretrainedTokenEncoder
from ldlm.objective import Losses, TokenObjective
from ldlm.training.callbacks.ema import EMA
from ldlm.training.callbacks.likelihood_bound import LikelihoodBound
from ldlm.training.stages import CODERS, FixedLatents, replace_token_decoder, token_decoder_stage
from ldlm.training.task import LDLMTask

SIZES = {"width": 16, "layers": 1, "heads": 2}
ONLY_DIFFUSION = {"reconstruction_weight": 0.0, "token_weight": 0.0}


def save(folder, model: LDLM, name: str) -> str:
    """Two steps of training, which also measures the hidden states, and the checkpoint."""
    trainer = make_trainer(folder, [], max_steps=2)
    trainer.fit(make_task(model=model, timestep_refresh=2), make_data(folder))
    trainer.save_checkpoint(folder / name)
    return str(folder / name)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("stages")


@pytest.fixture(scope="module")
def first(folder) -> str:
    """A trained model with a latent a token."""
    return save(folder, make_model(tokenizer=make_tokenizer(), sampler=DDIM()), "first.ckpt")


@pytest.fixture(scope="module")
def half(folder) -> str:
    """A trained model with 4 latents for 8 tokens."""
    parts = {
        "latent_encoder": PerceiverResamplerEncoder(HIDDEN, LATENT, LENGTH, 4, **SIZES),
        "latent_decoder": PerceiverResamplerDecoder(HIDDEN, LATENT, LENGTH, 4, **SIZES),
        "denoiser": TimeOnlyDenoiser(LATENT, 4),
    }
    return save(folder, make_model(tokenizer=make_tokenizer(), **parts), "half.ckpt")


def stored(path: str) -> dict[str, Tensor]:
    return torch.load(path, weights_only=True)["state_dict"]


def second(**changes) -> LDLMTask:
    """Another start than the checkpoint's."""
    return make_task(seed=7, **({"tokenizer": make_tokenizer(), "timestep_refresh": 2, **ONLY_DIFFUSION} | changes))


def moved(before: dict[str, Tensor], after: dict[str, Tensor]) -> set[str]:
    """Which parts have a tensor that is not bit-equal."""
    assert before.keys() == after.keys()
    return {name.partition(".")[0] for name in before if not torch.equal(before[name], after[name])}


# --- diffusion on fixed latents


@pytest.mark.parametrize("averaged", [None, "after", "before"])
def test_only_the_denoiser_and_the_timesteps_learn_on_fixed_latents(folder, first, averaged):
    fixed = FixedLatents(first)
    callbacks = {None: [fixed], "after": [fixed, EMA()], "before": [EMA(), fixed]}[averaged]
    task = second()
    trainer = make_trainer(folder, callbacks, max_steps=3)
    trainer.fit(task, make_data(folder))
    trainer.save_checkpoint(folder / "fixed.ckpt")
    assert moved(stored(first), task.state_dict()) == {"denoiser", "timesteps"}
    assert moved(stored(first), stored(str(folder / "fixed.ckpt"))) == {"denoiser", "timesteps"}
    trained = {id(p) for group in trainer.optimizers[0].param_groups for p in group["params"]}
    assert trained == {id(p) for p in task.model.denoiser.parameters()}
    assert all(p.grad is None for name in CODERS for p in task.model.get_submodule(name).parameters())
    start = second().state_dict()
    assert all(
        not torch.equal(start[f"denoiser.{name}"], value)
        for name, value in task.model.denoiser.named_parameters()
        if value.requires_grad
    )


def test_the_diffusion_loss_on_fixed_latents_is_that_of_the_first_stages_latents(folder, first):
    task = second(self_conditioning=0.0)
    model = task.model
    make_trainer(folder, [FixedLatents(first)], max_steps=1).fit(task, make_data(folder))
    model.eval()
    old, tokens, u = LDLM.load_from_checkpoint(first), rows(4), torch.tensor([0.1, 0.4, 0.6, 0.9])
    with torch.no_grad():
        z0 = old.latent_encoder((old.token_encoder.table[tokens] - old.token_encoder.mean) / old.token_encoder.std)
        eps = torch.randn(z0.shape, generator=generator(3))
        z_t = old.schedule.alpha(u)[:, None, None] * z0 + old.schedule.sigma(u)[:, None, None] * eps
        want = (z0 - model.denoiser(z_t, u, torch.zeros_like(z_t))).square().mean()
        losses = task.objective(model, tokens, u, task.gamma, generator(3))
    torch.testing.assert_close(losses.total, want, rtol=1e-6, atol=0)


@pytest.mark.parametrize("more", [[], [EMA]], ids=["raw", "averaged"])
def test_a_resumed_run_on_fixed_latents_goes_on_exactly(folder, first, more):
    def callbacks() -> list[L.Callback]:
        return [FixedLatents(first), *(kind() for kind in more)]

    whole = second()
    make_trainer(folder, callbacks(), max_steps=5).fit(whole, make_data(folder))
    cut = make_trainer(folder, callbacks(), max_steps=2)
    cut.fit(second(), make_data(folder))
    cut.save_checkpoint(folder / "cut.ckpt")
    rest = second()
    make_trainer(folder, callbacks(), max_steps=5).fit(rest, make_data(folder), ckpt_path=folder / "cut.ckpt")
    assert moved(whole.state_dict(), rest.state_dict()) == set()


def other_words() -> PreTrainedTokenizerFast:
    tokenizer = make_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["word0"]})
    return tokenizer


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        (
            {"latent_encoder": SelfAttentionEncoder(HIDDEN, LATENT, LENGTH, **SIZES)},
            r"has a ldlm\.PerceiverResamplerEncoder as its latent_encoder and the model a "
            r"ldlm\.SelfAttentionEncoder: give the recipe",
        ),
        (
            {"latent_encoder": PerceiverResamplerEncoder(HIDDEN, LATENT, LENGTH, width=16, layers=2, heads=2)},
            r"has latent_encoder\.layers=1 and the model 2: its latents cannot be read so",
        ),
        (
            {"latent_encoder": PerceiverResamplerEncoder(HIDDEN, LATENT, LENGTH, **SIZES, unit_variance=True)},
            r"has latent_encoder\.unit_variance=False and the model True",
        ),
        ({"token_encoder": FixedTokenEncoder(seed=1)}, r"has token_encoder\.seed=0 and the model 1"),
        ({"token_decoder": TransformerTokenDecoder(HIDDEN, VOCAB, 1, 2)}, "TransformerTokenDecoder: give the recipe"),
        ({"tokenizer": other_words()}, "was trained with the tokenizer .* and the model has .*: give both one"),
    ],
    ids=["class", "size", "variance", "encoder", "decoder", "tokenizer"],
)
def test_other_coders_than_the_checkpoints_are_refused_in_one_sentence(folder, first, changes, told):
    trainer = make_trainer(folder, [FixedLatents(first)])
    tokenizer = changes.get("tokenizer", make_tokenizer())
    with pytest.raises(ValueError, match=told) as error:
        trainer.fit(second(**changes), make_data(folder, tokenizer=tokenizer))
    assert "\n" not in str(error.value)
    assert first in str(error.value)


def test_another_row_length_is_refused_with_both_lengths(folder, first):
    parts = {
        "latent_encoder": PerceiverResamplerEncoder(HIDDEN, LATENT, 6, LENGTH, **SIZES),
        "latent_decoder": PerceiverResamplerDecoder(HIDDEN, LATENT, 6, LENGTH, **SIZES),
    }
    trainer = make_trainer(folder, [FixedLatents(first)])
    with pytest.raises(
        ValueError, match=r"has latents of 8 tokens and the model reads rows of 6: .*sequence_length=8$"
    ):
        trainer.fit(second(sequence_length=6, **parts), make_data(folder, sequence_length=6))


def test_hidden_states_of_another_layer_are_refused_though_the_shapes_agree(folder):
    make_pretrained("bert", folder / "bert")
    make_tokenizer().save_pretrained(str(folder / "bert"))

    def with_layer(layer: int) -> LDLM:
        encoder = PretrainedTokenEncoder(str(folder / "bert"), layer=layer)
        return make_model(token_encoder=encoder, tokenizer=make_tokenizer())

    path = save(folder, with_layer(-3), "layer-3.ckpt")
    trainer = make_trainer(folder, [FixedLatents(path)], max_steps=1)
    with pytest.raises(ValueError, match=r"has token_encoder\.layer=-3 and the model -2"):
        trainer.fit(make_task(model=with_layer(-2), **ONLY_DIFFUSION), make_data(folder))
    # The same hidden states in another dtype are the same latents.
    task = make_task(model=with_layer(-3), **ONLY_DIFFUSION)
    task.model.token_encoder.dtype = "bfloat16"
    make_trainer(folder, [FixedLatents(path)], max_steps=1).fit(task, make_data(folder))


@pytest.mark.parametrize("stage", [FixedLatents, token_decoder_stage])
@pytest.mark.parametrize(
    ("content", "told"),
    [(None, "does not exist"), (b"text", "is truncated or not a checkpoint"), ({"a": 1}, "is of something else")],
)
def test_what_is_no_checkpoint_is_said_to_be_none(folder, tmp_path, stage, content, told):
    path = tmp_path / "odd.ckpt"
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content:
        torch.save(content, path)
    if stage is token_decoder_stage:
        with pytest.raises(ValueError, match=f"odd.ckpt {told}"):
            token_decoder_stage(str(path))
    else:
        trainer = make_trainer(folder, [FixedLatents(str(path))])
        with pytest.raises(ValueError, match=f"odd.ckpt {told}"):
            trainer.fit(second(), make_data(folder))


# --- token decoders trained afterwards


def loss_of(model: LDLM, tokens: Tensor, draw: torch.Generator) -> Losses:
    nowhere = torch.full((len(tokens),), torch.nan)  # no time and no gamma matter
    return TokenObjective()(model, tokens, nowhere, torch.nan, draw)


def test_the_decoders_loss_is_cross_entropy_on_noised_latents_and_nothing_else(first):
    stage, old, tokens = token_decoder_stage(first, layers=1, heads=2, sigma_dec=0.7), stored(first), rows(5)
    losses = loss_of(stage, tokens, generator(2))
    model = LDLM.load_from_checkpoint(first)
    draw = generator(2)
    with torch.no_grad():
        hidden = (model.token_encoder.table[tokens] - old["token_encoder.mean"]) / old["token_encoder.std"]
        z = model.latent_encoder(hidden) + 0.7 * torch.randn(5, LENGTH, LATENT, generator=draw)
        logits = stage.token_decoder(z)
    each = [logits[b, i].exp().sum().log() - logits[b, i, tokens[b, i]] for b in range(5) for i in range(LENGTH)]
    nats = sum(each) / (5 * LENGTH)
    torch.testing.assert_close(losses.total, nats, rtol=1e-5, atol=0)
    torch.testing.assert_close(losses.terms, {"token": nats}, rtol=1e-5, atol=0)
    assert losses.rows is None


def test_its_noise_is_the_checkpoints_unless_another_is_given(folder):
    path = save(folder, make_model(sigma_dec=2.5), "noise.ckpt")
    assert token_decoder_stage(path, heads=2).sigma_dec == 2.5
    assert token_decoder_stage(path, heads=2, sigma_dec=0.0).sigma_dec == 0.0


@pytest.mark.parametrize("with_decoder", [False, True])
def test_only_the_new_decoders_get_gradients_and_all_of_them_do(first, with_decoder):
    latent_decoder = PerceiverResamplerDecoder(10, LATENT, LENGTH, **SIZES) if with_decoder else None
    stage = token_decoder_stage(first, layers=2, heads=2, latent_decoder=latent_decoder)
    TokenObjective().prepare(stage)
    with torch.no_grad():
        for parameter in stage.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator(1)))
    loss_of(stage, rows(4), generator()).total.backward()
    having = {name.partition(".")[0] for name, p in stage.named_parameters() if p.grad is not None and p.grad.any()}
    assert having == ({"latent_decoder", "token_decoder"} if with_decoder else {"token_decoder"})
    assert all(p.grad is not None for part in (stage.token_decoder, stage.latent_decoder) for p in part.parameters())
    assert {n.partition(".")[0] for n, p in stage.named_parameters() if p.requires_grad} == having


@pytest.mark.parametrize("positions", [False, True])
def test_a_new_decoder_has_learned_positions_where_the_old_one_had_them(folder, positions):
    old = TransformerTokenDecoder(HIDDEN, VOCAB, 1, 2, learned_positions=positions, sequence_length=LENGTH)
    path = save(folder, make_model(tokenizer=make_tokenizer(), token_decoder=old), f"positions-{positions}.ckpt")
    assert (LDLM.load_from_checkpoint(path).token_decoder.positions is not None) == positions
    stage = token_decoder_stage(path, layers=1, heads=2)
    assert (stage.token_decoder.positions is not None) == positions
    assert stage.token_decoder(torch.zeros(1, LENGTH, LATENT)).shape == (1, LENGTH, VOCAB)


def test_layers_0_is_the_linear_head_from_latents_to_tokens(first):
    stage = token_decoder_stage(first, layers=0)
    assert type(stage.token_decoder) is LinearTokenDecoder
    trained = sum(p.numel() for p in stage.parameters() if p.requires_grad)
    assert trained == LATENT * VOCAB + sum(p.numel() for n, p in stage.token_decoder.named_parameters() if "bias" in n)
    z = torch.randn(3, LENGTH, LATENT, generator=generator())
    doubled = stage.token_decoder(2 * z) - stage.token_decoder(z)
    torch.testing.assert_close(doubled, stage.token_decoder(z) - stage.token_decoder(0 * z), rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="layers=-1 must be 0"):
        token_decoder_stage(first, layers=-1)


def fit_stage(folder, stage: LDLM, name: str, steps: int = 3, resume: str | None = None, **changes) -> str:
    trainer = make_trainer(folder, [], max_steps=steps)
    trainer.fit(token_task(stage, **changes), make_data(folder), ckpt_path=resume)
    trainer.save_checkpoint(folder / name)
    return str(folder / name)


def token_task(stage: LDLM, **changes) -> LDLMTask:
    return LDLMTask(stage, TokenObjective(), **({"warmup_steps": 0, "lr_warmup_steps": 0} | changes))


def make_stage(path: str, **changes) -> LDLM:
    torch.manual_seed(3)
    return token_decoder_stage(path, **({"layers": 1, "heads": 2} | changes))


def test_its_checkpoint_is_a_model_that_generates_with_encoder_and_denoiser_bit_equal_to_the_first_stages(
    folder, first
):
    stage = make_stage(first)
    head = stage.token_decoder.state_dict()["head.weight"].clone()
    path = fit_stage(folder, stage, "stage.ckpt")
    model, old = LDLM.load_from_checkpoint(path), LDLM.load_from_checkpoint(first)
    assert type(model) is LDLM
    assert type(model.sampler) is DDIM
    for name in ("token_encoder", "latent_encoder", "denoiser", "timesteps"):
        assert moved(old.get_submodule(name).state_dict(), model.get_submodule(name).state_dict()) == set()
    assert not torch.equal(model.token_decoder.state_dict()["head.weight"], head)
    got = model.sample_tokens(6, nfe=4, seed=1)
    latents = []
    old.decode = lambda z, *rest: latents.append(z) or torch.zeros(len(z), LENGTH, dtype=torch.int64)
    old.sample_tokens(6, nfe=4, seed=1)
    with torch.no_grad():
        assert torch.equal(got, model.token_decoder(latents[0]).argmax(-1)[:6])
    assert len(model.generate(2, nfe=2)) == 2


def test_it_lowers_the_cross_entropy_by_training(folder, first):
    stage = make_stage(first, sigma_dec=0.0)
    tokens = make_data(folder).train_dataset[list(range(16))]
    with torch.no_grad():
        before = loss_of(stage, tokens, generator()).terms["token"]
    fit_stage(folder, stage, "learned.ckpt", steps=40, learning_rate=1e-2)
    with torch.no_grad():
        assert loss_of(stage, tokens, generator()).terms["token"] < before - 0.3


def test_the_timesteps_keep_what_they_learned_while_a_decoder_is_trained(folder, first):
    stage = make_stage(first)
    before = {name: value.clone() for name, value in stage.timesteps.state_dict().items()}
    assert before["den"].sum() > 0
    make_trainer(folder, [], max_steps=4).fit(token_task(stage, timestep_refresh=1), make_data(folder))
    assert moved(before, stage.timesteps.state_dict()) == set()


def test_a_resumed_stage_goes_on_exactly(folder, first):
    whole, cut, rest = (make_stage(first) for _ in range(3))
    fit_stage(folder, whole, "whole.ckpt", steps=5)
    path = fit_stage(folder, cut, "cut-stage.ckpt", steps=2)
    fit_stage(folder, rest, "rest.ckpt", steps=5, resume=path)
    assert moved(whole.state_dict(), rest.state_dict()) == set()
    assert "token_decoder" in moved(whole.state_dict(), cut.state_dict())


def test_the_bound_of_a_decoder_that_skips_hidden_states_is_the_token_bound_alone(folder, first):
    stage, tokens = make_stage(first, sigma_dec=0.5), rows(4)
    with torch.no_grad():
        terms = likelihood_terms(stage, tokens, generator(1), tau=0.4, sigma_rec=1.0, samples=1)
        draw = generator(1)
        torch.rand((), generator=draw, dtype=torch.float64)
        torch.randn(4, LENGTH, LATENT, generator=draw)
        z = stage.encode(tokens) + (0.4**2 + 0.5**2) ** 0.5 * torch.randn(4, LENGTH, LATENT, generator=draw)
        nats = -stage.token_decoder(z).log_softmax(-1).gather(-1, tokens[..., None]).sum((1, 2))
    torch.testing.assert_close(terms.token_cross_entropy[0], nats.double(), rtol=1e-5, atol=1e-4)
    assert terms.kl.gt(0).all()
    assert terms.hidden_density.isnan().all()
    trainer = make_trainer(folder, [LikelihoodBound(0.4)])
    (got,) = trainer.validate(token_task(stage), make_data(folder), verbose=False)
    bounds = {name.removeprefix("validation/") for name in got} - {"token", "accuracy", "accuracy_noised"}
    assert bounds == {"token_cross_entropy", "kl", "token_bound", "token_bound_error"}
    assert got["validation/token_bound"] == pytest.approx(
        got["validation/token_cross_entropy"] + got["validation/kl"], rel=1e-5
    )


def test_fewer_latents_than_tokens_need_a_latent_decoder_of_any_width_and_train_with_one(folder, half):
    with pytest.raises(ValueError, match=r"has 4 latents for 8 tokens.*give latent_decoder=PerceiverResamplerDecoder"):
        token_decoder_stage(half, layers=1, heads=2)
    decoder = PerceiverResamplerDecoder(10, LATENT, LENGTH, 4, **SIZES)  # 10 is neither h = 16 nor d = 12
    stage = make_stage(half, latent_decoder=decoder)
    assert stage.token_decoder.hidden_size == 10
    start = {name: p.detach().clone() for name, p in stage.latent_decoder.named_parameters()}
    model = LDLM.load_from_checkpoint(fit_stage(folder, stage, "half-stage.ckpt"))
    assert any(not torch.equal(start[name], p) for name, p in model.latent_decoder.named_parameters())
    tokens = rows(3)
    with torch.no_grad():
        logits = model.token_decoder(model.latent_decoder(model.encode(tokens)))
    assert torch.equal(model.decode(model.encode(tokens)), logits.argmax(-1))


def test_data_of_another_tokenizer_are_refused_when_the_fit_starts(folder, first):
    other = other_words()
    with pytest.raises(ValueError, match="give both the same tokenizer"):
        make_trainer(folder, []).fit(token_task(make_stage(first)), make_data(folder, tokenizer=other))


def test_what_trained_a_decoder_is_not_named_in_its_export(folder, first):
    stage = make_stage(first)
    assert describe_model(stage)["model"]["class_path"] == describe_model(make_model())["model"]["class_path"]
    assert describe_model(stage)["model"]["class_path"] == "ldlm.LDLM"
    fit_stage(folder, stage, "named.ckpt")
    stage.save_pretrained(folder / "exported")
    assert "TokenObjective" not in (folder / "exported" / "ldlm.json").read_text()
    assert moved(stage.state_dict(), LDLM.from_pretrained(folder / "exported").state_dict()) == set()


def test_a_token_decoder_is_tuned_on_the_trained_latent_decoder_and_nothing_else_moves(folder, first):
    torch.manual_seed(4)
    decoder = TransformerTokenDecoder(HIDDEN, VOCAB, 1, 2)
    model = replace_token_decoder(LDLM.load_from_checkpoint(first), decoder, latent_decoder=None)
    assert {name for name, p in model.named_parameters() if p.requires_grad} == {
        f"token_decoder.{name}" for name, _ in decoder.named_parameters()
    }
    tokens, draw = rows(5), generator(6)
    old = LDLM.load_from_checkpoint(first)
    with torch.no_grad():
        z0 = old.encode(tokens)
        logits = decoder(old.latent_decoder(z0 + old.sigma_dec * torch.randn(z0.shape, generator=draw)))
        want = F.cross_entropy(logits.flatten(0, 1), tokens.flatten())
        losses = loss_of(model, tokens, generator(6))
    torch.testing.assert_close(losses.total, want, rtol=1e-6, atol=0)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    path = fit_stage(folder, model, "tuned.ckpt", learning_rate=1e-2)
    assert moved(before, model.state_dict()) == {"token_decoder"}
    assert all(not torch.equal(before[f"token_decoder.{name}"], p) for name, p in decoder.named_parameters())
    loaded = LDLM.load_from_checkpoint(path)
    assert type(loaded.token_decoder) is TransformerTokenDecoder
    assert moved(model.state_dict(), loaded.state_dict()) == set()
    for name in ("token_encoder", "latent_encoder", "denoiser", "latent_decoder", "timesteps"):
        assert moved(old.get_submodule(name).state_dict(), loaded.get_submodule(name).state_dict()) == set()
    with torch.no_grad():
        assert torch.equal(loaded.decode(z0), loaded.token_decoder(old.latent_decoder(z0)).argmax(-1))
