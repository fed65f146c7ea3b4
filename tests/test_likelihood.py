"""The likelihood bounds against what is known of Gaussian latents, against quadrature, and against loops by hand."""

import math

import lightning as L
import pytest
import torch
import torch.nn.functional as F
from helpers.tiny import (
    HIDDEN,
    LENGTH,
    VOCAB,
    FixedTokenEncoder,
    TimeOnlyDenoiser,
    generator,
    make_data,
    make_model,
    make_task,
    make_trainer,
    rows,
)
from torch import Tensor
from torch.utils.data import DataLoader

from ldlm import likelihood_terms
from ldlm.data.rows import RowsInOrder
from ldlm.diffusion.schedules import CosineSchedule, NoiseSchedule, TangentSchedule
from ldlm.likelihood import integration_times
from ldlm.model import LDLM
from ldlm.nn import token_decoders as decoders
from ldlm.nn.denoiser import Denoiser, DiT
from ldlm.nn.latent_coders import IdentityDecoder, IdentityEncoder, PerceiverResamplerDecoder, PerceiverResamplerEncoder
from ldlm.nn.token_decoders import LinearTokenDecoder, TransformerTokenDecoder
from ldlm.rng import generator as noise_generator
from ldlm.training.callbacks.ema import EMA
from ldlm.training.callbacks.likelihood_bound import LikelihoodBound
from ldlm.training.task import LDLMTask

SCHEDULES = [TangentSchedule(), CosineSchedule()]
NAMES = ["token_bound", "token_bound_error", "token_cross_entropy", "kl", "hidden_density"]
AUGMENTED = "validation/augmented_nelbo_not_comparable_with_other_models_sigma_rec_0.5"


class GaussianDenoiser(Denoiser):
    """E[z0 | z_t] for latents N(0, s²)."""

    def __init__(self, schedule: NoiseSchedule, s: float, latent_size: int, num_latents: int) -> None:
        super().__init__(latent_size, num_latents)
        self.schedule, self.s = schedule, s

    def forward(self, z_t: Tensor, t: Tensor, self_condition: Tensor) -> Tensor:
        alpha, sigma = (level[:, None, None] for level in (self.schedule.alpha(t), self.schedule.sigma(t)))
        return alpha * self.s**2 / (alpha**2 * self.s**2 + sigma**2) * z_t


def gaussian_model(s: float, schedule: NoiseSchedule | None = None, n: int = 8, h: int = 4, vocab: int = 256) -> LDLM:
    """The latents are a table of normal vectors whose mean square is s² to the last digit."""
    schedule, encoder = schedule or TangentSchedule(), FixedTokenEncoder(h, vocab)
    encoder.table = torch.randn(vocab, h, generator=generator(7))
    encoder.table *= s / encoder.table.square().mean().sqrt()
    return make_model(
        token_encoder=encoder,
        latent_encoder=IdentityEncoder(h, n),
        latent_decoder=IdentityDecoder(h, n),
        denoiser=GaussianDenoiser(schedule, s, h, n),
        token_decoder=LinearTokenDecoder(h, vocab),
        sequence_length=n,
        schedule=schedule,
    )


def gaussian_kl(mu: Tensor, s: float, tau: float) -> Tensor:
    """KL(N(mu, tau²) ‖ N(0, s² + tau²)) of each element. The bound on it is tight when the denoiser is perfect."""
    v = s**2 + tau**2
    return 0.5 * ((tau**2 + mu.double() ** 2) / v - 1 + math.log(v / tau**2))


# --- the diffusion term


@pytest.mark.parametrize("tau", [0.03, 0.3, 2.0])
@pytest.mark.parametrize("s", [0.3, 1.0, 5.0])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_gaussian_latents_and_their_exact_denoiser_give_the_closed_form(schedule, s, tau):
    model, tokens = gaussian_model(s, schedule), torch.arange(256).view(32, 8)
    kl = likelihood_terms(model, tokens, generator(), tau, 1.0, 64).kl
    assert kl.shape == (64, 32)
    error = kl.mean(1).std().item() / 8
    want = 32 * 0.5 * math.log1p(s**2 / tau**2)
    assert kl.mean().item() == pytest.approx(want, abs=4 * error)
    assert error < 0.01 * want
    # and of each row alone, whose mu is known
    rows_want = gaussian_kl(model.encode(tokens), s, tau).sum(dim=(1, 2))
    assert rows_want.mean().item() == pytest.approx(want, rel=1e-6)
    assert ((kl.mean(0) - rows_want).abs() < 5 * kl.std(0) / 8).all()


class PointsDenoiser(GaussianDenoiser):
    """E[z0 | z_t] for latents that are one row of a table each, all rows equally likely."""

    def forward(self, z_t: Tensor, t: Tensor, self_condition: Tensor) -> Tensor:
        alpha, sigma = (level[:, None, None] for level in (self.schedule.alpha(t), self.schedule.sigma(t)))
        distances = (z_t[:, :, None] - alpha[..., None] * self.table).square().sum(-1)
        return (-distances / (2 * sigma**2)).softmax(-1) @ self.table


@pytest.mark.parametrize("tau", [0.1, 0.5])
def test_latents_that_are_one_of_v_far_points_cost_log_v_nats_whatever_tau(tau):
    model = gaussian_model(5.0, h=8, vocab=16)
    model.denoiser = PointsDenoiser(model.schedule, 5.0, 8, 8)
    model.denoiser.table = model.token_encoder.table
    kl = likelihood_terms(model, torch.arange(16).view(2, 8).repeat(32, 1), generator(), tau, 1.0, 32).kl
    error = kl.mean(1).std().item() / math.sqrt(32)
    assert kl.mean().item() == pytest.approx(8 * math.log(16), abs=4 * error)
    assert error < 0.03 * 8 * math.log(16)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_a_wrong_denoiser_gives_the_integral_of_omega_over_the_times_with_no_tail_left_out(schedule):
    model = make_model(denoiser=TimeOnlyDenoiser(), schedule=schedule, shake=0.5)
    tokens, tau = rows(4), 0.5
    kl = likelihood_terms(model, tokens.repeat(100, 1), generator(), tau, 1.0, 25).kl.view(25, 100, 4).mean(1)
    # a trapezoid over the SNR: its slope is -2 omega, and the error is a function of t alone
    start = schedule.time_at(torch.tensor(-2 * math.log(tau), dtype=torch.float64)).item()
    t = torch.linspace(start, 1, 4001, dtype=torch.float64)
    miss = (model.encode(tokens).double()[:, None] - t[:, None, None] * model.denoiser.slope.double()).square()
    want = -0.5 * torch.trapezoid(miss.sum(dim=(2, 3)), schedule.log_snr(t).exp(), dim=1)
    error = kl.std(0) / 5
    assert ((kl.mean(0) - want).abs() < 4 * error).all()
    assert (error < 0.01 * want).all()


@pytest.mark.parametrize("tau", [0.01, 1.0, 3.0])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_the_weights_are_omega_over_the_density_of_the_times(schedule, tau):
    position = torch.linspace(0.02, 1, 50, dtype=torch.float64, requires_grad=True)
    power = torch.linspace(0, 30, 50, dtype=torch.float64)
    t, weight = integration_times(schedule, position, tau, power)
    (speed,) = torch.autograd.grad(t.sum(), position)
    at = t.detach().requires_grad_()
    log_snr = schedule.log_snr(at)
    (slope,) = torch.autograd.grad(log_snr.sum(), at)
    omega = -0.5 * slope * log_snr.exp()
    torch.testing.assert_close(weight, omega * -speed, rtol=1e-7, atol=0)


@pytest.mark.parametrize("d", [1.0, 3.0, 9.0])
@pytest.mark.parametrize("tau", [0.01, 1.0, 3.0])
def test_the_times_run_from_pure_noise_to_the_time_at_which_sigma_over_alpha_is_tau(d, tau):
    ends, power = torch.tensor([0.0, 1.0], dtype=torch.float64), torch.tensor([2.0, 2.0], dtype=torch.float64)
    t, weight = integration_times(TangentSchedule(d), ends, tau, power)
    assert t[0] == 1
    assert t[1].item() == pytest.approx(2 / math.pi * math.atan(tau / d), rel=1e-12)
    assert weight.isfinite().all()


def test_the_denoiser_sees_zeros_as_condition_and_times_evenly_spread_over_the_rows():
    model, calls = gaussian_model(1.0), []
    model.denoiser.register_forward_pre_hook(lambda _, inputs: calls.append(inputs))
    tokens = torch.arange(64).view(8, 8)
    likelihood_terms(model, tokens, generator(), 0.1, 1.0, 3)
    power = model.encode(tokens).double().square().mean(dim=(1, 2))
    offsets = []
    for _, t, condition in calls:
        assert not condition.any()
        c = power + 0.01
        position = torch.log1p(c * model.schedule.log_snr(t.double()).exp()) / torch.log1p(c / 0.01)
        offsets.append((8 * position) % 1)
        assert position.sort().values.diff().tolist() == pytest.approx([1 / 8] * 7, rel=1e-4)
    assert len({round(offset[0].item(), 3) for offset in offsets}) == 3


# --- the bound


@pytest.mark.parametrize("tau", [0.2, 1.0])
def test_the_token_bound_lies_above_the_known_probability_by_the_divergence_of_the_posteriors(tau):
    s, sigma_dec, vocab = 1.5, 0.5, 5
    model = gaussian_model(s, n=1, h=1, vocab=vocab)
    model.sigma_dec = sigma_dec
    with torch.no_grad():
        model.token_decoder.head.weight.copy_(torch.tensor([[-3.0], [-1.0], [0.0], [2.0], [3.0]]))
    tokens = torch.arange(vocab).repeat(200)[:, None]
    bound = likelihood_terms(model, tokens, generator(), tau, 1.0, 64).token_bound.view(64, 200, vocab).mean(1)
    estimate, error = bound.mean(0), bound.std(0) / 8

    def normal(x: Tensor, mean: Tensor | float, variance: float) -> Tensor:
        return torch.distributions.Normal(mean, math.sqrt(variance)).log_prob(x)

    z = torch.linspace(-12, 12, 601, dtype=torch.float64)
    width = (z[1] - z[0]).item()
    head = model.token_decoder.head
    log_softmax = (z[:, None] * head.weight.double().T + head.bias.double()).log_softmax(-1)  # [z~ w]
    prior = normal(z, 0.0, s**2 + tau**2)[:, None] + normal(z[None], z[:, None], sigma_dec**2)  # log p(z0, z~)
    probability = torch.empty(vocab, dtype=torch.float64)
    for w, mu in enumerate(model.token_encoder.table[:, 0].tolist()):
        joint = prior + log_softmax[:, w]
        probability[w] = joint.exp().sum() * width**2
        q = normal(z, mu, tau**2)[:, None] + normal(z[None], z[:, None], sigma_dec**2)
        gap = (q.exp() * (q - joint + probability[w].log())).sum().item() * width**2
        assert gap > 0.01
        assert estimate[w].item() == pytest.approx(-probability[w].log().item() + gap, abs=4 * error[w].item())
        assert error[w].item() < 0.5 * gap
    assert probability.sum().item() == pytest.approx(1, abs=1e-6)
    assert (-estimate).exp().sum() < 1


def other_sizes() -> LDLM:
    """3 latents of width 5 for 8 tokens of width 16."""
    return make_model(
        latent_encoder=PerceiverResamplerEncoder(HIDDEN, 5, LENGTH, num_latents=3, width=16, layers=1, heads=2),
        latent_decoder=PerceiverResamplerDecoder(HIDDEN, 5, LENGTH, num_latents=3, width=16, layers=1, heads=2),
        denoiser=DiT(5, 3, width=16, layers=1, heads=2),
        token_decoder=TransformerTokenDecoder(HIDDEN, VOCAB, layers=1, heads=2),
        sigma_dec=0.7,
    )


@pytest.mark.parametrize("chunk", [2048, 5])
def test_cross_entropy_and_density_are_torchs_own_on_the_noised_latents(chunk, monkeypatch):
    monkeypatch.setattr(decoders, "CHUNK", chunk)
    model, tokens, draw = other_sizes(), rows(6), generator(1)
    model.token_encoder.fit_statistics([rows(20, seed=9)], 20)
    terms = likelihood_terms(model, tokens, generator(1), 0.4, 0.5, 2)
    for k in range(2):
        torch.rand((), generator=draw, dtype=torch.float64)
        torch.randn(6, 3, 5, generator=draw)
        z = model.encode(tokens) + math.sqrt(0.4**2 + 0.7**2) * torch.randn(6, 3, 5, generator=draw)
        hidden_hat = model.latent_decoder(z)
        nats = F.cross_entropy(model.token_decoder(hidden_hat).transpose(1, 2), tokens, reduction="none").sum(1)
        normal = torch.distributions.Normal(hidden_hat.double(), 0.5)
        density = -normal.log_prob(model.token_encoder(tokens).double()).sum(dim=(1, 2))
        torch.testing.assert_close(terms.token_cross_entropy[k], nats.double(), rtol=1e-5, atol=0)
        torch.testing.assert_close(terms.hidden_density[k], density, rtol=1e-6, atol=0)
        mean = model.token_decoder.loss(hidden_hat, tokens).item()
        assert terms.token_cross_entropy[k].mean().item() / LENGTH == pytest.approx(mean, rel=1e-5)
    assert torch.equal(terms.token_bound, terms.token_cross_entropy + terms.kl)
    assert torch.equal(terms.augmented_nelbo, terms.token_cross_entropy + terms.kl + terms.hidden_density)


def test_in_bfloat16_the_terms_are_summed_in_64_bits_and_close_to_those_in_float32():
    model, tokens = other_sizes(), rows(6)
    single = likelihood_terms(model, tokens, generator(1), 0.4, 0.5, 4)
    with torch.autocast("cpu", torch.bfloat16):
        half = likelihood_terms(model, tokens, generator(1), 0.4, 0.5, 4)
    for got, want in zip(half, single, strict=True):
        assert got.dtype == torch.float64
        torch.testing.assert_close(got.mean(), want.mean(), rtol=0.01, atol=0)


# --- the callback


def by_hand(task: LDLMTask, calls: list[tuple[int, int, Tensor]], tau: float, samples: int) -> dict[str, float]:
    """The logged numbers from (rank, batch, tokens)."""
    totals, variance, tokens = [0.0, 0.0, 0.0], 0.0, 0
    for rank, index, batch in calls:
        draw = noise_generator(task.seed, "likelihood", index, rank)
        terms = likelihood_terms(task.model, batch, draw, tau, 0.5, samples)
        for i, term in enumerate(terms):
            totals[i] += sum(term[k].sum().item() for k in range(samples)) / samples
        of_batch = [(terms.token_cross_entropy[k] + terms.kl[k]).sum().item() for k in range(samples)]
        mean = sum(of_batch) / samples
        variance += sum((x - mean) ** 2 for x in of_batch) / (samples - 1) / samples
        tokens += batch.numel()
    cross_entropy, kl, density = (total / tokens for total in totals)
    values = [cross_entropy + kl, math.sqrt(variance) / tokens, cross_entropy, kl, density]
    named = {f"validation/{name}": value for name, value in zip(NAMES, values, strict=True)}
    return named | {AUGMENTED: cross_entropy + kl + density}


def logged(metrics: dict[str, float | Tensor]) -> dict[str, float]:
    return {name: float(metrics[name]) for name in [*(f"validation/{name}" for name in NAMES), AUGMENTED]}


@pytest.mark.parametrize("stage", ["validate", "test"])
def test_what_is_logged_is_a_loop_by_hand_over_batches_of_any_size(tmp_path, stage):
    task, tokens = make_task(model=other_sizes()), rows(7)
    batches = DataLoader([tokens[:4], tokens[4:], tokens[:0]], batch_size=None)
    trainer = make_trainer(tmp_path, [LikelihoodBound(0.4, sigma_rec=0.5, samples=3)])
    for _ in range(2):  # a second pass forgets the first
        (got,) = {"validate": trainer.validate, "test": trainer.test}[stage](task, batches, verbose=False)
    want = by_hand(task, [(0, 0, tokens[:4]), (0, 1, tokens[4:])], 0.4, 3)
    assert logged(got) == pytest.approx(want, rel=1e-5)


def test_two_ranks_log_the_sum_of_both_over_all_rows_also_when_one_has_none_left(tmp_path):
    task, data = make_task(model=other_sizes()), make_data(tmp_path, batch_size=2)
    trainer = make_trainer(tmp_path, [LikelihoodBound(0.4, sigma_rec=0.5)], devices=2, strategy="ddp_spawn")
    trainer.validate(task, data, verbose=False)
    held_out = data.validation_dataset
    calls = [
        (rank, index, batch)
        for rank in range(2)
        for index, batch in enumerate(DataLoader(held_out, sampler=RowsInOrder(held_out, 2, rank, 2), batch_size=None))
        if len(batch)
    ]
    assert [(rank, index, len(batch)) for rank, index, batch in calls] == [(0, 0, 1), (0, 1, 1), (1, 0, 1)]
    assert logged(trainer.callback_metrics) == pytest.approx(by_hand(task, calls, 0.4, 4), rel=1e-5)


def test_the_reported_error_covers_the_truth_as_often_as_it_says_and_shrinks_with_the_root_of_samples(tmp_path):
    model, tokens = gaussian_model(1.0, n=2, h=2, vocab=16), torch.arange(16).view(8, 2)
    with torch.no_grad():  # the tokens' probabilities do not depend on the latents
        model.token_decoder.head.weight.zero_()
    bias = model.token_decoder.head.bias.double()
    truth = gaussian_kl(model.encode(tokens), 1.0, 0.3).sum().item() / 16 - bias.log_softmax(0).mean().item()
    batches = DataLoader([tokens[:4], tokens[4:]], batch_size=None)
    task, scores, errors = make_task(model=model), [], {4: [], 64: []}
    for samples, seeds in ((4, 60), (64, 5)):
        trainer = make_trainer(tmp_path, [LikelihoodBound(0.3, samples=samples)])
        for seed in range(seeds):
            task.seed = seed
            (got,) = trainer.validate(task, batches, verbose=False)
            errors[samples].append(got["validation/token_bound_error"])
            if samples == 4:
                scores.append((got["validation/token_bound"] - truth) / errors[4][-1])
    scores = torch.tensor(scores)
    # Student's t with some 6 degrees of freedom: variance 1.5
    assert abs(scores.mean().item()) < 3 * math.sqrt(1.5 / 60)
    assert 0.8 < scores.square().mean().item() < 2.6
    rms = [torch.tensor(values).square().mean().sqrt().item() for values in errors.values()]
    assert rms[0] / rms[1] == pytest.approx(4, rel=0.2)


def test_a_fit_logs_the_bounds_of_the_averaged_weights(tmp_path):
    def metrics(trainer: L.Trainer) -> dict[str, float]:
        return logged(trainer.callback_metrics)

    task = make_task(learning_rate=0.05, warmup_steps=4, timestep_refresh=2)
    data, bound, ema = make_data(tmp_path), LikelihoodBound(0.4, sigma_rec=0.5), EMA()
    trainer = make_trainer(tmp_path, [bound, ema])
    trainer.fit(task, data)
    fitted = metrics(trainer)
    alone = make_trainer(tmp_path, [LikelihoodBound(0.4, sigma_rec=0.5)])
    alone.validate(task, data, verbose=False)
    assert fitted == pytest.approx(metrics(alone), rel=1e-5)
    task.model.load_state_dict(ema.live, strict=False)
    alone.validate(task, data, verbose=False)
    assert fitted["validation/token_bound"] != pytest.approx(metrics(alone)["validation/token_bound"], rel=1e-2)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"tau": 0.0}, r"tau=0\.0 is a standard deviation: it must be above 0"),
        ({"tau": math.inf}, "tau=inf"),
        ({"tau": 1.0, "sigma_rec": -1.0}, r"sigma_rec=-1\.0"),
        ({"tau": 1.0, "samples": 1}, "samples=1 must be at least 2"),
    ],
)
def test_arguments_that_cannot_work_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        LikelihoodBound(**arguments)


def test_a_second_callback_is_refused(tmp_path):
    trainer = make_trainer(tmp_path, [LikelihoodBound(0.4), LikelihoodBound(0.8)])
    with pytest.raises(ValueError, match="give the trainer one LikelihoodBound"):
        trainer.validate(make_task(), DataLoader([rows(2)], batch_size=None), verbose=False)
