"""Tables, figures and verdicts made of a study's cells."""

import math
import re
from typing import Any

import numpy as np
import pytest
from helpers.studies import OUT, STUDY

from ldlm.cli import main as cli
from ldlm.plots import loss_curves, side_by_side
from ldlm.studies.summary import COLUMNS, figures, markdown, measure, noise, verdicts


def made(cell: str, perplexities: list[float], seed: int = 0, mauve: list[float] | None = None) -> dict[str, Any]:
    """A cell's result with these numbers, a draw of texts each."""
    found = {"perplexity": {"per_seed": perplexities}}
    if mauve:
        found["mauve"] = {"per_seed": mauve}
    return {
        "cell": cell,
        "seed": seed,
        "settings": {"commands": [f"ldlm fit {cell}"]},
        "seconds": {"fit": 120.0, "predict": 30.0, "evaluate": 30.0},
        "versions": {"ldlm": "0", "torch": "2"},
        "device": "x CPU",
        "threads": "1",
        "validation": {"validation/accuracy": 0.9},
        "scores": found,
        "curves": {"diffusion": [[0, 1.0], [5, 0.5]], "reconstruction": [[0, 2.0]], "latent_std": []},
    }


def test_a_measure_is_the_mean_over_draws_and_its_deviation_over_them_with_one_seed():
    value = measure([made("a", [90.0, 110.0, 100.0])], "perplexity")
    assert value == (100.0, 10.0, 1)
    assert measure([made("a", [90.0], mauve=[0.5, 0.7])], "mauve") == pytest.approx((60.0, math.sqrt(200.0), 1))
    assert measure([made("a", [90.0])], "perplexity") == (90.0, 0.0, 1)
    assert measure([made("a", [90.0])], "mauve") is None
    assert measure([made("a", [90.0])], "accuracy") == pytest.approx((90.0, 0.0, 1))
    assert measure([], "perplexity") is None
    assert measure([made("a", [None, 80.0])], "perplexity") == (80.0, 0.0, 1)  # no text of a draw could be scored


def test_with_two_seeds_the_deviation_is_over_their_means():
    value = measure([made("a", [90.0, 110.0]), made("a", [80.0, 84.0], seed=1)], "perplexity")
    assert value == pytest.approx((91.0, 18.0 / math.sqrt(2), 2))


def test_the_noise_is_the_root_mean_square_of_relative_deviations_over_seeds_where_there_are_any():
    one, other = [made("a", [90.0, 110.0])], [made("b", [10.0, 10.0])]
    relative = math.sqrt(200.0) / 100
    assert noise({"a": one, "b": other}, "perplexity") == pytest.approx((math.sqrt(relative**2 / 2), False))
    several = [made("b", [10.0, 10.0]), made("b", [12.0, 12.0], seed=1)]
    assert noise({"a": one, "b": several}, "perplexity") == pytest.approx((math.sqrt(2.0) / 11, True))
    assert noise({}, "perplexity") == (0.0, False)


def judged(here: dict[str, list[float]], paper: dict[str, list[float]]) -> list[tuple[str, str]]:
    """(order, verdict) of each line, for cells with these draws of perplexity and the paper's [mean, deviation]."""
    rows = {name: {"cell": name, "perplexity": pair} for name, pair in paper.items()}
    lines = verdicts({"tables": {"T": rows}}, [made(name, draws) for name, draws in here.items()])
    cut = [[part.strip() for part in line.strip("|").split("|")] for line in lines]
    assert all(len(parts) == 6 and parts[0] == "T" for parts in cut)
    return [(parts[2], parts[5].strip("*")) for parts in cut]


def test_a_verdict_says_whether_the_order_came_out_is_reversed_or_drowns_in_the_noise():
    # All cells deviate by 1 % of their mean, so two differ from 2 · 0.01 · √(x² + y²) on.
    def near(mean: float) -> list[float]:
        return [mean - 0.01 * mean / math.sqrt(2), mean + 0.01 * mean / math.sqrt(2)]

    paper = {"one": [50.0, 1.0], "two": [60.0, 1.0]}
    # 2 · 0.01 · √(100² + 102.8²) = 2.868 > 2.8;  with 103: 2.871 < 3
    assert judged({"one": near(100), "two": near(103.0)}, paper) == [("one better than two", "came out")]
    assert judged({"one": near(100), "two": near(102.8)}, paper) == [("one better than two", "within the noise")]
    assert judged({"one": near(103), "two": near(100.0)}, paper) == [("one better than two", "reversed")]
    turned = {"one": [60.0, 1.0], "two": [50.0, 1.0]}
    assert judged({"one": near(103), "two": near(100.0)}, turned) == [("two better than one", "came out")]


@pytest.mark.parametrize(
    ("here", "word"),
    [
        ({"varied": (40.0, 4.0), "flat": (5.0, 2.0)}, "came out"),  # flat has half of the real texts' entropy
        ({"varied": (5.0, 2.0), "flat": (40.0, 4.0)}, "reversed"),
        ({"varied": (40.0, 4.0), "flat": (60.0, 3.2)}, "came out"),  # neither has collapsed, and 40 is below 60
        ({"varied": (40.0, 4.0), "flat": (5.0, 3.2)}, "reversed"),
        ({"varied": (5.0, 2.0), "flat": (3.0, 1.0)}, "both collapsed"),
    ],
)
def test_a_low_perplexity_of_collapsed_texts_counts_as_worse(here, word):
    results = []
    for cell, (perplexity, entropy) in here.items():
        results.append(made(cell, [perplexity] * 2))
        results[-1]["scores"] |= {"entropy": {"per_seed": [entropy]}, "reference": {"entropy": {"mean": 4.3}}}
    rows = {
        "3": {"cell": "varied", "perplexity": [66.3, 0.8], "entropy": [4.25, 0.01]},
        "4": {"cell": "flat", "perplexity": [38.1, 0.6], "entropy": [2.19, 0.01]},
    }
    (line,) = verdicts({"real": {"entropy": [4.27, 0.0]}, "tables": {"T": rows}}, results)
    assert "| 3 better than 4 |" in line
    assert line.endswith(f"**{word}** |")


def test_an_order_of_mauve_that_the_paper_does_not_settle_stays_out_though_one_row_collapsed():
    rows = {  # Table 1's sigma_dec 0.1 and 4
        "0.1": {"cell": "a", "mauve": [0.6, 0.1], "entropy": [3.58, 0.03]},
        "4": {"cell": "b", "mauve": [0.4, 0.1], "entropy": [2.19, 0.01]},
    }
    results = [made("a", [700.0], mauve=[0.01]), made("b", [40.0], mauve=[0.01])]
    assert verdicts({"real": {"entropy": [4.27, 0.0]}, "tables": {"T": rows}}, results) == []


def test_pairs_that_the_papers_own_deviations_do_not_settle_are_left_out():
    here = {"one": [10.0, 10.0], "two": [20.0, 20.0], "three": [30.0, 30.0]}
    # |50 - 60| against 2·√(3² + 4²) = 10: settled; |60 - 69| against 2·√(4² + 3²) = 10: not.
    paper = {"one": [50.0, 3.0], "two": [60.0, 4.0], "three": [69.0, 3.0]}
    assert judged(here, paper) == [("one better than two", "came out"), ("one better than three", "came out")]
    assert judged({"one": here["one"]}, paper) == []
    rows = {"T": {"x": {"cell": "one"}, "y": {"cell": "two", "perplexity": [1.0, 0.1]}}}
    assert verdicts({"tables": rows}, [made("one", [1.0]), made("two", [2.0])]) == []


def tables_of(page: str) -> list[list[list[str]]]:
    """The Markdown tables of a page, as rows of cells."""
    blocks = re.findall(r"(?:^\|.*\n)+", page, re.M)
    return [[[cell.strip() for cell in row.strip().removeprefix("|").removesuffix("|").split("|")]
             for row in block.splitlines()] for block in blocks]  # fmt: skip


def test_the_markdown_is_a_table_with_as_many_columns_in_every_row(hub):
    hub.broken = {"d"}
    with pytest.raises(SystemExit):
        cli.main(list(STUDY))
    first, second = tables_of((OUT / "table.md").read_text())
    for table in (first, second):
        assert {len(row) for row in table} == {len(table[0])}
        assert all(re.fullmatch(r"-+:?", cell) for cell in table[1])
    headings = first[0]
    assert headings[1:6] == [heading for heading, *_ in COLUMNS.values()]
    shown = {row[0]: dict(zip(headings, row, strict=True)) for row in first[2:]}
    assert list(shown) == ["real texts", "**Block**", "row a", "row b", "row c", "row d"]
    assert shown["row a"]["gen. PPL ↓"] == "105.0 ± 7.1"  # of 100 and 110
    assert shown["row a"]["MAUVE ↑"] == "85.0 ± 7.1"  # of 0.8 and 0.9, times 100
    assert shown["row a"]["entropy ↑"] == "4.10 ± 0.14"
    assert shown["row a"]["reconstruction ↑"] == "75.0"
    assert (shown["row a"]["seeds"], shown["row d"]["seeds"]) == ("1 (2 draws)", "not run")
    assert shown["row a"]["paper's gen. PPL ↓"] == "100 ± 1"
    assert shown["row c"]["paper's gen. PPL ↓"] == ""
    assert (shown["real texts"]["gen. PPL ↓"], shown["real texts"]["entropy ↑"]) == ("25.0", "4.30")
    assert [row[2:] for row in second[2:]] == [["row b better than row a", "100, 50", "105.0, 52.0", "**came out**"]]


def test_the_page_names_each_command_and_whether_deviations_are_over_seeds():
    rows = {"r": {"cell": "a", "perplexity": [1.0, 0.1]}, "s": {"cell": "b", "perplexity": [9.0, 0.1]}}
    study = {"tables": {"T": rows}}
    results = [made("a", [90.0, 110.0]), made("b", [50.0, 52.0])]
    page = markdown(study, "mine-laptop", results, {})
    assert page.startswith("`mine-laptop`: mean ± standard deviation over training seeds, or over draws of texts where")
    assert "is over draws of texts only; another training seed would add to it" in page
    assert "* a, seed 0: 3.0 min (2.0 of training) on x CPU, threads: 1; ldlm 0, torch 2; `ldlm fit a`" in page
    results += [made("a", [100.0], seed=1), made("b", [50.0], seed=1)]
    page = markdown(study, "mine-laptop", results, {})
    assert "is over training seeds" in page
    assert page.count("; `ldlm fit ") == 4


def test_the_figure_has_the_points_of_both_sides_and_none_where_there_is_no_number():
    study = {"tables": {"T": {"r": {"cell": "a", "perplexity": [98.5, 1.9]}, "s": {"cell": "b"}}}, "curves": {"R": "a"}}
    found = figures(study, [made("a", [90.0, 110.0])])
    left, right = found["figure"].axes
    drawn = [[line.get_xydata().tolist() for line in axes.lines if line.get_marker() == "o"] for axes in (left, right)]
    assert drawn == [[[[100.0, 1.0]]], [[[98.5, 1.0]]]]
    assert [text.get_text() for text in left.get_yticklabels()] == ["T:", "r", "s"]
    diffusion, reconstruction, deviation = found["curves"].axes
    assert [line.get_xydata().tolist() for line in diffusion.lines] == [[[0.0, 1.0], [5.0, 0.5]]]
    assert [line.get_xydata().tolist() for line in reconstruction.lines] == [[[0.0, 2.0]]]
    assert list(deviation.lines) == []
    assert diffusion.get_legend_handles_labels()[1] == ["R"]
    assert "curves" not in figures({"tables": study["tables"]}, [made("a", [90.0])])


def test_two_panels_share_their_rows_and_not_their_numbers():
    here, paper = [None, (3.0, 0.5), None], [None, (300.0, 20.0), (40.0, 0.0)]
    left, right = side_by_side(["Head:", "one", "two"], here, paper, "what", ("ours", "theirs")).axes
    bars = [[bar.get_segments()[0].tolist() for bar in axes.collections] for axes in (left, right)]
    np.testing.assert_allclose(bars[0], [[[2.5, 1], [3.5, 1]]])
    np.testing.assert_allclose(bars[1], [[[280.0, 1], [320.0, 1]], [[40.0, 2], [40.0, 2]]])
    assert [axes.get_title() for axes in (left, right)] == ["ours", "theirs"]
    assert [axes.get_xscale() for axes in (left, right)] == ["log", "log"]
    assert left.get_ylim() == (2.5, -0.5)  # the first row is on top
    bold = [text.get_text() for text in left.get_yticklabels() if text.get_fontweight() == "bold"]
    assert bold == ["Head:"]


def test_a_run_without_points_has_no_curve():
    (axes,) = loss_curves({"one": {"loss": [[0, 1.0], [2, 0.5]]}, "two": {}}, {"loss": "loss (nats)"}).axes
    assert [line.get_label() for line in axes.lines] == ["one"]
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("optimizer step s", "loss (nats)")
