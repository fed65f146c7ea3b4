"""Latent encoders and decoders: the trainable space between hidden states and diffusion.

In: normalised hidden states [b n h] (encoder) or latents z [b m d] (decoder).
Out: latents z0 [b m d] (encoder) or estimated hidden states [b n h] (decoder).
Paper: section 4.1, App. B.4 (Perceiver Resampler against self-attention), App. C (about 50M parameters each).

No encoder here ends in a norm: z0 is not normalised before diffusion, its scale is what joint training shapes.
"""

import abc

import torch.nn.functional as F
from torch import Tensor, nn

from ldlm.nn.layers import Resampler, Transformer, widened


class LatentCoder(nn.Module, abc.ABC):
    """What latent encoders and decoders have in common: their sizes.

    Args:
        hidden_size: Width h of the token encoder.
        latent_size: Width d of a latent vector.
        num_latents: Latent vectors a row, m.
    """

    def __init__(self, hidden_size: int, latent_size: int, num_latents: int) -> None:
        super().__init__()
        for name, size in [("hidden_size", hidden_size), ("latent_size", latent_size), ("num_latents", num_latents)]:
            if size < 1:
                raise ValueError(f"{name}={size} must be at least 1")
        self.hidden_size = hidden_size
        self.latent_size = latent_size
        self.num_latents = num_latents


class LatentEncoder(LatentCoder):
    """Maps hidden states to latents; arguments as in `LatentCoder`."""

    @abc.abstractmethod
    def forward(self, hidden: Tensor) -> Tensor:
        """Normalised hidden states [b n h] -> latents z0 [b m d]."""


class LatentDecoder(LatentCoder):
    """Maps latents back to hidden states; arguments as in `LatentCoder`."""

    @abc.abstractmethod
    def forward(self, z: Tensor) -> Tensor:
        """Latents [b m d], noised in training -> estimated normalised hidden states [b n h]."""


class PerceiverResamplerEncoder(LatentEncoder):
    """The paper's latent encoder: learned queries read the hidden states through ``layers`` resampler blocks.

    Args:
        hidden_size: Width h of the token encoder.
        latent_size: Width d of a latent vector.
        sequence_length: Tokens a row, n.
        num_latents: Latent vectors a row, m; None for one a token, as in the paper.
        width: Width of the resampler.
        layers: Number of blocks.
        heads: Attention heads; must divide ``width``.
        unit_variance: Scale every latent vector to mean square 1, as the autoencoders before this paper did, whose
            latents are fixed before diffusion sees them. In joint training it would hide a collapse.
    """

    def __init__(
        self,
        hidden_size: int = 768,
        latent_size: int = 768,
        sequence_length: int = 128,
        num_latents: int | None = None,
        width: int = 768,
        layers: int = 6,
        heads: int = 12,
        unit_variance: bool = False,
    ) -> None:
        super().__init__(hidden_size, latent_size, sequence_length if num_latents is None else num_latents)
        self.sequence_length = sequence_length
        self.width = width
        self.layers = layers
        self.heads = heads
        self.unit_variance = unit_variance
        self.resampler = Resampler(hidden_size, sequence_length, width, self.num_latents, latent_size, layers, heads)

    def forward(self, hidden: Tensor) -> Tensor:
        """[b n h] -> z0 [b m d]."""
        out: Tensor = self.resampler(hidden)
        return F.rms_norm(widened(out), (self.latent_size,)) if self.unit_variance else out


class PerceiverResamplerDecoder(LatentDecoder):
    """The paper's latent decoder: a second resampler, back from latents; arguments as in the encoder."""

    def __init__(
        self,
        hidden_size: int = 768,
        latent_size: int = 768,
        sequence_length: int = 128,
        num_latents: int | None = None,
        width: int = 768,
        layers: int = 6,
        heads: int = 12,
    ) -> None:
        super().__init__(hidden_size, latent_size, sequence_length if num_latents is None else num_latents)
        self.sequence_length = sequence_length
        self.width = width
        self.layers = layers
        self.heads = heads
        self.resampler = Resampler(latent_size, self.num_latents, width, sequence_length, hidden_size, layers, heads)

    def forward(self, z: Tensor) -> Tensor:
        """[b m d] -> [b n h]."""
        out: Tensor = self.resampler(z)
        return out


class SelfAttentionEncoder(LatentEncoder):
    """Bidirectional self-attention over the hidden states, whose outputs are the latents (App. B.4): m = n.

    Args:
        hidden_size: Width h of the token encoder.
        latent_size: Width d of a latent vector.
        sequence_length: Tokens a row, n, which is also the number of latents.
        width: Width of the transformer.
        layers: Number of blocks.
        heads: Attention heads; must divide ``width``.
    """

    def __init__(
        self,
        hidden_size: int = 768,
        latent_size: int = 768,
        sequence_length: int = 128,
        width: int = 768,
        layers: int = 6,
        heads: int = 12,
    ) -> None:
        super().__init__(hidden_size, latent_size, sequence_length)
        self.sequence_length = sequence_length
        self.width = width
        self.layers = layers
        self.heads = heads
        self.transformer = Transformer(hidden_size, sequence_length, width, latent_size, layers, heads)

    def forward(self, hidden: Tensor) -> Tensor:
        """[b n h] -> z0 [b n d]."""
        out: Tensor = self.transformer(hidden)
        return out


class SelfAttentionDecoder(LatentDecoder):
    """Bidirectional self-attention from latents to hidden states (App. B.4); arguments as in the encoder."""

    def __init__(
        self,
        hidden_size: int = 768,
        latent_size: int = 768,
        sequence_length: int = 128,
        width: int = 768,
        layers: int = 6,
        heads: int = 12,
    ) -> None:
        super().__init__(hidden_size, latent_size, sequence_length)
        self.sequence_length = sequence_length
        self.width = width
        self.layers = layers
        self.heads = heads
        self.transformer = Transformer(latent_size, sequence_length, width, hidden_size, layers, heads)

    def forward(self, z: Tensor) -> Tensor:
        """[b n d] -> [b n h]."""
        out: Tensor = self.transformer(z)
        return out


class IdentityEncoder(LatentEncoder):
    """The normalised hidden states are the latents (the TEncDM-like row of Table 2): no parameters, m = n, d = h.

    Args:
        hidden_size: Width h of the token encoder, which is also d.
        sequence_length: Tokens a row, n, which is also the number of latents.
    """

    def __init__(self, hidden_size: int = 768, sequence_length: int = 128) -> None:
        super().__init__(hidden_size, hidden_size, sequence_length)
        self.sequence_length = sequence_length

    def forward(self, hidden: Tensor) -> Tensor:
        """[b n h] -> the same."""
        return hidden


class IdentityDecoder(LatentDecoder):
    """The latents are the hidden states: no parameters; arguments as in the encoder."""

    def __init__(self, hidden_size: int = 768, sequence_length: int = 128) -> None:
        super().__init__(hidden_size, hidden_size, sequence_length)
        self.sequence_length = sequence_length

    def forward(self, z: Tensor) -> Tensor:
        """[b n h] -> the same."""
        return z
