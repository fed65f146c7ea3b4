"""Parts described as plain data and made again; files of others' that must not be believed, or run."""

import importlib
import pickle
import sys
import zipfile

import pytest
import torch
from helpers.tiny import FixedTokenEncoder, make_model, make_task, make_tokenizer
from torch import nn

import ldlm
from ldlm.checkpoints import description as checkpoints
from ldlm.checkpoints.description import PARTS, build, describe, describe_model, read_json
from ldlm.checkpoints.pretrained import check_weights, read_checkpoint
from ldlm.diffusion.grids import AdaptedGrid, LogSNRGrid, MixedGrid, UniformGrid
from ldlm.diffusion.samplers import DDIM, Ancestral, DPMSolver2M, EulerMaruyama
from ldlm.diffusion.schedules import CosineSchedule, TangentSchedule
from ldlm.diffusion.timesteps import AdaptiveTimesteps, UniformTimesteps
from ldlm.nn.denoiser import DiT
from ldlm.nn.latent_coders import (
    IdentityDecoder,
    IdentityEncoder,
    PerceiverResamplerDecoder,
    PerceiverResamplerEncoder,
    SelfAttentionDecoder,
    SelfAttentionEncoder,
)
from ldlm.nn.token_decoders import LinearTokenDecoder, TransformerTokenDecoder
from ldlm.nn.token_encoders import EmbeddingTokenEncoder, PretrainedTokenEncoder, ShallowTokenEncoder
from ldlm.tokenizer import pack_tokenizer, unpack_tokenizer

KEPT = {"hidden_size": 16, "vocab_size": 40}  # an encoder that knows its sizes needs no files to be built
SIZES = {"hidden_size": 16, "latent_size": 12, "sequence_length": 8, "width": 8, "layers": 1, "heads": 2}
EVERY_PART = [
    (PretrainedTokenEncoder, {"model": "someone/model", "layer": -2, "revision": "abc", "sha256": "00", **KEPT}),
    (ShallowTokenEncoder, {"model": "package:a/b", "revision": None, "sha256": None, **KEPT}),
    (EmbeddingTokenEncoder, KEPT),
    (PerceiverResamplerEncoder, SIZES | {"num_latents": 4}),
    (PerceiverResamplerDecoder, SIZES | {"num_latents": 4}),
    (SelfAttentionEncoder, SIZES),
    (SelfAttentionDecoder, SIZES),
    (IdentityEncoder, {"hidden_size": 16, "sequence_length": 8}),
    (IdentityDecoder, {"hidden_size": 16, "sequence_length": 8}),
    (DiT, {"latent_size": 12, "num_latents": 8, "width": 8, "layers": 1, "heads": 2}),
    (LinearTokenDecoder, KEPT | {"from_embeddings": True}),
    (TransformerTokenDecoder, KEPT | {"layers": 1, "heads": 2}),
    (TangentSchedule, {"d": 2.5}),
    (CosineSchedule, {}),
    (UniformTimesteps, {}),
    (AdaptiveTimesteps, {"bins": 7, "memory": 50, "floor": 0.01}),
    (EulerMaruyama, {"beta_t_max": 0.8}),
    (Ancestral, {}),
    (DDIM, {"eta": 0.5}),
    (DPMSolver2M, {"eta": 1.0}),
    (UniformGrid, {"t_min": 0.2}),
    (LogSNRGrid, {"t_max": 0.99, "t_min": 0.02}),
    (AdaptedGrid, {"t_min": 0.3}),
]


@pytest.mark.parametrize(("kind", "arguments"), EVERY_PART, ids=[kind.__name__ for kind, _ in EVERY_PART])
def test_a_part_is_described_by_its_class_and_its_arguments_and_made_again_from_them(kind, arguments):
    description = describe(kind(**arguments))
    assert description["class_path"] == f"ldlm.{kind.__name__}"
    assert description["init_args"] | arguments == description["init_args"]
    again = build(description)
    assert type(again) is kind
    assert describe(again) == description


def test_every_concrete_part_of_the_library_is_in_the_list_above():
    concrete, waiting = set(), list(PARTS)
    while waiting:
        kind = waiting.pop()
        waiting += kind.__subclasses__()
        if kind.__module__.startswith("ldlm.") and not getattr(kind, "__abstractmethods__", None):
            concrete.add(kind)
    assert concrete - {MixedGrid} == {kind for kind, _ in EVERY_PART}


def test_parts_within_parts_are_described_and_made_again_to_any_depth():
    grid = MixedGrid(MixedGrid(UniformGrid(0.1), AdaptedGrid(0.2), 0.3), LogSNRGrid(0.99, 0.04), 0.6)
    description = describe(grid)
    assert description["init_args"]["first"]["init_args"]["first"] == {
        "class_path": "ldlm.UniformGrid",
        "init_args": {"t_min": 0.1},
    }
    again = build(description)
    assert describe(again) == description
    times = [g.times(9, TangentSchedule(), AdaptiveTimesteps()) for g in (grid, again)]
    assert torch.equal(*times)


class Forgetful(UniformGrid):
    def __init__(self, t_min: float = 0.1, colour: str = "red") -> None:
        super().__init__(t_min)


class Argument(UniformGrid):
    def __init__(self, value: object) -> None:
        super().__init__()
        self.value = value


def test_a_part_that_forgets_an_argument_is_told_the_line_to_write():
    with pytest.raises(ValueError, match=r"Forgetful takes an argument 'colour' .*write self\.colour = colour"):
        describe(Forgetful())


def test_an_argument_that_is_no_plain_data_is_named_with_its_type():
    with pytest.raises(ValueError, match=r"Argument\.value is a Tensor, which a checkpoint cannot describe"):
        describe(Argument(torch.zeros(1)))
    with pytest.raises(ValueError, match=r"Argument\.value is a dict"):
        describe(Argument({1: 2}))


def test_of_an_absolute_path_only_the_last_component_is_kept():
    for given in ("/home/someone/secret/model", "/home/someone/secret/model/"):
        assert describe(Argument(given))["init_args"] == {"value": "./model"}
        assert describe(Argument([{"a": given}]))["init_args"] == {"value": [{"a": "./model"}]}
    kept = ["package:x/model", "someone/model", "model", "./model"]
    assert describe(Argument(kept))["init_args"] == {"value": kept}


# --- what a file may name


def test_a_class_of_a_module_that_is_not_imported_is_named_with_the_flag_and_nothing_is_imported(tmp_path, monkeypatch):
    (tmp_path / "their_encoder.py").write_text(f"open({str(tmp_path / 'was_run')!r}, 'w')")
    monkeypatch.syspath_prepend(tmp_path)
    before = set(sys.modules)
    with pytest.raises(ValueError, match=r"class Mine of the module their_encoder.*--import their_encoder"):
        build({"class_path": "their_encoder.Mine", "init_args": {}})
    assert set(sys.modules) == before
    assert not (tmp_path / "was_run").exists()


@pytest.mark.parametrize(
    "class_path",
    [
        "os.system",
        "builtins.eval",
        "collections.OrderedDict",
        "torch.nn.modules.linear.Linear",
        "subprocess.Popen",
        "ldlm.checkpoints.description.build",
        "ldlm.diffusion.samplers.NoSuchClass",
        "ldlm.checkpoints.description.os",
    ],
)
def test_what_is_no_part_is_refused_without_being_called(class_path, tmp_path):
    importlib.import_module(class_path.rpartition(".")[0])
    harmful = {"class_path": class_path, "init_args": {"command": f"touch {tmp_path}/was_run"}}
    with pytest.raises(ValueError, match=f"uses {class_path}, which is not a part of a model"):
        build(harmful)
    with pytest.raises(ValueError, match=f"uses {class_path}, "):
        build({"class_path": "ldlm.MixedGrid", "init_args": {"first": harmful}})
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("class_path", ["system", "", "ldlm.Sampler.sample", None, 3])
def test_a_name_that_leads_nowhere_is_refused(class_path):
    with pytest.raises(ValueError, match="this model uses"):
        build({"class_path": class_path, "init_args": {}})


def test_what_stands_among_the_modules_and_is_none_is_refused(monkeypatch):
    for odd in (None, 3, object(), UniformGrid):
        monkeypatch.setitem(sys.modules, "odd_module", odd)
        with pytest.raises(ValueError, match="odd_module, which is not imported"):
            build({"class_path": "odd_module.UniformGrid", "init_args": {}})


def test_somebodys_own_encoder_is_made_again_once_its_module_is_imported(tmp_path, monkeypatch):
    (tmp_path / "my_own_encoder.py").write_text(
        "from ldlm.nn.token_encoders import EmbeddingTokenEncoder\n"
        "class Mine(EmbeddingTokenEncoder):\n"
        "    def __init__(self, depth: int = 1) -> None:\n"
        "        super().__init__(hidden_size=16, vocab_size=40)\n"
        "        self.depth = depth\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    module = importlib.import_module("my_own_encoder")
    description = describe(module.Mine(depth=5))
    assert description == {"class_path": "my_own_encoder.Mine", "init_args": {"depth": 5}}
    again = build(description)
    assert (type(again), again.depth) == (module.Mine, 5)
    monkeypatch.delitem(sys.modules, "my_own_encoder")
    with pytest.raises(ValueError, match="--import my_own_encoder"):
        build(description)


def test_a_part_whose_types_are_known_to_checkers_alone_is_made_again(tmp_path, monkeypatch):
    (tmp_path / "my_typed_grid.py").write_text(
        "from __future__ import annotations\n"
        "from typing import TYPE_CHECKING\n"
        "from ldlm.diffusion.grids import MixedGrid, TimeGrid, UniformGrid\n"
        "if TYPE_CHECKING:\n"
        "    from nowhere import Number\n"
        "class Mine(MixedGrid):\n"
        "    def __init__(self, first: TimeGrid, weight: Number = 0.5) -> None:\n"
        "        super().__init__(first, UniformGrid(), weight)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    module = importlib.import_module("my_typed_grid")
    again = build(describe(module.Mine(UniformGrid(0.2))))
    assert (type(again), again.first.t_min) == (module.Mine, 0.2)


def test_plain_data_are_built_as_they_are():
    for value in (None, 3, 0.5, "text", [1, [2]], {"a": 1}):
        assert build(value) == value


# --- files


class Malicious:
    def __init__(self, marker) -> None:
        self.marker = marker

    def __reduce__(self):
        return (open, (str(self.marker), "w"))


@pytest.mark.parametrize("zipped", [True, False])
def test_a_checkpoint_that_would_run_something_is_refused_unrun(tmp_path, zipped):
    marker, file = tmp_path / "was_run", tmp_path / "bad.ckpt"
    content = {"ldlm": {"format": 2}, "state_dict": Malicious(marker)}
    torch.save(content, file, _use_new_zipfile_serialization=zipped)
    with pytest.raises(ValueError, match=r"bad\.ckpt (could not be read|is truncated or not a checkpoint)"):
        read_checkpoint(file)
    assert not marker.exists()
    torch.load(file, weights_only=False)
    assert marker.exists()  # the file does run what it carries if it is let


def good_checkpoint(file):
    torch.save({"ldlm": {"format": 2, "model": {"init_args": {}}}, "state_dict": {"x": torch.ones(9)}}, file)
    return file


def test_a_whole_checkpoint_is_read_as_it_was_written(tmp_path):
    content = read_checkpoint(good_checkpoint(tmp_path / "good.ckpt"))
    assert torch.equal(content["state_dict"]["x"], torch.ones(9))
    assert content["ldlm"] == {"format": 2, "model": {"init_args": {}}}


def test_a_missing_checkpoint_is_told_with_those_that_are_there(tmp_path):
    good_checkpoint(tmp_path / "good.ckpt")
    with pytest.raises(ValueError, match=r"none\.ckpt does not exist; there are .*good\.ckpt"):
        read_checkpoint(tmp_path / "none.ckpt")
    with pytest.raises(ValueError, match=r"none\.ckpt does not exist$"):
        read_checkpoint(tmp_path / "nowhere" / "none.ckpt")


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.99])
def test_a_truncated_checkpoint_is_called_truncated(tmp_path, share):
    file = good_checkpoint(tmp_path / "cut.ckpt")
    file.write_bytes(file.read_bytes()[: int(share * file.stat().st_size)])
    with pytest.raises(ValueError, match=r"cut\.ckpt is truncated or not a checkpoint"):
        read_checkpoint(file)


def test_files_of_something_else_are_told_apart(tmp_path):
    file = tmp_path / "other.ckpt"
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("letter.txt", "hello")
    with pytest.raises(ValueError, match=r"other\.ckpt could not be read as a checkpoint"):
        read_checkpoint(file)
    for content in ({"state_dict": {}}, [1, 2], torch.ones(2)):
        torch.save(content, file)
        with pytest.raises(ValueError, match=r"other\.ckpt is of something else"):
            read_checkpoint(file)
    file.write_bytes(pickle.dumps({"a": 1}))
    with pytest.raises(ValueError, match="not a checkpoint"):
        read_checkpoint(file)


def test_a_checkpoint_of_another_format_names_both(tmp_path, monkeypatch):
    file = good_checkpoint(tmp_path / "later.ckpt")
    monkeypatch.setattr(checkpoints, "FORMAT", 0)
    with pytest.raises(ValueError, match="has format 2, and this ldlm reads 0: use the ldlm that wrote it"):
        read_checkpoint(file)


def test_weights_that_do_not_fit_are_named():
    model = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 1))
    state = model.state_dict()
    missing = {name: value for name, value in state.items() if name != "1.bias"}
    with pytest.raises(ValueError, match=r"^x\.ckpt does not fit this model: it lacks 1\.bias$"):
        check_weights(model, missing, "x.ckpt")
    with pytest.raises(ValueError, match=r"it has too much a, b, c \.\.\.$"):
        check_weights(model, state | dict.fromkeys("abcd", torch.ones(1)), "x.ckpt")
    wrong = missing | {"0.weight": torch.ones(3, 3), "2.bias": torch.ones(1)}
    with pytest.raises(ValueError, match=r"lacks 1\.bias; it has too much 2\.bias; it has other shapes for 0\.weight$"):
        check_weights(model, wrong, "x.ckpt")
    check_weights(model, {name: torch.full_like(value, 7) for name, value in state.items()}, "x.ckpt")  # no complaint


def test_a_tokenizer_comes_back_the_same_and_carries_no_path(tmp_path):
    tokenizer = make_tokenizer()
    tokenizer.save_pretrained(tmp_path / "folder")
    reloaded = unpack_tokenizer(pack_tokenizer(type(tokenizer).from_pretrained(tmp_path / "folder")))
    text = "word3 word0 unheard-of word36"
    assert reloaded(text)["input_ids"] == tokenizer(text)["input_ids"] == [6, 3, 0, 39]
    assert (reloaded.bos_token_id, reloaded.eos_token_id, len(reloaded)) == (1, 2, 40)
    packed = pack_tokenizer(type(tokenizer).from_pretrained(tmp_path / "folder"))
    assert not any(str(tmp_path).encode() in content.numpy().tobytes() for content in packed.values())


def test_real_tokenizers_come_back_the_same(gpt2_tokenizer, bert_tokenizer):
    text = "The State of the Union, 1790: naïve coöperation — 'tis <|endoftext|> [SEP] 42"
    for tokenizer in (gpt2_tokenizer, bert_tokenizer):
        reloaded = unpack_tokenizer(pack_tokenizer(tokenizer))
        assert reloaded(text)["input_ids"] == tokenizer(text)["input_ids"]
        assert reloaded.decode(tokenizer(text)["input_ids"]) == tokenizer.decode(tokenizer(text)["input_ids"])


def test_a_tokenizers_file_names_cannot_leave_their_folder(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    files = pack_tokenizer(make_tokenizer())
    unpack_tokenizer(files | {"../../escaped.txt": torch.zeros(3, dtype=torch.uint8)})
    assert not list(tmp_path.glob("**/escaped.txt"))
    assert not (tmp_path.parent / "escaped.txt").exists()


@pytest.mark.parametrize(("content", "message"), [("{", "could not be read as JSON"), ("[1]", "holds no JSON object")])
def test_json_that_is_no_object_is_told(tmp_path, content, message):
    (tmp_path / "a.json").write_text(content)
    with pytest.raises(ValueError, match=f"a\\.json {message}"):
        read_json(tmp_path / "a.json")
    with pytest.raises(ValueError, match="could not be read as JSON"):
        read_json(tmp_path / "none.json")


def test_a_models_description_is_plain_and_names_its_version_and_every_part():
    about = describe_model(make_model(tokenizer=make_tokenizer(), grid=MixedGrid(AdaptedGrid(), LogSNRGrid())))
    assert about["version"] == ldlm.__version__
    assert about["format"] == 2
    arguments = about["model"]["init_args"]
    assert "tokenizer" not in arguments
    assert arguments["token_encoder"]["class_path"] == f"{FixedTokenEncoder.__module__}.FixedTokenEncoder"
    assert arguments["grid"]["init_args"]["second"]["class_path"] == "ldlm.LogSNRGrid"


def test_a_tasks_description_names_the_objective_and_every_argument_and_an_exports_neither(tmp_path):
    task = make_task(learning_rate=2e-4, token_fraction=0.5, allow_changes=["sigma_dec"])
    about = task.about_run()
    assert about["model"] == describe_model(task.model)["model"]
    assert "run" not in about  # which a Trainer stands behind
    assert about["training"]["class_path"] == "ldlm.LDLMTask"
    arguments = about["training"]["init_args"]
    assert arguments["objective"]["class_path"] == "ldlm.JointObjective"
    assert arguments["objective"]["init_args"]["token_fraction"] == 0.5
    assert (arguments["learning_rate"], arguments["betas"], arguments["warmup_steps"]) == (2e-4, [0.9, 0.98], 0)
    assert not {"model", "allow_changes"} & arguments.keys()
    task.model.save_pretrained(tmp_path)
    assert read_json(tmp_path / "ldlm.json").keys() == {"format", "version", "model", "sha256"}


@pytest.mark.parametrize("content", [{"ldlm": 3, "state_dict": {}}, {"ldlm": {"format": 2}}, [1, 2]])
def test_a_checkpoint_that_lacks_what_ours_have_is_of_something_else(tmp_path, content):
    torch.save(content, tmp_path / "changed.ckpt")
    with pytest.raises(ValueError, match="is of something else"):
        read_checkpoint(tmp_path / "changed.ckpt")


@pytest.mark.parametrize(
    ("class_path", "arguments"), [("ldlm.DiT", {"wings": 2}), ("ldlm.Denoiser", {"latent_size": 1})]
)
def test_a_part_that_cannot_be_made_from_its_description_is_named(class_path, arguments):
    with pytest.raises(ValueError, match=f"{class_path} cannot be made from what the file says of it"):
        build({"class_path": class_path, "init_args": arguments})
