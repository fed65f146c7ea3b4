"""Compiled blocks: each layer of a stack goes through torch.compile, in place.

In: a module with `layers.Block`s, or a transformers model's layers, somewhere in it. Out: the same module, computing
the same sooner; where nothing can be compiled, a warning and the module as it was.
No section of the paper.

Layers of one class share their compiled graphs, so that twelve take little longer to compile than one. A graph is made
for the first shape, one more for all other numbers of rows, a third for a single row, and each of these again for
gradients, for none, and for inference mode.
"""

import functools

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer

from ldlm.nn.layers import Block

LAYERS = (Block, GradientCheckpointingLayer)  # the latter is what each layer of a transformers model derives from
# Of one class: 9 graphs as above, twice, as latent encoder and latent decoder differ in widths, and room for other
# precisions. Beyond them torch warns and calls the layer uncompiled, so that no sequence of shapes compiles for ever.
MAX_GRAPHS = 32
REMEDIES = {
    "cpu": "install a C++ compiler (g++, or clang on macOS) and Python's headers, or name the compiler in CXX",
    "cuda": "install triton, a C compiler and Python's headers",
}


def compile_blocks(module: nn.Module, mode: str = "default") -> None:
    """Compile every layer in a module, each by itself; it happens when a layer is first called.

    Parameters stay where they are and state-dict keys what they are. A pre-trained token encoder hides its model from
    the module tree: ``compile_blocks(token_encoder.frozen())`` reaches it.

    Args:
        module: A model or a part of one, on the device it will run on.
        mode: torch.compile's.

    Raises:
        ValueError: If there is no such mode.
    """
    check_mode(mode)
    blocks = [block for block in module.modules() if isinstance(block, LAYERS)]
    device = next((p.device.type for block in blocks for p in block.parameters()), "cpu")
    if blocks and (reason := obstacle(device)) is not None:
        remedy = REMEDIES.get(device, f"see what torch.compile needs for {device}")
        rank_zero_warn(f"nothing is compiled, all runs as it would without: {reason}; {remedy}")
        return
    for block in blocks:
        block.compile(mode=mode, recompile_limit=MAX_GRAPHS)


def release_blocks(module: nn.Module) -> None:
    """Undo `compile_blocks`."""
    for block in module.modules():
        if isinstance(block, LAYERS):
            block._compiled_call_impl = None  # there is no public way back


def check_mode(mode: str) -> None:
    """Raise ValueError unless torch.compile knows the mode."""
    if mode not in (modes := torch._inductor.list_mode_options()):
        raise ValueError(f"mode={mode!r} is not one of torch.compile's: {', '.join(modes)}")


@functools.cache
def obstacle(device: str) -> str | None:
    """Why nothing can be compiled for a kind of device, found by compiling one small function; None if it can be."""
    try:
        torch.compile(torch.cos)(torch.zeros(8, device=device))
    except (RuntimeError, OSError) as error:  # all of torch.compile's own are RuntimeErrors
        return " ".join(str(error).strip().partition("\n\n")[0].split())
    return None
