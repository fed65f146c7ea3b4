"""Checkpoints and exports read into memory: verified, compared with a model, never believed.

In: a `.ckpt` file or an exported folder. Out: plain data and CPU tensors; or a ValueError in one sentence.
No section of the paper.
"""

import hashlib
import os
import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ldlm._sizes import storage_numbers
from ldlm.checkpoints.description import DESCRIPTION, check_description, read_json
from ldlm.checkpoints.integrity import LOOKS, read
from ldlm.hub import local_folder


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
