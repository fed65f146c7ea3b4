"""The transformer pieces against formulas and against torch's own, in float64: float32 kernels differ by machine."""

import math

import pytest
import torch
import torch.nn.functional as F
from helpers.tiny import generator
from torch import Tensor, nn

from ldlm.nn.layers import (
    MLP,
    GatedMLP,
    ModulatedBlock,
    Resampler,
    ResamplerBlock,
    SelfAttention,
    TimeEmbedding,
    TransformerBlock,
    attend,
    sinusoids,
)

WIDTH, HEADS = 12, 3


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=generator(seed), dtype=torch.float64)


def shaken(module: nn.Module) -> nn.Module:
    draw = generator(9)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(0.5 * torch.randn(parameter.shape, generator=draw))
    return module.double()


def softmax_attention(queries: Tensor, keys: Tensor, values: Tensor, heads: int) -> Tensor:
    """softmax(Q Kᵀ / √e) V, head by head and row by row."""
    e = queries.shape[-1] // heads
    out = torch.zeros_like(queries)
    for row in range(len(queries)):
        for head in range(heads):
            part = slice(head * e, (head + 1) * e)
            scores = queries[row, :, part] @ keys[row, :, part].T / math.sqrt(e)
            weights = scores.exp() / scores.exp().sum(1, keepdim=True)
            out[row, :, part] = weights @ values[row, :, part]
    return out


def standardised(x: Tensor) -> Tensor:
    return (x - x.mean(-1, keepdim=True)) / (x.var(-1, keepdim=True, correction=0) + 1e-5).sqrt()


@pytest.mark.parametrize("grad", [False, True])
def test_attention_is_softmax_of_scaled_products_times_values(grad):
    queries, keys, values = normal(2, 5, WIDTH), normal(2, 7, WIDTH, seed=1), normal(2, 7, WIDTH, seed=2)
    with torch.set_grad_enabled(grad):
        got = attend(queries, keys, values, HEADS)
    torch.testing.assert_close(got, softmax_attention(queries, keys, values, HEADS), rtol=1e-12, atol=1e-12)


def test_attention_under_bfloat16_stays_bfloat16_and_close_to_float32():
    module, x = SelfAttention(WIDTH, HEADS), normal(2, 5, WIDTH).float()
    with torch.autocast("cpu", torch.bfloat16):
        trained = module(x)
        with torch.no_grad():
            sampled = module(x)
    assert trained.dtype == sampled.dtype == torch.bfloat16
    for half in (trained, sampled):
        torch.testing.assert_close(half.float(), module(x), rtol=0.05, atol=0.02)


def test_self_attention_is_torchs_multihead_attention():
    ours, theirs = (
        shaken(SelfAttention(WIDTH, HEADS)),
        nn.MultiheadAttention(WIDTH, HEADS, batch_first=True, dtype=torch.float64),
    )
    with torch.no_grad():
        theirs.in_proj_weight.copy_(ours.qkv.weight)
        theirs.in_proj_bias.copy_(ours.qkv.bias)
        theirs.out_proj.weight.copy_(ours.out.weight)
        theirs.out_proj.bias.copy_(ours.out.bias)
    x = normal(2, 5, WIDTH)
    torch.testing.assert_close(ours(x), theirs(x, x, x, need_weights=False)[0], rtol=1e-12, atol=1e-12)


def test_a_transformer_block_is_torchs_pre_norm_encoder_layer():
    ours = shaken(TransformerBlock(WIDTH, HEADS))
    theirs = nn.TransformerEncoderLayer(
        WIDTH, HEADS, 4 * WIDTH, dropout=0.0, activation=F.gelu, batch_first=True, norm_first=True
    ).double()
    pairs = {
        "self_attn.in_proj_weight": ours.attention.qkv.weight,
        "self_attn.in_proj_bias": ours.attention.qkv.bias,
        "self_attn.out_proj.weight": ours.attention.out.weight,
        "self_attn.out_proj.bias": ours.attention.out.bias,
        "linear1.weight": ours.mlp.up.weight,
        "linear1.bias": ours.mlp.up.bias,
        "linear2.weight": ours.mlp.down.weight,
        "linear2.bias": ours.mlp.down.bias,
        "norm1.weight": ours.attention_norm.weight,
        "norm1.bias": ours.attention_norm.bias,
        "norm2.weight": ours.mlp_norm.weight,
        "norm2.bias": ours.mlp_norm.bias,
    }
    theirs.load_state_dict(pairs)
    x = normal(2, 5, WIDTH)
    torch.testing.assert_close(ours(x), theirs(x), rtol=1e-12, atol=1e-12)


def test_the_gated_mlp_multiplies_a_gelu_of_one_half_with_the_other():
    mlp, x = shaken(GatedMLP(WIDTH)), normal(2, WIDTH)
    weight, bias = mlp.gate_up.weight, mlp.gate_up.bias
    gate = x @ weight[: 4 * WIDTH].T + bias[: 4 * WIDTH]
    up = x @ weight[4 * WIDTH :].T + bias[4 * WIDTH :]
    gelu = gate * 0.5 * (1 + torch.erf(gate / math.sqrt(2)))
    want = (gelu * up) @ mlp.down.weight.T + mlp.down.bias
    torch.testing.assert_close(mlp(x), want, rtol=1e-12, atol=1e-12)


# --- the resampler


def test_a_resampler_block_attends_to_inputs_and_latents_in_one_softmax_each_with_its_own_projection():
    block, latents, inputs = shaken(ResamplerBlock(WIDTH, 10, HEADS)), normal(2, 3, WIDTH), normal(2, 6, 10, seed=1)
    x = standardised(inputs) * block.input_norm.weight + block.input_norm.bias
    y = standardised(latents) * block.latent_norm.weight + block.latent_norm.bias
    key_x, value_x = (x @ w.T + b for w, b in zip(*(p.chunk(2) for p in block.from_inputs.parameters()), strict=True))
    query, key_y, value_y = (
        y @ w.T + b for w, b in zip(*(p.chunk(3) for p in block.from_latents.parameters()), strict=True)
    )
    attended = softmax_attention(query, torch.cat([key_x, key_y], 1), torch.cat([value_x, value_y], 1), HEADS)
    middle = latents + attended @ block.out.weight.T + block.out.bias
    normed = standardised(middle) * block.mlp_norm.weight + block.mlp_norm.bias
    torch.testing.assert_close(block(latents, inputs), middle + block.mlp(normed), rtol=1e-12, atol=1e-12)


def test_a_resampler_block_reads_every_input_and_every_other_latent():
    block = shaken(ResamplerBlock(WIDTH, WIDTH, HEADS))
    latents, inputs = normal(1, 3, WIDTH).requires_grad_(), normal(1, 6, WIDTH, seed=1).requires_grad_()
    of_latents, of_inputs = torch.autograd.grad(block(latents, inputs)[0, 0].sum(), [latents, inputs])
    assert of_inputs[0].abs().sum(1).gt(0).all()
    assert of_latents[0].abs().sum(1).gt(0).all()


def test_a_resampler_tells_positions_apart_and_ends_in_a_linear_layer_whose_scale_is_free():
    torch.manual_seed(0)
    resampler, inputs = Resampler(10, 6, WIDTH, 4, 5, layers=2, heads=HEADS).double(), normal(2, 6, 10)
    out = resampler(inputs)
    assert out.shape == (2, 4, 5)
    assert not torch.allclose(resampler(inputs.flip(1)), out, atol=1e-2)
    with torch.no_grad():
        resampler.out.weight.mul_(100)
    torch.testing.assert_close(resampler(inputs), 100 * out, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("module", "matrices", "vectors"),
    [
        (ResamplerBlock(WIDTH, WIDTH, HEADS), 14, 2 + 3 + 1 + 4 + 1 + 6),  # biases, and three norms of two vectors
        (TransformerBlock(WIDTH, HEADS), 12, 3 + 1 + 4 + 1 + 4),
        (TransformerBlock(WIDTH, HEADS, gated=True), 16, 3 + 1 + 8 + 1 + 4),
        (ModulatedBlock(WIDTH, HEADS), 12, 3 + 1 + 4 + 1),
        (SelfAttention(WIDTH, HEADS), 4, 4),
        (MLP(WIDTH), 8, 5),
        (GatedMLP(WIDTH), 12, 9),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else None,
)
def test_a_module_has_as_many_parameters_as_it_says(module, matrices, vectors):
    assert sum(p.numel() for p in module.parameters()) == matrices * WIDTH**2 + vectors * WIDTH


# --- AdaLN-zero and time


def test_a_modulated_block_of_zero_modulation_is_the_identity():
    block, x = shaken(ModulatedBlock(WIDTH, HEADS)), normal(2, 5, WIDTH)
    assert torch.equal(block(x, torch.zeros(2, 6 * WIDTH).double()), x)
    assert torch.equal(block(x, torch.zeros(1, 6 * WIDTH).double()), x)


def test_a_modulated_block_shifts_scales_and_gates_both_branches():
    block, x, modulation = shaken(ModulatedBlock(WIDTH, HEADS)), normal(2, 5, WIDTH), normal(2, 6 * WIDTH, seed=1)
    shift1, scale1, gate1, shift2, scale2, gate2 = (modulation[:, None, i * WIDTH : (i + 1) * WIDTH] for i in range(6))
    middle = x + gate1 * block.attention(standardised(x) * (1 + scale1) + shift1)
    want = middle + gate2 * block.mlp(standardised(middle) * (1 + scale2) + shift2)
    torch.testing.assert_close(block(x, modulation), want, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("width", [2, 8, 9])
def test_sinusoids_are_sines_then_cosines_of_geometric_frequencies(width):
    positions = [0.0, 1.0, 2.5, 999.0]
    half = width // 2
    want = [
        [math.sin(p * 10_000 ** (-i / half)) for i in range(half)]
        + [math.cos(p * 10_000 ** (-i / half)) for i in range(half)]
        + [0.0] * (width % 2)
        for p in positions
    ]
    for dtype, error in ((torch.float64, 1e-12), (torch.float32, 2e-4)):  # float32 rounds 999 by 3e-5
        found = sinusoids(torch.tensor(positions, dtype=dtype), width)
        torch.testing.assert_close(found, torch.tensor(want, dtype=dtype), rtol=0, atol=error)
    assert sinusoids(torch.tensor(positions).bfloat16(), width).dtype == torch.float32


def test_the_time_embedding_is_an_mlp_of_the_sinusoid_of_a_thousand_t():
    embedding, t = shaken(TimeEmbedding(WIDTH, 16)), torch.tensor([0.0, 0.137, 1.0], dtype=torch.float64)
    angles = torch.stack([1000 * t * 10_000 ** (-i / 8) for i in range(8)], 1)
    first, _, last = embedding.mlp
    x = torch.cat([angles.sin(), angles.cos()], 1) @ first.weight.T + first.bias
    want = (x * torch.sigmoid(x)) @ last.weight.T + last.bias
    torch.testing.assert_close(embedding(t), want, rtol=1e-10, atol=1e-10)  # sines of angles up to 1000
    assert embedding.float()(t.bfloat16()).dtype == torch.float32


@pytest.mark.parametrize("heads", [0, -1, 5, 24])
@pytest.mark.parametrize(
    "make",
    [
        lambda heads: SelfAttention(WIDTH, heads),
        lambda heads: ResamplerBlock(WIDTH, WIDTH, heads),
        lambda heads: ModulatedBlock(WIDTH, heads),
    ],
)
def test_heads_that_do_not_divide_the_width_are_refused_with_those_that_do(make, heads):
    with pytest.raises(ValueError, match=rf"heads={heads} does not divide width=12: .* \[1, 2, 3, 4, 6, 12\]"):
        make(heads)
