"""Where a sampler looks: grids fall from 1 to t_min, and are even in what they say they are even in."""

import pytest
import torch
from helpers.grids import ADAPTED, GRIDS, SCHEDULE, adapted

from ldlm.diffusion.grids import AdaptedGrid, LogSNRGrid, MixedGrid, TimeGrid, UniformGrid


@pytest.mark.parametrize("grid", GRIDS)
def test_every_grid_falls_strictly_from_exactly_1_to_exactly_t_min(grid: TimeGrid):
    for nfe in (*range(1, 40), 100, 333, 1024):
        times = grid.times(nfe, SCHEDULE, ADAPTED)
        assert times.shape == (nfe + 1,)
        assert times.dtype == torch.float64
        assert (times[0], times[-1]) == (1, grid.t_min)
        assert (times.diff() < 0).all()
        assert (times.float().diff() < 0).all()


def test_the_log_snr_grid_is_even_in_log_snr_after_its_first_step():
    times = LogSNRGrid(t_max=0.99, t_min=0.02).times(8, SCHEDULE)
    assert times[1].item() == pytest.approx(0.99, abs=1e-12)
    steps = SCHEDULE.log_snr(times[1:]).diff()
    torch.testing.assert_close(steps, steps.mean().expand(7), rtol=1e-9, atol=0)


def test_the_adapted_grid_is_even_in_the_adapted_time():
    # F(u) = u⁴ but for the floor and the width of a bin, so the grid is the fourth root of an even one
    times = AdaptedGrid(t_min=0.3).times(10, SCHEDULE, adapted(4))
    want = torch.linspace(1, 0.3**4, 11, dtype=torch.float64) ** 0.25
    torch.testing.assert_close(times, want, rtol=0, atol=4e-3)


@pytest.mark.parametrize("weight", [0.0, 0.25, 1.0])
def test_a_mixed_grid_has_as_many_times_in_a_stretch_as_its_two_grids_weighted(weight):
    first, second = UniformGrid(), LogSNRGrid()
    mixed = MixedGrid(first, second, weight).times(1000, SCHEDULE, ADAPTED)
    for low in (0.05, 0.3, 0.7, 0.95):
        counts = [(grid.times(1000, SCHEDULE, ADAPTED) > low).sum().item() for grid in (first, second)]
        assert (mixed > low).sum().item() == pytest.approx(weight * counts[0] + (1 - weight) * counts[1], abs=2)


@pytest.mark.parametrize("nfe", [0, -3])
@pytest.mark.parametrize("grid", GRIDS)
def test_less_than_one_call_is_refused(grid, nfe):
    with pytest.raises(ValueError, match=f"nfe is {nfe}, "):
        grid.times(nfe, SCHEDULE, ADAPTED)


@pytest.mark.parametrize(
    ("grid", "message"),
    [
        (lambda: UniformGrid(t_min=0.0), r"t_min is 0\.0"),
        (lambda: LogSNRGrid(t_max=1.0), r"t_max is 1\.0"),
        (lambda: LogSNRGrid(t_max=0.1, t_min=0.2), r"t_max is 0\.1"),
        (lambda: MixedGrid(UniformGrid(), UniformGrid(), weight=1.5), r"weight is 1\.5"),
    ],
)
def test_arguments_that_cannot_work_are_refused(grid, message):
    with pytest.raises(ValueError, match=message):
        grid()
