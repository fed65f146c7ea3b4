"""Noise schedules: the published values, the derivatives they stand for, and exact ends."""

import math

import pytest
import torch

from ldlm.diffusion.schedules import CosineSchedule, NoiseSchedule, TangentSchedule

SCHEDULES = [TangentSchedule(), TangentSchedule(d=9.0), CosineSchedule()]

# (d, t, alpha, sigma, beta), computed by others from TEncDM's code
FIXTURES = [
    (3.0, 0.01, 0.99889, 0.04708, 0.4433),
    (3.0, 0.1, 0.90322, 0.42917, 3.7450),
    (3.0, 0.5, 0.31623, 0.94868, 5.6549),
    (3.0, 0.9, 0.05272, 0.99861, 20.2763),
    (9.0, 0.01, 0.99015, 0.13999, 3.9201),
    (9.0, 0.1, 0.57430, 0.81864, 13.6266),
    (9.0, 0.5, 0.11043, 0.99388, 6.2066),
    (9.0, 0.9, 0.01760, 0.99985, 20.3265),
]


@pytest.mark.parametrize(("d", "t", "alpha", "sigma", "beta"), FIXTURES)
def test_the_tangent_schedule_gives_the_published_values(d, t, alpha, sigma, beta):
    schedule, time = TangentSchedule(d), torch.tensor(t)
    assert schedule.alpha(time).item() == pytest.approx(alpha, abs=6e-6)
    assert schedule.sigma(time).item() == pytest.approx(sigma, abs=6e-6)
    assert schedule.beta(time).item() == pytest.approx(beta, abs=6e-5)
    assert schedule.log_snr(time).item() == pytest.approx(-2 * math.log(d * math.tan(math.pi * t / 2)), abs=1e-5)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_beta_is_minus_twice_the_slope_of_log_alpha(schedule: NoiseSchedule):
    t = torch.linspace(0.001, 0.999, 99, dtype=torch.float64, requires_grad=True)
    (slope,) = torch.autograd.grad(schedule.alpha(t).log().sum(), t)
    torch.testing.assert_close(schedule.beta(t), -2 * slope, rtol=1e-10, atol=0)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_the_slope_of_the_log_snr_is_minus_beta_over_sigma_squared(schedule: NoiseSchedule):
    t = torch.linspace(0.001, 0.999, 99, dtype=torch.float64, requires_grad=True)
    (slope,) = torch.autograd.grad(schedule.log_snr(t).sum(), t)
    torch.testing.assert_close(-schedule.beta(t) / schedule.sigma(t) ** 2, slope, rtol=1e-10, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_the_ends_are_exact(schedule: NoiseSchedule, dtype: torch.dtype):
    zero, one = torch.zeros(2, 3, dtype=dtype), torch.ones(2, 3, dtype=dtype)
    for got, want in [
        (schedule.alpha(zero), one),
        (schedule.sigma(zero), zero),
        (schedule.beta(zero), zero),
        (schedule.log_snr(zero), one * math.inf),
        (schedule.alpha(one), zero),
        (schedule.sigma(one), one),
        (schedule.beta(one), one * math.inf),
        (schedule.log_snr(one), -one * math.inf),
        (schedule.time_at(-one * math.inf), one),
        (schedule.time_at(one * math.inf), zero),
    ]:
        assert torch.equal(got, want)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_the_variance_is_preserved(schedule: NoiseSchedule):
    t = torch.linspace(0, 1, 1001, dtype=torch.float64)
    torch.testing.assert_close(schedule.alpha(t) ** 2 + schedule.sigma(t) ** 2, torch.ones_like(t), rtol=0, atol=1e-15)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_time_at_inverts_the_log_snr(schedule: NoiseSchedule):
    t = torch.linspace(0.001, 0.9999, 500, dtype=torch.float64)
    torch.testing.assert_close(schedule.time_at(schedule.log_snr(t)), t, rtol=1e-12, atol=0)


def test_the_cosine_schedule_is_the_tangent_schedule_with_d_1():
    t = torch.linspace(0.01, 0.99, 99, dtype=torch.float64)
    for got, want in zip(CosineSchedule().levels(t), TangentSchedule(1.0).levels(t), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-13, atol=0)
    torch.testing.assert_close(CosineSchedule().alpha(t), torch.cos(math.pi * t / 2))


def test_float32_times_near_1_are_computed_in_float64():
    t = torch.tensor([1 - 2**-20])
    c = math.sin(math.pi / 2 * 2**-20)
    assert TangentSchedule(3.0).alpha(t).item() == pytest.approx(c / 3, rel=1e-6)
    assert TangentSchedule(3.0).alpha(t).dtype == torch.float32
    assert TangentSchedule(3.0).sigma(t.bfloat16()).dtype == torch.float32


@pytest.mark.parametrize("d", [0.0, -1.0, math.inf, math.nan])
def test_a_tangent_schedule_without_a_positive_d_is_refused(d):
    with pytest.raises(ValueError, match=r"^d is .* such as 3\.0"):
        TangentSchedule(d)
