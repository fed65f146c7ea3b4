"""Transformer pieces shared by encoders, decoders and the denoiser. They know nothing of diffusion.

In: vectors [b n d] and, for the modulated block, a conditioning vector [b d] or [1 d].
Out: vectors of the same shape.
Paper: section 6 and App. C name the architectures (Perceiver Resampler, Diffusion Transformer); the shapes here are
those that reproduce App. C's parameter counts.

Legend: b rows, n inputs, m latents, d width, k the 6 modulation vectors of a block.
"""

import abc
import math

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

DEEPEST = 1000  # layers of the deepest transformer that has been published (DeepNet, arXiv 2203.00555)


def check_layers(layers: int) -> None:
    """Raise ValueError unless ``layers`` is 0 to `DEEPEST`: one zero too many and the constructor would never end."""
    if not 0 <= layers <= DEEPEST:
        raise ValueError(f"layers={layers} must be at least 0 and at most {DEEPEST:,}")


def check_heads(width: int, heads: int) -> None:
    """Raise ValueError unless ``heads`` divides ``width``."""
    if heads < 1 or width < 1 or width % heads:
        fitting = [count for count in range(1, 65) if width > 0 and width % count == 0]
        raise ValueError(f"heads={heads} does not divide width={width}: choose heads from {fitting}")


def dtype_of(module: nn.Module, otherwise: torch.dtype) -> torch.dtype:
    """What a module's first parameter is kept in, and its inputs should be; ``otherwise`` if it has none."""
    return next((parameter.dtype for parameter in module.parameters()), otherwise)


def initialise(module: nn.Module) -> None:
    """Xavier-uniform matrices and zero biases, for use with ``Module.apply``."""
    if isinstance(module, nn.Linear):
        nn.init.xavier_uniform_(module.weight)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


def widened(x: Tensor) -> Tensor:
    """A tensor in float32, or in float64 if it is."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def sinusoids(positions: Tensor, width: int, period: float = 10_000.0) -> Tensor:
    """Sines and cosines of ``positions`` [...] at ``width``/2 geometric frequencies: [... width], float32 or wider."""
    half = width // 2
    angles = widened(positions).unsqueeze(-1)
    angles = angles * torch.exp(
        torch.arange(half, device=angles.device, dtype=angles.dtype) * (-math.log(period) / half)
    )
    return F.pad(torch.cat([angles.sin(), angles.cos()], dim=-1), (0, width - 2 * half))


def attend(queries: Tensor, keys: Tensor, values: Tensor, heads: int) -> Tensor:
    """softmax(Q Kᵀ / √(d/heads)) V without ever forming the matrix: [b m d], [b n d], [b n d] -> [b m d]."""
    split = "b n (heads e) -> b heads n e"
    q, k, v = (rearrange(part, split, heads=heads) for part in (queries, keys, values))
    if queries.device.type == "cpu" and torch.is_grad_enabled():
        # The CPU kernel's backward pass is slower in bfloat16 than in float32 (docs/decisions.md), and
        # autocast would cast back.
        with torch.autocast("cpu", enabled=False):
            out = F.scaled_dot_product_attention(widened(q), widened(k), widened(v)).to(queries.dtype)
    else:
        out = F.scaled_dot_product_attention(q, k, v)
    return rearrange(out, "b heads n e -> b n (heads e)")


class SelfAttention(nn.Module):
    """Bidirectional multi-head self-attention, 4 d² parameters."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        check_heads(width, heads)
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        """[b n d] -> [b n d]."""
        queries, keys, values = self.qkv(x).chunk(3, dim=-1)
        out: Tensor = self.out(attend(queries, keys, values, self.heads))
        return out


class MLP(nn.Module):
    """Linear, GELU, Linear with an inner width of 4 d: 8 d² parameters."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.up = nn.Linear(width, 4 * width)
        self.down = nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        """[... d] -> [... d]."""
        out: Tensor = self.down(F.gelu(self.up(x)))
        return out


class GatedMLP(nn.Module):
    """down(gelu(gate(x)) · up(x)) with an inner width of 4 d: 12 d² parameters."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.gate_up = nn.Linear(width, 8 * width)
        self.down = nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        """[... d] -> [... d]."""
        gate, up = self.gate_up(x).chunk(2, dim=-1)
        out: Tensor = self.down(F.gelu(gate) * up)
        return out


class Block(nn.Module, abc.ABC):
    """One layer of a stack: what is compiled, or computed again in the backward pass, one at a time.

    A subclass writes `forward` as any module does; it draws nothing at random, or the second time would differ.

    Attributes:
        recompute: Whether the backward pass computes the layer again, so that until then only its inputs are kept.
    """

    recompute: bool = False

    def __call__(self, *inputs: Tensor) -> Tensor:
        """As any module's; around a compiled layer too, whose own call this is not."""
        if self.recompute and torch.is_grad_enabled():
            again: Tensor = checkpoint(super().__call__, *inputs, use_reentrant=False, preserve_rng_state=False)
            return again
        out: Tensor = super().__call__(*inputs)
        return out


class TransformerBlock(Block):
    """Pre-norm bidirectional block: 12 d² parameters, or 16 d² with the gated MLP."""

    def __init__(self, width: int, heads: int, gated: bool = False) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(width)
        self.attention = SelfAttention(width, heads)
        self.mlp_norm = nn.LayerNorm(width)
        self.mlp: nn.Module = GatedMLP(width) if gated else MLP(width)

    def forward(self, x: Tensor) -> Tensor:
        """[b n d] -> [b n d]."""
        x = x + self.attention(self.attention_norm(x))
        out: Tensor = x + self.mlp(self.mlp_norm(x))
        return out


class ResamplerBlock(Block):
    """One layer of a Perceiver Resampler: latents read the inputs *and* each other.

    Keys and values come from inputs and from latents, each with a projection of its own, in one softmax. With inputs
    of width d that is 6 d² for attention and 8 d² for the MLP.
    """

    def __init__(self, width: int, input_width: int, heads: int) -> None:
        super().__init__()
        check_heads(width, heads)
        self.heads = heads
        self.input_norm = nn.LayerNorm(input_width)
        self.latent_norm = nn.LayerNorm(width)
        self.from_inputs = nn.Linear(input_width, 2 * width)
        self.from_latents = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.mlp_norm = nn.LayerNorm(width)
        self.mlp = MLP(width)

    def forward(self, latents: Tensor, inputs: Tensor) -> Tensor:
        """[b m d], [b n input_width] -> [b m d]."""
        keys, values = self.from_inputs(self.input_norm(inputs)).chunk(2, dim=-1)
        queries, own_keys, own_values = self.from_latents(self.latent_norm(latents)).chunk(3, dim=-1)
        keys = torch.cat([keys, own_keys], dim=1)
        values = torch.cat([values, own_values], dim=1)
        latents = latents + self.out(attend(queries, keys, values, self.heads))
        out: Tensor = latents + self.mlp(self.mlp_norm(latents))
        return out


class Resampler(nn.Module):
    """A stack of resampler blocks from learned queries: [b n input_width] -> [b num_queries output_width].

    Ends in LayerNorm and Linear: the output's scale is free. A norm as the last operation would hide a collapse of
    the latent space from everything that watches for one.
    """

    def __init__(
        self,
        input_width: int,
        num_inputs: int,
        width: int,
        num_queries: int,
        output_width: int,
        layers: int,
        heads: int,
    ) -> None:
        super().__init__()
        check_layers(layers)
        self.positions = nn.Parameter(sinusoids(torch.arange(num_inputs), input_width))
        self.queries = nn.Parameter(sinusoids(torch.arange(num_queries) * (num_inputs / num_queries), width))
        self.blocks = nn.ModuleList(ResamplerBlock(width, input_width, heads) for _ in range(layers))
        self.norm = nn.LayerNorm(width)
        self.out = nn.Linear(width, output_width)
        self.apply(initialise)

    def forward(self, inputs: Tensor) -> Tensor:
        """[b n input_width] -> [b m output_width]."""
        inputs = inputs + self.positions
        latents = self.queries.expand(len(inputs), -1, -1).contiguous()  # else the first block compiles for itself
        for block in self.blocks:
            latents = block(latents, inputs)
        out: Tensor = self.out(self.norm(latents))
        return out


class Transformer(nn.Module):
    """Linear, learned positions, bidirectional blocks, LayerNorm, Linear: [b n input_width] -> [b n output_width]."""

    def __init__(
        self, input_width: int, num_inputs: int, width: int, output_width: int, layers: int, heads: int
    ) -> None:
        super().__init__()
        check_layers(layers)
        self.input = nn.Linear(input_width, width)
        self.positions = nn.Parameter(sinusoids(torch.arange(num_inputs), width))
        self.blocks = nn.Sequential(*(TransformerBlock(width, heads) for _ in range(layers)))
        self.norm = nn.LayerNorm(width)
        self.out = nn.Linear(width, output_width)
        self.apply(initialise)

    def forward(self, inputs: Tensor) -> Tensor:
        """[b n input_width] -> [b n output_width]."""
        out: Tensor = self.out(self.norm(self.blocks(self.input(inputs) + self.positions)))
        return out


class TimeEmbedding(nn.Module):
    """Sinusoid of 1000 t, then an MLP: [b] -> [b d]."""

    def __init__(self, width: int, frequencies: int = 256) -> None:
        super().__init__()
        self.frequencies = frequencies
        self.mlp = nn.Sequential(nn.Linear(frequencies, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, t: Tensor) -> Tensor:
        """Schedule times t [b] in [0, 1] -> [b d]."""
        waves = sinusoids(1000 * widened(t), self.frequencies)
        out: Tensor = self.mlp(waves.to(dtype_of(self.mlp, waves.dtype)))
        return out


class ModulatedBlock(Block):
    """DiT block with AdaLN-zero (Peebles and Xie, 2023): shift, scale and gate of both branches come from outside."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(width, elementwise_affine=False)
        self.attention = SelfAttention(width, heads)
        self.mlp_norm = nn.LayerNorm(width, elementwise_affine=False)
        self.mlp = MLP(width)

    def forward(self, x: Tensor, modulation: Tensor) -> Tensor:
        """[b n d] and modulation [b or 1, 6d] -> [b n d]."""
        shift1, scale1, gate1, shift2, scale2, gate2 = modulation.unsqueeze(1).chunk(6, dim=-1)
        x = x + gate1 * self.attention(self.attention_norm(x) * (1 + scale1) + shift1)
        out: Tensor = x + gate2 * self.mlp(self.mlp_norm(x) * (1 + scale2) + shift2)
        return out
