"""The joint objective against a by-hand recomputation with the same draws, and the paths its gradients take."""

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from helpers.tiny import HIDDEN, LATENT, LENGTH, TimeOnlyDenoiser, generator, make_model, make_task, rows
from torch import Tensor, nn

from ldlm.diffusion.timesteps import UniformTimesteps
from ldlm.model import LDLM
from ldlm.nn.latent_coders import IdentityDecoder, IdentityEncoder
from ldlm.objective import JointObjective, Losses
from ldlm.rng import RowNoise, Source


def with_gamma(gamma: float, **changes) -> tuple[LDLM, Callable[..., Losses]]:
    """A model as a task prepares it, and the losses of its batches; times that are not given are drawn first."""
    task = make_task(**changes)
    model = task.model
    task.objective.prepare(model)  # as a fit does

    def losses_of(tokens: Tensor, source: Source, u: Tensor | None = None) -> Losses:
        times = model.timesteps.sample(len(tokens), source) if u is None else u
        return task.objective(model, tokens, times, torch.tensor(gamma), source)

    return model, losses_of


def gradients(loss: Tensor, part: nn.Module) -> list[Tensor]:
    return list(torch.autograd.grad(loss, list(part.parameters()), retain_graph=True, allow_unused=True))


class Watched(nn.Module):
    """Writes down what a denoiser is given and what it gives."""

    def __init__(self, model: LDLM) -> None:
        super().__init__()
        self.inner = model.denoiser
        self.calls: list[tuple[Tensor, Tensor, Tensor]] = []
        self.answers: list[Tensor] = []
        model.denoiser = self

    def forward(self, z_t: Tensor, t: Tensor, self_condition: Tensor) -> Tensor:
        self.calls.append((z_t.detach().clone(), t.clone(), self_condition.clone()))
        self.answers.append(self.inner(z_t, t, self_condition))
        return self.answers[-1]


# --- the values


def test_the_three_losses_are_those_of_a_recomputation_by_hand():
    weights = {"diffusion_weight": 0.5, "reconstruction_weight": 2.0, "token_weight": 0.25}
    model, losses_of = with_gamma(0.3, timesteps=UniformTimesteps(), sigma_dec=0.7, **weights)
    model.token_encoder.fit_statistics([rows(20, seed=9)], 20)
    tokens, draw = rows(6), generator(1)

    u = (1 - torch.rand(6, generator=draw, dtype=torch.float64)).float()
    eps, noise = (torch.randn(6, LENGTH, LATENT, generator=draw) for _ in range(2))
    hidden = (model.token_encoder.table[tokens] - model.token_encoder.mean) / model.token_encoder.std
    z0 = model.latent_encoder(hidden)
    tangent = 3 * torch.tan(math.pi / 2 * u.double())
    alpha, sigma = (1 / (1 + tangent**2).sqrt()).float(), (tangent / (1 + tangent**2).sqrt()).float()
    z_t = torch.stack([alpha[i] * z0[i] + sigma[i] * eps[i] for i in range(6)])
    condition = torch.zeros_like(z_t)
    for i in (0, 2, 4):
        condition[i] = model.denoiser(z_t[i : i + 1], u[i : i + 1], torch.zeros(1, LENGTH, LATENT))[0]
    estimate = model.denoiser(z_t, u, condition)
    errors = torch.stack([((z0[i] - estimate[i]) ** 2).sum() / (LENGTH * LATENT) for i in range(6)])
    hidden_hat = model.latent_decoder(z0 + 0.7 * noise)
    logits = model.token_decoder.head(hidden_hat)
    nats = -logits.log_softmax(-1).gather(-1, tokens[..., None]).sum() / tokens.numel()
    mse = ((hidden_hat - hidden) ** 2).sum() / hidden.numel()

    losses = losses_of(tokens, generator(1))
    torch.testing.assert_close(losses.rows, errors, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(losses.terms["diffusion"], errors.mean(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(losses.terms["reconstruction"], mse, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(losses.terms["token"], nats, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(losses.total, 0.5 * errors.mean() + 2 * mse + 0.25 * nats, rtol=1e-5, atol=1e-6)
    assert torch.equal(losses.z0, z0)
    assert not losses.rows.requires_grad
    assert losses.z0.requires_grad  # another objective may add a term of them


def test_given_times_are_used_and_none_are_drawn():
    (model, losses_of), tokens, u = with_gamma(1.0), rows(4), torch.tensor([0.2, 0.4, 0.6, 1.0])
    watched = Watched(model)
    draw = generator(3)
    losses_of(tokens, draw, u)
    eps = torch.randn(4, LENGTH, LATENT, generator=generator(3))
    z_t, t, _ = watched.calls[-1]
    assert torch.equal(t, u)
    assert torch.equal(z_t[3], eps[3])  # alpha(1) = 0 and sigma(1) = 1 exactly


def test_the_token_loss_on_a_fraction_of_positions_is_the_mean_over_those_positions():
    (model, losses_of), tokens = with_gamma(1.0, token_fraction=0.25, self_conditioning=0.0), rows(4)
    u, draw = torch.full((4,), 0.5), generator(2)
    torch.randn(4, LENGTH, LATENT, generator=draw)
    noise = torch.randn(4, LENGTH, LATENT, generator=draw)
    order = torch.rand(4, LENGTH, generator=draw).argsort(dim=1).tolist()
    chosen = torch.tensor([LENGTH * row + position for row in range(4) for position in order[row][:2]])
    hidden_hat = model.latent_decoder(model.encode(tokens) + noise)
    want = F.cross_entropy(model.token_decoder(hidden_hat).flatten(0, 1)[chosen], tokens.flatten()[chosen])
    torch.testing.assert_close(losses_of(tokens, generator(2), u).terms["token"], want, rtol=1e-6, atol=0)


@pytest.mark.parametrize(("weight", "part"), [("diffusion", "denoiser"), ("token", "token_decoder")])
def test_a_loss_of_weight_0_gives_its_own_part_no_gradient(weight, part):
    model, losses_of = with_gamma(1.0, **{f"{weight}_weight": 0.0})
    losses = losses_of(rows(4), generator())
    named = dict(model.named_parameters())
    own = [p for name, p in named.items() if name.startswith(part) and p.requires_grad]
    grads = torch.autograd.grad(losses.total, own, allow_unused=True) if own else []
    assert all(g is None or not g.any() for g in grads)
    others = {"diffusion": ("reconstruction", "token"), "token": ("diffusion", "reconstruction")}
    torch.testing.assert_close(losses.total, sum(losses.terms[name] for name in others[weight]))


class Counted(nn.Module):
    """Counts the calls of a part, of its loss too."""

    def __init__(self, model: LDLM, name: str) -> None:
        super().__init__()
        self.inner, self.count = model.get_submodule(name), 0
        model.set_submodule(name, self)

    def forward(self, *inputs: Tensor) -> Tensor:
        self.count += 1
        return self.inner(*inputs)

    def loss(self, *inputs: Tensor) -> Tensor:
        self.count += 1
        return self.inner.loss(*inputs)


@pytest.mark.parametrize(
    ("off", "calls"),
    [
        # The denoiser runs twice with self-conditioning.
        ((), {"denoiser": 2, "latent_decoder": 1, "token_decoder": 1}),
        (("diffusion",), {"denoiser": 0, "latent_decoder": 1, "token_decoder": 1}),
        (("token",), {"denoiser": 2, "latent_decoder": 1, "token_decoder": 0}),
        (("reconstruction",), {"denoiser": 2, "latent_decoder": 1, "token_decoder": 1}),
        (("reconstruction", "token"), {"denoiser": 2, "latent_decoder": 0, "token_decoder": 0}),
        (("diffusion", "token"), {"denoiser": 0, "latent_decoder": 1, "token_decoder": 0}),
    ],
)
def test_a_loss_of_weight_0_is_not_computed_and_the_others_are_what_they_were(off, calls):
    u, tokens = torch.full((4,), 0.5), rows(4)
    _, losses_of = with_gamma(1.0, sigma_dec=0.0)
    whole = losses_of(tokens, generator(), u)
    model, losses_of = with_gamma(1.0, sigma_dec=0.0, **{f"{name}_weight": 0.0 for name in off})
    counted = {name: Counted(model, name) for name in calls}
    losses = losses_of(tokens, generator(), u)
    assert {name: one.count for name, one in counted.items()} == calls
    assert set(losses.terms) == {"diffusion", "reconstruction", "token"} - set(off)
    assert all(torch.equal(loss, whole.terms[name]) for name, loss in losses.terms.items())
    assert torch.equal(losses.total, sum(losses.terms.values()))
    if "diffusion" in off:
        assert losses.rows is None
    else:
        assert losses.rows.shape == (4,)
        assert losses.rows.any()


@pytest.mark.parametrize(
    ("changes", "frozen"),
    [
        ({}, set()),
        ({"diffusion_weight": 0.0}, {"denoiser"}),
        ({"token_weight": 0.0}, {"token_decoder"}),
        ({"reconstruction_weight": 0.0}, {"latent_decoder"}),
        ({"reconstruction_weight": 0.0, "token_gradient": True}, set()),
        ({"reconstruction_weight": 0.0, "token_weight": 0.0}, {"latent_decoder", "token_decoder"}),
    ],
)
def test_what_no_loss_reaches_is_frozen_and_everything_else_has_a_gradient(changes, frozen):
    model, losses_of = with_gamma(1.0, **changes)
    losses_of(rows(4), generator()).total.backward()
    named = list(model.named_parameters())
    assert {name.partition(".")[0] for name, p in named if not p.requires_grad} == frozen
    assert {name for name, p in named if p.requires_grad} == {name for name, p in named if p.grad is not None}


def test_hidden_masking_hides_positions_from_the_encoder_and_not_from_the_target():
    (model, losses_of), tokens = with_gamma(1.0, hidden_masking=0.25, sigma_dec=0.0, diffusion_weight=0.0), rows(64)
    inputs = []
    model.latent_encoder.register_forward_pre_hook(lambda _, given: inputs.append(given[0]))
    model.train()
    loss = losses_of(tokens, generator(5), torch.full((64,), 0.5)).terms["reconstruction"]
    hidden = model.token_encoder(tokens)
    kept = torch.rand(64, LENGTH, generator=generator(5)) >= 0.25
    masked = torch.where(kept[..., None], hidden, torch.zeros(()))
    assert torch.equal(inputs[0], masked)
    hidden_share = (inputs[0] == 0).all(-1).float().mean().item()
    assert hidden_share == pytest.approx(0.25, abs=4 * math.sqrt(0.25 * 0.75 / (64 * LENGTH)))
    want = (model.latent_decoder(model.latent_encoder(masked)) - hidden).square().mean()
    torch.testing.assert_close(loss, want, rtol=1e-5, atol=0)
    model.eval()
    inputs.clear()
    losses_of(tokens, generator(5), torch.full((64,), 0.5))
    assert torch.equal(inputs[0], hidden)


def test_a_reconstruction_weight_of_0_freezes_the_latent_decoder_unless_the_cross_entropy_reaches_it():
    model, losses_of = with_gamma(1.0, reconstruction_weight=0.0, token_gradient=True)
    assert any(g is not None for g in gradients(losses_of(rows(4), generator()).total, model.latent_decoder))
    model, losses_of = with_gamma(1.0, reconstruction_weight=0.0)
    losses = losses_of(rows(4), generator())
    assert not any(p.requires_grad for p in model.latent_decoder.parameters())
    torch.testing.assert_close(losses.total, losses.terms["diffusion"] + losses.terms["token"])


def test_the_identity_pair_reconstructs_with_the_variance_of_the_decoder_noise():
    _, losses_of = with_gamma(
        1.0,
        latent_encoder=IdentityEncoder(HIDDEN, LENGTH),
        latent_decoder=IdentityDecoder(HIDDEN, LENGTH),
        denoiser=TimeOnlyDenoiser(HIDDEN, LENGTH),
        sigma_dec=2.0,
    )
    losses = losses_of(rows(256), generator())
    elements = 256 * LENGTH * HIDDEN
    assert losses.terms["reconstruction"].item() == pytest.approx(4.0, rel=5 * math.sqrt(2 / elements))


# --- the paths of the gradients


def plain_diffusion(model: LDLM, tokens: Tensor, u: Tensor) -> Tensor:
    """Eq. 25 with no warm-up anywhere: the whole gradient reaches the latent encoder."""
    eps = torch.randn(len(tokens), LENGTH, LATENT, generator=generator(4))
    z0 = model.latent_encoder(model.token_encoder(tokens))
    z_t = model.schedule.alpha(u)[:, None, None] * z0 + model.schedule.sigma(u)[:, None, None] * eps
    with torch.no_grad():
        condition = model.denoiser(z_t, u, torch.zeros_like(z_t))
        condition[1::2] = 0
    return (z0 - model.denoiser(z_t, u, condition)).square().mean()


@pytest.mark.parametrize("gamma", [0.0, 0.25, 0.3, 1.0])
def test_gamma_scales_the_encoders_gradient_of_the_diffusion_loss_and_nothing_else(gamma):
    (model, losses_of), tokens, u = with_gamma(gamma), rows(4), torch.tensor([0.05, 0.2, 0.5, 0.9])
    plain = plain_diffusion(model, tokens, u)
    loss = losses_of(tokens, generator(4), u).terms["diffusion"]
    torch.testing.assert_close(loss, plain, rtol=1e-6, atol=0)
    for got, want in zip(gradients(loss, model.denoiser), gradients(plain, model.denoiser), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-7)
    pairs = list(zip(gradients(loss, model.latent_encoder), gradients(plain, model.latent_encoder), strict=True))
    assert sum(want.abs().sum().item() for _, want in pairs) > 1e-2
    for got, want in pairs:
        torch.testing.assert_close(got, gamma * want, rtol=1e-4, atol=1e-7)
        assert gamma > 0 or not got.any()


@pytest.mark.parametrize("gamma", [0.0, 0.25, 0.3])
@pytest.mark.parametrize("bfloat16", [False, True])
def test_gamma_changes_no_value_and_no_bit_of_the_denoisers_gradient(gamma, bfloat16):
    results = []
    for value in (gamma, 1.0):
        model, losses_of = with_gamma(value)
        with torch.autocast("cpu", torch.bfloat16, enabled=bfloat16):
            losses = losses_of(rows(4), generator(4))
        loss = losses.terms["diffusion"]
        encoder, denoiser = gradients(loss, model.latent_encoder), gradients(loss, model.denoiser)
        results.append((loss, losses.total, denoiser, encoder))
    (diffusion, total, denoiser, encoder), (diffusion1, total1, denoiser1, encoder1) = results
    assert torch.equal(diffusion, diffusion1)
    assert torch.equal(total, total1)
    assert all(torch.equal(got, want) for got, want in zip(denoiser, denoiser1, strict=True))
    if gamma in (0.0, 0.25):  # powers of two commute with rounding
        assert all(torch.equal(got, gamma * want) for got, want in zip(encoder, encoder1, strict=True))


def test_in_bfloat16_the_denoiser_gets_its_gradient_although_it_ran_without_one_before():
    # autocast caches the cast weights: a cache filled under no_grad would give the denoiser no gradient
    grads = []
    for bfloat16 in (False, True):
        model, losses_of = with_gamma(1.0)
        with torch.autocast("cpu", torch.bfloat16, enabled=bfloat16):
            losses = losses_of(rows(4), generator(4))
        grads.append(torch.cat([g.flatten() for g in gradients(losses.terms["diffusion"], model.denoiser)]))
    assert F.cosine_similarity(grads[0], grads[1], dim=0).item() > 0.999
    assert (grads[1].norm() / grads[0].norm()).item() == pytest.approx(1, abs=0.02)


def test_the_token_loss_gives_latent_encoder_and_decoder_exactly_zero():
    model, losses_of = with_gamma(1.0)
    losses = losses_of(rows(4), generator())
    for part in (model.latent_encoder, model.latent_decoder, model.denoiser):
        assert all(g is None for g in gradients(losses.terms["token"], part))
    assert all(g.any() for g in gradients(losses.terms["token"], model.token_decoder))


def test_with_token_gradient_the_token_loss_gives_them_the_gradient_of_plain_cross_entropy():
    (model, losses_of), tokens = with_gamma(1.0, token_gradient=True, sigma_dec=0.0), rows(4)
    loss = losses_of(tokens, generator()).terms["token"]
    logits = model.token_decoder(model.latent_decoder(model.encode(tokens)))
    plain = F.cross_entropy(logits.flatten(0, 1), tokens.flatten())
    for part in (model.latent_encoder, model.latent_decoder):
        for got, want in zip(gradients(loss, part), gradients(plain, part), strict=True):
            assert want.any()
            torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-7)


def test_the_reconstruction_loss_gives_the_latent_encoder_its_whole_gradient_whatever_gamma():
    (model, losses_of), tokens = with_gamma(0.0, sigma_dec=0.0), rows(4)
    loss = losses_of(tokens, generator()).terms["reconstruction"]
    hidden = model.token_encoder(tokens)
    plain = (model.latent_decoder(model.latent_encoder(hidden)) - hidden).square().mean()
    for got, want in zip(gradients(loss, model.latent_encoder), gradients(plain, model.latent_encoder), strict=True):
        assert want.any()
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-7)


def test_gamma_may_be_a_number_and_is_not_needed_without_gradients():
    model, tokens, objective = make_model(), rows(4), JointObjective()
    u, found = torch.tensor([0.05, 0.2, 0.5, 0.9]), []
    for gamma in (0.25, torch.tensor(0.25)):
        loss = objective(model, tokens, u, gamma, generator(2)).terms["diffusion"]
        found.append([loss, *gradients(loss, model.latent_encoder)])
    assert all(map(torch.equal, *found))
    with torch.no_grad():
        totals = [objective(model, tokens, u, gamma, generator(2)).total for gamma in (0.0, 1.0)]
    assert torch.equal(*totals)


# --- self-conditioning


def test_even_rows_see_their_own_first_estimate_and_odd_rows_see_zeros():
    model, losses_of = with_gamma(1.0)
    watched = Watched(model)
    losses_of(rows(6), generator())
    (z_even, u_even, first), (z_t, u, condition) = watched.calls
    assert torch.equal(first, torch.zeros(3, LENGTH, LATENT))
    assert torch.equal(z_even, z_t[0::2])
    assert torch.equal(u_even, u[0::2])
    assert torch.equal(condition[0::2], watched.answers[0])
    assert condition[0::2].any()
    assert not condition[1::2].any()
    assert not watched.answers[0].requires_grad
    assert watched.answers[1].requires_grad


@pytest.mark.parametrize(("count", "share"), [(601, 0.5), (600, 0.2), (600, 1.0)])
def test_batches_of_odd_size_and_other_probabilities_throw_a_coin_for_each_row(count, share):
    model, losses_of = with_gamma(1.0, self_conditioning=share)
    watched = Watched(model)
    losses_of(rows(count), generator(), torch.full((count,), 0.5))
    condition = watched.calls[1][2]
    draw = generator()
    torch.randn(count, LENGTH, LATENT, generator=draw)
    coins = torch.rand(count, generator=draw) < share
    assert torch.equal(condition.flatten(1).any(1), coins)
    assert torch.equal(condition[coins], watched.answers[0][coins])
    assert coins.float().mean().item() == pytest.approx(share, abs=4 * math.sqrt(0.25 / count))


@pytest.mark.parametrize(("start", "even"), [(0, [0, 2]), (3, [1]), (5, [1])])
def test_the_rows_of_even_index_in_the_global_batch_see_their_estimate_wherever_a_slice_begins(start, even):
    model, losses_of = with_gamma(1.0)
    watched = Watched(model)
    mine = range(start, start + 3)
    losses_of(rows(3), RowNoise(0, "noise", rows=mine, total=8), torch.full((3,), 0.5))
    assert watched.calls[-1][2].flatten(1).any(1).nonzero().flatten().tolist() == even


def test_one_row_of_odd_index_alone_calls_the_denoiser_once():
    model, losses_of = with_gamma(1.0)
    watched = Watched(model)
    losses_of(rows(1), RowNoise(0, "noise", rows=range(1, 2), total=8), torch.full((1,), 0.5))
    assert len(watched.calls) == 1


def test_a_global_batch_of_odd_size_throws_each_rows_coin_whatever_slice_the_row_is_in():
    conditions = []
    for parts in ([range(9)], [range(4), range(4, 9)]):
        model, losses_of = with_gamma(1.0)
        watched = Watched(model)
        seen = []
        for part in parts:
            noise = RowNoise(0, "noise", rows=part, total=9)
            losses_of(rows(9)[part.start : part.stop], noise, torch.full((len(part),), 0.5))
            seen += watched.calls[-1][2].flatten(1).any(1).tolist()
        conditions.append(seen)
    assert conditions[0] == conditions[1]
    assert 0 < sum(conditions[0]) < 9


def test_switched_off_the_denoiser_is_called_once_and_sees_zeros():
    model, losses_of = with_gamma(1.0, self_conditioning=0.0)
    watched = Watched(model)
    losses_of(rows(6), generator())
    assert len(watched.calls) == 1
    assert not watched.calls[0][2].any()


# --- encode and decode


def test_decode_adds_no_noise_and_draws_only_at_a_temperature():
    model, tokens = make_model(sigma_dec=5.0), rows(4)
    z0 = model.encode(tokens)
    draw = generator(8)
    want = model.token_decoder(model.latent_decoder(z0)).argmax(-1)
    assert torch.equal(model.decode(z0, generator=draw), want)
    assert torch.equal(draw.get_state(), generator(8).get_state())
    model.decode(z0, temperature=1.0, generator=draw)
    assert not torch.equal(draw.get_state(), generator(8).get_state())


def test_latents_are_float32_under_bfloat16_and_close_to_the_ones_without():
    model, tokens = make_model(), rows(4)
    with torch.autocast("cpu", torch.bfloat16):
        half = model.encode(tokens)
    assert half.dtype == torch.float32
    torch.testing.assert_close(half, model.encode(tokens), rtol=0.02, atol=0.03)
