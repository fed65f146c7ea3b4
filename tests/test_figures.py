"""Figures hold the numbers they were given."""

import numpy as np
import pytest

from ldlm.figures import gamma_curve, loss_over_time


def test_the_loss_is_drawn_against_both_times_with_a_straight_line_beside_the_second():
    u, adapted, loss = [0.1, 0.5, 0.9], [0.3, 0.6, 0.95], [0.2, 0.5, 1.5]
    left, right = loss_over_time(u, adapted, loss).axes
    np.testing.assert_array_equal(left.lines[0].get_xydata(), np.stack([u, loss], 1))
    np.testing.assert_array_equal(right.lines[0].get_xydata(), np.stack([adapted, loss], 1))
    np.testing.assert_array_equal(right.lines[1].get_xydata(), [[0.3, 0.2], [0.95, 1.5]])
    assert left.get_xlabel() == "schedule time u"
    assert right.get_xlabel() == "adapted time F(u)"
    assert left.get_ylabel() == "diffusion loss (MSE per element)"
    assert right.get_legend_handles_labels()[1] == ["linear"]


def test_a_single_point_has_no_line_beside_it():
    left, right = loss_over_time([0.5], [0.5], [1.0]).axes
    assert [len(axes.lines) for axes in (left, right)] == [1, 1]


@pytest.mark.parametrize("now", [None, 7])
def test_the_warm_up_curve_shows_where_the_run_is(now):
    steps, gamma = [0, 5, 10], [0.0, 0.2, 1.0]
    (axes,) = gamma_curve(steps, gamma, now).axes
    np.testing.assert_array_equal(axes.lines[0].get_xydata(), np.stack([steps, gamma], 1))
    assert [list(line.get_xdata()) for line in axes.lines[1:]] == ([] if now is None else [[7, 7]])
    assert axes.get_xlabel() == "optimizer step s"
