"""Checkpoints and exports: files that describe themselves and are read without running what is in them.

In: a model made of parts, or a file. Out: a description (plain data), a model's classes and arguments, tensors.
No section of the paper.

Every part keeps each argument of its constructor under the argument's own name. That one rule lets `describe` write a
part as ``{"class_path": ..., "init_args": {...}}`` and `build` make it again, whether it came from YAML or a script.
Nothing is imported on a file's word: `build` takes classes only from modules that are already imported.
"""

import inspect
import json
import os
import sys
from pathlib import Path
from types import ModuleType, NoneType, UnionType
from typing import Any, TypeVar, Union, get_args, get_origin, get_type_hints

import torch
from torch import nn

import ldlm
from ldlm._files import brief
from ldlm._sizes import check_length
from ldlm.diffusion.grids import TimeGrid
from ldlm.diffusion.samplers import Sampler
from ldlm.diffusion.schedules import NoiseSchedule
from ldlm.diffusion.timesteps import TimestepSampler
from ldlm.hub import leads_out
from ldlm.nn.denoiser import Denoiser
from ldlm.nn.latent_coders import LatentDecoder, LatentEncoder
from ldlm.nn.token_decoders import TokenDecoder
from ldlm.nn.token_encoders import TokenEncoder

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
FORMAT = 2
DESCRIPTION = "ldlm.json"  # of an export
LARGEST_DESCRIPTION = 2**24  # bytes of it; the paper's model takes 3 kB
LARGEST_INTEGER = 2**64  # in either direction; one that no float can hold would end a multiplication much later
T = TypeVar("T")


def describe(part: object, leave_out: tuple[str, ...] = (), kind: type | None = None) -> dict[str, Any]:
    """A part as plain data: the path of its class and the arguments that make it again.

    Args:
        part: Anything that keeps its constructor's arguments under their own names.
        leave_out: Arguments not to describe.
        kind: The class to make it again as; None for its own.

    Raises:
        ValueError: If an argument is not kept under its name, or is not plain data or a part.

    >>> from ldlm.diffusion.schedules import TangentSchedule
    >>> describe(TangentSchedule(d=3.0))
    {'class_path': 'ldlm.TangentSchedule', 'init_args': {'d': 3.0}}
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
    return {"class_path": class_path(kind), "init_args": arguments}


def class_path(kind: type) -> str:
    """A class's name in files: ``ldlm.Name`` for a public one, which may move between modules; else its module's."""
    if kind.__name__ in ldlm.__all__ and getattr(ldlm, kind.__name__) is kind:
        return f"ldlm.{kind.__name__}"
    return f"{kind.__module__}.{kind.__qualname__}"


def describe_model(model: object) -> dict[str, Any]:
    """A model as files hold it: its parts and arguments but for the tokenizer, whose files stand beside; versions."""
    return {"format": FORMAT, "version": ldlm.__version__, "model": describe(model, leave_out=("tokenizer",))}


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


def build(description: Any, kinds: tuple[type, ...] = PARTS) -> Any:
    """The inverse of `describe` for a part; plain data are returned as they are.

    Args:
        description: Plain data.
        kinds: What a class may be a subclass of.

    Raises:
        ValueError: If a class is not in a module that is already imported, or is not one of ldlm's parts, or an
            argument is a path that `describe` would not have written.
    """
    if isinstance(description, str) and leads_out(description):
        name = brief(repr(description))
        raise ValueError(f"{name} leads out of the current folder, which no file may: name it in the command")
    if isinstance(description, int) and abs(description) > LARGEST_INTEGER:
        raise ValueError(f"the file has an argument of {description.bit_length()} bits, and 64 are enough for all")
    if isinstance(description, list):
        return [build(item, kinds) for item in description]
    if not isinstance(description, dict):
        return description
    if description.keys() != {"class_path", "init_args"}:
        return {key: build(item, kinds) for key, item in description.items()}
    path = str(description["class_path"])
    module_name, _, class_name = path.rpartition(".")
    public = module_name == "ldlm" and class_name in ldlm.__all__  # importing it is this package's own doing
    module = sys.modules.get(module_name)
    if not isinstance(module, ModuleType):
        class_name, module_name = brief(class_name), brief(module_name)
        raise ValueError(
            f"this model uses the class {class_name} of the module {module_name}, which is not imported, and files "
            f"are not allowed to import anything: import {module_name} first, or add --import {module_name}"
        )
    kind = getattr(ldlm, class_name) if public else vars(module).get(class_name)
    if not (isinstance(kind, type) and issubclass(kind, kinds)):
        raise ValueError(
            f"this model uses {brief(path)}, which is not a part of a model here: define the class in "
            f"{module_name} at the top level, as a subclass of one of ldlm's abstract parts"
        )
    return make(kind, description["init_args"], kinds)


def make(kind: type[T], arguments: dict[str, Any], kinds: tuple[type, ...] = PARTS) -> T:
    """An object of a class from arguments that a file gives, after `build` made parts of those that describe one.

    On the meta device (``with torch.device("meta")``) nothing takes memory. A class from elsewhere whose constructor
    needs numbers to compute with is then made for real, with its parts.

    Raises:
        ValueError: If the class cannot be made of them.
    """
    ours = kind.__module__.startswith("ldlm.")
    try:
        built = {name: build(value, kinds) for name, value in arguments.items()}
        for name, hint in _hints(kind).items():
            if name in built and not _suits(built[name], hint, kinds, ours):
                raise TypeError(f"{name} cannot be a {type(built[name]).__name__}")
        return kind(**built)
    except Exception as error:  # untrusted arguments can make a constructor raise anything
        if torch.get_default_device().type == "meta" and not ours:
            with torch.device("cpu"):
                return make(kind, arguments, kinds)
        if isinstance(error, ValueError):
            raise
        raise ValueError(
            f"{class_path(kind)} cannot be made from what the file says of it: {brief(error, 300)}"
        ) from error


def _hints(kind: type) -> dict[str, Any]:
    """The types of a constructor's arguments, as far as they are known while running."""
    try:
        return get_type_hints(inspect.getattr_static(kind, "__init__"))
    except NameError:  # somebody's own part, with names for type checkers alone
        return {}


def _suits(value: Any, hint: Any, kinds: tuple[type, ...], ours: bool) -> bool:
    """Whether an argument is of its type: a part always, plain data where the class is ours and the type is plain."""
    if get_origin(hint) in (Union, UnionType):
        return any(_suits(value, one, kinds, ours) for one in get_args(hint))
    if isinstance(value, kinds):
        return isinstance(hint, type) and isinstance(value, hint)
    if not ours:
        return True
    if get_origin(hint) is tuple:
        items = get_args(hint)
        suited = isinstance(value, list) and len(value) == len(items)
        return suited and all(_suits(item, one, kinds, ours) for item, one in zip(value, items, strict=True))
    if hint is int:  # a script may say 1e5 steps
        return isinstance(value, int) or (isinstance(value, float) and value.is_integer())
    if hint is float:
        return isinstance(value, int | float)
    return isinstance(value, hint) if hint in (str, bool, NoneType) else True


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
