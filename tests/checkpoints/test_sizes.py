"""A file cannot make its reader take more memory or time than its own size allows.

Every case runs under a limit on memory that is a small part of what it claims; what must still load is compared bit for
bit with what was saved.
"""

import gzip
import json
import re
import shutil
import signal
import threading
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
import torch
import yaml
from helpers.command import complaint
from helpers.memory import at_most
from helpers.recipe import RECIPE
from helpers.tiny import (
    HIDDEN,
    LATENT,
    LENGTH,
    VOCAB,
    make_home,
    make_model,
    make_pretrained,
    make_task,
    make_tokenizer,
    make_trainer,
    rows,
    save_both,
)
from torch import Tensor, nn

from ldlm.checkpoints.description import describe, make
from ldlm.checkpoints.integrity import read
from ldlm.checkpoints.io import CheckpointFiles
from ldlm.checkpoints.pretrained import read_checkpoint
from ldlm.checkpoints.resume import last_checkpoint
from ldlm.data.corpus import FileCorpus, open_corpus
from ldlm.data.datamodule import PackedTextDataModule
from ldlm.data.packing import pack
from ldlm.hub import weights_size
from ldlm.model import LDLM
from ldlm.nn.denoiser import DiT
from ldlm.nn.latent_coders import PerceiverResamplerEncoder, SelfAttentionDecoder
from ldlm.nn.token_decoders import TransformerTokenDecoder
from ldlm.nn.token_encoders import EmbeddingTokenEncoder, PretrainedTokenEncoder
from ldlm.tokenizer import pack_tokenizer, unpack_tokenizer

pytestmark = pytest.mark.filterwarnings("ignore:.*(has no .*sha256 beside it|passed over).*")


@pytest.fixture(autouse=True)
def no_case_takes_long():
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGALRM, lambda *_: pytest.fail("this takes longer than the file's size allows"))
        signal.alarm(60)
    yield
    signal.alarm(0)


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    """A checkpoint with an optimizer's state in it, and an export."""
    folder = tmp_path_factory.mktemp("saved")
    model = make_model(tokenizer=make_tokenizer())
    save_both(model, folder)
    return folder


def repeated(count: int) -> Tensor:
    """One byte that says it is so many."""
    return torch.zeros(1, dtype=torch.uint8).expand(count)


def overlapping(count: int) -> Tensor:
    """2 ``count`` numbers that say they are ``count``²."""
    return torch.zeros(2 * count).as_strided((count, count), (1, 1))


# --- tensors


@pytest.mark.parametrize("make", [repeated, overlapping])
@pytest.mark.parametrize(
    "place",
    ["tokenizer", "state_dict", "raw_parameters", "optimizer_states", "callbacks", "global_step", "hyper_parameters"],
)
def test_a_tensor_of_a_checkpoint_is_as_large_as_its_shape_says(saved, tmp_path, place, make):
    content = read_checkpoint(saved / "whole.ckpt")
    lie = make(3_000_000_000 if make is repeated else 30_000)
    content[place] = {
        "tokenizer": {**content["tokenizer"], "tokenizer.json": lie},
        "state_dict": {**content["state_dict"], "token_encoder.mean": lie},
        "raw_parameters": {"denoiser.input.weight": lie},
        "optimizer_states": [{"state": {0: {"exp_avg": lie}}, "param_groups": []}],
        "callbacks": {"Somebody": {"state": (1, [lie])}},
        "global_step": lie,
        "hyper_parameters": {"a": {"b": [lie]}},
    }[place]
    torch.save(content, tmp_path / "lie.ckpt")
    assert (tmp_path / "lie.ckpt").stat().st_size < 1_000_000
    with at_most(500):
        for loader in (read, LDLM.load_from_checkpoint, CheckpointFiles().load_checkpoint):
            with pytest.raises(ValueError, match=r"lie\.ckpt .*holds a tensor of shape \[.* bytes for all its numbers"):
                loader(tmp_path / "lie.ckpt")
        assert last_checkpoint(tmp_path) is None


def test_files_of_a_tokenizer_that_are_the_same_bytes_are_not_written_again_and_again(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    one = torch.zeros(1_000_000, dtype=torch.uint8)
    with pytest.raises(ValueError, match=r"^x\.ckpt holds no files of a tokenizer .*the same bytes"):
        unpack_tokenizer({f"{i}.json": one for i in range(10_000)}, "x.ckpt")
    again = unpack_tokenizer(pack_tokenizer(make_tokenizer()))
    assert again.get_vocab() == make_tokenizer().get_vocab()


@pytest.mark.parametrize("layers", [3, 900])
def test_one_storage_does_not_stand_for_many_layers(saved, tmp_path, layers):
    """Layers whose weights are all the same bytes: the file is small, the model would not be."""
    content = read_checkpoint(saved / "whole.ckpt")
    width = 64
    model = make_model(denoiser=DiT(LATENT, LENGTH, width=width, layers=1, heads=2))
    block = {name: value for name, value in model.state_dict().items() if "denoiser" in name}
    state = {name: value for name, value in content["state_dict"].items() if "denoiser" not in name} | block
    for layer in range(1, layers):
        state |= {re.sub(r"(blocks|modulators)\.0", rf"\1.{layer}", name): value for name, value in block.items()}
    about = describe(model, leave_out=("tokenizer",))
    about["init_args"]["denoiser"]["init_args"]["layers"] = layers
    content["ldlm"]["model"], content["state_dict"] = about, state
    torch.save(content, tmp_path / "lie.ckpt")
    with at_most(200), pytest.raises(ValueError, match=r"it has [\d,]+ numbers, and the model has|larger model than"):
        LDLM.load_from_checkpoint(tmp_path / "lie.ckpt")


# --- descriptions

HUGE = {
    "a width": ("denoiser", {"width": 8192}),
    "a width of the latent encoder": ("latent_encoder", {"width": 65_536}),
    "a width of the latent decoder": ("latent_decoder", {"width": 65_536}),
    "bins": ("timesteps", {"bins": 10**9}),
    "layers of the denoiser": ("denoiser", {"layers": 10**7}),
    "layers of the latent encoder": ("latent_encoder", {"layers": 10**7}),
    "layers of the latent decoder": ("latent_decoder", {"layers": 10**7}),
    "as many layers as are allowed": ("denoiser", {"layers": 1000}),
    "latents": ("*", {"num_latents": 10**9}),
    "a row": ("*", {"sequence_length": 10**9}),
    "a vocabulary": ("*", {"vocab_size": 10**9}),
    "hidden states": ("*", {"hidden_size": 10**8}),
    "latent vectors": ("*", {"latent_size": 10**8}),
    "all of them": ("*", {"width": 10**6, "num_latents": 10**6, "layers": 10**6, "hidden_size": 10**6}),
}  # fmt: skip


def altered(about: dict, part: str, changes: dict) -> dict:
    """A model's description with other arguments for one part, or for whichever has them."""
    about = json.loads(json.dumps(about))
    model = about["model"]["init_args"]
    parts = [value["init_args"] for name, value in model.items() if isinstance(value, dict) and part in ("*", name)]
    for arguments in [*parts, *([model] if part == "*" else [])]:
        arguments.update({name: value for name, value in changes.items() if name in arguments})
    return about


@pytest.mark.parametrize("name", HUGE)
def test_a_description_larger_than_its_file_is_refused_before_it_takes_memory_or_time(saved, tmp_path, name):
    part, changes = HUGE[name]
    content = read_checkpoint(saved / "whole.ckpt")
    content["ldlm"] = altered(content["ldlm"], part, changes)
    torch.save(content, tmp_path / "lie.ckpt")
    shutil.copytree(saved / "export", tmp_path / "export")
    about = altered(json.loads((tmp_path / "export/ldlm.json").read_text()), part, changes)
    (tmp_path / "export/ldlm.json").write_text(json.dumps(about))
    with at_most(500):
        for load, source in ((LDLM.load_from_checkpoint, "lie.ckpt"), (LDLM.from_pretrained, "export")):
            with pytest.raises(
                ValueError, match=r"does not fit this model|larger model than it holds|layers="
            ) as caught:
                load(tmp_path / source)
            assert len(str(caught.value)) < 500


@pytest.mark.parametrize("name", ["denoiser", "latent_encoder", "latent_decoder", "token_decoder"])
def test_a_part_that_the_file_leaves_to_a_default_is_compared_too(saved, tmp_path, name):
    content = read_checkpoint(saved / "whole.ckpt")
    content["ldlm"] = altered(content["ldlm"], "*", {"sequence_length": 10**8, "num_latents": 10**8})
    content["ldlm"]["model"]["init_args"][name] = None
    torch.save(content, tmp_path / "lie.ckpt")
    with at_most(500), pytest.raises(ValueError, match=r"does not fit this model|larger model|differs, "):
        LDLM.load_from_checkpoint(tmp_path / "lie.ckpt")


class Pyramid(EmbeddingTokenEncoder):
    """Somebody's own part: as many layers as its argument says, made of numbers that its constructor computes."""

    def __init__(self, hidden_size: int = HIDDEN, vocab_size: int = VOCAB, steps: int = 2) -> None:
        super().__init__(hidden_size, vocab_size)
        self.steps = steps
        source = torch.Generator().manual_seed(1)
        self.register_buffer("table_of_waves", torch.randn(7, generator=source), persistent=False)
        self.scale = float(self.table_of_waves.sum().item())  # no such thing on the meta device
        for step in range(steps):
            self.register_parameter(f"step{step}", nn.Parameter(torch.randn(3, generator=source)))
        self.tied = self.table


def test_a_part_of_ones_own_that_computes_in_its_constructor_loads_with_all_its_numbers(tmp_path):
    model = make_model(token_encoder=Pyramid())
    trainer = make_trainer(tmp_path, [])
    trainer.strategy.connect(make_task(model=model))
    trainer.save_checkpoint(tmp_path / "own.ckpt")
    before = torch.random.get_rng_state()
    again = LDLM.load_from_checkpoint(tmp_path / "own.ckpt")
    torch.random.set_rng_state(before)
    assert {name: value.tolist() for name, value in again.state_dict().items()} == {
        name: value.tolist() for name, value in model.state_dict().items()
    }
    assert torch.equal(again.token_encoder.table_of_waves, Pyramid().table_of_waves)
    assert again.token_encoder.scale == Pyramid().scale
    assert again.token_encoder.tied is again.token_encoder.table
    assert torch.equal(again.encode(rows(2)), model.eval().encode(rows(2)))
    content = torch.load(tmp_path / "own.ckpt", weights_only=True)
    content["ldlm"]["model"]["init_args"]["token_encoder"]["init_args"]["steps"] = 10**7
    torch.save(content, tmp_path / "lie.ckpt")
    with at_most(500), pytest.raises(ValueError, match=r"larger model than it holds"):
        LDLM.load_from_checkpoint(tmp_path / "lie.ckpt")


def test_comparing_first_draws_no_random_numbers(saved):
    """Whoever seeds, loads and goes on gets what they got when a model was made once."""
    torch.manual_seed(0)
    about = read_checkpoint(saved / "whole.ckpt")["ldlm"]["model"]["init_args"]
    make(LDLM, about | {"tokenizer": None})
    once = torch.rand(3)
    torch.manual_seed(0)
    LDLM.load_from_checkpoint(saved / "whole.ckpt")
    assert torch.equal(torch.rand(3), once)


def bomb(leaf: object, levels: int = 40) -> list:
    for _ in range(levels):
        leaf = [leaf, leaf]
    return leaf


@pytest.mark.parametrize("place", ["argument", "part", "training", "version", "model"])
@pytest.mark.parametrize("kind", ["values", "letters", "itself"])
def test_references_to_references_in_a_description_are_not_followed_for_ever(saved, tmp_path, place, kind):
    content = read_checkpoint(saved / "whole.ckpt")
    evil: list = bomb("a") if kind == "values" else [["x" * 1000] * 1000] * 1000
    if kind == "itself":
        evil = []
        evil.append(evil)
    model = content["ldlm"]["model"]
    if place == "argument":
        model["init_args"]["sigma_dec"] = evil
    elif place == "part":
        model["init_args"]["schedule"]["init_args"]["d"] = evil
    elif place == "training":
        content["ldlm"]["training"]["init_args"]["objective"]["init_args"]["token_weight"] = evil
    elif place == "version":
        content["ldlm"]["version"] = evil
    else:
        content["ldlm"]["model"]["class_path"] = evil
    torch.save(content, tmp_path / "bomb.ckpt")
    with at_most(500), pytest.raises(ValueError, match=r"bomb\.ckpt holds no description of a model"):
        LDLM.load_from_checkpoint(tmp_path / "bomb.ckpt")


def test_a_recipe_with_ten_million_layers_is_refused_before_it_is_built(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    make_home(tmp_path)
    recipe = json.loads(json.dumps(RECIPE))
    recipe["model"]["denoiser"]["init_args"]["layers"] = 10**7
    Path("recipe.yaml").write_text(yaml.safe_dump(recipe))
    with at_most(1000):
        assert "layers=10000000 must be at least 0 and at most 1,000" in complaint(
            capsys, "fit", "--config", "recipe.yaml"
        )


@pytest.mark.parametrize(
    "make",
    [
        lambda layers: DiT(layers=layers),
        lambda layers: PerceiverResamplerEncoder(layers=layers),
        lambda layers: SelfAttentionDecoder(layers=layers),
        lambda layers: TransformerTokenDecoder(layers=layers),
    ],
)
@pytest.mark.parametrize("layers", [-1, 1001, 10**7])
def test_a_number_of_layers_is_looked_at_before_the_first_is_built(make, layers):
    with torch.device("meta"), pytest.raises(ValueError, match=rf"layers={layers} must be"):
        make(layers)


# --- folders: JSON and configurations


@pytest.mark.parametrize("name", ["ldlm.json", "tokenizer.json", "tokenizer_config.json", "config.json"])
def test_an_export_with_a_json_file_of_absurd_size_is_refused_unread(saved, tmp_path, name):
    shutil.copytree(saved / "export", tmp_path / "export")
    with open(tmp_path / "export" / name, "ab") as file:
        file.truncate(3 * 2**30)  # of nothing: no disk is taken
    with at_most(500), pytest.raises(ValueError, match=rf"{name} .*(bytes|altered)"):
        LDLM.from_pretrained(tmp_path / "export")


def test_a_description_of_twenty_megabytes_is_none(saved, tmp_path):
    shutil.copytree(saved / "export", tmp_path / "export")
    (tmp_path / "export/ldlm.json").write_text('{"a": [' + "[]," * 7_000_000 + "[]]}")
    with at_most(300), pytest.raises(ValueError, match=r"ldlm\.json could not be read as JSON \(it has 21,0"):
        LDLM.from_pretrained(tmp_path / "export")


@pytest.mark.parametrize("changes", [{"num_hidden_layers": 10**7}, {"vocab_size": 10**9}, {"intermediate_size": 10**9}])
def test_a_token_encoders_configuration_describes_no_more_than_its_weights(tmp_path, changes):
    make_pretrained("bert", tmp_path)
    encoder = PretrainedTokenEncoder(str(tmp_path), layer=-1, hidden_size=HIDDEN, vocab_size=VOCAB)
    right = encoder(rows(2))
    tensors, numbers = weights_size(tmp_path)
    assert tensors > 60
    assert numbers == sum(p.numel() for p in encoder.frozen().parameters())
    about = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(about | changes))
    encoder._frozen.clear()
    with at_most(1000), pytest.raises(ValueError, match="describes a larger model than it holds"):
        encoder(rows(2))
    (tmp_path / "config.json").write_text(json.dumps(about))
    assert torch.equal(encoder(rows(2)), right)


# --- corpora

LONG = 100 * 2**20
LINES = {
    "txt as one line": ("a.txt", "line", lambda: b"x" * LONG),
    "txt as one paragraph": ("a.txt", "paragraph", lambda: b"word word\n" * (LONG // 10)),
    "txt as one document": ("a.txt", "document", lambda: b"word\n\n" * (LONG // 6)),
    "txt of blank lines": ("a.txt", "paragraph", lambda: b" " * LONG),
    "jsonl of no text": ("a.jsonl", "line", lambda: b"[" + b"[]," * (LONG // 50)),
    "jsonl.gz as one line": ("a.jsonl.gz", "line", lambda: b'{"text": "' + b"x" * LONG + b'"}'),
    "jsonl.gz with another field": ("a.jsonl.gz", "line", lambda: b'{"x": "' + b"x" * LONG + b'", "text": "a"}'),
}


@pytest.mark.parametrize("name", LINES)
def test_a_line_or_a_document_of_any_length_is_refused_where_it_gets_too_long(tmp_path, name):
    file, unit, make = LINES[name]
    data = make()
    (tmp_path / file).write_bytes(gzip.compress(data, 9) if file.endswith(".gz") else data)
    if file.endswith(".gz"):
        assert (tmp_path / file).stat().st_size < 150_000
    del data
    said = rf"{re.escape(file)}, line \d+.* (max_document_bytes|outside of its strings)"
    with at_most(80), pytest.raises(ValueError, match=said) as caught:
        list(open_corpus(str(tmp_path / file), text_unit=unit))
    assert len(str(caught.value).splitlines()) == 1


def test_a_document_as_long_as_the_argument_allows_is_read_and_one_byte_more_is_not(tmp_path):
    for kind, frame in (("txt", "{}\n"), ("jsonl", '{{"text": "{}"}}\n')):
        text = "é" * 500
        line = frame.format(text)
        (tmp_path / f"a.{kind}").write_text(line + line, encoding="utf-8")
        size = len(line.encode())
        assert list(FileCorpus(tmp_path / f"a.{kind}", text_unit="line", max_document_bytes=size)) == [text, text]
        with pytest.raises(ValueError, match=rf"a\.{kind}, line 1 has more than the {size - 1:,} bytes"):
            list(FileCorpus(tmp_path / f"a.{kind}", text_unit="line", max_document_bytes=size - 1))
    data = {"sequence_length": 8, "batch_size": 2, "cache_dir": str(tmp_path / "cache"), "text_unit": "line"}
    module = PackedTextDataModule(str(tmp_path / "a.txt"), make_tokenizer(), max_document_bytes=1000, **data)
    with pytest.raises(ValueError, match=r"line 1 has more than the 1,000 bytes .*--data\.max_document_bytes"):
        module.prepare_data()
    with pytest.raises(ValueError, match="max_document_bytes=0 must be at least 1"):
        PackedTextDataModule(str(tmp_path / "a.txt"), make_tokenizer(), max_document_bytes=0, **data)


def test_the_limit_does_not_change_which_packed_file_is_found(tmp_path):
    (tmp_path / "a.txt").write_text("word1 word2\n\nword3")
    found = [
        pack(open_corpus(str(tmp_path / "a.txt"), max_document_bytes=size), make_tokenizer(), tmp_path / "cache")
        for size in (100, 1000)
    ]
    assert found[0] == found[1]


def test_a_long_line_of_text_with_quotes_and_backslashes_is_still_a_line(tmp_path):
    text = '"[],{}\\\\" \\" é\n' * 100_000
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": text, "n": [1, 2]}) + "\n")
    assert list(open_corpus(str(tmp_path / "a.jsonl"))) == [text]


def parquet(path: Path, text: str, times: int, dictionary: bool) -> None:
    """One text, ``times`` rows, each of which refers to it."""
    column = pyarrow.DictionaryArray.from_arrays(pyarrow.array([0] * times, pyarrow.int32()), pyarrow.array([text]))
    table = pyarrow.table({"text": column if dictionary else column.cast(pyarrow.string())})
    pyarrow.parquet.write_table(table, path, compression="zstd")


@pytest.mark.parametrize(("times", "dictionary"), [(1, False), (20, True), (20, False), (1, True)])
def test_a_long_cell_of_parquet_is_refused_and_never_repeated(tmp_path, times, dictionary):
    parquet(tmp_path / "a.parquet", "x" * (40 * 2**20), times, dictionary)
    assert (tmp_path / "a.parquet").stat().st_size < 100_000
    with at_most(400), pytest.raises(ValueError, match=r"a\.parquet, (after row 0|row 1).* max_document_bytes"):
        list(open_corpus(str(tmp_path / "a.parquet")))


def test_a_cell_of_parquet_that_is_a_list_without_end_is_refused_unread(tmp_path):
    values = pyarrow.ListArray.from_arrays([0, 30_000_000], pyarrow.nulls(30_000_000, pyarrow.string()))
    pyarrow.parquet.write_table(pyarrow.table({"text": values}), tmp_path / "a.parquet")
    del values
    with at_most(100), pytest.raises(ValueError, match=r"a\.parquet, row 1: 'text' holds list"):
        list(open_corpus(str(tmp_path / "a.parquet")))
