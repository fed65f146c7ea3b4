"""Figures from plain numbers.

In: lists or CPU tensors. Out: matplotlib figures, to be saved or logged.
Paper: Fig. 5 (loss against t and against the adapted time), Fig. 6 (gamma against the step).
"""

from collections.abc import Mapping, Sequence

from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator

from ldlm._files import visible

SIZE = (4.2, 3.2)  # inches a panel


def drawn(name: str) -> str:
    r"""A name as matplotlib's text: dollars begin no formula, and a leading underscore hides it from no legend.

    >>> print(drawn("_a$b$.jsonl"))
     _a\$b\$.jsonl
    """
    text = visible(name).replace("$", r"\$")
    return f" {text}" if text.startswith("_") else text


def loss_over_time(u: Sequence[float], adapted: Sequence[float], loss: Sequence[float]) -> Figure:
    """Denoising loss against schedule time u and against adapted time F(u): Fig. 5.

    With timesteps that have adapted, the second panel is close to a straight line.

    Args:
        u: Schedule times, rising.
        adapted: F(u) of each.
        loss: Mean squared error per element at each.
    """
    figure = Figure(figsize=(2 * SIZE[0], SIZE[1]), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    left.plot(u, loss)
    left.set(xlabel="schedule time u", ylabel="diffusion loss (MSE per element)", xlim=(0, 1))
    right.plot(adapted, loss)
    if len(loss) > 1:
        right.plot(
            [adapted[0], adapted[-1]], [loss[0], loss[-1]], color="grey", linestyle="--", linewidth=1, label="linear"
        )
        right.legend(frameon=False)
    right.set(xlabel="adapted time F(u)", xlim=(0, 1))
    for axes in (left, right):
        axes.grid(alpha=0.3)
    return figure


def gamma_curve(steps: Sequence[int], gamma: Sequence[float], now: int | None = None) -> Figure:
    """Diffusion-to-encoder coefficient against the optimizer step: Fig. 6.

    Args:
        steps: Optimizer steps.
        gamma: Coefficient at each.
        now: Where the run is.
    """
    figure = Figure(figsize=SIZE, layout="constrained")
    axes = figure.subplots()
    axes.plot(steps, gamma)
    if now is not None:
        axes.axvline(now, color="grey", linestyle="--", linewidth=1, label="now")
        axes.legend(frameon=False)
    axes.set(xlabel="optimizer step s", ylabel="γ(s)", ylim=(-0.02, 1.05))
    axes.grid(alpha=0.3)
    return figure


def side_by_side(
    labels: Sequence[str],
    here: Sequence[tuple[float, float] | None],
    paper: Sequence[tuple[float, float] | None],
    quantity: str,
    titles: tuple[str, str],
    hollow: tuple[Sequence[bool], Sequence[bool]] = ((), ()),
) -> Figure:
    """Two panels of points with error bars, a row a label, the second of published numbers: they share no axis.

    Args:
        labels: One a row, from the top; a label without points is a heading.
        here: (mean, deviation) of each, None for no point.
        paper: Likewise.
        quantity: What both axes show, on a logarithmic scale.
        titles: Of the panels.
        hollow: For each panel, which points are drawn hollow; none if empty.
    """
    figure = Figure(figsize=(2.2 * SIZE[0], 0.8 + 0.26 * len(labels)), layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    colors = ("tab:blue", "tab:grey")
    for axes, values, title, color, open_ones in zip(panels, (here, paper), titles, colors, hollow, strict=True):
        for y, value in enumerate(values):
            if value is not None:
                inside = "none" if open_ones and open_ones[y] else color
                axes.errorbar(value[0], y, xerr=value[1], fmt="o", markersize=5, capsize=2, color=color, mfc=inside)
        axes.set(xlabel=quantity, title=title, xscale="log")
        axes.xaxis.set_major_formatter("{x:g}")
        axes.xaxis.set_minor_locator(LogLocator(subs=(2, 5)))
        axes.xaxis.set_minor_formatter("{x:g}")
        axes.tick_params(axis="x", which="both", labelsize=8, rotation=45)
        axes.grid(alpha=0.3, which="both")
    panels[0].set_yticks(range(len(labels)), [drawn(label) for label in labels])
    panels[0].set_ylim(len(labels) - 0.5, -0.5)
    for text in panels[0].get_yticklabels():
        if text.get_text().endswith(":"):
            text.set_fontweight("bold")
    return figure


def loss_curves(curves: Mapping[str, Mapping[str, Sequence[Sequence[float]]]], panels: Mapping[str, str]) -> Figure:
    """Quantities against the optimizer step, a line a run: Fig. 3, middle and right.

    Args:
        curves: For each run, points [step, value] of each quantity.
        panels: Quantities to draw, with their axis labels.
    """
    figure = Figure(figsize=(len(panels) * SIZE[0], 1.2 * SIZE[1]), layout="constrained")
    for axes, (name, label) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels.items(), strict=True):
        for run, quantities in curves.items():
            if points := quantities.get(name):
                axes.plot(*zip(*points, strict=True), label=drawn(run), linewidth=1.2)
        axes.set(xlabel="optimizer step s", ylabel=label, ylim=(0, None))
        axes.grid(alpha=0.3)
    if figure.axes[0].lines:
        figure.axes[0].legend(frameon=False, fontsize=8)
    return figure
