"""Files that are not to be believed: altered by a bit, refused in a sentence, compared when they are read."""

import random
import sys
import threading
from pathlib import Path

import torch

from ldlm.checkpoints.io import CheckpointFiles
from ldlm.checkpoints.pretrained import read_checkpoint
from ldlm.model import LDLM
from ldlm.training.task import LDLMTask


def one_sentence(error: BaseException) -> None:
    said = str(error)
    assert said
    assert len(said.splitlines()) == 1, said
    assert "Traceback" not in said


def flipped(dice: random.Random, data: bytes) -> bytes:
    at = dice.randrange(len(data))
    return data[:at] + bytes([data[at] ^ (1 << dice.randrange(8))]) + data[at + 1 :]


def same(one: object, other: object) -> bool:
    """Whether two checkpoints hold the same, bit for bit."""
    if isinstance(one, torch.Tensor):
        return isinstance(other, torch.Tensor) and one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, dict):
        return isinstance(other, dict) and list(one) == list(other) and all(same(one[k], other[k]) for k in one)
    if isinstance(one, list | tuple):
        return type(one) is type(other) and len(one) == len(other) and all(map(same, one, other))
    return type(one) is type(other) and one == other


LOADERS = [LDLM.load_from_checkpoint, LDLMTask.load_from_checkpoint, read_checkpoint, CheckpointFiles().load_checkpoint]


def refused(path: Path, loader) -> bool:
    try:
        loader(path)
        return False
    except ValueError as error:
        refusal = error
    one_sentence(refusal)
    assert path.name in str(refusal)
    return True


def nested(depth: int, kind: type) -> object:
    value: object = 1
    for _ in range(depth):
        value = [value] if kind is list else {"a": value}
    return value


def save_deep(content: object, path: Path) -> None:
    """`torch.save` with room for what nests deeper than the interpreter goes by itself."""
    limit = sys.getrecursionlimit()
    sys.setrecursionlimit(10**6)
    size = threading.stack_size(2**29)
    thread = threading.Thread(target=torch.save, args=(content, path))
    thread.start()
    thread.join()
    threading.stack_size(size)
    sys.setrecursionlimit(limit)
