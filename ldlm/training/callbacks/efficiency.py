"""Callbacks that change what a training step costs and not what it computes.

In: a Trainer and its model. Out: the same model, its layers compiled, or computed again in the backward pass.
No section of the paper.

Both end with the fit, enter no checkpoint, and may be added or left out when a run is resumed.
"""

import lightning as L
from torch import nn

from ldlm.nn.compile import check_mode, compile_blocks, release_blocks
from ldlm.nn.layers import Block
from ldlm.nn.token_encoders import FrozenTokenEncoder
from ldlm.training.outputs import model_of


class CompileBlocks(L.Callback):
    """Sends the model's `Block`s through torch.compile, each by itself, where a compiler is at hand.

    The first steps and the first validation compile, which takes a minute or two; a second run finds most of it in
    torch's cache on disk. Where nothing can be compiled a warning says why, and the run goes on as it would without.

    Args:
        mode: torch.compile's.
        token_encoder: Whether to compile the layers of a pre-trained token encoder too; its hidden states are then
            transformers' up to rounding, and no longer bit for bit.

    Raises:
        ValueError: If there is no such mode.
    """

    def __init__(self, mode: str = "default", token_encoder: bool = False) -> None:
        check_mode(mode)
        self.mode = mode
        self.token_encoder = token_encoder

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """The model is on its device and nothing was computed yet."""
        for module in self._modules(pl_module):
            compile_blocks(module, self.mode)

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Leave the model as it was found."""
        for module in self._modules(pl_module) if stage == "fit" else []:
            release_blocks(module)

    def _modules(self, module: L.LightningModule) -> list[nn.Module]:
        encoder = model_of(module).token_encoder
        if self.token_encoder and isinstance(encoder, FrozenTokenEncoder):
            return [module, encoder.frozen()]
        return [module]


class RecomputeActivations(L.Callback):
    """Gradient checkpointing, for small cards: of each trained `Block` only its inputs wait for the backward pass.

    The gradients are the same; a step computes the blocks' forward pass twice, and is longer by up to a third.
    """

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Blocks of frozen parts have no backward pass to wait for."""
        for block in _blocks(pl_module):
            block.recompute = any(p.requires_grad for p in block.parameters())

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Leave the model as it was found."""
        for block in _blocks(pl_module) if stage == "fit" else []:
            block.recompute = False


def _blocks(module: L.LightningModule) -> list[Block]:
    return [block for block in module.modules() if isinstance(block, Block)]
