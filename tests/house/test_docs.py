"""The tour is what its script makes, and the pages of the site are all there."""

import importlib.util
import re
from importlib import import_module

import pytest
from helpers import ROOT

import ldlm

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


def reference() -> list[str]:
    """What the page of the reference has entries for, in its order."""
    return re.findall(r"^::: ([\w.]+)$", (DOCS / "reference.md").read_text(encoding="utf-8"), re.M)


def test_the_reference_has_an_entry_for_every_public_name_where_it_stands_and_for_nothing_else():
    entries = [name for name in reference() if not name.startswith(("ldlm.metrics.", "ldlm.testing."))]
    assert sorted(entries) == sorted(f"{module}.{name}" for name, module in ldlm._HOMES.items())


@pytest.mark.parametrize("module", [getattr(ldlm, name) for name in ldlm._MODULES], ids=lambda module: module.__name__)
def test_the_reference_has_an_entry_for_every_name_of_a_public_module(module):
    entries = [name for name in reference() if name.startswith(f"{module.__name__}.")]
    assert sorted(name.rpartition(".")[2] for name in entries) == sorted(module.__all__)
    for name in entries:
        home, _, last = name.rpartition(".")
        assert getattr(import_module(home), last) is getattr(module, last)


def test_reliability_names_tests_that_there_are():
    page = (DOCS / "reliability.md").read_text(encoding="utf-8")
    found = re.findall(r"`(\w+) -k (\w+)`", page)
    assert len(found) > 60
    for file, word in found:
        names = re.findall(r"^def (test_\w+)", next((ROOT / "tests").rglob(f"test_{file}.py")).read_text("utf-8"), re.M)
        assert any(word in name for name in names), f"{file} -k {word} selects nothing"


def test_the_tables_of_the_results_are_what_the_studies_wrote():
    page = (DOCS / "results.md").read_text(encoding="utf-8")
    spec = importlib.util.spec_from_file_location("make_results", ROOT / "scripts" / "make_results.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert page.count("<!-- table1-laptop -->") == 1
    assert module.fill(page) == page
