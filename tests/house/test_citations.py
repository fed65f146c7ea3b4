"""What is said of the paper and of other people's work: numbers of its sections, and licences of libraries."""

import re
import tomllib
from importlib.metadata import PackageNotFoundError, metadata
from pathlib import Path

import pytest
from helpers import ROOT

FILES = sorted(
    path
    for pattern in (
        "ldlm/**/*.py",
        "ldlm/**/*.yaml",
        "ldlm/**/*.j2",
        "docs/*.md",
        "*.md",
        "examples/*",
        "tests/**/*.py",
        "scripts/*.py",
    )
    for path in ROOT.glob(pattern)
    if path.is_file() and path != Path(__file__)
)
# The paper's own headings, and how many equations, figures and tables it has.
SECTIONS = {*map(str, range(1, 10)), "4.1", "4.2", "4.3", "5.1", "5.2", "5.3", "5.4"}
APPENDICES = {*"ABCDEFGHI", "A.1", "A.2", "B.1", "B.2", "B.3", "B.4"}
COUNTS = {"Eq": 30, "Fig": 9, "Table": 10}

# Where the paper says what a file is about. Metrics are section 6 and App. E, the sampler 4.3 and App. C; App. G are
# limitations. What the paper does not say is cited from nowhere.
SAYS = {
    "metrics/generative_perplexity.py": "section 6",
    "metrics/text.py": "section 6 and App. E",
    "metrics/scorer.py": "section 6",
    "training/callbacks/sample_scores.py": "section 6",
    "evaluation/scores.py": "section 6",
    "diffusion/samplers.py": "§4.3 and App. C",
    "diffusion/grids.py": "The paper does not say where",
    "evaluation/trace.py": "section 4.3",
    "benchmarks/sampling.py": "section 8 and Table 3",
    "studies/summary.py": "Tables 1, 2 and 4-7; Fig. 3 and 4",
    "evaluation/tables.py": "Fig. 1, Fig. 3 left and Fig. 5",
    "evaluation/evaluate.py": "Fig. 3 left and Fig. 5",
}
# The first of a package's own words about its licence that says which it is.
MARKS = {
    "Apache-2.0": "Apache",
    "MIT": "MIT",
    "BSD-3-Clause": "BSD",
    "BSD-3-Clause and others": "BSD-3-Clause",
    "GPL-3": "General Public License v3",
    "ISC": "ISC",
    "PSF-like (matplotlib's own)": "Python Software Foundation",
}


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_what_is_cited_of_the_paper_is_in_the_paper(path):
    text = path.read_text(encoding="utf-8")
    cited = re.findall(r"(?:[Ss]ections?|§) ?(\d(?:\.\d)?)\b", text)
    cited += re.findall(r"[Ss]ections \d(?:\.\d)?(?:, \d(?:\.\d)?)* and (\d(?:\.\d)?)", text)
    assert set(cited) <= SECTIONS
    assert set(re.findall(r"\bApp\. ([A-Z](?:\.\d)?)", text)) <= APPENDICES
    assert not {"G", "H"} & set(re.findall(r"\bApp\. ([A-Z])", text))  # limitations and societal impact: nothing here
    for kind, count in COUNTS.items():
        numbers = re.findall(rf"\b{kind}s?(?:ure|ures)?\.? (\d+)(?:(?:-|–| to | and )(\d+))?", text)
        assert all(1 <= int(number) <= count for pair in numbers for number in pair if number)


@pytest.mark.parametrize("name", SAYS)
def test_a_file_cites_the_section_that_is_about_it(name):
    assert SAYS[name] in " ".join((ROOT / "ldlm" / name).read_text(encoding="utf-8").split('"""')[1].split())


def test_only_the_tables_that_have_a_study_are_promised():
    studies = {path.stem.removeprefix("table") for path in (ROOT / "ldlm/configs/studies").glob("table*.yaml")}
    assert studies == {"1", "2", "4", "5", "6", "7"}
    for page in ("README.md", "docs/index.md"):
        assert "every row of the paper's Tables 1, 2 and 4 to 7 as a recipe" in (ROOT / page).read_text("utf-8")
    for path in FILES:
        assert "every row of the paper's tables" not in path.read_text(encoding="utf-8")


def test_every_library_this_one_depends_on_has_its_licence_on_the_page_as_it_states_it():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    groups = [project["dependencies"], *project["optional-dependencies"].values()]
    names = {re.split(r"[\[>=<]", name)[0] for group in groups for name in group}
    page = (ROOT / "docs/assets.md").read_text(encoding="utf-8").partition("## Libraries")[2]
    table = dict(re.findall(r"^\| ([\w.-]+) \| ([^|]+?) \|", page, re.M))
    assert set(table) - {"library"} == names
    looked_at = 0
    for name in names:
        try:
            about = metadata(name)
        except PackageNotFoundError:  # an extra that is not installed
            continue
        stated = [about.get("License-Expression"), about.get("License"), *(about.get_all("Classifier") or [])]
        assert MARKS[table[name]] in " ".join(filter(None, stated)), name
        looked_at += 1
    assert looked_at > 15


def test_the_papers_own_assets_are_all_on_the_page():
    page = (ROOT / "docs/assets.md").read_text(encoding="utf-8")
    rows = [line for line in page.partition("## Models")[0].splitlines() if line.startswith("| ")][1:]
    assert [row.split(" | ")[0].strip("| ") for row in rows] == [
        "GPT-2",
        "LM1B",
        "OpenWebText",
        "MDLM, ReMDM, Duo, FLM",
        "CANDI's checkpoint",
    ]
    assert "assets.md" in (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
