"""A page about what an evaluation found: self-contained, to be looked at rather than read.

In: what an evaluation writes as JSON, figures, texts beside real ones, a text taking shape. Out: one file of HTML.
Paper: Fig. 1, Tables 8 and 9 and App. E, whose figures, tables and scores these are; App. I, whose Fig. 7-9 print the
perplexity and the entropy of each text.
"""

import base64
import io
import json
import math
from pathlib import Path
from typing import Any, NamedTuple

from matplotlib.figure import Figure

from ldlm.evaluation.html import write_page
from ldlm.evaluation.trace import Trace

# Heading, unit, which way is better. A score that is not among them is shown under its own name.
SCORES = {
    "perplexity": ("Generative perplexity", "", "↓"),
    "entropy": ("Unigram entropy", "nats", "↑"),
    "diversity": ("n-gram diversity", "", "↑"),
    "mauve": ("MAUVE", "", "↑"),
    "memorisation": ("4-grams of the training text", "share", "↓"),
}
APART = ("runs", "published", "reference", "command", "measurements")  # what has its own place on the page or a figure
NUMBERS = ("mean", "std", "per_seed", "interval_95")  # of a score
LONG = 12  # entries from which a list is left to the JSON at the end of the page


class Shown(NamedTuple):
    """A text with its own scores.

    Attributes:
        text: Without special tokens.
        perplexity: Of this text alone; NaN if it could not be scored.
        entropy: In nats; NaN if it has no token ids.
    """

    text: str
    perplexity: float
    entropy: float


def write_report(
    path: Path,
    result: dict[str, Any],
    figures: dict[str, Figure],
    samples: dict[str, list[dict[str, Shown]]],
    trace: Trace | None,
) -> None:
    """Write the report whole or not at all.

    Args:
        path: Of the file.
        result: What one evaluation writes, or several of them as ``runs`` beside what they share. A score is whatever
            has a ``mean``, perhaps with ``std``, ``per_seed`` and ``interval_95``; a run's ``reference`` holds the
            same scores of real texts; ``command`` is shown as what to type. ``published`` is a list of rows
            with ``name``, ``nfe`` (or None), ``where``, ``protocol`` and scores, shown apart as not measured here.
        figures: By their captions.
        samples: By source; each has a text as ``generated`` and perhaps one as ``real``.
        trace: A text taking shape, or None.
    """
    runs: list[dict[str, Any]] = result.get("runs", [result])
    described = [facts(run) for run in runs]
    common = {key: value for key, value in described[0].items() if all(one.get(key) == value for one in described)}
    about = {key: value for key, value in result.items() if key not in (*runs[0], *APART)}
    references: list[dict[str, Any]] = []
    for run in runs:
        if run.get("reference") and run["reference"] not in references:
            references.append(run["reference"])
    published = result.get("published", [])
    names = dict.fromkeys(key for row in [*runs, *references, *published] for key in scores(row))
    columns = {name: SCORES.get(name, (name.replace("_", " "), "", "")) for name in names}
    values = {
        "title": ", ".join(dict.fromkeys(run["source"]["name"] for run in runs)),
        "columns": columns,
        "cards": [(name, found) for name in names if (found := in_order(runs, name))],
        "runs": runs,
        "references": references,
        "published": published,
        "warnings": warnings(runs),
        "common": facts(about) | common,
        "differing": [key for key in dict.fromkeys(key for one in described for key in one) if key not in common],
        "described": described,
        "figures": {caption: picture(figure) for caption, figure in figures.items()},
        "wide": {
            caption for caption, figure in figures.items() if figure.get_figwidth() > 1.6 * figure.get_figheight()
        },
        "samples": samples,
        "trace": trace,
        "command": result.get("command"),
        "seconds": result.get("seconds"),
        "json": json.dumps(result, indent=2, ensure_ascii=False),
        "number": number,
        "finite": finite,
    }
    write_page(path, "report.html.j2", values)


def scores(row: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """What has a mean."""
    return {key: value for key, value in row.items() if isinstance(value, dict) and "mean" in value}


def warnings(runs: list[dict[str, Any]]) -> list[str]:
    """What is to be said of scores, each once."""
    found = [score["warning"] for run in runs for score in scores(run).values() if "warning" in score]
    return list(dict.fromkeys(found))


def in_order(runs: list[dict[str, Any]], name: str) -> list[dict[str, Any]]:
    """The runs' scores of that name, from the lowest mean to the highest, without those that have none."""
    found = [run[name] for run in runs if name in run and finite(run[name]["mean"])]
    return sorted(found, key=lambda score: float(score["mean"]))


def finite(value: float | None) -> bool:
    """Whether there is a number: JSON has null where no text could be scored."""
    return value is not None and math.isfinite(value)


def number(value: float | None, digits: int = 4) -> str:
    """With so many significant digits, one less below 1, and without an exponent.

    >>> number(1234.56), number(603.21), number(0.56789), number(32), number(None), number(0.00462, 2)
    ('1,235', '603.2', '0.568', '32', '–', '0.0046')
    """
    if value is None or not finite(value):
        return "–"
    if isinstance(value, int) or value == 0:
        return f"{value:,.0f}"
    digits = digits if abs(value) >= 1 else min(digits, 3)
    return f"{value:,.{max(0, digits - 1 - math.floor(math.log10(abs(value))))}f}"


def facts(run: dict[str, Any]) -> dict[str, str]:
    """All that a run says of itself but its scores, as names and short texts.

    >>> facts({"texts": 3, "entropy": {"mean": 1.0, "ids": "of the model"}, "sampling": {"nfe": 8, "seeds": [0, 1]}})
    {'texts': '3', 'entropy, ids': 'of the model', 'sampling, nfe': '8', 'sampling, seeds': '0, 1'}
    """
    found: dict[str, str] = {}
    for key, value in run.items():
        if key in APART:
            continue
        if isinstance(value, dict) and "class_path" not in value:
            inner = value if "mean" not in value else {name: value[name] for name in value if name not in NUMBERS}
            found |= {f"{key}, {name}".replace("_", " "): text for name, text in facts(inner).items()}
        else:
            found[key.replace("_", " ")] = said(value)
    return found


def said(value: Any) -> str:
    """Plain data in words; a part as the call that makes it.

    >>> said({"class_path": "ldlm.DDIM", "init_args": {"eta": 0.0}}), said(None), said([1, 2])
    ('DDIM(eta=0.0)', 'none', '1, 2')
    """
    if isinstance(value, dict) and "class_path" in value:
        arguments = ", ".join(f"{name}={said(item)}" for name, item in value.get("init_args", {}).items())
        return f"{value['class_path'].rpartition('.')[2]}({arguments})"
    if isinstance(value, list):
        return ", ".join(map(said, value)) if len(value) <= LONG else f"{len(value)} entries, in the JSON below"
    return "none" if value is None else str(value)


def picture(figure: Figure) -> str:
    """A figure as the address of a PNG that is the address."""
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=200)
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()
