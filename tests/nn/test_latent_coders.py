"""Latent encoders and decoders: the paper's sizes, what they read, and that no norm hides their scale."""

import pytest
import torch
from helpers.tiny import generator
from torch import nn

from ldlm.nn.latent_coders import (
    IdentityDecoder,
    IdentityEncoder,
    LatentDecoder,
    LatentEncoder,
    PerceiverResamplerDecoder,
    PerceiverResamplerEncoder,
    SelfAttentionDecoder,
    SelfAttentionEncoder,
)

SIZES = {"hidden_size": 10, "latent_size": 6, "sequence_length": 8, "width": 12, "layers": 2, "heads": 3}
TRAINABLE = [PerceiverResamplerEncoder, PerceiverResamplerDecoder, SelfAttentionEncoder, SelfAttentionDecoder]


def count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def inputs(part: nn.Module, rows: int = 2) -> torch.Tensor:
    of_tokens = isinstance(part, LatentEncoder)
    shape = (rows, 8, part.hidden_size) if of_tokens else (rows, part.num_latents, part.latent_size)
    return torch.randn(shape, generator=generator(), dtype=torch.float64)


@pytest.mark.parametrize("kind", [PerceiverResamplerEncoder, PerceiverResamplerDecoder])
def test_the_papers_latent_coders_have_about_50_million_parameters(kind):
    with torch.device("meta"):
        part = kind()
    d, tables, vectors = 768, 2 * 128 * 768, 17 * 768
    assert count(part) == 6 * (14 * d**2 + vectors) + tables + 2 * d + d**2 + d
    assert 49e6 < count(part) < 51.5e6  # App. C: about 50M each


@pytest.mark.parametrize("kind", TRAINABLE)
def test_the_output_is_linear_in_the_last_layer_so_that_its_scale_is_free(kind):
    torch.manual_seed(0)
    part = kind(**SIZES).double()
    last = [module for module in part.modules() if isinstance(module, nn.Linear)][-1]
    x = inputs(part)
    before = part(x)
    with torch.no_grad():
        last.weight.mul_(50)
        last.bias.mul_(50)
    torch.testing.assert_close(part(x), 50 * before, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kind", TRAINABLE)
def test_every_output_reads_every_input_and_rows_do_not_meet(kind):
    torch.manual_seed(0)
    part = kind(**SIZES).double()
    x = inputs(part).requires_grad_()
    out = part(x)
    for position in range(out.shape[1]):
        (gradient,) = torch.autograd.grad(out[0, position].sum(), x, retain_graph=True)
        assert gradient[0].abs().sum(-1).gt(0).all()
        assert not gradient[1].any()


@pytest.mark.parametrize("kind", TRAINABLE)
def test_the_order_of_the_inputs_matters(kind):
    torch.manual_seed(0)
    part = kind(**SIZES).double()
    x = inputs(part)
    assert not torch.allclose(part(x.roll(1, 1)), part(x), atol=1e-2)
    assert not torch.allclose(part(x.roll(1, 1)), part(x).roll(1, 1), atol=1e-2)


@pytest.mark.parametrize(("num_latents", "m"), [(None, 8), (3, 3), (16, 16)])
def test_the_number_of_latents_is_free_and_one_a_token_by_default(num_latents, m):
    torch.manual_seed(0)
    encoder = PerceiverResamplerEncoder(**SIZES, num_latents=num_latents).double()
    decoder = PerceiverResamplerDecoder(**SIZES, num_latents=num_latents).double()
    assert encoder.num_latents == decoder.num_latents == m
    z0 = encoder(inputs(encoder))
    assert z0.shape == (2, m, 6)
    assert decoder(z0).shape == (2, 8, 10)


def test_unit_variance_gives_every_latent_vector_mean_square_1_and_keeps_its_direction():
    torch.manual_seed(0)
    free = PerceiverResamplerEncoder(**SIZES).double()
    with torch.no_grad():
        list(free.parameters())[-1].add_(torch.randn(6))
    unit = PerceiverResamplerEncoder(**SIZES, unit_variance=True).double()
    unit.load_state_dict(free.state_dict())  # it has no parameters of its own
    x = inputs(free)
    z0, z1 = free(x), unit(x)
    torch.testing.assert_close(z1.square().mean(-1), torch.ones(2, 8, dtype=torch.float64), rtol=1e-9, atol=0)
    torch.testing.assert_close(z1, z0 / z0.square().mean(-1, keepdim=True).sqrt(), rtol=1e-9, atol=0)
    assert unit.bfloat16()(x.bfloat16()).dtype == torch.float32


def test_the_identity_pair_changes_nothing_and_learns_nothing():
    for part in (IdentityEncoder(10, 8), IdentityDecoder(10, 8)):
        x = inputs(part)
        assert part(x) is x
        assert count(part) == 0
        assert (part.hidden_size, part.latent_size, part.num_latents) == (10, 10, 8)


@pytest.mark.parametrize("kind", TRAINABLE)
def test_heads_that_do_not_divide_the_width_are_refused(kind):
    with pytest.raises(ValueError, match="heads=5 does not divide width=12"):
        kind(**(SIZES | {"heads": 5}))


@pytest.mark.parametrize("kind", [LatentEncoder, LatentDecoder])
def test_the_abstract_parts_cannot_be_made(kind):
    with pytest.raises(TypeError, match="abstract"):
        kind(10, 6, 8)
