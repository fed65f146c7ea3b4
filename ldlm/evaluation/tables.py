"""The results of a sweep, to be looked at: a table, figures, and other people's rows beside one's own.

In: runs as `evaluate.py` writes them down. Out: a table for the terminal; matplotlib figures by name.
Paper: Tables 8 and 9, whose numbers are in ``published.yaml``; Fig. 1, Fig. 3 left and Fig. 5.
"""

import math
from importlib.resources import files
from pathlib import Path
from typing import Any

import yaml
from matplotlib.figure import Figure
from rich.box import SIMPLE
from rich.table import Table
from rich.text import Text

from ldlm._files import visible
from ldlm.evaluation.plots import Point, frontier, interpolation, reconstruction, spectrum
from ldlm.evaluation.report import warnings
from ldlm.plots import drawn, loss_over_time

Scores = dict[str, Any]
COLUMNS = ("perplexity", "entropy", "diversity", "mauve", "memorisation")
REAL = "real text"
# What the figures are called in a report.
CAPTIONS = {
    "frontier": "Quality against diversity over numbers of denoiser calls; down and to the right is better",
    "interpolation": "Perplexity of texts decoded between the latents of two real texts; flat is smooth",
    "reconstruction": "Tokens that come back from latents with noise added",
    "spectrum": "The latents' covariance: eigenvalues, and the deviation of each coordinate",
    "loss_over_time": "Diffusion loss against schedule time and against the adapted time",
}


def labels(names: list[str]) -> list[str]:
    """The shortest ends of different paths that tell them apart.

    >>> labels(["/home/me/runs/a/last.ckpt", "/home/me/runs/b/last.ckpt", "last.ckpt", "samples.jsonl"])
    ['a/last.ckpt', 'b/last.ckpt', 'last.ckpt', 'samples.jsonl']
    """
    paths = [Path(name).parts for name in names]
    found = []
    for path in paths:
        ends = (path[-count:] for count in range(1, len(path) + 1))
        alone = (end for end in ends if sum(other[-len(end) :] == end for other in paths) == 1)
        found.append(Path(*next(alone, path)).as_posix())
    return found


def published(name: str) -> list[Scores]:
    """Other people's rows of a table, each saying where it was published and by what protocol; none for ``none``."""
    if name == "none":
        return []
    everything = yaml.safe_load((files("ldlm.evaluation") / "published.yaml").read_text(encoding="utf-8"))
    about = everything[name]
    mark = {
        "published_elsewhere": True,
        "where": f"{everything['source']}, Table {about['table']}",
        "settings": f"gpt2-large, {about['sequence_length']} tokens",
        "protocol": everything["protocol"],
    }
    real = {score: {"mean": value, "std": None} for score, value in about["real"].items()}
    rows: list[Scores] = [{"name": REAL, "nfe": None, **mark, **real}]
    for method in about["methods"]:
        label = " ".join([method["method"], *([f"({method['setting']})"] if "setting" in method else [])])
        for place, nfe in enumerate(about["nfe"]):
            scores = {one: {"mean": method[one][place], "std": method[f"{one}_std"][place]} for one in about["real"]}
            rows.append({"name": label, "nfe": nfe, **mark, **scores})
    return rows


def point(run: Scores) -> Point:
    """A run, a reference or a published row as a point of the frontier."""
    sampling = run.get("sampling") or {}
    nfe = sampling.get("nfe", run.get("nfe"))
    return Point(run["entropy"]["mean"], run["perplexity"]["mean"], nfe, sampling.get("seconds_per_text"))


def draw(runs: dict[str, list[Scores]], result: Scores) -> dict[str, Figure]:
    """All figures that the results give, by name."""
    scorer = Path(result["runs"][0]["scorer"]["name"]).name.removesuffix(".gguf")
    theirs: dict[str, list[Point]] = {}
    for row in result["published"]:
        theirs.setdefault(row["name"], []).append(point(row))
    their_real = theirs.pop(REAL)[0] if theirs else None
    settings = result["published"][0]["settings"] if theirs else ""
    ours = {name: [point(run) for run in each if math.isfinite(point(run)[1])] for name, each in runs.items()}
    real = point(result["reference"]) if result["reference"] else None
    found = {"frontier": frontier(ours, real, theirs, their_real, scorer, settings)}
    measured: dict[str, Scores] = result["measurements"]
    if measured:
        of = {part: {name: each[part] for name, each in measured.items()} for part in next(iter(measured.values()))}
        found["interpolation"] = interpolation(of["interpolation"], scorer)
        found["reconstruction"] = reconstruction(of["reconstruction"], of["sigma_dec"])
        found["spectrum"] = spectrum(of["spectrum"])
        for place, curve in enumerate(of["loss_over_time"].values()):
            several = len(measured) > 1
            figure = loss_over_time(curve["u"], curve["adapted"], curve["loss"])
            figure.suptitle(drawn(list(measured)[place]) if several else "")
            found["loss_over_time" + (f"-{place + 1}" if several else "")] = figure
    return found


def caption(name: str) -> str:
    """What a figure of `draw` is called in a report."""
    kind, _, number = name.partition("-")
    return CAPTIONS[kind] + (f", of model {number}" if number else "")


def cell(score: Scores | None) -> str:
    """A mean with its deviation over sets, or with its interval over texts if there is one set."""
    if score is None or not math.isfinite(score["mean"]):
        return "" if score is None else "–"
    if score["std"] is not None:
        return f"{score['mean']:.4g} ± {score['std']:.2g}"
    ends = score.get("interval_95")
    return f"{score['mean']:.4g}" + (f" ({ends[0]:.3g}–{ends[1]:.3g})" if ends else "")


def table(runs: dict[str, list[Scores]]) -> Table:
    """A row a run, as in Tables 8 and 9."""
    everything = [run for each in runs.values() for run in each]
    first = everything[0]
    columns = [name for name in COLUMNS if name in first]
    texts = ", ".join(dict.fromkeys(str(run["texts"]) for run in everything))
    title = f"{first['protocol']['name']}, {Path(first['scorer']['name']).name}, {texts} texts a set"
    shown = Table(title=Text(visible(title), "table.title"), box=SIMPLE)
    shown.add_column("source", overflow="fold")
    for heading in ("NFE", *columns, "s a text"):
        shown.add_column(heading, justify="right", overflow="fold")
    for name, each in runs.items():
        for run in each:
            sampling = run["sampling"] or {"nfe": "", "seconds_per_text": ""}
            shown.add_row(
                Text(visible(name)),
                f"{sampling['nfe']}",
                *(cell(run[c]) for c in columns),
                f"{sampling['seconds_per_text']}",
            )
    if first["reference"]:
        shown.add_row(REAL, "", *(cell(first["reference"].get(c)) for c in columns), "")
    counts = (f"{name} {sum(run[name] for run in everything)}" for name in ("skipped", "truncated", "empty"))
    caption = "; ".join(["± over sets; (95 % over texts)", ", ".join(counts), *warnings(everything)])
    shown.caption = Text(visible(caption), "table.caption")
    return shown
