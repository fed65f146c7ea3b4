"""The tour is what its script makes, and the pages of the site are all there."""

import importlib.util
import re

import pytest
from helpers import ROOT

DOCS = ROOT / "docs"
TOUR = (DOCS / "tour.md").read_text(encoding="utf-8")


def make_tour():
    spec = importlib.util.spec_from_file_location("make_tour", ROOT / "scripts" / "make_tour.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def without_numbers(page: str) -> str:
    """A page with numbers, generated texts and runs of spaces made the same: they depend on the machine."""
    page = re.sub(r"^'.*'$", "'text'", page, flags=re.M)
    page = re.sub(r"[-+]?(\d[\d,]*(\.\d+)?(e[-+]?\d+)?|\binf\b)", "#", page)
    return re.sub(r" +", " ", page)


def test_the_tour_has_the_prose_and_the_code_of_its_script():
    script = make_tour()
    page = re.sub(r"\n\n```text\n.*?\n```", "", TOUR, flags=re.S).rstrip("\n")
    pieces = [script.INTRODUCTION]
    for prose, code in script.STEPS:
        pieces += [prose, f"```python\n{code.strip()}\n```"]
    assert page == "\n\n".join(pieces)
    assert TOUR.count("```text\n") == len(script.STEPS) > 10


@pytest.mark.slow
def test_the_tour_is_what_its_script_prints_but_for_numbers(tmp_path, monkeypatch):
    monkeypatch.setenv("LDLM_CACHE", str(tmp_path))
    assert without_numbers(make_tour().make_page()) == without_numbers(TOUR)


def test_the_reference_names_every_file_of_the_package_that_a_script_may_import():
    named = set(re.findall(r"^::: ldlm\.(\w+)$", (DOCS / "reference.md").read_text(encoding="utf-8"), re.M))
    there = {path.stem for path in (DOCS.parent / "ldlm").glob("*.py")}
    assert there - named == {"__init__", "__main__", "cli", "parsing", "recipes", "training", "texts"}
    assert named <= there


def test_reliability_names_tests_that_there_are():
    page = (DOCS / "reliability.md").read_text(encoding="utf-8")
    found = re.findall(r"`(\w+) -k (\w+)`", page)
    assert len(found) > 60
    for file, word in found:
        names = re.findall(r"^def (test_\w+)", next((ROOT / "tests").rglob(f"test_{file}.py")).read_text("utf-8"), re.M)
        assert any(word in name for name in names), f"{file} -k {word} selects nothing"


def test_the_reference_names_every_instrument_of_the_lab_in_one_section():
    page = (DOCS / "reference.md").read_text(encoding="utf-8")
    named = re.findall(r"^::: ldlm\.lab\.(\w+)$", page.partition("\n## The lab\n")[2], re.M)
    assert sorted(named) == sorted(path.stem for path in (DOCS.parent / "ldlm" / "lab").glob("[a-z]*.py"))


def test_the_tables_of_the_results_are_what_the_studies_wrote():
    page = (DOCS / "results.md").read_text(encoding="utf-8")
    spec = importlib.util.spec_from_file_location("make_results", ROOT / "scripts" / "make_results.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert page.count("<!-- table1-laptop -->") == 1
    assert module.fill(page) == page
