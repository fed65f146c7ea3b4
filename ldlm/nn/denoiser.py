"""The denoiser: the network that is called at every sampling step.

In: noised latents z_t [b m d], schedule times t [b] and a self-condition [b m d] (a previous estimate of z0, or zeros).
Out: the estimate z0_hat [b m d] (x0-prediction).
Paper: section 4.2, App. C (12-layer DiT, 132M parameters at d = 768).
"""

import abc
from collections.abc import Callable, Iterator
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldlm.nn.layers import ModulatedBlock, TimeEmbedding, check_heads, check_layers, initialise, sinusoids

Denoise = Callable[[Tensor, Tensor, Tensor], Tensor]  # z_t [b m d], t [b] float32, self_condition [b m d] -> z0_hat
Call = Callable[[Tensor, Tensor], Tensor]  # the same at a time that is known: z_t, self_condition -> z0_hat

# Times whose modulations are held at once while sampling: at 12 x 768, 116 MB in float32.
TIMES = 512


def at_times(denoise: Denoise, times: Tensor) -> Iterator[Call]:
    """The function at each of the times [k], which are the same for all rows."""

    def at(t: Tensor, z_t: Tensor, self_condition: Tensor) -> Tensor:
        return denoise(z_t, t.expand(len(z_t)), self_condition)

    return (partial(at, t) for t in times)


class Denoiser(nn.Module, abc.ABC):
    """Estimates the clean latents z0 from noised ones.

    Args:
        latent_size: Width d of a latent vector.
        num_latents: Latent vectors a row, m.
    """

    def __init__(self, latent_size: int, num_latents: int) -> None:
        super().__init__()
        self.latent_size = latent_size
        self.num_latents = num_latents

    @abc.abstractmethod
    def forward(self, z_t: Tensor, t: Tensor, self_condition: Tensor) -> Tensor:
        """[b m d], [b] schedule times in [0, 1], [b m d] -> z0_hat [b m d].

        The time is always the schedule's: the adapted time F(u) never reaches the denoiser.
        """

    def at_times(self, times: Tensor) -> Iterator[Call]:
        """The network at each of a sampler's times [k] float32, in order; a time is the same for all rows.

        A seam for what depends on the times alone, which here is computed anew at each of them.
        """
        return at_times(self, times)


class DiT(Denoiser):
    """Diffusion Transformer with AdaLN-zero (Peebles and Xie, 2023) over latents and their self-condition.

    At the defaults: 12 blocks of 12 d² + 6 d² modulation, 131.5M parameters.

    Args:
        latent_size: Width d of a latent vector.
        num_latents: Latent vectors a row, m.
        width: Width of the transformer.
        layers: Number of blocks.
        heads: Attention heads; must divide ``width``.
    """

    def __init__(
        self, latent_size: int = 768, num_latents: int = 128, width: int = 768, layers: int = 12, heads: int = 12
    ) -> None:
        super().__init__(latent_size, num_latents)
        check_heads(width, heads)
        check_layers(layers)
        self.width = width
        self.layers = layers
        self.heads = heads
        self.input = nn.Linear(2 * latent_size, width)
        self.positions = nn.Parameter(sinusoids(torch.arange(num_latents), width))
        self.time = TimeEmbedding(width)
        self.blocks = nn.ModuleList(ModulatedBlock(width, heads) for _ in range(layers))
        # Modulations depend on t alone; standing apart, they can be computed once for all steps of a sampler.
        self.modulators = nn.ModuleList(nn.Linear(width, 6 * width) for _ in range(layers))
        self.final_modulator = nn.Linear(width, 2 * width)
        self.norm = nn.LayerNorm(width, elementwise_affine=False)
        self.output = nn.Linear(width, latent_size)
        self.apply(initialise)
        # AdaLN-zero: every block starts as the identity and the network as the prediction 0, the mean of the prior.
        for linear in [*self.modulators, self.final_modulator, self.output]:
            nn.init.zeros_(linear.get_parameter("weight"))

    def modulations(self, t: Tensor) -> list[Tensor]:
        """Times [b] -> the modulation of each block [b 6·width] and of the last norm [b 2·width]."""
        condition = F.silu(self.time(t))
        return [modulator(condition) for modulator in [*self.modulators, self.final_modulator]]

    def denoise(self, z_t: Tensor, self_condition: Tensor, modulations: list[Tensor]) -> Tensor:
        """The network given its modulations: [b m d], [b m d] -> z0_hat [b m d]."""
        x = self.input(torch.cat([z_t, self_condition], dim=-1)) + self.positions
        for block, modulation in zip(self.blocks, modulations, strict=False):
            x = block(x, modulation)
        shift, scale = modulations[-1].unsqueeze(1).chunk(2, dim=-1)
        out: Tensor = self.output(self.norm(x) * (1 + scale) + shift)
        return out

    def at_times(self, times: Tensor) -> Iterator[Call]:
        """See `Denoiser.at_times`; modulations of `TIMES` times are computed together, one row each for all texts."""
        for some in torch.split(times, TIMES):
            for row in zip(*(torch.split(table, 1) for table in self.modulations(some)), strict=True):
                yield partial(self.denoise, modulations=list(row))

    def forward(self, z_t: Tensor, t: Tensor, self_condition: Tensor) -> Tensor:
        """See `Denoiser.forward`."""
        return self.denoise(z_t, self_condition, self.modulations(t))
