"""Gaussian data N(mu, s²) have an exact denoiser, linear in z, which makes every sampler's output Gaussian."""

import itertools
import math

import numpy as np
import pytest
import torch
from helpers.grids import ADAPTED, GRIDS
from torch import Tensor

from ldlm.diffusion.grids import AdaptedGrid, LogSNRGrid, MixedGrid, UniformGrid
from ldlm.diffusion.samplers import DDIM, Ancestral, DPMSolver2M, EulerMaruyama, Sampler
from ldlm.diffusion.schedules import CosineSchedule, NoiseSchedule, TangentSchedule
from ldlm.diffusion.timesteps import AdaptiveTimesteps
from ldlm.nn.denoiser import Denoiser, DiT

MU, S = 0.7, 0.5  # of the Gaussian data
SCHEDULE = TangentSchedule(3.0)
SAMPLERS = [EulerMaruyama(), Ancestral(), DDIM(), DDIM(0.5), DPMSolver2M(), DPMSolver2M(1.0)]


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def slope(schedule: NoiseSchedule, t: Tensor) -> Tensor:
    """k of E[z0 | z_t] = MU + k (z_t − alpha MU)."""
    return schedule.alpha(t) * S**2 / marginal(schedule, t)


def marginal(schedule: NoiseSchedule, t: Tensor) -> Tensor:
    """The variance of z_t."""
    alpha, sigma, _ = schedule.levels(t)
    return alpha**2 * S**2 + sigma**2


def posterior_mean(z: Tensor, t: Tensor, self_condition: Tensor) -> Tensor:
    t = t.view(-1, 1, 1)
    return (MU + slope(SCHEDULE, t.double()) * (z - SCHEDULE.alpha(t) * MU)).to(z)


def propagate(sampler: Sampler, schedule: NoiseSchedule, times: Tensor) -> tuple[Tensor, Tensor]:
    """Mean [2] and covariance [2 2] of (z, the prediction before) at t_{N−1}, from the weights: no Monte Carlo."""
    mean, covariance = torch.zeros(2, dtype=torch.float64), torch.diag(torch.tensor([1.0, 0.0], dtype=torch.float64))
    for (a, b, c, e), t in zip(sampler.table(schedule, times).tolist(), times, strict=False):
        k = slope(schedule, t).item()
        offset = MU * (1 - k * schedule.alpha(t).item())
        move = torch.tensor([[a + b * k, c], [k, 0]], dtype=torch.float64)
        mean = move @ mean + offset * torch.tensor([b, 1], dtype=torch.float64)
        covariance = move @ covariance @ move.T
        covariance[0, 0] += e**2
    return mean, covariance


# --- what is sampled


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("grid", [UniformGrid(), MixedGrid(AdaptedGrid(), LogSNRGrid())])
def test_samples_of_gaussian_data_have_the_mean_and_variance_of_the_posterior_mean_at_the_last_time(sampler, grid):
    nfe, rows = 800, 4000
    noise = torch.randn(rows, 1, 2, generator=generator(1), dtype=torch.float64)
    z0_hat = sampler.sample(posterior_mean, SCHEDULE, noise, nfe, generator(2), grid, ADAPTED)
    times = grid.times(nfe, SCHEDULE, ADAPTED)
    k = slope(SCHEDULE, times[-2]).item()
    variance = k**2 * marginal(SCHEDULE, times[-2]).item()
    spread = math.sqrt(variance / z0_hat.numel())
    # What 800 steps leave, from the weights alone, is small; what Monte Carlo adds is within five standard errors.
    mean_by_table, covariance_by_table = propagate(sampler, SCHEDULE, times)
    mean_by_table = MU + k * (mean_by_table[0].item() - SCHEDULE.alpha(times[-2]).item() * MU)
    variance_by_table = k**2 * covariance_by_table[0, 0].item()
    assert mean_by_table == pytest.approx(MU, abs=0.005)
    assert variance_by_table == pytest.approx(variance, rel=0.03)
    assert z0_hat.mean().item() == pytest.approx(mean_by_table, abs=5 * spread)
    assert z0_hat.var().item() == pytest.approx(variance_by_table, rel=5 * math.sqrt(2 / z0_hat.numel()))


def orders(errors: list[float]) -> list[float]:
    return [math.log2(coarse / fine) for coarse, fine in itertools.pairwise(errors)]


def steps_down_to(t_end: float, count: int) -> Tensor:
    """`count` even steps from 1 to t_end, and the time after it, which no update leads to."""
    return torch.cat([torch.linspace(1, t_end, count + 1, dtype=torch.float64), torch.tensor([t_end / 2])])


@pytest.mark.parametrize(
    ("sampler", "order"),
    [(DDIM(), 1), (DDIM(0.5), 1), (Ancestral(), 1), (DPMSolver2M(), 2), (DPMSolver2M(1.0), 2)],
    ids=["ddim", "ddim half", "ancestral", "2m", "2m sde"],
)
@pytest.mark.parametrize("schedule", [SCHEDULE, CosineSchedule()], ids=["tangent", "cosine"])
def test_the_error_falls_with_the_order_of_the_solver(sampler, order, schedule):
    t_end = torch.tensor(0.2, dtype=torch.float64)
    errors = []
    for count in (64, 128, 256, 512):
        mean, covariance = propagate(sampler, schedule, steps_down_to(0.2, count))
        # ODE and SDE both end in the marginal of z at t_end; the ODE's map z → sd z makes the sd an error of the path.
        errors.append(
            abs(mean[0].item() - schedule.alpha(t_end).item() * MU)
            + abs(covariance[0, 0].sqrt().item() - marginal(schedule, t_end).sqrt().item())
        )
    assert orders(errors)[-1] == pytest.approx(order, abs=0.2)
    assert errors[-1] < 0.01


def test_euler_maruyama_converges_weakly_with_order_1_to_the_clipped_sde():
    from scipy.integrate import solve_ivp

    sampler = EulerMaruyama(beta_t_max=0.9)

    def slopes(t: float, moments: np.ndarray) -> list[float]:
        # of dz = −beta_c (½ z + score) dt + √beta_c dw, backwards; beta_c by a finite difference of log alpha
        at, clipped = torch.tensor(t, dtype=torch.float64), torch.tensor(min(t, 0.9), dtype=torch.float64)
        beta = -(SCHEDULE.alpha(clipped + 1e-6).log() - SCHEDULE.alpha(clipped - 1e-6).log()).item() / 1e-6
        alpha, v = SCHEDULE.alpha(at).item(), marginal(SCHEDULE, at).item()
        # the exact denoiser makes the score the marginal's: −(z − alpha MU)/v
        mean, variance = moments
        return [-beta * (mean / 2 - (mean - alpha * MU) / v), -beta * (1 - 2 / v) * variance - beta]

    limit = solve_ivp(slopes, (1, 0.2), [0.0, 1.0], rtol=1e-9, atol=1e-10).y[:, -1]
    errors = []
    for count in (200, 400, 800):
        _, covariance = propagate(sampler, SCHEDULE, steps_down_to(0.2, count))
        errors.append(abs(covariance[0, 0].item() - limit[1]))
    assert orders(errors)[-1] == pytest.approx(1, abs=0.15)
    assert errors[-1] < 0.01


# --- the weights


@pytest.mark.parametrize(("t", "s"), [(1.0, 0.9), (0.6, 0.5), (0.02, 0.01)])
def test_the_ancestral_step_is_gaussian_conditioning(t, s):
    t, s = torch.tensor(t, dtype=torch.float64), torch.tensor(s, dtype=torch.float64)
    alpha_t, alpha_s, sigma_s = SCHEDULE.alpha(t).item(), SCHEDULE.alpha(s).item(), SCHEDULE.sigma(s).item()
    # z0, z_s, z_t as linear maps of three independent unit normals, then z_s conditioned on (z_t, z0)
    onward = alpha_t / alpha_s
    z0, z_s = np.array([1.0, 0, 0]), np.array([alpha_s, sigma_s, 0])
    z_t = onward * z_s + np.array([0, 0, math.sqrt(1 - onward**2)])
    given = np.stack([z_t, z0])
    weights = np.linalg.solve(given @ given.T, given @ z_s)
    variance = z_s @ z_s - weights @ given @ z_s
    a, b, c, e = Ancestral().step(SCHEDULE, t, s, None)
    assert (float(a), float(b)) == pytest.approx(tuple(weights), abs=1e-9)
    assert float(e) ** 2 == pytest.approx(variance, abs=1e-9)
    assert c == 0


@pytest.mark.parametrize("grid", GRIDS)
def test_ddim_with_eta_1_is_ancestral(grid):
    times = grid.times(30, SCHEDULE, ADAPTED)
    torch.testing.assert_close(DDIM(1.0).table(SCHEDULE, times), Ancestral().table(SCHEDULE, times), rtol=0, atol=1e-12)


@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_the_2m_weights_are_those_of_the_paper_of_dpm_solver_plus_plus(eta):
    before, t, s = (torch.tensor(x, dtype=torch.float64) for x in (0.8, 0.7, 0.55))
    half_log_snr = [math.log(SCHEDULE.alpha(x).item() / SCHEDULE.sigma(x).item()) for x in (before, t, s)]
    h_before, h = half_log_snr[1] - half_log_snr[0], half_log_snr[2] - half_log_snr[1]
    r = h_before / h
    shrink, alpha, sigma = SCHEDULE.sigma(s).item() / SCHEDULE.sigma(t).item(), SCHEDULE.alpha(s), SCHEDULE.sigma(s)
    if eta == 0:  # Algorithm 2: x_s = sigma_s/sigma_t x_t − alpha_s (e^{−h} − 1) D, D = (1 + 1/2r) x0 − 1/2r x0_before
        data = alpha.item() * (1 - math.exp(-h))
        want = [shrink, data * (1 + 1 / (2 * r)), -data / (2 * r), 0.0]
    else:  # SDE-DPM-Solver++(2M): the same D, with e^{−2h} and fresh noise
        data = alpha.item() * (1 - math.exp(-2 * h))
        noise = sigma.item() * math.sqrt(1 - math.exp(-2 * h))
        want = [shrink * math.exp(-h), data * (1 + 1 / (2 * r)), -data / (2 * r), noise]
    got = [float(weight) for weight in DPMSolver2M(eta).step(SCHEDULE, t, s, before)]
    assert got == pytest.approx(want, abs=1e-12)


@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_2m_is_first_order_in_its_first_two_steps(eta):
    times = UniformGrid().times(10, SCHEDULE)
    ddim, second_order = DDIM(eta).table(SCHEDULE, times), DPMSolver2M(eta).table(SCHEDULE, times)
    assert torch.equal(second_order[:2], ddim[:2])
    assert (second_order[2:, 2] < 0).all()


def test_the_euler_maruyama_step_is_the_reverse_sde_written_out():
    t, s = torch.tensor(0.97, dtype=torch.float64), torch.tensor(0.9, dtype=torch.float64)
    z, z0_hat, eps = 0.3, -1.1, 0.8
    alpha, sigma = SCHEDULE.alpha(t).item(), SCHEDULE.sigma(t).item()
    beta = SCHEDULE.beta(torch.tensor(0.95, dtype=torch.float64)).item()
    score = -(z - alpha * z0_hat) / sigma**2
    want = z + (-0.5 * beta * z - beta * score) * (0.9 - 0.97) + math.sqrt(beta * 0.07) * eps
    a, b, c, e = EulerMaruyama().step(SCHEDULE, t, s, None)
    assert float(a * z + b * z0_hat + e * eps) == pytest.approx(want, rel=1e-12)
    assert c == 0


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("grid", GRIDS)
def test_all_weights_are_finite_from_pure_noise_on(sampler, grid):
    for nfe in (1, 2, 3, 50):
        table = sampler.table(SCHEDULE, grid.times(nfe, SCHEDULE, ADAPTED))
        assert table.shape == (nfe - 1, 4)
        assert table.isfinite().all()


# --- the loop


class Recorder:
    """A denoiser that notes how it is called; its predictions are drawn, so that no two are alike."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        self.random, self.dtype = generator(99), dtype
        self.states: list[Tensor] = []
        self.times: list[Tensor] = []
        self.conditions: list[Tensor] = []
        self.predictions: list[Tensor] = []

    def __call__(self, z: Tensor, t: Tensor, self_condition: Tensor) -> Tensor:
        self.states.append(z)
        self.times.append(t)
        self.conditions.append(self_condition)
        self.predictions.append(torch.randn(z.shape, generator=self.random).to(self.dtype))
        return self.predictions[-1]


@pytest.mark.parametrize("nfe", [1, 2, 7])
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_the_denoiser_is_called_nfe_times_with_its_last_prediction_and_the_last_is_the_answer(sampler, nfe):
    denoise, told = Recorder(), []
    noise = torch.randn(3, 4, 5, generator=generator())
    z0_hat = sampler.sample(
        denoise, SCHEDULE, noise, nfe, generator(), UniformGrid(), on_step=lambda *step: told.append(step)
    )
    assert [number for number, _ in told] == list(range(1, nfe + 1))
    assert len(denoise.predictions) == nfe
    assert all(torch.equal(seen, want) for (_, seen), want in zip(told, denoise.predictions, strict=True))
    want = torch.linspace(1, 0.01, nfe + 1)[:-1, None].expand(nfe, 3)
    torch.testing.assert_close(torch.stack(denoise.times), want, rtol=0, atol=1e-7)
    assert torch.equal(denoise.states[0], noise)
    for condition, prediction in zip(denoise.conditions, [torch.zeros_like(noise), *denoise.predictions], strict=False):
        assert torch.equal(condition, prediction)
    assert torch.equal(z0_hat, denoise.predictions[-1])


def test_a_sample_repeats_with_its_generator_and_only_a_stochastic_sampler_draws():
    noise = torch.randn(2, 3, 4, generator=generator())
    for sampler in SAMPLERS:
        first, second, third = (
            sampler.sample(posterior_mean, SCHEDULE, noise, 9, generator(seed), UniformGrid()) for seed in (1, 1, 2)
        )
        deterministic = isinstance(sampler, DDIM | DPMSolver2M) and sampler.eta == 0
        assert torch.equal(first, second)
        assert torch.equal(first, third) == deterministic
        used = generator(1)
        sampler.sample(posterior_mean, SCHEDULE, noise, 9, used, UniformGrid())
        assert torch.equal(used.get_state(), generator(1).get_state()) == deterministic


def test_the_state_stays_in_float32_under_a_bfloat16_denoiser():
    denoise = Recorder(torch.bfloat16)
    z0_hat = Ancestral().sample(denoise, SCHEDULE, torch.zeros(2, 3, 4).bfloat16(), 5, generator(), UniformGrid())
    assert {tensor.dtype for tensor in (*denoise.states, *denoise.times, *denoise.conditions, z0_hat)} == {
        torch.float32
    }


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_a_denoiser_with_its_times_known_before_samples_what_the_plain_function_samples(sampler):
    torch.manual_seed(0)
    dit = DiT(4, 3, 8, layers=2, heads=2).double()
    for parameter in dit.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    noise = torch.randn(2, 3, 4, dtype=torch.float64)
    fast, plain = (
        sampler.sample(denoise, SCHEDULE, noise, 9, generator(3), UniformGrid()) for denoise in (dit, dit.forward)
    )
    assert ((fast - plain).norm() / plain.norm()).item() < 1e-5


def test_a_denoiser_is_fed_in_its_own_dtype_and_its_state_stays_in_float32():
    class Keeper(Denoiser):
        def __init__(self) -> None:
            super().__init__(4, 3)
            self.scale = torch.nn.Parameter(torch.full((), 0.5, dtype=torch.bfloat16))

        def forward(self, z_t: Tensor, t: Tensor, self_condition: Tensor) -> Tensor:
            assert (z_t.dtype, t.dtype, self_condition.dtype) == (torch.bfloat16, torch.float32, torch.bfloat16)
            return self.scale * z_t

    z0_hat = []
    noise = torch.randn(2, 3, 4, generator=generator())
    rounded = [lambda z, t, c: 0.5 * z.bfloat16().float(), Keeper()]
    for denoise in rounded:
        z0_hat.append(Ancestral().sample(denoise, SCHEDULE, noise, 7, generator(1), UniformGrid()))
    assert z0_hat[1].dtype == torch.float32
    assert torch.equal(*z0_hat)  # halving is exact: a state in bfloat16 would have drifted away


def test_without_self_conditioning_the_denoiser_is_told_nothing():
    denoise = Recorder()
    Ancestral().sample(denoise, SCHEDULE, torch.ones(2, 3, 4), 5, generator(), UniformGrid(), self_condition=False)
    assert len(denoise.conditions) == 5
    assert not torch.stack(denoise.conditions).any()


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_the_state_moves_by_the_four_weights_of_the_table(sampler):
    denoise, times = Recorder(), UniformGrid().times(6, SCHEDULE)
    noise, source = torch.randn(2, 3, 4, generator=generator()), generator(5)
    sampler.sample(denoise, SCHEDULE, noise, 6, generator(5), UniformGrid())
    before = torch.zeros_like(noise)
    for k, (a, b, c, e) in enumerate(sampler.table(SCHEDULE, times).tolist()):
        z, z0_hat = denoise.states[k], denoise.predictions[k]
        eps = torch.randn(2, 3, 4, generator=source) if e else torch.zeros(())
        torch.testing.assert_close(denoise.states[k + 1], a * z + b * z0_hat + c * before + e * eps)
        before = z0_hat


def test_nothing_in_the_loop_waits_for_the_device():
    # Meta tensors have no values: asking for one, as .item(), .tolist() or an if would, raises.
    noise = torch.empty(2, 3, 4, device="meta")
    for sampler in SAMPLERS:
        z0_hat = sampler.sample(lambda z, t, z0: z + t.view(-1, 1, 1), SCHEDULE, noise, 6, generator(), UniformGrid())
        assert (z0_hat.shape, z0_hat.device.type) == ((2, 3, 4), "meta")
    with pytest.raises(RuntimeError):
        noise.sum().item()


# --- the grids


class Codebook:
    """128 codewords in R^16 of unit variance with Zipf weights and a spread of 0.05, and their exact denoiser."""

    spread = 0.05

    def __init__(self) -> None:
        self.words = torch.randn(128, 16, generator=generator())
        self.words /= self.words.std()
        self.weights = 1 / torch.arange(1, 129).float()

    def __call__(self, z: Tensor, t: Tensor, self_condition: Tensor) -> Tensor:
        alpha, sigma = SCHEDULE.alpha(t)[:, None], SCHEDULE.sigma(t)[:, None]
        variance = alpha**2 * self.spread**2 + sigma**2
        distances = (z - alpha[:, None] * self.words).square().sum(-1)  # z [b 1 d]: one latent a row
        mode = (self.weights.log() - distances / (2 * variance)).softmax(-1) @ self.words
        return (mode + alpha * self.spread**2 / variance * (z[:, 0] - alpha * mode))[:, None]

    def draw(self, count: int, random: torch.Generator) -> Tensor:
        words = self.words[torch.multinomial(self.weights, count, replacement=True, generator=random)]
        return (words + self.spread * torch.randn(words.shape, generator=random))[:, None]

    def invalid(self, z0_hat: Tensor) -> float:
        """The share of samples whose nearest word is farther than five spreads."""
        return (torch.cdist(z0_hat[:, 0], self.words).amin(1) > 5 * self.spread).float().mean().item()


def test_2m_on_the_mixed_grid_needs_16_calls_for_token_like_latents():
    codebook, timesteps, random = Codebook(), AdaptiveTimesteps(), generator(3)
    for _ in range(8):
        u, z0 = timesteps.sample(2048, random), codebook.draw(2048, random)
        eps = torch.randn(z0.shape, generator=random)
        z = SCHEDULE.alpha(u)[:, None, None] * z0 + SCHEDULE.sigma(u)[:, None, None] * eps
        timesteps.observe(u, (codebook(z, u, z0) - z0).square().mean((1, 2)))
        timesteps.synchronize()
    timesteps.refresh()
    noise = torch.randn(2048, 1, 16, generator=generator(1))
    mixed = MixedGrid(AdaptedGrid(), LogSNRGrid())
    good = DPMSolver2M().sample(codebook, SCHEDULE, noise, 16, generator(), mixed, timesteps)
    bad = DPMSolver2M().sample(codebook, SCHEDULE, noise, 16, generator(), AdaptedGrid(), timesteps)
    assert codebook.invalid(good) < 0.01
    assert codebook.invalid(bad) > 0.1  # the training density alone leaves no calls for the low noise


@pytest.mark.parametrize(
    ("part", "message"),
    [
        (lambda: EulerMaruyama(beta_t_max=1.0), r"beta_t_max is 1\.0"),
        (lambda: DDIM(eta=2.0), r"eta is 2\.0"),
        (lambda: DPMSolver2M(eta=-1.0), r"eta is -1\.0"),
    ],
)
def test_arguments_that_cannot_work_are_refused(part, message):
    with pytest.raises(ValueError, match=message):
        part()


def test_the_noise_scale_multiplies_the_posteriors_deviation_and_leaves_its_mean():
    times = UniformGrid().times(10, SCHEDULE)
    plain, cooler = Ancestral().table(SCHEDULE, times), Ancestral(0.6).table(SCHEDULE, times)
    torch.testing.assert_close(cooler[:, :3], plain[:, :3], rtol=0, atol=0)
    torch.testing.assert_close(cooler[:, 3], 0.6 * plain[:, 3])
    with pytest.raises(ValueError, match="noise_scale is -1"):
        Ancestral(-1)
