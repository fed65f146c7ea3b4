import math
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor

from ldlm.timesteps import AdaptiveTimesteps, TimestepSampler, UniformTimesteps, interpolate


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
    torch.testing.assert_close(loss, straight, rtol=0, atol=1e-3)


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
    monkeypatch.setattr("ldlm.timesteps.uniform", lambda shape, source, dtype: torch.zeros(shape, dtype=dtype))
    assert told(sigmoid_curve).sample(2, generator()).tolist() == [1.0, 1.0]


def test_draws_are_uniform_until_the_first_refresh():
    timesteps = AdaptiveTimesteps()
    timesteps.observe(torch.linspace(0, 1, 100), torch.linspace(0, 1, 100) ** 4)
    timesteps.synchronize()
    torch.testing.assert_close(timesteps.sample(99, generator(3)), UniformTimesteps().sample(99, generator(3)))


def brute_force(steps: list[tuple[list[float], list[float]]], bins: int, rho: float) -> tuple[list[float], list[float]]:
    num, den = [0.0] * (bins + 1), [0.0] * (bins + 1)
    for times, losses in steps:
        num, den = [rho * x for x in num], [rho * x for x in den]
        for u, loss in zip(times, losses, strict=True):
            if math.isfinite(loss):
                edge = min(int(u * bins), bins - 1)
                right = u * bins - edge
                for i, weight in [(edge, 1 - right), (edge + 1, right)]:
                    num[i] += weight * loss
                    den[i] += weight
    return num, den


def test_the_running_sums_are_those_of_a_loop_over_rows_whatever_the_micro_steps_and_bad_losses():
    timesteps, random, steps = AdaptiveTimesteps(bins=7, rho=0.9), generator(1), []
    for _ in range(20):
        u, loss = torch.rand(8, generator=random), torch.randn(8, generator=random).exp()
        u[0], u[1], loss[2], loss[3] = 1.0, 3 / 7, math.nan, math.inf
        for part in (slice(0, 5), slice(5, 8)):
            timesteps.observe(u[part], loss[part])
        timesteps.synchronize()
        steps.append((u.tolist(), loss.tolist()))
    num, den = brute_force(steps, 7, 0.9)
    torch.testing.assert_close(timesteps.num, torch.tensor(num, dtype=torch.float64), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(timesteps.den, torch.tensor(den, dtype=torch.float64), rtol=1e-12, atol=1e-12)


def test_edges_nothing_was_seen_at_are_interpolated_and_flat_beyond_the_last():
    timesteps = AdaptiveTimesteps(bins=8)
    timesteps.observe(torch.tensor([2.0, 5.0, 6.0]) / 8, torch.tensor([1.0, 4.0, 2.0]))
    timesteps.synchronize()
    want = torch.tensor([1, 1, 1, 2, 3, 4, 2, 2, 2], dtype=torch.float64)
    torch.testing.assert_close(timesteps.edge_losses(), want)
    timesteps.refresh()
    rises = torch.tensor([0, 0, 1, 1, 1, 0, 0, 0], dtype=torch.float64) / 3  # of the envelope 1 1 1 2 3 4 4 4 4
    torch.testing.assert_close(timesteps.density, 0.999 * rises + 0.001 / 8)


def test_without_any_observation_the_losses_are_0_and_the_density_uniform():
    timesteps = AdaptiveTimesteps(bins=4)
    timesteps.synchronize()
    timesteps.refresh()
    assert timesteps.edge_losses().tolist() == [0, 0, 0, 0, 0]
    assert timesteps.density.tolist() == [0.25] * 4


@pytest.mark.parametrize(
    "curve", [lambda u: 0.7 + 0 * u, lambda u: 1 - u, lambda u: 0 * u, lambda u: u * math.nan, lambda u: u + math.inf]
)
def test_a_flat_falling_or_broken_curve_gives_the_uniform_density(curve):
    torch.testing.assert_close(told(curve).density, torch.full((100,), 0.01, dtype=torch.float64), rtol=1e-12, atol=0)


def test_a_restored_sampler_continues_as_the_saved_one():
    saved, restored = told(sigmoid_curve), AdaptiveTimesteps()
    restored.load_state_dict(saved.state_dict())
    assert set(saved.state_dict()) == {"num", "den", "density"}
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
    [({"bins": 0}, "bins is 0"), ({"rho": 1.0}, r"rho is 1\.0"), ({"floor": 0.0}, r"floor is 0\.0")],
)
def test_arguments_that_cannot_work_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        AdaptiveTimesteps(**arguments)
