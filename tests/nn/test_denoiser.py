"""The DiT: the paper's size, the start of AdaLN-zero, and a forward pass written out."""

import pytest
import torch
import torch.nn.functional as F
from helpers.tiny import generator
from torch import Tensor

from ldlm.nn import denoiser
from ldlm.nn.denoiser import Denoiser, DiT

D, M, WIDTH = 6, 5, 12


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=generator(seed), dtype=torch.float64)


def make(shake: float = 0.3, layers: int = 2) -> DiT:
    torch.manual_seed(0)
    dit = DiT(D, M, WIDTH, layers, heads=3)
    with torch.no_grad():
        for parameter in dit.parameters():
            parameter.add_(shake * torch.randn_like(parameter))
    return dit.double()


def test_the_papers_denoiser_has_131_to_132_million_parameters():
    with torch.device("meta"):
        dit = DiT()
    d = 768
    blocks = 12 * (18 * d**2 + 15 * d)
    rest = 2 * d**2 + d + 128 * d + 256 * d + d + d**2 + d + 2 * d**2 + 2 * d + d**2 + d
    count = sum(parameter.numel() for parameter in dit.parameters())
    assert count == blocks + rest
    assert 131e6 < count < 132e6  # App. C: 132M


def test_at_the_start_the_prediction_is_0_and_every_block_the_identity():
    torch.manual_seed(0)
    dit = DiT(D, M, WIDTH, layers=3, heads=3).double()
    z_t, t = normal(4, M, D), torch.tensor([0.0, 0.3, 0.9, 1.0])
    assert not dit(z_t, t, normal(4, M, D, seed=1)).any()
    x = normal(4, M, WIDTH)
    for block, modulation in zip(dit.blocks, dit.modulations(t), strict=False):
        assert not modulation.any()
        assert torch.equal(block(x, modulation), x)


def test_at_the_start_the_last_layer_alone_learns():
    torch.manual_seed(0)
    dit = DiT(D, M, WIDTH, layers=1, heads=3).double()
    z_t, condition = normal(4, M, D), normal(4, M, D, seed=1)
    (1 - dit(z_t, torch.rand(4, generator=generator()), condition)).square().mean().backward()
    x = F.layer_norm(dit.input(torch.cat([z_t, condition], -1)) + dit.positions, (WIDTH,))
    torch.testing.assert_close(dit.output.bias.grad, torch.full((D,), -2 / D, dtype=torch.float64))
    torch.testing.assert_close(
        dit.output.weight.grad, (-2 / D * x.mean((0, 1))).expand(D, WIDTH), rtol=1e-12, atol=1e-12
    )
    assert not any(p.grad.any() for name, p in dit.named_parameters() if not name.startswith("output"))


def test_the_forward_pass_is_the_one_written_out():
    dit, t = make(), torch.tensor([0.1, 0.8], dtype=torch.float64)
    z_t, condition = normal(2, M, D), normal(2, M, D, seed=1)
    angles = torch.stack([1000 * t * 10_000 ** (-i / 128) for i in range(128)], 1)
    time = dit.time.mlp(torch.cat([angles.sin(), angles.cos()], 1))
    silu = time * torch.sigmoid(time)
    x = torch.cat([z_t, condition], -1) @ dit.input.weight.T + dit.input.bias + dit.positions
    for block, modulator in zip(dit.blocks, dit.modulators, strict=True):
        x = block(x, silu @ modulator.weight.T + modulator.bias)
    shift, scale = (silu @ dit.final_modulator.weight.T + dit.final_modulator.bias).split(WIDTH, -1)
    normed = F.layer_norm(x, (WIDTH,)) * (1 + scale[:, None]) + shift[:, None]
    want = normed @ dit.output.weight.T + dit.output.bias
    torch.testing.assert_close(dit(z_t, t, condition), want, rtol=1e-10, atol=1e-10)


def test_denoising_with_modulations_computed_before_is_the_forward_pass():
    dit, z_t, condition = make(), normal(3, M, D), normal(3, M, D, seed=1)
    t = torch.tensor([0.2, 0.5, 0.99])
    assert torch.equal(dit.denoise(z_t, condition, dit.modulations(t)), dit(z_t, t, condition))
    one = torch.tensor([0.5])  # one time for all rows, as while sampling
    torch.testing.assert_close(
        dit.denoise(z_t, condition, dit.modulations(one)), dit(z_t, one.expand(3), condition), rtol=1e-12, atol=1e-12
    )


@pytest.mark.parametrize("at_once", [512, 3, 1])
def test_the_table_of_modulations_gives_the_forward_pass_at_every_time(at_once, monkeypatch):
    monkeypatch.setattr(denoiser, "TIMES", at_once)
    dit, z_t, condition = make(), normal(3, M, D), normal(3, M, D, seed=1)
    times = torch.linspace(1, 0.01, 7, dtype=torch.float64)
    calls = list(dit.at_times(times))
    assert len(calls) == 7
    for t, call in zip(times, calls, strict=True):
        want = dit(z_t, t.expand(3), condition)
        assert ((call(z_t, condition) - want).norm() / want.norm()).item() < 1e-12


def test_modulations_are_computed_once_for_all_times_and_of_one_row_each(monkeypatch):
    monkeypatch.setattr(denoiser, "TIMES", 4)
    dit, seen = make(), []
    dit.modulators[0].register_forward_hook(lambda _module, inputs, _output: seen.append(tuple(inputs[0].shape)))
    for call in dit.at_times(torch.linspace(1, 0.01, 10)):
        call(normal(3, M, D), normal(3, M, D))
    assert seen == [(4, WIDTH), (4, WIDTH), (2, WIDTH)]


def test_a_denoiser_of_ones_own_is_called_with_the_time_of_all_rows():
    class Shift(Denoiser):
        def forward(self, z_t: Tensor, t: Tensor, self_condition: Tensor) -> Tensor:
            return z_t + t[:, None, None] - self_condition

    z, condition = normal(3, M, D), normal(3, M, D, seed=1)
    calls = Shift(D, M).at_times(torch.tensor([1.0, 0.25]))
    for t, call in zip((1.0, 0.25), calls, strict=True):
        torch.testing.assert_close(call(z, condition), z + t - condition)


def test_every_argument_reaches_the_estimate_and_rows_do_not_meet():
    dit = make()
    z_t, condition = normal(2, M, D).requires_grad_(), normal(2, M, D, seed=1).requires_grad_()
    t = torch.tensor([0.2, 0.5], requires_grad=True)
    gradients = torch.autograd.grad(dit(z_t, t, condition)[0].sum(), [z_t, t, condition])
    for gradient in gradients:
        assert gradient[0].abs().gt(0).all()
        assert not gradient[1].any()


def test_heads_that_do_not_divide_the_width_are_refused():
    with pytest.raises(ValueError, match="heads=5 does not divide width=12"):
        DiT(D, M, WIDTH, heads=5)
