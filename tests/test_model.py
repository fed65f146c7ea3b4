"""A model by itself: what it says of itself, what is drawn, how often the denoiser is called, and what a text is."""

import lightning as L
import pytest
import torch
from helpers.tiny import HIDDEN, LATENT, LENGTH, VOCAB, WORDS, Calls, generator, make_model, make_tokenizer, rows

from ldlm import rng as noise
from ldlm.diffusion.grids import LogSNRGrid, UniformGrid
from ldlm.diffusion.samplers import DDIM, Ancestral, DPMSolver2M, EulerMaruyama
from ldlm.evaluation.sampling import load
from ldlm.model import LDLM
from ldlm.nn.token_encoders import EmbeddingTokenEncoder


def test_a_model_is_a_plain_module_that_generates_is_saved_and_comes_back_without_a_trainer(tmp_path, monkeypatch):
    monkeypatch.setattr(L.Trainer, "__init__", lambda *_, **__: 1 / 0)
    model = make_model(tokenizer=make_tokenizer(), sigma_dec=0.5, sampler=DDIM())
    assert isinstance(model, torch.nn.Module)
    assert not isinstance(model, L.LightningModule)
    texts = model.generate(3, nfe=4, seed=1)
    model.save_pretrained(tmp_path)
    again = LDLM.from_pretrained(tmp_path)
    assert type(again) is LDLM
    assert not again.training
    assert again.state_dict().keys() == model.state_dict().keys()
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in model.state_dict().items())
    assert repr(again) == repr(model)
    assert again.generate(3, nfe=4, seed=1) == texts
    assert torch.equal(again.decode(again.encode(rows(4))), model.decode(model.encode(rows(4))))


def test_its_repr_names_every_part_with_its_number_of_parameters_and_says_what_is_frozen():
    encoder = EmbeddingTokenEncoder(HIDDEN, VOCAB)
    model = make_model(token_encoder=encoder, tokenizer=make_tokenizer(), sampler=DDIM(), grid=LogSNRGrid())
    model.denoiser.requires_grad_(False)
    first, *lines = repr(model).splitlines()
    total = sum(p.numel() for p in model.parameters())
    assert first == f"LDLM of 8 tokens in 8 latents of 12 numbers, a tokenizer of 40, {total:,} parameters"
    told = dict(line.strip().split(": ", 1) for line in lines if ": " in line)
    assert told.keys() == dict(model.named_children()).keys() | {"sampler", "grid"}
    assert (told["sampler"], told["grid"]) == ("DDIM", "LogSNRGrid")
    counted = 0
    for name, part in model.named_children():
        if count := sum(p.numel() for p in part.parameters()):
            frozen = ", frozen" if part is model.denoiser else ""
            assert told[name] == f"{type(part).__name__}, {count:,} parameters{frozen}"
        else:
            assert told[name] == f"{type(part).__name__}, no parameters of its own"
        counted += count
    assert counted == total
    assert lines[-1] == "  sigma_dec=1, self_conditioning=0.5"
    assert "no tokenizer" in repr(make_model())


def test_the_same_seed_gives_the_same_texts_and_another_seed_others():
    model = make_model(tokenizer=make_tokenizer())
    first, again, other = (model.generate(5, nfe=6, seed=seed, temperature=1.0) for seed in (3, 3, 4))
    assert first == again
    assert first != other
    assert len(set(first)) == 5


@pytest.mark.parametrize("sampler", [EulerMaruyama(), DDIM()])
def test_the_first_texts_do_not_depend_on_how_many_are_asked_for(sampler):
    model = make_model()
    arguments = {"nfe": 5, "sampler": sampler, "batch_size": 4, "temperature": 1.0}
    many = model.sample_tokens(11, **arguments)
    for count in (1, 3, 4, 5, 8):
        assert torch.equal(model.sample_tokens(count, **arguments), many[:count])
    assert many.shape == (11, LENGTH)


@pytest.mark.parametrize("sampler", [EulerMaruyama(), Ancestral(), DDIM(), DPMSolver2M()])
@pytest.mark.parametrize("nfe", [1, 2, 7])
def test_the_denoiser_is_called_exactly_nfe_times_a_batch(sampler, nfe):
    model, steps = make_model(), []
    calls = Calls(model)
    batches = list(
        model.sample_batches(7, nfe, sampler, UniformGrid(), batch_size=3, on_step=lambda *step: steps.append(step))
    )
    assert calls.rows == [3] * (3 * nfe)
    assert [number for number, _ in steps] == [*range(1, nfe + 1)] * 3
    assert all(torch.equal(seen, answer) for (_, seen), answer in zip(steps, calls.answers, strict=True))
    assert [len(batch) for batch in batches] == [3, 3, 1]


def test_the_samplers_answer_is_decoded_without_noise():
    model = make_model(sigma_dec=100.0, self_conditioning=0.0)
    calls = Calls(model)
    tokens = model.sample_tokens(2, nfe=4, batch_size=2)
    assert torch.equal(tokens, model.token_decoder(model.latent_decoder(calls.answers[-1])).argmax(-1))


def test_the_noise_is_that_of_the_seed_and_the_batch():
    model = make_model(sampler=DDIM())
    z0_hat = []
    for batch in range(2):
        source = noise.generator(9, "generate", batch)
        start = torch.randn(3, LENGTH, LATENT, generator=source)
        z0_hat.append(DDIM().sample(model.denoiser, model.schedule, start, 4, source, UniformGrid()))
    with torch.no_grad():
        want = model.decode(torch.cat(z0_hat))
    assert torch.equal(model.sample_tokens(6, nfe=4, seed=9, batch_size=3), want)


def test_the_models_own_sampler_and_grid_are_used_unless_others_are_given():
    arguments = {"nfe": 4, "batch_size": 4, "temperature": 1.0}
    one = make_model(sampler=DDIM(), grid=LogSNRGrid())
    other = make_model(sampler=Ancestral(), grid=UniformGrid())
    given = other.sample_tokens(4, sampler=DDIM(), grid=LogSNRGrid(), **arguments)
    assert torch.equal(one.sample_tokens(4, **arguments), given)
    assert not torch.equal(other.sample_tokens(4, **arguments), given)


def test_the_last_prediction_is_carried_and_zeros_where_self_conditioning_is_off():
    for share, carried in ((0.5, True), (0.0, False)):
        model = make_model(self_conditioning=share)
        calls = Calls(model)
        model.sample_tokens(2, nfe=3, batch_size=2)
        assert not calls.conditions[0].any()
        for condition, before in zip(calls.conditions[1:], calls.answers, strict=False):
            assert torch.equal(condition, before if carried else torch.zeros_like(before))


def test_neither_encoder_runs_while_generating():
    model = make_model(tokenizer=make_tokenizer())
    for part in (model.token_encoder, model.latent_encoder):
        part.register_forward_hook(lambda *_: 1 / 0)
    assert len(model.generate(2, nfe=2)) == 2
    with pytest.raises(ZeroDivisionError):
        model.encode(rows(1))


def test_a_higher_temperature_draws_more_different_tokens_and_0_is_the_argmax():
    model = make_model()
    with torch.no_grad():
        model.token_decoder.head.weight.mul_(20)
    cold, cool, hot = (model.sample_tokens(64, nfe=2, batch_size=64, temperature=t) for t in (0.0, 0.01, 100.0))
    assert (cold == cool).float().mean() > 0.95
    assert torch.bincount(hot.flatten(), minlength=40).min() > 0  # 512 draws, nearly even over 40 tokens


@pytest.mark.parametrize("name", ["num_samples", "nfe", "batch_size"])
@pytest.mark.parametrize("count", [0, -2])
def test_counts_below_1_are_refused(name, count):
    arguments = {"num_samples": 2, "nfe": 2, "batch_size": 2, name: count}
    with pytest.raises(ValueError, match=f"{name}={count} must be at least 1"):
        make_model(tokenizer=make_tokenizer()).generate(**arguments)


def test_texts_are_words_without_special_tokens_and_need_a_tokenizer():
    model = make_model(tokenizer=make_tokenizer())
    assert model.to_text(torch.tensor([[1, 3, 4, 2, 39, 2], [2, 2, 2, 1, 1, 1]])) == ["word0 word1 word36", ""]
    assert WORDS[36] == "word36"
    with pytest.raises(ValueError, match=r"has no tokenizer to make text with: give LDLM\(tokenizer=\.\.\.\)"):
        make_model().generate(1, nfe=1)


def test_in_bfloat16_what_samples_keeps_its_weights_so_and_predicts_nearly_the_same():
    full, half = make_model(sampler=DDIM()), make_model(sampler=DDIM()).to_bfloat16()
    parts = (half.denoiser, half.latent_decoder, half.token_decoder)
    assert {p.dtype for part in parts for p in part.parameters()} == {torch.bfloat16}
    assert {p.dtype for p in half.latent_encoder.parameters()} == {torch.float32}
    listening = [Calls(model) for model in (full, half)]
    tokens = [model.sample_tokens(16, nfe=8, batch_size=16) for model in (full, half)]
    wanted, found = (calls.answers[-1].float() for calls in listening)
    assert ((found - wanted).norm() / wanted.norm()).item() < 0.02  # a bfloat16 is right to 1 in 256
    assert (tokens[0] == tokens[1]).float().mean() > 0.9


def test_a_model_whose_blocks_are_compiled_samples_the_same(graphs, tmp_path):
    make_model().save_pretrained(tmp_path)
    plain, compiled = (load(str(tmp_path), torch.device("cpu"), "32", mode) for mode in (None, "default"))
    listening = [Calls(model) for model in (plain, compiled)]
    tokens = [model.sample_tokens(6, nfe=4, batch_size=4) for model in (plain, compiled)]
    wanted, found = (calls.answers[-1] for calls in listening)
    assert graphs
    assert ((found - wanted).norm() / wanted.norm()).item() < 1e-5
    assert torch.equal(*tokens)
    assert compiled.state_dict().keys() == plain.state_dict().keys()


def test_generating_leaves_no_gradient_and_the_global_random_state_alone():
    model = make_model()
    torch.manual_seed(11)
    want = torch.rand(3)
    torch.manual_seed(11)
    model.sample_tokens(3, nfe=3)
    assert torch.equal(torch.rand(3), want)
    calls = Calls(model)
    draw = generator()
    for _ in model.sample_batches(2, nfe=2):
        assert torch.is_grad_enabled()
    assert [answer.requires_grad for answer in calls.answers] == [False, False]
    assert torch.rand(1, generator=draw) == torch.rand(1, generator=generator())
