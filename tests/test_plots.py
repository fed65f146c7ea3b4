"""Figures hold the numbers they were given."""

import numpy as np
import pytest

from ldlm.evaluation.plots import Point, frontier, interpolation, reconstruction, spectrum
from ldlm.plots import gamma_curve, loss_over_time


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


def test_the_frontier_joins_points_by_calls_and_grows_them_with_time():
    ours = {"a": [Point(4.1, 90, 8, 0.1), Point(4.2, 60, 16, 0.2), Point(4.3, 50, 32, 0.4)], "b.txt": [Point(4, 70)]}
    figure = frontier(ours, Point(4.4, 30))
    (axes,) = figure.axes
    lines = {line.get_label(): line for line in axes.lines}
    np.testing.assert_array_equal(lines["a"].get_xydata(), [[4.1, 90], [4.2, 60], [4.3, 50]])
    np.testing.assert_array_equal(lines["real text"].get_xydata(), [[4.4, 30]])
    assert lines["real text"].get_marker() == "*"
    areas = np.array([discs.get_sizes()[0] for discs in axes.collections])
    np.testing.assert_allclose(np.diff(areas[:3]), [1, 2] * np.diff(areas[:2]))  # linear in the time
    assert areas[3] < areas[0]  # nobody knows its time: an open circle, smaller than any
    assert axes.collections[3].get_facecolor()[0, :3].tolist() == [1, 1, 1]
    assert [text.get_text() for text in axes.texts] == ["8", "16", "32"]
    assert axes.get_yscale() == "log"
    assert axes.get_xlabel() == "unigram entropy (nats)"
    named = [text.get_text() for text in figure.legends[0].get_texts()]
    assert {"a", "b.txt", "real text", "time per text", "0.04 s", "0.4 s", "unknown time"} <= set(named)
    assert not any("published" in name for name in named)


def test_other_peoples_points_are_grey_and_named_as_such():
    theirs = {"MDLM": [Point(5.7, 197, 32), Point(5.6, 142, 64)]}
    figure = frontier({"a": [Point(5.1, 90, 8, 0.1)]}, None, theirs, Point(5.4, 14.6), settings="gpt2-large")
    lines = {line.get_label(): line for line in figure.axes[0].lines}
    np.testing.assert_array_equal(lines["MDLM"].get_xydata(), [[5.7, 197], [5.6, 142]])
    assert 0 < float(lines["MDLM"].get_color()) < 1  # a shade of grey
    assert lines["a"].get_color() == "C0"
    named = [text.get_text() for text in figure.legends[0].get_texts()]
    assert named.index("a") < named.index("published elsewhere, gpt2-large") < named.index("MDLM")


def test_measurements_are_drawn_as_they_were_found():
    path = {"a": [0, 0.5, 1], "perplexity": [50, 90, 50]}
    (axes,) = interpolation({"one": path, "two": path}).axes
    np.testing.assert_array_equal(axes.lines[1].get_xydata(), [[0, 50], [0.5, 90], [1, 50]])
    assert axes.get_legend_handles_labels()[1] == ["one", "two"]
    (axes,) = reconstruction({"one": {"noise": [0, 2], "accuracy": [0.9, 0.4]}}, {"one": 1.5}).axes
    np.testing.assert_array_equal(axes.lines[0].get_xydata(), [[0, 0.9], [2, 0.4]])
    assert list(axes.lines[1].get_xdata()) == [1.5, 1.5]
    left, right = spectrum({"one": {"eigenvalues": [0.7, 0.3], "std": [2, 1], "dimensions": 1.72}}).axes
    np.testing.assert_array_equal(left.lines[0].get_xydata(), [[1, 0.7], [2, 0.3]])
    np.testing.assert_array_equal(right.lines[0].get_xydata(), [[1, 2], [2, 1]])
    assert left.get_legend_handles_labels()[1] == ["one: 1.7 effective dimensions"]
