"""The table, the figure and the verdicts of a study, from the JSON of its cells.

In: a study's rows with what the paper printed, and cells' results. Out: table.md; figures as .png and .pdf.
Paper: Tables 1, 2 and 4-7; Fig. 3 and 4.

A verdict compares two rows of one block whose order the paper's numbers settle, by two deviations. Ours settle it by
two deviations over training seeds; where no cell has several seeds, over drawn texts, which is said.
"""

import math
import statistics
from itertools import combinations, product
from pathlib import Path
from typing import Any, NamedTuple

from matplotlib.figure import Figure

from ldlm._files import visible, write_atomically
from ldlm.evaluation.plots import Noised, decoder_noise, interpolation, save
from ldlm.plots import loss_curves, side_by_side

# Column: heading, decimals, whether it is printed times 100 as in the paper, whether more is better.
COLUMNS = {
    "perplexity": ("gen. PPL ↓", 1, False, False),
    "mauve": ("MAUVE ↑", 1, True, True),
    "diversity": ("div. ↑", 1, True, True),
    "entropy": ("entropy ↑", 2, False, True),
    "accuracy": ("reconstruction ↑", 1, True, True),
}
JUDGED = ("perplexity", "mauve")
APART = 2.0  # deviations of a difference from which it counts
PRECISIONS = {"bf16": "bfloat16", "32": "float32"}
COLLAPSED = 0.7  # of real texts' entropy; the paper's collapsed row, sigma_dec 4, has 0.51, its next lowest 0.73


class Value(NamedTuple):
    """A number, its deviation over training seeds (over draws of texts if there is one), and how many seeds."""

    mean: float
    deviation: float
    seeds: int


def measure(results: list[dict[str, Any]], name: str) -> Value | None:
    """One metric of one cell over its seeds; None if no result has it."""
    draws: list[list[float]] = []
    for result in results:
        if name == "accuracy":
            values = [result["validation"].get("validation/accuracy")]
        else:
            values = result["scores"].get(name, {}).get("per_seed", [])
        factor = 100 if COLUMNS[name][2] else 1
        known = [factor * value for value in values if value is not None]
        if known:
            draws.append(known)
    if not draws:
        return None
    means = [statistics.fmean(values) for values in draws]
    spread = means if len(means) > 1 else draws[0]
    return Value(statistics.fmean(means), statistics.stdev(spread) if len(spread) > 1 else 0.0, len(means))


def by_cell(results: list[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """Results of each cell, one a seed."""
    cells: dict[str, list[dict[str, Any]]] = {}
    for result in results:
        cells.setdefault(result["cell"], []).append(result)
    return cells


def noise(cells: dict[str, list[dict[str, Any]]], name: str) -> tuple[float, bool]:
    """The relative deviation of one cell's number, pooled over cells, and whether it is over training seeds.

    It is relative because perplexities of 100 and 1,000 do not vary by the same amount. Collapsed cells are left out:
    all their draws are alike.
    """
    real = reference([result for found in cells.values() for result in found]).get("entropy", {}).get("mean")
    values = []
    for found in cells.values():
        value, entropy = measure(found, name), measure(found, "entropy")
        if value is not None and value.mean > 0 and not collapsed(entropy.mean if entropy else None, real):
            values.append(value)
    several = [value for value in values if value.seeds > 1]
    chosen = several or values
    if not chosen:
        return 0.0, False
    return math.sqrt(statistics.fmean((value.deviation / value.mean) ** 2 for value in chosen)), bool(several)


def collapsed(entropy: float | None, real: float | None) -> bool:
    """Whether texts have so little variety that their perplexity says nothing: one word repeated is likely."""
    return entropy is not None and real is not None and entropy < COLLAPSED * real


class Side(NamedTuple):
    """One of two numbers that are compared, and whether its texts have collapsed."""

    value: float
    lost: bool


def first_is_better(name: str, first: Side, second: Side, apart: float) -> bool | None:
    """Which of two is better, the paper's or ours; None if they are equal, or less than that apart.

    A perplexity of collapsed texts is not compared: it counts as worse than one of texts that have not.
    """
    if name == "perplexity" and first.lost != second.lost:
        return second.lost
    if first.value == second.value or abs(first.value - second.value) < apart:
        return None
    return (first.value > second.value) == COLUMNS[name][3]


def verdicts(study: dict[str, Any], results: list[dict[str, Any]]) -> list[str]:
    """One row of a Markdown table for each pair of rows of a block whose order the paper settles."""
    cells, lines = by_cell(results), []
    real = reference(results).get("entropy", {}).get("mean")
    real_paper = study.get("real", {}).get("entropy", [None])[0]

    def printed(row: dict[str, Any], name: str) -> Side:
        return Side(row[name][0], collapsed(row.get("entropy", [None])[0], real_paper))

    def measured(row: dict[str, Any], name: str) -> Side | None:
        found = cells.get(row["cell"], [])
        value, entropy = measure(found, name), measure(found, "entropy")
        return Side(value.mean, collapsed(entropy.mean if entropy else None, real)) if value else None

    for (title, rows), name in product(study["tables"].items(), JUDGED):
        relative, _ = noise(cells, name)
        heading, decimals, _, _ = COLUMNS[name]
        for (one, first), (two, second) in combinations(rows.items(), 2):
            x, y = measured(first, name), measured(second, name)
            if name not in first or name not in second or x is None or y is None:
                continue
            a, b = printed(first, name), printed(second, name)
            paper = first_is_better(name, a, b, APART * math.hypot(first[name][1], second[name][1]))
            if paper is None:
                continue
            here = first_is_better(name, x, y, APART * relative * math.hypot(x.value, y.value))
            word = "within the noise" if here is None else "came out" if here == paper else "reversed"
            if name == "perplexity" and x.lost and y.lost:
                word = "both collapsed"
            order = f"{one} better than {two}" if paper else f"{two} better than {one}"
            theirs = f"{a.value:g}, {b.value:g}"
            ours = ", ".join(f"{side.value:.{decimals}f}{' (collapsed)' if side.lost else ''}" for side in (x, y))
            lines.append(f"| {title} | {heading[:-2]} | {order} | {theirs} | {ours} | **{word}** |")
    return lines


def reference(results: list[dict[str, Any]]) -> dict[str, Any]:
    """The scores of real texts, which are the same in all cells; empty if there are none."""
    return next((found for result in results if (found := result["scores"].get("reference"))), {})


def markdown(study: dict[str, Any], label: str, results: list[dict[str, Any]], failed: dict[str, str]) -> str:
    """The study's table, its verdicts, and the command of each cell."""
    cells = by_cell(results)
    headings = [heading for heading, *_ in COLUMNS.values()]
    printed = [row for rows in study["tables"].values() for row in rows.values()]
    names = [name for name in COLUMNS if any(name in row for row in printed)]
    paper = [f"paper's {COLUMNS[name][0]}" for name in names]
    lines = [
        f"`{label}`: mean ± standard deviation over training seeds, or over draws of texts where there is one seed. "
        f"{sampled(results)}The paper's columns: {study.get('published', '')}. They are of other data, sizes and "
        "scorers, and stand here for their order only.",
        "",
        f"| {' | '.join(['', *headings, 'seeds', *paper])} |",
        f"|---{'|---:' * (len(headings) + 1 + len(paper))}|",
    ]
    if real := reference(results):
        found = [real.get(name, {}).get("mean") for name in COLUMNS]
        texts = [
            "" if value is None else f"{100 * value if times else value:.{decimals}f}"
            for value, (_, decimals, times, _) in zip(found, COLUMNS.values(), strict=True)
        ]
        lines.append(f"| real texts | {' | '.join(texts)} | | {' | '.join([''] * len(paper))} |")
    for title, rows in study["tables"].items():
        lines.append(f"| **{title}** {'|' * (len(headings) + 2 + len(paper))}")
        for row, about in rows.items():
            found = cells.get(about["cell"], [])
            lines.append(f"| {row} | {' | '.join([*ours(found), *theirs(about, names)])} |")
    lines += ["", *(f"* {title} failed: {visible(reason)}" for title, reason in failed.items())]
    judged = verdicts(study, results)
    if judged:
        (relative, over_seeds), (relative_mauve, _) = noise(cells, "perplexity"), noise(cells, "mauve")
        what = "training seeds" if over_seeds else "draws of texts only; another training seed would add to it"
        lines += [
            "Whether the paper's order came out, where the paper's own deviations settle it. Two numbers count as "
            f"different when they are {APART:g} deviations apart; the deviation, {100 * relative:.1f} % of a "
            f"perplexity and {100 * relative_mauve:.0f} % of a MAUVE, is over {what}. Texts whose entropy is below "
            f"{COLLAPSED:g} of real texts' have collapsed, and their perplexity counts as worse than any other.",
            "",
            "| block | metric | the paper's order | its numbers | ours | |",
            "|---|---|---|---|---|---|",
            *judged,
            "",
        ]
    lines += [
        "Each cell, its seed, time, versions and commands. WORK stands for the folder of the cell's files, FROM for "
        "that of the cell it starts from.",
        "",
    ]
    for result in sorted(results, key=lambda result: (result["seed"], result["cell"])):
        total, training = sum(result["seconds"].values()) / 60, result["seconds"]["fit"] / 60
        versions = ", ".join(f"{name} {version}" for name, version in result["versions"].items())
        lines.append(
            f"* {result['cell']}, seed {result['seed']}: {total:.1f} min ({training:.1f} of training) on "
            f"{result['device']}, threads: {result['threads'] or 'all'}; {versions}; "
            + "; ".join(f"`{command}`" for command in result["settings"]["commands"])
        )
    return "\n".join(lines) + "\n"


def sampled(results: list[dict[str, Any]]) -> str:
    """How the texts were sampled, where all were in one way."""
    settings = [result["scores"].get("sampling") for result in results]
    told = {(one["nfe"], one["precision"]) for one in settings if one}
    if len(told) != 1:
        return ""
    ((nfe, precision),) = told
    return f"Texts are sampled in {nfe} calls of the denoiser with weights in {PRECISIONS[precision]}. "


def ours(found: list[dict[str, Any]]) -> list[str]:
    """A row's own numbers, and how many seeds they are of."""
    texts = []
    for name, (_, decimals, _, _) in COLUMNS.items():
        value = measure(found, name)
        deviation = f" ± {value.deviation:.{decimals}f}" if value is not None and value.deviation else ""
        texts.append("" if value is None else f"{value.mean:.{decimals}f}{deviation}")
    draws = len(found[0]["scores"]["perplexity"]["per_seed"]) if found else 0
    return [*texts, "not run" if not found else str(len(found)) if len(found) > 1 else f"1 ({draws} draws)"]


def theirs(about: dict[str, Any], names: list[str]) -> list[str]:
    """What the paper printed for a row."""
    return [f"{about[name][0]:g} ± {about[name][1]:g}" if name in about else "" for name in names]


def figures(study: dict[str, Any], results: list[dict[str, Any]]) -> dict[str, Figure]:
    """The study's figures by file name: perplexities beside the paper's, and those of Fig. 3 and 4 that it asks for."""
    cells, real = by_cell(results), reference(results).get("entropy", {}).get("mean")
    real_paper = study.get("real", {}).get("entropy", [None])[0]
    labels: list[str] = []
    here: list[tuple[float, float] | None] = []
    paper: list[tuple[float, float] | None] = []
    lost: tuple[list[bool], list[bool]] = ([], [])
    for title, rows in study["tables"].items():
        for row, about in [(f"{title}:", {}), *rows.items()]:
            found = cells.get(about.get("cell", ""), [])
            value, entropy = measure(found, "perplexity"), measure(found, "entropy")
            labels.append(row)
            here.append((value.mean, value.deviation) if value else None)
            paper.append(tuple(about["perplexity"]) if "perplexity" in about else None)
            lost[0].append(collapsed(entropy.mean if entropy else None, real))
            lost[1].append(collapsed(about.get("entropy", [None])[0], real_paper))
    titles = ("here (hollow: collapsed)", "paper (other data and sizes)")
    found_figures = {"figure": side_by_side(labels, here, paper, "generative perplexity", titles, lost)}
    curves = {row: cells[cell][0]["curves"] for row, cell in study.get("curves", {}).items() if cell in cells}
    if curves:
        panels = {
            "diffusion": "diffusion loss (MSE per element)",
            "reconstruction": "hidden-state loss (MSE per element)",
        }
        found_figures["curves"] = loss_curves(curves, panels | {"latent_std": "standard deviation of z0"})
    scorers = [result["scores"]["scorer"]["name"] for result in results if "scorer" in result["scores"]]
    scorer = Path(scorers[0]).name.removesuffix(".gguf") if scorers else ""
    paths = {row: path(cells[cell]) for row, cell in study.get("paths", {}).items() if cell in cells}
    measured = {row: found for row, found in paths.items() if found is not None}
    if measured:
        found_figures["paths"] = interpolation(measured, scorer)
    points = {float(sigma): noised(cells[cell]) for sigma, cell in study.get("noise", {}).items() if cell in cells}
    if any(value is not None for point in points.values() for value in point):
        found_figures["noise"] = decoder_noise(points, scorer)
    return found_figures


def path(found: list[dict[str, Any]]) -> dict[str, list[float]] | None:
    """A cell's perplexities between two texts, averaged over seeds; None if they were not measured."""
    models = [model for result in found for model in result["scores"].get("measurements", {}).values()]
    if not models:
        return None
    paths = [model["interpolation"] for model in models]
    columns = zip(*(each["perplexity"] for each in paths), strict=True)
    return {"a": paths[0]["a"], "perplexity": [statistics.fmean(column) for column in columns]}


def noised(found: list[dict[str, Any]]) -> Noised:
    """A cell as a point of Fig. 4, averaged over seeds."""

    def mean(values: list[float | None]) -> float | None:
        known = [value for value in values if value is not None]
        return statistics.fmean(known) if known else None

    validation = [result["validation"] for result in found]
    curves = [result["curves"].get("latent_std") for result in found]
    between = path(found)
    return Noised(
        mean([each.get("validation/diffusion") for each in validation]),
        mean([curve[-1][1] if curve else None for curve in curves]),
        mean([each.get("validation/reconstruction") for each in validation]),
        mean([each.get("validation/accuracy") for each in validation]),
        between["perplexity"][between["a"].index(0.5)] if between else None,
    )


def write_summary(
    study: dict[str, Any], label: str, results: list[dict[str, Any]], failed: dict[str, str], output: Path
) -> None:
    """Write table.md and the figures into the study's folder."""
    with write_atomically(output / "table.md") as file:
        file.write(markdown(study, label, results, failed).encode())
    if not results:
        return
    save(figures(study, results), output)
