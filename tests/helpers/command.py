"""What tests of the command share: one complaint, one evaluation, and the folder it needs."""

import json
from pathlib import Path

import pytest
import torch

from helpers.tiny import WORDS, generator, make_model, make_scorer_folder, make_tokenizer
from ldlm.cli import main as cli


def complaint(capsys, *words: str) -> str:
    """What is said, once it is certain that it is one line and that the exit status is 2."""
    with pytest.raises(SystemExit) as stop:
        cli.main(list(words))
    assert stop.value.code == 2
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("ldlm: ")]
    assert len(said) == 1
    return said[0]


def evaluate(*words: str) -> dict:
    """What `ldlm evaluate` writes in a folder made by `evaluation_folder`."""
    cli.main(["evaluate", *words, "--scorer", "./scorer", "--output", "out/scores.json"])
    with open("out/scores.json", encoding="utf-8") as file:
        return json.load(file)


def evaluation_folder(folder: Path, words: int) -> list[str]:
    """Put a model, a scorer and 40 real texts of so many different words into a folder; the texts' JSON lines."""
    make_model(tokenizer=make_tokenizer()).save_pretrained(folder / "model")
    make_scorer_folder(folder / "scorer")
    picks = torch.randint(0, words, (40, 9), generator=generator(5)).tolist()
    lines = [json.dumps({"text": " ".join(WORDS[i] for i in row)}) for row in picks]
    (folder / "real.jsonl").write_text("\n".join(lines))
    return lines
