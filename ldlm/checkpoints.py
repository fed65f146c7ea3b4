"""Checkpoints and exports: files that describe themselves and are read without running what is in them.

In: a model made of parts, or a file. Out: a description (plain data), a model's classes and arguments, tensors.
No section of the paper.

Every part keeps each argument of its constructor under the argument's own name. That one rule lets `describe` write a
part as ``{"class_path": ..., "init_args": {...}}`` and `build` make it again, whether it came from YAML or a script.
Nothing is imported on a file's word: `build` takes classes only from modules that are already imported.
"""

import hashlib
import inspect
import json
import os
import re
import sys
import tempfile
from pathlib import Path
from types import ModuleType
from typing import Any, TypeVar, get_type_hints

import torch
from torch import Tensor, nn
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from ldlm.decoders import TokenDecoder
from ldlm.denoiser import Denoiser
from ldlm.encoders import TokenEncoder
from ldlm.files import FULL, leads_out, naming
from ldlm.grids import TimeGrid
from ldlm.hub import check_json, local_folder
from ldlm.latents import LatentDecoder, LatentEncoder
from ldlm.packing import name_tokenizer, tokenizer_digest
from ldlm.samplers import Sampler
from ldlm.saving import LOOKS, read
from ldlm.schedules import NoiseSchedule
from ldlm.sizes import check_length, storage_bytes, storage_numbers
from ldlm.timesteps import TimestepSampler

PARTS = (
    TokenEncoder,
    LatentEncoder,
    LatentDecoder,
    TokenDecoder,
    Denoiser,
    NoiseSchedule,
    TimestepSampler,
    Sampler,
    TimeGrid,
)
FORMAT = 1
DESCRIPTION = "ldlm.json"  # of an export
LARGEST_DESCRIPTION = 2**24  # bytes of it; the paper's model takes 3 kB
T = TypeVar("T")


def describe(part: object, leave_out: tuple[str, ...] = (), kind: type | None = None) -> dict[str, Any]:
    """A part as plain data: the path of its class and the arguments that make it again.

    Args:
        part: Anything that keeps its constructor's arguments under their own names.
        leave_out: Arguments not to describe.
        kind: The class to make it again as; None for its own.

    Raises:
        ValueError: If an argument is not kept under its name, or is not plain data or a part.

    >>> from ldlm.schedules import TangentSchedule
    >>> describe(TangentSchedule(d=3.0))
    {'class_path': 'ldlm.schedules.TangentSchedule', 'init_args': {'d': 3.0}}
    """
    kind = type(part) if kind is None else kind
    arguments = {}
    # A class without a constructor of its own has nn.Module's, which takes *args and **kwargs and uses neither.
    bare = isinstance(part, nn.Module) and inspect.getattr_static(kind, "__init__") is nn.Module.__init__
    for name in [] if bare else list(inspect.signature(kind).parameters):
        if name in leave_out:
            continue
        try:
            value = getattr(part, name)
        except AttributeError:
            raise ValueError(
                f"{kind.__name__} takes an argument {name!r} but keeps no attribute of that name, so no checkpoint "
                f"could make it again: write self.{name} = {name} in its constructor"
            ) from None
        arguments[name] = _plain(value, f"{kind.__name__}.{name}")
    return {"class_path": f"{kind.__module__}.{kind.__qualname__}", "init_args": arguments}


def _plain(value: Any, name: str) -> Any:
    """An argument as JSON-able data."""
    if isinstance(value, PARTS):
        return describe(value)
    if isinstance(value, str) and leads_out(value):
        # A path on this machine means nothing elsewhere, and may tell more than its owner wants told.
        return f"./{os.path.basename(os.path.abspath(value))}"  # not to be taken for a hub id
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, list | tuple):
        return [_plain(item, name) for item in value]
    if isinstance(value, dict) and all(isinstance(key, str) for key in value):
        return {key: _plain(item, name) for key, item in value.items()}
    raise ValueError(
        f"{name} is a {type(value).__name__}, which a checkpoint cannot describe: arguments of parts are numbers, "
        "strings, lists, dictionaries or other parts"
    )


def build(description: Any) -> Any:
    """The inverse of `describe` for a part; plain data are returned as they are.

    Raises:
        ValueError: If a class is not in a module that is already imported, or is not one of ldlm's parts, or an
            argument is a path that `describe` would not have written.
    """
    if isinstance(description, str) and leads_out(description):
        raise ValueError(f"{description!r} leads out of the current folder, which no file may: name it in the command")
    if isinstance(description, list):
        return [build(item) for item in description]
    if not isinstance(description, dict):
        return description
    if description.keys() != {"class_path", "init_args"}:
        return {key: build(item) for key, item in description.items()}
    module_name, _, class_name = str(description["class_path"]).rpartition(".")
    module = sys.modules.get(module_name)
    if not isinstance(module, ModuleType):
        raise ValueError(
            f"this model uses the class {class_name} of the module {module_name}, which is not imported, and files "
            f"are not allowed to import anything: import {module_name} first, or add --import {module_name}"
        )
    kind = vars(module).get(class_name)
    if not (isinstance(kind, type) and issubclass(kind, PARTS)):
        raise ValueError(
            f"this model uses {description['class_path']}, which is not a part of a model here: define the class in "
            f"{module_name} at the top level, as a subclass of one of ldlm's abstract parts"
        )
    return make(kind, description["init_args"])


def make(kind: type[T], arguments: dict[str, Any]) -> T:
    """An object of a class from arguments that a file gives, after `build` made parts of those that describe one.

    On the meta device (``with torch.device("meta")``) nothing takes memory. A class from elsewhere whose constructor
    needs numbers to compute with is then made for real, with its parts.

    Raises:
        ValueError: If the class cannot be made of them.
    """
    try:
        built = {name: build(value) for name, value in arguments.items()}
        for name, hint in _hints(kind).items():
            if isinstance(built.get(name), PARTS) and not isinstance(built[name], hint):
                raise TypeError(f"{name} cannot be a {type(built[name]).__name__}")
        return kind(**built)
    except Exception as error:  # untrusted arguments can make a constructor raise anything
        if torch.get_default_device().type == "meta" and not kind.__module__.startswith("ldlm."):
            with torch.device("cpu"):
                return make(kind, arguments)
        if isinstance(error, ValueError):
            raise
        raise ValueError(
            f"{kind.__module__}.{kind.__qualname__} cannot be made from what the file says of it: {error}"
        ) from error


def _hints(kind: type) -> dict[str, Any]:
    """The types of a constructor's arguments, as far as they are known while running."""
    try:
        return get_type_hints(inspect.getattr_static(kind, "__init__"))
    except NameError:  # somebody's own part, with names for type checkers alone
        return {}


def pack_tokenizer(tokenizer: PreTrainedTokenizerBase) -> dict[str, Tensor]:
    """A tokenizer's files by name, each as bytes [length] uint8."""
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        files = [path for path in sorted(Path(folder).iterdir()) if path.is_file()]
        return {path.name: torch.frombuffer(bytearray(path.read_bytes()), dtype=torch.uint8) for path in files}


def check_tokenizer(tokenizer: PreTrainedTokenizerBase) -> None:
    """Raise ValueError if transformers does not save a tokenizer whole: a checkpoint's would give other ids."""
    kept = unpack_tokenizer(pack_tokenizer(tokenizer), "the model")
    if tokenizer_digest(kept) != tokenizer_digest(tokenizer):
        raise ValueError(
            f"tokenizer={name_tokenizer(tokenizer)!r} gives other ids once it is saved and loaded again, and a "
            "checkpoint would hold that other one: save it by save_pretrained, and give the folder as the tokenizer"
        )


def unpack_tokenizer(files: dict[str, Tensor], source: str = "the file") -> PreTrainedTokenizerBase:
    """The inverse of `pack_tokenizer`; ValueError if these are no tokenizer's files."""
    with tempfile.TemporaryDirectory() as folder, naming(folder):
        try:
            if sum(content.nbytes for content in files.values()) > storage_bytes(files.values()):
                raise ValueError("several of them are the same bytes")
            for name, content in files.items():
                (Path(folder) / Path(name).name).write_bytes(content.numpy().tobytes())
        except Exception as error:  # a stranger's names and contents can be anything
            if isinstance(error, OSError) and error.errno in FULL:
                raise
            raise ValueError(f"{source} holds no files of a tokenizer ({error})") from error
        return read_tokenizer(folder, source)


def read_tokenizer(folder: str | os.PathLike[str], source: str) -> PreTrainedTokenizerBase:
    """The tokenizer of a folder, none of whose code is run; ValueError if it cannot be read."""
    try:
        check_json(Path(folder))
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            folder, trust_remote_code=False, local_files_only=True
        )
    except Exception as error:  # a stranger's files can make it raise anything
        reason = str(error).partition("\n")[0]
        raise ValueError(f"the tokenizer of {source} could not be read ({reason})") from error
    return tokenizer


def read_checkpoint(path: str | os.PathLike[str]) -> dict[str, Any]:
    """A checkpoint of ours as plain data and CPU tensors; nothing in it is executed.

    Raises:
        ValueError: If the file is missing, damaged, or not a checkpoint of this library.
    """
    checkpoint = read(os.fspath(path))
    state = checkpoint.get("state_dict") if isinstance(checkpoint, dict) else None
    if not isinstance(state, dict) or not all(map(torch.is_tensor, state.values())):
        raise ValueError(f"{path} is of something else: it does not describe an ldlm model")
    check_description(checkpoint.get("ldlm"), str(path))
    return dict(checkpoint)


def read_export(path_or_repo: str, revision: str | None, looks: int = LOOKS) -> tuple[dict[str, Any], dict[str, bytes]]:
    """What an exported folder, local or on the hub, says of its model, and the files that it names, by name.

    The bytes that are given are those that were compared with their digests. Files that it does not name are not read.

    Raises:
        ValueError: If it is no export of ours, was cut short, or lacks a file, or if one was altered.
    """
    folder = local_folder(path_or_repo, revision, DESCRIPTION)
    if not (folder / DESCRIPTION).is_file():
        raise ValueError(f"'{path_or_repo}' holds no {DESCRIPTION}: it is not an exported ldlm model")
    about = read_json(folder / DESCRIPTION)
    if about.keys() == {"sha256"}:
        raise ValueError(f"{path_or_repo} is being written, or its export was cut short: export the model again")
    check_description(about, path_or_repo)
    digests = exported(about, path_or_repo)
    try:
        folder = local_folder(path_or_repo, revision, DESCRIPTION, *digests)
        return about, {name: _verified(folder / name, digest, path_or_repo) for name, digest in digests.items()}
    except ValueError:
        if looks and read_json(folder / DESCRIPTION) != about:  # another export took its place meanwhile
            return read_export(path_or_repo, revision, looks - 1)
        raise


def exported(about: dict[str, Any], source: str) -> dict[str, str]:
    """The digests of an export's files by name, as its description gives them.

    Raises:
        ValueError: If it gives none, or names what lies elsewhere.
    """
    digests = about.get("sha256")
    if not isinstance(digests, dict) or not all(isinstance(digest, str) for digest in digests.values()):
        raise ValueError(f"{source}/{DESCRIPTION} does not say which files belong to the model: export the model again")
    for name in digests:
        if not re.fullmatch(r"\w[\w.-]{,199}", name, re.ASCII) or name == DESCRIPTION:
            raise ValueError(f"{source}/{DESCRIPTION} names {name!r}, which is no file of an export")
    return digests


def _verified(file: Path, digest: str, source: str) -> bytes:
    try:
        if not file.is_file():
            raise ValueError(f"{source} lacks {file.name}, which belongs to the model: export or fetch the model again")
        content = file.read_bytes()
    except OSError as error:
        raise ValueError(f"{source}/{file.name} could not be read ({error.strerror})") from error
    if hashlib.sha256(content).hexdigest() != digest:
        raise ValueError(f"{source}/{file.name} was altered after the export: export the model again")
    return content


def check_weights(model: nn.Module, state: dict[str, Tensor], source: str) -> None:
    """Compare a state_dict's names and shapes with a model's, which may be on the meta device.

    Raises:
        ValueError: If keys are missing, unexpected or of another shape or kind, or fewer numbers than the model has
            stand behind them; the sentence names some.
    """
    own = model.state_dict(keep_vars=True)
    missing, unexpected = sorted(own.keys() - state.keys()), sorted(state.keys() - own.keys())
    shapes = [key for key in own.keys() & state.keys() if own[key].shape != state[key].shape]
    wrong = [("lacks", missing), ("has too much", unexpected), ("has other shapes for", sorted(shapes))]
    told = [f"{what} {', '.join(keys[:3])}{' ...' if len(keys) > 3 else ''}" for what, keys in wrong if keys]
    if told:
        raise ValueError(f"{source} does not fit this model: it {'; it '.join(told)}")
    wanted = sum({id(value): value.numel() for value in own.values()}.values())  # tied weights are one parameter
    if wanted > (held := storage_numbers(state.values())):
        raise ValueError(f"{source} does not fit this model: it has {held:,} numbers, and the model has {wanted:,}")


def check_description(about: Any, source: str) -> dict[str, Any]:
    """What a file says of its model, if it is a description that this version can read.

    Raises:
        ValueError: If it is something else, or of another format.
    """
    try:
        check_length(about)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{source} holds no description of a model ({error})") from None
    model = about.get("model") if isinstance(about, dict) else None
    if not isinstance(model, dict) or not isinstance(model.get("init_args"), dict):
        raise ValueError(f"{source} is of something else: it does not describe an ldlm model")
    if about.get("format") != FORMAT:
        raise ValueError(
            f"{source} has format {about.get('format')}, and this ldlm reads {FORMAT}: use the ldlm that wrote it"
        )
    return dict(about)


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file, or one sentence about why not."""
    try:
        if (size := path.stat().st_size) > LARGEST_DESCRIPTION:
            raise ValueError(f"it has {size:,} bytes, and a description has at most {LARGEST_DESCRIPTION:,}")
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{path} could not be read as JSON ({error})") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds no JSON object")
    return content
