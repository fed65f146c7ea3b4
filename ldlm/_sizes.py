"""Sizes that a file claims, compared with what it holds before memory is given for them.

In: what was read from a file; the building of modules that it describes. Out: nothing, or a ValueError in one sentence.
No section of the paper.
"""

import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_parameter_registration_hook

MOST = 10_000_000  # values and letters of a description with references written out; the recipes' have about 2,000
AGAIN = 4  # a constructor may register a parameter several times: tied, parametrised, replaced, read from a file


def tensors_in(content: Any) -> Iterator[Tensor]:
    """The tensors in plain data, each once, however often it is referred to."""
    waiting, seen = [content], set()
    while waiting:
        value = waiting.pop()
        if id(value) in seen:
            continue
        seen.add(id(value))
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, dict):
            waiting.extend(value.values())
        elif isinstance(value, list | tuple | set):
            waiting.extend(value)


def check_storages(content: Any) -> None:
    """Refuse tensors whose numbers are fewer than their shape says: a copy of one would take any memory.

    Raises:
        ValueError: If a tensor in these plain data repeats its storage.
    """
    for tensor in tensors_in(content):
        held = tensor.untyped_storage().nbytes() if tensor.layout == torch.strided else tensor.numel()
        if tensor.layout == torch.strided and tensor.numel() * tensor.itemsize > held:
            raise ValueError(f"holds a tensor of shape {list(tensor.shape)} with {held} bytes for all its numbers")


def storage_bytes(tensors: Iterable[Tensor]) -> int:
    """Bytes behind dense tensors, those that several share being counted once."""
    dense = [tensor.untyped_storage() for tensor in tensors if tensor.layout == torch.strided]
    return sum({storage.data_ptr(): storage.nbytes() for storage in dense}.values())


def storage_numbers(tensors: Iterable[Tensor]) -> int:
    """Numbers behind dense tensors, those that several share being counted once."""
    dense = [tensor for tensor in tensors if tensor.layout == torch.strided]
    found = {
        tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() // tensor.itemsize for tensor in dense
    }
    return sum(found.values())


def check_length(content: Any) -> None:
    """Refuse plain data that mean more than anybody wrote, as lists of references to lists of references do.

    Raises:
        ValueError: If they have more than `MOST` values and letters with all references written out, or hold
            themselves.
    """
    lengths: dict[int, int] = {}

    def length(value: Any) -> int:
        if id(value) not in lengths:
            lengths[id(value)] = MOST  # of itself, should it be met below
            inside: list[Any] = list(value) if isinstance(value, list | tuple | set) else []
            if isinstance(value, dict):
                inside = [*value.keys(), *value.values()]
            own = len(value) if isinstance(value, str | bytes | bytearray) else 1
            lengths[id(value)] = own + sum(map(length, inside))
        return lengths[id(value)]

    if length(content) > MOST:
        raise ValueError(f"with all references written out it has more than {MOST:,} values")


@contextmanager
def building_at_most(tensors: int, numbers: int, source: str) -> Iterator[None]:
    """Within, modules that register far more parameters than a file has are refused while they are built.

    What is built for a file takes all its parameters from there, so the file itself says how many there can be. Without
    this, ten million layers would be built before their names are compared with the file's.

    Args:
        tensors: How many the file has.
        numbers: How many these hold.
        source: What to call the file.
    """
    thread, count, total = threading.get_ident(), 0, 0

    def registered(module: nn.Module, name: str, parameter: Tensor) -> None:
        nonlocal count, total
        if threading.get_ident() != thread:
            return
        count, total = count + 1, total + parameter.numel()
        if count > AGAIN * max(tensors, 1) or total > AGAIN * max(numbers, 1):
            raise ValueError(
                f"{source} describes a larger model than it holds: it has {tensors:,} tensors of {numbers:,} numbers, "
                f"and a {type(module).__name__} in what it describes would be beyond them"
            )

    hook = register_module_parameter_registration_hook(registered)
    try:
        yield
    finally:
        hook.remove()
