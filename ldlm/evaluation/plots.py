"""Figures of what `ldlm evaluate` finds, and of a study over the decoder noise.

In: plain numbers. Out: matplotlib figures; files of them.
Paper: Fig. 1 (quality against diversity), Fig. 3 left and Fig. 4. Fig. 5 is `ldlm.plots.loss_over_time`. What looks
closer at one model, `reconstruction` and `spectrum`, has no figure there.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator

from ldlm._files import write_atomically
from ldlm.plots import SIZE, drawn

SUFFIXES = (".png", ".pdf")
AREA = (25.0, 260.0)  # of markers in square points: of no time at all, and of the longest
MARKERS = "os^Dv<>ph*"


class Point(NamedTuple):
    """One set of texts.

    Attributes:
        entropy: Of unigrams, in nats.
        perplexity: Generative.
        nfe: Calls of the denoiser; None where nobody knows.
        seconds: Of sampling one text; None where nobody knows.
    """

    entropy: float
    perplexity: float
    nfe: int | None = None
    seconds: float | None = None


def frontier(
    lines: Mapping[str, Sequence[Point]],
    real: Point | None = None,
    published: Mapping[str, Sequence[Point]] | None = None,
    published_real: Point | None = None,
    scorer: str = "",
    settings: str = "",
) -> Figure:
    """Generative perplexity against unigram entropy: Fig. 1. Down and to the right is better.

    Args:
        lines: Points of each source, joined in their order, with NFE beside them; areas grow with the time per text.
        real: Real text, a star.
        published: Other people's points, grey and named as such.
        published_real: Their real text.
        scorer: Whose perplexity it is.
        settings: What other people's points were measured with.
    """
    figure = Figure(figsize=(2.1 * SIZE[0], 1.5 * SIZE[1]), layout="constrained")
    axes = figure.subplots()
    longest = max([point.seconds or 0.0 for points in lines.values() for point in points], default=0.0)
    theirs = [_grey(axes, name, points, place) for place, (name, points) in enumerate((published or {}).items())]
    if published_real is not None:
        theirs.append(_star(axes, published_real, "real text", "lightgrey"))
    ours = []
    for place, (name, points) in enumerate(lines.items()):
        color = f"C{place}"
        ours += axes.plot(*_columns(points), color=color, linewidth=1.2, label=drawn(name), marker=".", zorder=3)
        for point in points:
            face = color if point.seconds is not None else "white"
            area = _area(point.seconds or 0.0, longest)
            axes.scatter(*point[:2], s=area, facecolor=face, edgecolor=color, alpha=0.75, zorder=4)
            if point.nfe is not None:
                beside = (0.4 * area**0.5 + 2,) * 2
                label = axes.annotate(f"{point.nfe}", point[:2], beside, textcoords="offset points", fontsize=8)
                label.set_zorder(6)  # above the next marker, which may be near
    if real is not None:
        ours.append(_star(axes, real, "real text", "gold"))
    axes.set(xlabel="unigram entropy (nats)", ylabel=_perplexity(scorer))
    axes.margins(0.08, 0.1)
    _logarithmic(axes)
    entries = [_heading("here; numbers: NFE"), *ours]
    if longest > 0:
        entries += [_heading(""), _heading("time per text")]
        entries += [_disc(_area(part * longest, longest), f"{part * longest:.2g} s") for part in (0.1, 0.5, 1)]
    if _unknown(lines):
        entries.append(_disc(AREA[0], "unknown time", "white"))
    if theirs:
        entries += [_heading(""), _heading(f"published elsewhere{f', {settings}' if settings else ''}"), *theirs]
    figure.legend(handles=entries, loc="outside right upper", frameon=False, fontsize=8, labelspacing=0.8)
    return figure


def _columns(points: Sequence[Point]) -> tuple[list[float], list[float]]:
    return [point.entropy for point in points], [point.perplexity for point in points]


def _area(seconds: float, longest: float) -> float:
    return AREA[0] + (AREA[1] - AREA[0]) * seconds / longest if longest else AREA[0]


def _unknown(lines: Mapping[str, Sequence[Point]]) -> bool:
    return any(point.seconds is None for points in lines.values() for point in points)


def _disc(area: float, label: str, face: str = "grey") -> Line2D:
    disc = Line2D([], [], linestyle="", marker="o", markersize=area**0.5, label=label)
    disc.set(markerfacecolor=face, markeredgecolor="grey")
    return disc


def _grey(axes: Axes, name: str, points: Sequence[Point], place: int) -> Line2D:
    shade, marker = f"{0.45 + 0.05 * (place % 8)}", MARKERS[place % len(MARKERS)]
    return axes.plot(*_columns(points), color=shade, marker=marker, markersize=4, linewidth=0.8, label=drawn(name))[0]


def _star(axes: Axes, point: Point, label: str, face: str) -> Line2D:
    star = axes.plot(*point[:2], linestyle="", marker="*", markersize=15, label=label, zorder=5)[0]
    star.set(markerfacecolor=face, markeredgecolor="black" if face == "gold" else "grey")
    return star


def _heading(text: str) -> Line2D:
    return Line2D([], [], linestyle="", label=text)


def _perplexity(scorer: str) -> str:
    return f"generative perplexity{f'{chr(10)}({drawn(scorer)})' if scorer else ''}"


def _logarithmic(axes: Axes) -> None:
    axes.set_yscale("log")
    low, high = axes.get_ylim()
    # Within less than a decade powers of ten would leave the axis without numbers.
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)) if high / low > 8 else MaxNLocator(6))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter("{x:g}")
    axes.grid(alpha=0.3)


def interpolation(curves: Mapping[str, Mapping[str, Sequence[float]]], scorer: str = "") -> Figure:
    """Perplexity of texts decoded between two latents: Fig. 3 left. A flat line is a smooth space.

    Args:
        curves: For each model, ``a`` and ``perplexity``.
        scorer: Whose perplexity it is.
    """
    figure = Figure(figsize=(1.3 * SIZE[0], 1.2 * SIZE[1]), layout="constrained")
    axes = figure.subplots()
    for name, curve in curves.items():
        axes.plot(curve["a"], curve["perplexity"], marker=".", label=drawn(name))
    axes.set(xlabel="a, of the decoded (1 − a) z₁ + a z₂", ylabel=_perplexity(scorer), xlim=(-0.02, 1.02))
    _logarithmic(axes)
    return _named(figure, curves)


def reconstruction(curves: Mapping[str, Mapping[str, Sequence[float]]], trained: Mapping[str, float]) -> Figure:
    """Share of tokens that come back from latents with more and more noise, of models as they are.

    Fig. 4 middle is `decoder_noise`'s: there each point is another training.

    Args:
        curves: For each model, ``noise`` and ``accuracy``.
        trained: The noise that its decoders were trained with, a dashed line.
    """
    figure = Figure(figsize=(1.3 * SIZE[0], 1.2 * SIZE[1]), layout="constrained")
    axes = figure.subplots()
    for place, (name, curve) in enumerate(curves.items()):
        axes.plot(curve["noise"], curve["accuracy"], marker=".", color=f"C{place}", label=drawn(name))
        axes.axvline(trained[name], color=f"C{place}", linestyle="--", linewidth=1)
    label = "deviation of the noise added to latents\n(dashed: $\\sigma_\\mathrm{dec}$, as trained)"
    axes.set(xlabel=label, ylabel="tokens that come back (share)", ylim=(0, 1.02))
    axes.grid(alpha=0.3)
    return _named(figure, curves)


def spectrum(spectra: Mapping[str, Mapping[str, Any]]) -> Figure:
    """Eigenvalues of the latents' covariance, and the deviation of each coordinate, whose mean Fig. 4 left has.

    Args:
        spectra: For each model, ``eigenvalues`` and ``std``, falling, and ``dimensions``.
    """
    figure = Figure(figsize=(2.2 * SIZE[0], 1.2 * SIZE[1]), layout="constrained")
    left, right = figure.subplots(1, 2)
    for name, values in spectra.items():
        ranks = range(1, len(values["std"]) + 1)
        left.plot(ranks, values["eigenvalues"], label=f"{drawn(name)}: {values['dimensions']:.1f} effective dimensions")
        right.plot(ranks, values["std"])
    left.set(xlabel="eigenvalue, by size", ylabel="share of the variance", yscale="log")
    right.set(xlabel="latent coordinate, by size", ylabel="standard deviation", ylim=(0, None))
    left.legend(frameon=False, fontsize=8)
    for axes in (left, right):
        axes.grid(alpha=0.3)
    return figure


class Noised(NamedTuple):
    """What a training with one sigma_dec came to; None for what was not measured.

    Attributes:
        diffusion: Diffusion loss on held-out rows, mean squared error per element.
        deviation: Standard deviation of z0 over rows and positions, averaged over coordinates.
        reconstruction: Hidden-state loss on held-out rows under the noise, mean squared error per element.
        accuracy: Share of held-out tokens that come back from latents without noise.
        between: Generative perplexity of the decoded means of two latents of real texts.
    """

    diffusion: float | None
    deviation: float | None
    reconstruction: float | None
    accuracy: float | None
    between: float | None


def decoder_noise(points: Mapping[float, Noised], scorer: str = "") -> Figure:
    """What the decoder noise does to a model, each point another training: Fig. 4.

    Left: diffusion loss and deviation of the latents. Middle: hidden-state loss and reconstruction. Right, if anybody
    measured it: perplexity half-way between two texts, which is low where the latent space is smooth.

    Args:
        points: By sigma_dec.
        scorer: Whose perplexity it is.
    """
    sigmas = sorted(points)

    def known(name: str) -> list[tuple[float, float]]:
        values = ((sigma, points[sigma]._asdict()[name]) for sigma in sigmas)
        return [(sigma, value) for sigma, value in values if value is not None]

    panels = [
        {"diffusion": "diffusion loss (MSE per element)", "deviation": "standard deviation of z0"},
        {"reconstruction": "hidden-state loss (MSE per element)", "accuracy": "tokens that come back (share)"},
        {"between": f"half-way between two texts:\n{_perplexity(scorer)}"},
    ]
    drawn = [found for panel in panels if (found := {name: label for name, label in panel.items() if known(name)})]
    figure = Figure(figsize=(1.2 * len(drawn) * SIZE[0], 1.2 * SIZE[1]), layout="constrained")
    for axes, panel in zip(figure.subplots(1, len(drawn), squeeze=False)[0], drawn, strict=True):
        axes.set(xlabel="decoder noise $\\sigma_\\mathrm{dec}$")
        axes.grid(alpha=0.3)
        for place, (name, label) in enumerate(panel.items()):
            side = axes.twinx() if place else axes
            side.plot(*zip(*known(name), strict=True), color=f"C{place}", marker="o")
            side.set_ylabel(label, color=f"C{place}")
    return figure


def _named(figure: Figure, curves: Mapping[str, Any]) -> Figure:
    """With a legend, if there is something to tell apart."""
    if len(curves) > 1:
        figure.axes[0].legend(frameon=False, fontsize=8)
    return figure


def save(figures: Mapping[str, Figure], folder: Path) -> None:
    """Write each figure as NAME.png and NAME.pdf."""
    for name, figure in figures.items():
        for suffix in SUFFIXES:
            with write_atomically(folder / f"{name}{suffix}") as file:
                figure.savefig(file, format=suffix[1:], dpi=160)
