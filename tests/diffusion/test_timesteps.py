"""Timesteps: drawn as the losses rise, whatever the noise on them, the micro-steps and the ranks."""

import importlib.util
import math
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from helpers import ROOT
from sklearn.isotonic import isotonic_regression
from torch import Tensor

from ldlm.diffusion.timesteps import AdaptiveTimesteps, TimestepSampler, UniformTimesteps, interpolate, isotonic


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def told(curve, **arguments) -> AdaptiveTimesteps:
    """A sampler that has seen `curve` at many times and was refreshed."""
    timesteps = AdaptiveTimesteps(**arguments)
    u = torch.linspace(0, 1, 20_001, dtype=torch.float64)
    timesteps.observe(u, curve(u))
    timesteps.synchronize()
    timesteps.refresh()
    return timesteps


def measure():
    """The function that measured the errors in docs/decisions.md."""
    path = ROOT / "scripts" / "measure_timesteps.py"
    spec = importlib.util.spec_from_file_location("measure_timesteps", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.measure


def sigmoid_curve(u: Tensor) -> Tensor:
    return torch.sigmoid(12 * (u - 0.3))


@pytest.mark.parametrize("curve", [torch.square, sigmoid_curve, lambda u: 3 + 0.1 * u])
def test_drawn_times_follow_the_loss_curve(curve):
    count, timesteps = 50_000, told(curve)
    u = timesteps.sample(count, generator()).double().sort().values
    ends = curve(torch.tensor([0.0, 1.0], dtype=torch.float64))
    cdf = 0.999 * (curve(u) - ends[0]) / (ends[1] - ends[0]) + 0.001 * u
    ranks = torch.arange(count + 1, dtype=torch.float64) / count
    kolmogorov_smirnov = torch.maximum((cdf - ranks[:-1]).abs(), (cdf - ranks[1:]).abs()).max().item()
    assert kolmogorov_smirnov < 1.63 / math.sqrt(count) + 1e-3  # 1 % level; 1e-3 for the curve inside a bin


def test_the_loss_is_linear_in_the_adapted_time():
    q = torch.linspace(0, 1, 201, dtype=torch.float64)
    loss = sigmoid_curve(told(sigmoid_curve, floor=1e-9).inverse_cdf(q))
    straight = loss[0] + q * (loss[-1] - loss[0])
    torch.testing.assert_close(loss, straight, rtol=0, atol=2e-3)  # e is 1.6e-3: losses scatter within a bin


@pytest.mark.parametrize(
    "timesteps", [UniformTimesteps(), AdaptiveTimesteps(), told(sigmoid_curve), told(torch.square)]
)
def test_the_inverse_cdf_inverts_the_cdf_and_keeps_the_ends(timesteps: TimestepSampler):
    u = torch.linspace(0, 1, 777, dtype=torch.float64)
    torch.testing.assert_close(timesteps.inverse_cdf(timesteps.cdf(u)), u, rtol=0, atol=1e-12)
    ends = torch.tensor([0.0, 1.0], dtype=torch.float64)
    assert torch.equal(timesteps.cdf(ends), ends)
    assert torch.equal(timesteps.inverse_cdf(ends), ends)


@pytest.mark.parametrize("timesteps", [UniformTimesteps(), AdaptiveTimesteps(), told(sigmoid_curve)])
def test_draws_are_float32_above_0_and_repeat_with_the_generator(timesteps: TimestepSampler):
    u = timesteps.sample(1000, generator(7))
    assert u.shape == (1000,)
    assert u.dtype == torch.float32
    assert 0 < u.min() <= u.max() <= 1
    assert torch.equal(u, timesteps.sample(1000, generator(7)))


def test_a_uniform_draw_of_0_does_not_become_the_time_0(monkeypatch):
    monkeypatch.setattr(
        "ldlm.diffusion.timesteps.uniform", lambda shape, source, dtype: torch.zeros(shape, dtype=dtype)
    )
    assert told(sigmoid_curve).sample(2, generator()).tolist() == [1.0, 1.0]


def test_draws_are_uniform_until_the_first_refresh():
    timesteps = AdaptiveTimesteps()
    timesteps.observe(torch.linspace(0, 1, 100), torch.linspace(0, 1, 100) ** 4)
    timesteps.synchronize()
    torch.testing.assert_close(timesteps.sample(99, generator(3)), UniformTimesteps().sample(99, generator(3)))


def brute_force(steps: list[tuple[list[float], list[float]]], bins: int) -> tuple[list[float], ...]:
    num, den, square = [0.0] * (bins + 1), [0.0] * (bins + 1), [0.0] * (bins + 1)
    for times, losses in steps:
        for u, loss in zip(times, losses, strict=True):
            if math.isfinite(loss):
                edge = min(int(u * bins), bins - 1)
                right = u * bins - edge
                for i, weight in [(edge, 1 - right), (edge + 1, right)]:
                    num[i] += weight * loss
                    den[i] += weight
                    square[i] += weight * loss**2
    return num, den, square


def test_the_sums_are_those_of_a_loop_over_rows_whatever_the_micro_steps_and_bad_losses():
    timesteps, random, steps = AdaptiveTimesteps(bins=7), generator(1), []
    for _ in range(20):
        u, loss = torch.rand(8, generator=random), torch.randn(8, generator=random).exp()
        u[0], u[1], loss[2], loss[3] = 1.0, 3 / 7, math.nan, math.inf
        for part in (slice(0, 5), slice(5, 8)):
            timesteps.observe(u[part], loss[part])
        timesteps.synchronize()
        steps.append((u.tolist(), loss.tolist()))
    for found, want in zip((timesteps.num, timesteps.den, timesteps.square), brute_force(steps, 7), strict=True):
        torch.testing.assert_close(found, torch.tensor(want, dtype=torch.float64), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("seen", "memory", "left"), [(300, 500, 300), (300, 100, 100), (300, 20, 60), (0, 100, 0)])
def test_a_refresh_leaves_a_fifth_of_the_rows_and_at_least_the_memory_and_the_same_losses(seen, memory, left):
    timesteps = AdaptiveTimesteps(bins=10, memory=memory)
    timesteps.observe(torch.rand(seen, generator=generator()), torch.rand(seen, generator=generator(1)))
    timesteps.synchronize()
    sums = torch.stack([timesteps.num, timesteps.den, timesteps.square])
    timesteps.refresh()
    after = torch.stack([timesteps.num, timesteps.den, timesteps.square])
    torch.testing.assert_close(after, sums * (left / max(seen, 1)), rtol=1e-12, atol=0)


@pytest.mark.parametrize("unseen", [0.0, 0.5, 0.95])
@pytest.mark.parametrize("seed", range(5))
def test_the_isotonic_regression_is_sklearns(seed, unseen):
    random = generator(seed)
    den = torch.rand(101, generator=random, dtype=torch.float64) ** 4 * 1e3  # from next to nothing to many rows
    den[torch.rand(101, generator=random) < unseen] = 0
    loss = torch.linspace(0, 1, 101).sqrt().double() + torch.randn(101, generator=random, dtype=torch.float64)
    seen = den > 0
    want = isotonic_regression(loss[seen].numpy(), sample_weight=den[seen].numpy())
    found = isotonic(loss * den, den)[seen]
    torch.testing.assert_close(found, torch.from_numpy(want), rtol=1e-9, atol=1e-9)


def test_edges_nothing_was_seen_at_are_interpolated_and_flat_beyond_the_last():
    timesteps = AdaptiveTimesteps(bins=8)
    timesteps.observe(torch.tensor([2.0, 5.0, 6.0]) / 8, torch.tensor([1.0, 4.0, 2.0]))  # 4 and 2 fall: both are 3
    timesteps.synchronize()
    loss, error = timesteps.edge_losses()
    torch.testing.assert_close(loss, torch.tensor([1, 1, 1, 5 / 3, 7 / 3, 3, 3, 3, 3], dtype=torch.float64))
    assert error == 0  # one row an edge cannot tell how much they scatter
    timesteps.refresh()
    rises = torch.tensor([0, 0, 1, 1, 1, 0, 0, 0], dtype=torch.float64) / 3
    torch.testing.assert_close(timesteps.density, 0.999 * rises + 0.001 / 8)


@pytest.mark.parametrize(("rows", "noise"), [(20_000, 0.1), (20_000, 0.3), (2_000, 0.2)])
def test_the_error_is_the_share_of_the_rise_that_is_two_and_a_half_standard_errors_of_as_large_a_share_of_the_rows(
    rows, noise
):
    timesteps, random = AdaptiveTimesteps(floor=1e-6), generator(2)
    u = torch.rand(rows, generator=random)
    timesteps.observe(u, 3 + u + noise * torch.randn(rows, generator=random))
    timesteps.synchronize()
    _, error = timesteps.edge_losses()
    # e rise = 2.5 noise/√(e n); the rise between the means of the first and the last e n rows is 1 − e
    want = min(e / 1e4 for e in range(1, 10_000) if (e / 1e4) ** 3 * rows * (1 - e / 1e4) ** 2 >= 6.25 * noise**2)
    assert error.item() == pytest.approx(want, rel=0.1)
    timesteps.refresh()
    falls_to = error.item() / 100
    assert timesteps.density.min().item() == pytest.approx(falls_to, rel=1e-6)


@pytest.mark.parametrize("rows", [100, 800, 6_400])
@pytest.mark.parametrize("slope", [0.0, -0.5])
def test_a_flat_or_falling_curve_under_noise_gives_the_uniform_density(rows, slope):
    for seed in range(10):
        timesteps, random = AdaptiveTimesteps(), generator(seed)
        for _ in range(4):
            u = timesteps.sample(rows, random)
            timesteps.observe(u, (1 + slope * u) * (1 + 0.3 * torch.randn(rows, generator=random)))
            timesteps.synchronize()
            timesteps.refresh()
            torch.testing.assert_close(
                timesteps.density, torch.full((100,), 0.01, dtype=torch.float64), rtol=1e-12, atol=0
            )


def test_one_row_at_an_end_does_not_make_the_loss_there():
    timesteps = told(lambda u: u.clamp(max=0.98) / 0.98)
    timesteps.den[-1], timesteps.num[-1], timesteps.square[-1] = 0.01, 0.02, 0.04  # one row, nearly at the edge before
    loss, error = timesteps.edge_losses()
    assert loss[-1].item() == pytest.approx(1, abs=error.item())


@pytest.mark.parametrize(
    ("rows", "steps", "bound", "refreshes", "seeds"),
    [(512, 500, 0.02, 4, 1), (64, 100, 0.05, 10, 3), (16, 50, 0.08, 15, 6)],
)
def test_f_is_near_the_truth_at_every_refresh_after_the_first(rows, steps, bound, refreshes, seeds):
    for seed in range(seeds):
        errors = measure()(AdaptiveTimesteps(), rows, steps, refreshes, seed, 0.1)
        assert max(errors[1:]) <= bound


def test_f_follows_a_loss_that_changes():
    errors = measure()(AdaptiveTimesteps(), 512, 20, 26, 0, 0.1, turn=6)
    assert errors[6] > 0.2  # the first refresh after the turn remembers the curve before it
    assert max(errors[5], *errors[-3:]) < 0.05


@pytest.mark.parametrize("huge", [1e30, 3e38, 1e200, 1e308])
def test_a_loss_of_any_size_leaves_a_density_that_is_finite_and_sums_to_1(huge):
    timesteps = told(sigmoid_curve)
    timesteps.observe(torch.tensor([0.2, 0.7]).double(), torch.tensor([1.0, huge]).double())
    timesteps.synchronize()
    timesteps.refresh()
    assert timesteps.density.sum().item() == pytest.approx(1)
    assert (timesteps.density > 0).all()
    assert timesteps.square.isfinite().all()


def test_a_skipped_step_changes_nothing_and_is_forgotten():
    timesteps = told(sigmoid_curve)
    before = {name: value.clone() for name, value in timesteps.state_dict().items()}
    timesteps.observe(torch.rand(8, generator=generator()), torch.tensor([1.0, math.inf] * 4))
    timesteps.synchronize(torch.tensor(1.0))
    timesteps.synchronize(torch.tensor(0.0))
    assert all(torch.equal(value, before[name]) for name, value in timesteps.state_dict().items())


def test_without_any_observation_the_losses_are_0_and_the_density_uniform():
    timesteps = AdaptiveTimesteps(bins=4)
    timesteps.synchronize()
    timesteps.refresh()
    loss, error = timesteps.edge_losses()
    assert (loss.tolist(), error) == ([0, 0, 0, 0, 0], 1)
    assert timesteps.density.tolist() == [0.25] * 4


@pytest.mark.parametrize(
    "curve", [lambda u: 0.7 + 0 * u, lambda u: 1 - u, lambda u: 0 * u, lambda u: u * math.nan, lambda u: u + math.inf]
)
def test_a_flat_falling_or_broken_curve_gives_the_uniform_density(curve):
    torch.testing.assert_close(told(curve).density, torch.full((100,), 0.01, dtype=torch.float64), rtol=1e-12, atol=0)


def test_a_restored_sampler_continues_as_the_saved_one():
    saved, restored = told(sigmoid_curve), AdaptiveTimesteps()
    restored.load_state_dict(saved.state_dict())
    assert set(saved.state_dict()) == {"num", "den", "square", "density"}
    for timesteps in (saved, restored):
        u = timesteps.sample(64, generator(5))
        timesteps.observe(u, u**3)
        timesteps.synchronize()
        timesteps.refresh()
    assert torch.equal(saved.density, restored.density)
    assert torch.equal(saved.sample(64, generator(6)), restored.sample(64, generator(6)))


def rows_of_a_step(step: int) -> tuple[Tensor, Tensor]:
    u = torch.rand(12, generator=generator(step))
    return u, u**2 + step


def observe_on_one_of_two_ranks(rank: int, folder: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    timesteps = AdaptiveTimesteps(bins=10)
    for step in range(3):
        u, loss = rows_of_a_step(step)
        mine = slice(0, 5) if rank == 0 else slice(5, 12)
        if not (rank == 0 and step == 1):  # a rank that saw nothing takes part all the same
            timesteps.observe(u[mine], loss[mine])
        timesteps.synchronize()
    timesteps.refresh()
    torch.save(timesteps.state_dict(), f"{folder}/rank{rank}.pt")
    dist.destroy_process_group()


def test_two_ranks_keep_the_statistics_of_one_that_sees_all_rows(tmp_path: Path):
    mp.spawn(observe_on_one_of_two_ranks, args=(str(tmp_path),), nprocs=2)
    alone = AdaptiveTimesteps(bins=10)
    for step in range(3):
        u, loss = rows_of_a_step(step)
        mine = slice(5, 12) if step == 1 else slice(0, 12)
        alone.observe(u[mine], loss[mine])
        alone.synchronize()
    alone.refresh()
    first, second = (torch.load(tmp_path / f"rank{rank}.pt", weights_only=True) for rank in range(2))
    for name, value in alone.state_dict().items():
        assert torch.equal(first[name], second[name])
        torch.testing.assert_close(first[name], value, rtol=1e-12, atol=1e-12)


def test_interpolation_is_exact_at_the_knots_and_constant_outside():
    knots, values = torch.tensor([0.0, 0.1, 0.1, 0.7]), torch.tensor([3.0, 1.0, 1.0, 5.0])
    assert torch.equal(interpolate(knots, knots, values), values)
    assert interpolate(torch.tensor([-1.0, 9.0]), knots, values).tolist() == [3.0, 5.0]
    assert interpolate(torch.tensor(0.4), knots, values).item() == pytest.approx(3.0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [({"bins": 0}, "bins is 0"), ({"memory": 0}, "memory is 0"), ({"floor": 0.0}, r"floor is 0\.0")],
)
def test_arguments_that_cannot_work_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        AdaptiveTimesteps(**arguments)
