"""A model from a checkpoint or an export: verified, compared with its description, never believed.

In: a `.ckpt` file or an exported folder. Out: plain data and CPU tensors, a model; or a ValueError in one sentence.
And the other way: a model's tensors to an exported folder. No section of the paper.
"""

import hashlib
import json
import os
import re
from contextlib import ExitStack
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from ldlm._files import sha256, write_atomically
from ldlm._sizes import building_at_most, storage_numbers
from ldlm.checkpoints.description import DESCRIPTION, check_description, make, read_json
from ldlm.checkpoints.integrity import LOOKS, read
from ldlm.hub import local_folder, only_the_file
from ldlm.tokenizer import pack_tokenizer, unpack_tokenizer

WEIGHTS = "model.safetensors"  # of an export
M = TypeVar("M", bound=nn.Module)


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


def load_checkpoint(kind: type[M], path: str | os.PathLike[str]) -> M:
    """The model of a checkpoint, on the CPU; errors as in `read_checkpoint`."""
    return restored(kind, read_checkpoint(path), str(path))


def restored(kind: type[M], checkpoint: dict[str, Any], source: str) -> M:
    """The model of what `read_checkpoint` gave, on the CPU; ValueError if none can be made of it."""
    files = checkpoint.get("tokenizer")
    tokenizer = unpack_tokenizer(files, source) if files is not None else None
    return rebuild(kind, checkpoint["ldlm"], checkpoint["state_dict"], tokenizer, source)


def load_pretrained(kind: type[M], source: str, revision: str | None) -> M:
    """The model of an exported folder, local or on the hub, on the CPU; errors as in `read_export`."""
    about, files = read_export(source, revision)
    try:
        state = load(files.pop(WEIGHTS))
    except (KeyError, SafetensorError) as error:
        raise ValueError(f"{source}/{WEIGHTS} could not be read ({error}): export the model again") from error
    tensors = {name: torch.frombuffer(bytearray(content), dtype=torch.uint8) for name, content in files.items()}
    return rebuild(kind, about, state, unpack_tokenizer(tensors, source) if files else None, source)


def rebuild(
    kind: type[M],
    about: dict[str, Any],
    state: dict[str, Tensor],
    tokenizer: PreTrainedTokenizerBase | None,
    source: str,
) -> M:
    """A model from its description, its tensors and its tokenizer.

    It is made twice: without memory, to be compared with the tensors, and for real once it has their sizes. The
    second time also fills what is in no file, such as buffers registered with ``persistent=False``.
    """
    arguments = about["model"]["init_args"] | {"tokenizer": tokenizer}
    sizes = len(state), storage_numbers(state.values())
    with only_the_file():
        with building_at_most(*sizes, source), torch.random.fork_rng(devices=[]), torch.device("meta"):
            check_weights(make(kind, arguments), state, source)
        model = make(kind, arguments)
    try:
        model.load_state_dict(state)
    except RuntimeError as error:  # of a kind that cannot be copied, such as sparse ones
        raise ValueError(f"{source} holds tensors that no weights can be taken from ({error})") from error
    return model


def save_pretrained(
    folder: str | Path, about: dict[str, Any], state: dict[str, Tensor], tokenizer: PreTrainedTokenizerBase | None
) -> None:
    """Write a model's description, tensors and tokenizer into a folder; see `LDLM.save_pretrained`."""
    folder = Path(folder)
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder} is no folder, and an export is one: give another name")
    description = folder / DESCRIPTION
    packed = {} if tokenizer is None else pack_tokenizer(tokenizer)
    files = {name: content.numpy().tobytes() for name, content in packed.items()}
    files[WEIGHTS] = save({name: tensor.contiguous() for name, tensor in state.items()})
    digests = {name: hashlib.sha256(content).hexdigest() for name, content in files.items()}
    earlier = exported(read_json(description), str(folder)) if description.exists() else {}
    for name in files.keys() - earlier.keys():
        if (folder / name).exists():
            raise ValueError(f"{folder}/{name} is no file of an earlier export, and stays: give another folder")
    with ExitStack() as stack:
        for name, content in files.items():
            file = stack.enter_context(write_atomically(folder / name))
            file.write(content)
            file.flush()
        # All is on the disk. Until each file has its place, the folder says which are an export's, and is none.
        _write_json(description, {"sha256": earlier | digests})
    for name in earlier.keys() - files.keys():
        if (folder / name).is_file() and sha256(folder / name) == earlier[name]:
            (folder / name).unlink()
    _write_json(description, about | {"sha256": digests})


def _write_json(path: Path, content: dict[str, Any]) -> None:
    with write_atomically(path) as file:
        file.write((json.dumps(content, indent=2) + "\n").encode())
