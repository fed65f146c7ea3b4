"""Figures 3 (left) and 4 of the paper, from what the cells of a study wrote down."""

import json

import numpy as np
import pytest
import yaml
from helpers import ROOT
from helpers.command import complaint
from matplotlib.figure import Figure

from ldlm.cli import main as cli
from ldlm.evaluation.plots import Noised, decoder_noise
from ldlm.studies.plan import find_study, plan
from ldlm.studies.summary import figures, markdown, write_summary

TABLE = {"tables": {"T": {"row": {"cell": "low"}}}}
RESULTS = ROOT / "docs" / "results" / "table1-laptop"


def result(cell: str, numbers: tuple[float, ...], seed: int = 0, between: list[float] | None = None) -> dict:
    """A cell's JSON with these: diffusion loss, deviation, hidden-state loss, accuracy."""
    diffusion, deviation, reconstruction, accuracy = numbers
    path = {"a": [0.0, 0.5, 1.0], "perplexity": between}
    return {
        "cell": cell,
        "seed": seed,
        "validation": {
            "validation/diffusion": diffusion,
            "validation/reconstruction": reconstruction,
            "validation/accuracy": accuracy,
        },
        "curves": {"latent_std": [[0, 9.0], [5, deviation]], "diffusion": [], "reconstruction": []},
        "scores": {"perplexity": {"per_seed": [9.0]}, "scorer": {"name": "x/scorer.gguf"}}
        | ({"measurements": {"last.ckpt": {"interpolation": path}}} if between else {}),
    }


def lines(figure: Figure) -> dict[str, list[list[float]]]:
    """What each axis shows, by its label."""
    return {axes.get_ylabel(): axes.lines[0].get_xydata().tolist() for axes in figure.axes}


def test_figure_4_has_both_losses_deviation_accuracy_and_the_perplexity_half_way_over_sigma_dec():
    study = TABLE | {"noise": {2: "high", 0.5: "low", 3: "not run"}}
    found = figures(
        study,
        [
            result("low", (0.1, 0.7, 0.3, 0.9), between=[50, 90, 60]),
            result("low", (0.3, 0.9, 0.5, 0.7), seed=1, between=[50, 70, 60]),
            result("high", (0.6, 1.5, 0.8, 0.4), between=[50, 55, 60]),
        ],
    )
    shown = lines(found["noise"])
    want = {
        "diffusion loss (MSE per element)": [[0.5, 0.2], [2, 0.6]],
        "standard deviation of z0": [[0.5, 0.8], [2, 1.5]],
        "hidden-state loss (MSE per element)": [[0.5, 0.4], [2, 0.8]],
        "tokens that come back (share)": [[0.5, 0.8], [2, 0.4]],
        "half-way between two texts:\ngenerative perplexity\n(scorer)": [[0.5, 80], [2, 55]],
    }
    assert set(shown) == set(want)
    for label, points in want.items():
        np.testing.assert_allclose(shown[label], points)


def test_what_was_not_measured_has_no_panel_and_no_point():
    points = {1.0: Noised(0.5, None, 0.2, 0.9, None), 3.0: Noised(None, None, 0.4, 0.8, None)}
    shown = lines(decoder_noise({3.0: points[3.0], 1.0: points[1.0]}))
    assert shown["diffusion loss (MSE per element)"] == [[1.0, 0.5]]
    assert shown["tokens that come back (share)"] == [[1.0, 0.9], [3.0, 0.8]]
    assert not any("half-way" in label for label in shown)


def test_a_table_says_with_what_weights_its_texts_were_sampled():
    results = [json.loads(path.read_text("utf-8")) for path in sorted(RESULTS.glob("*.json"))]
    page = markdown(find_study("table1"), "table1-laptop", results, {})
    assert page == (RESULTS / "table.md").read_text("utf-8")
    assert "Texts are sampled in 64 calls of the denoiser with weights in bfloat16. The paper's columns: " in page


def test_figure_3_left_has_the_paths_of_each_loss_and_is_left_out_where_nobody_measured_them():
    study = TABLE | {"paths": {"CE": "low", "MSE": "high"}}
    ends = (0.1, 0.7, 0.3, 0.9)
    found = figures(study, [result("low", ends, between=[50, 90, 60]), result("high", ends, between=[50, 52, 54])])
    (axes,) = found["paths"].axes
    assert [line.get_label() for line in axes.lines] == ["CE", "MSE"]
    np.testing.assert_allclose(axes.lines[0].get_xydata(), [[0, 50], [0.5, 90], [1, 60]])
    assert "paths" not in figures(study, [result("low", ends)])


def test_the_published_results_are_drawn_with_the_numbers_that_their_cells_wrote(tmp_path):
    results = [json.loads(path.read_text("utf-8")) for path in sorted(RESULTS.glob("*.json"))]
    write_summary(find_study("table1"), "table1-laptop", results, {}, tmp_path)
    assert (tmp_path / "noise.png").stat().st_size > 5000
    by_cell = {one["cell"]: one for one in results}
    found = lines(figures(find_study("table1"), results)["noise"])
    cells = {0.1: "sigma-0.1", 0.5: "sigma-0.5", 1.0: "base", 3.0: "sigma-3"}
    want = [[sigma, by_cell[cell]["validation"]["validation/accuracy"]] for sigma, cell in cells.items()]
    assert found["tokens that come back (share)"] == want


@pytest.mark.parametrize("scale", ["laptop", "paper"])
def test_the_cells_of_figures_3_and_4_are_measured_in_bfloat16_and_the_others_are_not(tmp_path, monkeypatch, scale):
    given = []
    monkeypatch.setattr("ldlm.evaluation.evaluate.write_scores", given.append)
    measured = set()
    for cell in plan(find_study("table1"), scale, 1, tmp_path, tmp_path, []):
        cli.main(list(cell.commands[2]))
        options = given.pop()
        assert options.precision == "bf16"
        measured |= {cell.name} if options.measure else set()
    assert measured == {"base", "ce", "ce-mse", *(f"sigma-{sigma}" for sigma in ("0.1", "0.5", "2", "3", "4"))}


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"noise": {"high": "low"}}, "noise has 'high', where a number, sigma_dec, names each cell"),
        ({"noise": {1.0: "lo"}}, "names a cell it lacks, 'lo'; did you mean 'low'"),
        ({"paths": {"CE": "lo"}}, "names a cell it lacks, 'lo'; did you mean 'low'"),
    ],
)
def test_a_figure_of_cells_that_are_none_is_refused(tmp_path, capsys, change, told):
    study = TABLE | {"base": {"laptop": []}, "cells": {"low": {}}} | change
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(study))
    assert told in complaint(
        capsys, "study", str(tmp_path / "mine.yaml"), "--scale", "laptop", "--output", str(tmp_path / "out")
    )
