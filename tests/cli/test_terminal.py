"""Texts, file names and errors are data: nothing in them acts on a terminal, on rich, on TensorBoard or on matplotlib.

What acts on a terminal is found by Unicode's own tables; what TensorBoard makes of Markdown is asked of TensorBoard.
"""

import html
import json
import os
import re
import sys
import unicodedata
import warnings
from pathlib import Path

import pytest
from helpers.command import complaint, evaluation_folder
from helpers.tiny import LENGTH, VOCAB, make_data, make_model, make_task, make_tokenizer, make_trainer
from lightning.pytorch.loggers import TensorBoardLogger
from matplotlib.figure import Figure
from rich.console import Console
from rich.errors import MarkupError
from tensorboard.plugin_util import markdown_to_safe_html
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import PreTrainedTokenizerFast

from ldlm._files import visible
from ldlm.checkpoints.integrity import digest_file, read, write
from ldlm.checkpoints.resume import last_checkpoint
from ldlm.cli import main as cli
from ldlm.plots import drawn, loss_curves, side_by_side
from ldlm.studies import scheduler as study_module
from ldlm.training.callbacks.predictions import ReconstructionWriter
from ldlm.training.callbacks.visualisation import SampleLogger, ShowSamples, cell

DIRECTIONS = {"LRE", "RLE", "LRO", "RLO", "PDF", "LRI", "RLI", "FSI", "PDI"}
EVIL = [
    "[/INST]", "[INST]", "[bold]", "[link=http://e]", "[/]", "\x1b[31mred", "\x1b]0;title\x07", "a\rb", "c\x08d",
    "\x9b2J", "\u202egnp", "\u2066x", "|", "`code`", "![i](http://e/i.png)", "[x](http://e)", "<img", "src=http://e>",
    "<script>alert(1)</script>", "**b**", "_u_", "$x_", "&amp;", "\\", "---", "#", "é", "שלום", ":smile:", "\x7f",
]  # fmt: skip
NAME = "[/INST] _$a_{\x1b[31m\x07\r\u202e$"


def acts(text: str) -> list[str]:
    """The characters of a text that do something when they are printed, other than to begin a line or a column."""
    control = [c for c in text if unicodedata.category(c) in ("Cc", "Cs") and c not in "\n\t"]
    return control + [c for c in text if unicodedata.bidirectional(c) in DIRECTIONS]


def evil_tokenizer() -> PreTrainedTokenizerFast:
    words = EVIL + [f"word{i}" for i in range(VOCAB - 3 - len(EVIL))]
    ids = {token: i for i, token in enumerate(["<unk>", "<s>", "</s>", *words])}
    model = Tokenizer(WordLevel(ids, unk_token="<unk>"))
    model.pre_tokenizer = WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=model, unk_token="<unk>", bos_token="<s>", eos_token="</s>")


def test_every_character_that_acts_is_made_visible_and_no_other_is_touched():
    everything = "".join(map(chr, range(sys.maxunicode + 1)))
    acting = set(acts(everything))
    expected = "".join(ascii(one)[1:-1] if one in acting else one for one in everything)
    assert visible(everything) == expected
    assert acts(visible(everything)) == []
    assert visible(Path("a\x1bb")) == r"a\x1bb"
    assert visible(ValueError("\udcff\u202e")) == r"\udcff\u202e"


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("evil")
    make_model(tokenizer=evil_tokenizer()).save_pretrained(folder / "model")
    return folder


@pytest.fixture
def here(home, monkeypatch) -> Path:
    monkeypatch.chdir(home)
    return home


@pytest.mark.parametrize("trace", [[], ["--trace", f"{NAME}.html"]])
def test_generated_texts_are_printed_so_that_nothing_in_them_acts_and_written_as_they_are(here, capsys, trace):
    few = ["-n", "24", "--nfe", "2", "--temperature", "5"]
    cli.main(["generate", "model", *few, *trace])
    printed = capsys.readouterr().out
    cli.main(["generate", "model", *few, "--output", f"{NAME}.jsonl"])
    assert acts(capsys.readouterr().out + printed) == []
    lines = Path(f"{NAME}.jsonl").read_text(encoding="utf-8").split("\n")[:-1]
    texts = [json.loads(line)["text"] for line in lines]
    assert len(set("".join(acts("".join(texts))))) > 4  # else nothing was put to the test
    assert printed.startswith("".join(f"[{i}] {visible(text)}\n\n" for i, text in enumerate(texts)))


def fitted(folder: Path, tokenizer, **changes):
    """A short fit on texts of such words."""
    words = [token for token in sorted(tokenizer.get_vocab()) if token not in tokenizer.all_special_tokens]
    lines = [" ".join(words[(7 * i + j) % len(words)] for j in range(LENGTH)) for i in range(60)]
    (folder / "texts.jsonl").write_text("\n".join(json.dumps({"text": line}) for line in lines))
    data = make_data(folder, dataset=str(folder / "texts.jsonl"), tokenizer=tokenizer, validation=0.3)
    trainer = make_trainer(folder, changes.pop("callbacks"), max_steps=2, **changes)
    trainer.fit(make_task(timestep_refresh=2, tokenizer=tokenizer), data)
    return trainer, data


def test_markup_in_a_held_out_text_does_not_end_a_fit(tmp_path, capsys):
    tokenizer = evil_tokenizer()
    trainer, data = fitted(tmp_path, tokenizer, callbacks=[ShowSamples(num_samples=12, nfe=2)])
    printed = capsys.readouterr().out
    assert trainer.global_step == 2
    assert acts(printed) == []
    real = tokenizer.batch_decode(next(iter(data.val_dataloader()))[:12].tolist(), skip_special_tokens=True)
    words = {word for text in real for word in text.split(" ") if word.isascii() and len(word) < 9 and not acts(word)}
    assert "[/INST]" in words
    assert [word for word in words if word not in printed] == []


@pytest.mark.parametrize("text", ["[/INST]", "[/]", "a [/b] c", "[link=http://e]x", "\x1b[31m[/red]"])
def test_what_looks_like_markup_is_shown_at_the_end_of_a_fit(tmp_path, monkeypatch, capsys, text):
    monkeypatch.setattr("ldlm.training.callbacks.visualisation.sample_texts", lambda *_: [text])
    fitted(tmp_path, make_tokenizer(), callbacks=[ShowSamples(num_samples=1, nfe=1)])
    assert visible(text) in capsys.readouterr().out


def test_tensorboard_shows_a_text_as_text():
    for text in [*EVIL, " ".join(EVIL), "a | b\n  c\td", "1. x", "<!-- x", "&#60;b>", "[r]: http://e"]:
        table = f"| | generated |\n|---|---|\n| 0 | {cell(text)} |"
        page = markdown_to_safe_html(table)
        assert re.findall(r"</?(\w+)", page) == re.findall(
            r"</?(\w+)", markdown_to_safe_html(table.replace(cell(text), "x"))
        )
        row = html.unescape(re.sub(r"<[^>]+>", "", page.split("<td>")[-1]))
        assert row.split() == visible(text).split()


def test_sample_logger_writes_what_tensorboard_shows_as_text(tmp_path, monkeypatch):
    written: list[str] = []
    logger = TensorBoardLogger(tmp_path)
    monkeypatch.setattr(logger.experiment, "add_text", lambda name, text, step: written.append(text))
    monkeypatch.setattr(
        "ldlm.training.callbacks.visualisation.sample_texts",
        lambda *_: ["![i](http://e/i.png) <img src=http://e> | `x`"],
    )
    fitted(tmp_path, evil_tokenizer(), callbacks=[SampleLogger(1, nfe=1)], logger=logger, val_check_interval=1)
    assert written
    assert "<img" not in markdown_to_safe_html(written[0])


# --- names and errors


@pytest.mark.parametrize(
    "words",
    [
        ["generate", f"{NAME}.ckpt"],
        ["generate", "model", "--sampler", NAME],
        ["generate", "model", "--output", f"{NAME}/x/../y/"],
        ["export", f"{NAME}.ckpt", "x"],
        ["evaluate", f"{NAME}.jsonl2"],
        ["evaluate", "b\udcffd.ckpt"],
        ["fit", "--config", f"{NAME}.yaml"],
        ["validate", "--ckpt_path", f"{NAME}.ckpt"],
        ["study", NAME, "--scale", "laptop"],
        [NAME],
        ["generate", f"--{NAME}"],
        ["--import", NAME],
    ],
)
def test_an_error_prints_a_name_so_that_nothing_in_it_acts(here, capsys, words):
    if "--output" in words:
        Path(NAME).parent.mkdir(exist_ok=True)
        Path(NAME).write_text("a file, and no folder")
    said = complaint(capsys, *words)
    assert acts(said) == []
    assert said.isprintable()


def test_what_a_checkpoint_says_is_printed_so_that_nothing_in_it_acts(here, capsys):
    content = {"state_dict": {}, "ldlm": {"format": f"\x1b[31m{NAME}", "model": {"class_path": "x", "init_args": {}}}}
    write(content, Path("format.ckpt"))
    assert r"\x1b[31m[/INST]" in complaint(capsys, "generate", "format.ckpt")
    part = {"class_path": f"{NAME}.Part", "init_args": {}}
    content["ldlm"] = {"format": 1, "model": {"class_path": "x", "init_args": {"token_encoder": part}}}
    write(content, Path("class.ckpt"))
    assert acts(complaint(capsys, "generate", "class.ckpt")) == []


def test_warnings_name_files_so_that_nothing_in_the_names_acts(tmp_path):
    path = tmp_path / f"{NAME}.ckpt"
    write({"global_step": 1}, path)
    digest_file(path).unlink()
    (tmp_path / f"{NAME}2.ckpt").write_bytes(b"x")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        read(path)
        assert last_checkpoint(tmp_path) is None
    told = [str(one.message) for one in caught]
    assert len([one for one in told if "[/INST]" in one]) == 3
    assert acts("".join(told)) == []


def test_a_source_of_any_name_is_scored_drawn_and_reported(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    lines = evaluation_folder(tmp_path, words=6)
    # The shortest ends that tell them apart are shown: these are the names themselves.
    names = ["[/x].jsonl", "y/x].jsonl", "_u$a_{\x1b[31m\r.jsonl", "b\udcffd.jsonl", "<b>&.jsonl"]
    for place, name in enumerate(names):
        Path(name).parent.mkdir(exist_ok=True)
        Path(name).write_text("\n".join(lines[place : place + 8]))
    written = ["--output", "scores.json", "--report", "report.html", "--figures", "figures"]
    cli.main(["evaluate", *names, "--scorer", "./scorer", "--protocol", "plain", *written])
    printed = capsys.readouterr().out
    assert acts(printed) == []
    assert "[/x].jsonl" in printed
    found = json.loads(Path("scores.json").read_text(encoding="utf-8"))
    assert [run["source"]["name"] for run in found["runs"]] == names
    page = Path("report.html").read_text(encoding="utf-8")
    assert "<b>&amp;" not in page
    assert "&lt;b&gt;&amp;.jsonl" in page
    assert {path.name for path in Path("figures").iterdir()} == {"frontier.png", "frontier.pdf"}


def test_matplotlib_draws_a_name_as_it_is_and_every_name_is_in_the_legend():
    names = ["_a", "$x", "$\\frac{$", "a_b", "[/INST]", "$1$"]
    curves = {name: {"diffusion": [[0, 1.0], [1, 2.0]]} for name in names}
    figure = loss_curves(curves, {"diffusion": "loss"})
    figure.canvas.draw()
    assert [text.get_text() for text in figure.axes[0].get_legend().get_texts()] == [drawn(name) for name in names]
    other = side_by_side(names, [(1.0, 0.1)] * 6, [None] * 6, "perplexity", ("a", "b"))
    other.canvas.draw()
    alone = Figure().text(0, 0, drawn("$x"))
    assert not alone.get_text().startswith("$")
    assert alone._preprocess_math(alone.get_text()) == ("$x", False)


def test_a_study_tells_of_a_failure_so_that_nothing_in_it_acts(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(study_module, "check_instruments", lambda scorer: None)
    monkeypatch.setattr(study_module, "run_all", lambda *_: ({"base, seed 0": f"fit ended ({NAME})"}, False))
    with pytest.raises(SystemExit):
        cli.main(["study", "table1", "--scale", "laptop", "--only", "base", "--output", "out", "--work", "work"])
    said = capsys.readouterr().err
    assert "[/INST]" in said
    assert acts(said) == []
    assert acts(next(Path("out").glob("*/table.md")).read_text(encoding="utf-8")) == []


def test_predict_says_where_its_file_is_whatever_the_name(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    trainer = make_trainer(tmp_path, [ReconstructionWriter(f"{NAME}.jsonl")])
    trainer.predict(make_task(tokenizer=make_tokenizer()), make_data(tmp_path))
    said = capsys.readouterr().err
    assert "[/INST]" in said
    assert acts(said) == []


def test_a_benchmark_shows_any_name(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    make_model(tokenizer=make_tokenizer()).save_pretrained(NAME)
    words = ["--repeats", "1", "--nfe", "1", "--batch_size", "1", "--device", "cpu"]
    cli.main(["bench", "sampling", NAME, *words])
    printed = capsys.readouterr().out
    assert "[/INST]" in printed
    assert acts(printed) == []


def test_rich_takes_brackets_in_a_plain_string_for_markup():
    """Why a `Text` is asked for: the day this fails, rich has changed."""
    with pytest.raises(MarkupError):
        Console(file=open(os.devnull, "w")).print("[/INST]")  # noqa: SIM115
