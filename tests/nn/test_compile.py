"""Compiled layers against the same ones uncompiled, and what happens where nothing can be compiled."""

import copy
import warnings

import pytest
import torch
from helpers.tiny import HIDDEN, TanhBlock, make_pretrained, rows
from torch import Tensor, nn
from torch._inductor import config as inductor

from ldlm.nn.compile import MAX_GRAPHS, compile_blocks, obstacle, release_blocks
from ldlm.nn.denoiser import DiT
from ldlm.nn.latent_coders import PerceiverResamplerDecoder, PerceiverResamplerEncoder
from ldlm.nn.token_encoders import PretrainedTokenEncoder


@pytest.fixture(autouse=True)
def _forget_what_was_compiled():
    torch._dynamo.reset()
    yield
    obstacle.cache_clear()
    torch._dynamo.reset()


def shaken(module: nn.Module) -> nn.Module:
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return module


def normal(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def output_and_gradients(module: nn.Module, *inputs: Tensor) -> list[Tensor]:
    module.zero_grad()
    out = module(*inputs)
    out.square().mean().backward()
    return [out.detach(), *(p.grad for p in module.parameters() if p.grad is not None)]


@pytest.mark.slow
def test_compiled_layers_compute_what_they_do_uncompiled_also_somebodys_own():
    model = shaken(nn.Sequential(DiT(16, 8, width=16, layers=2, heads=2), TanhBlock(16)))
    model.forward = lambda z: model[1](model[0](z, torch.linspace(0, 1, len(z)), z))
    names, z = list(model.state_dict()), normal(4, 8, 16)
    want = output_and_gradients(model, z)
    compile_blocks(model)
    assert [block._compiled_call_impl is not None for block in (*model[0].blocks, model[1])] == [True] * 3
    assert list(model.state_dict()) == names
    for got, wanted in zip(output_and_gradients(model, z), want, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-5 * wanted.abs().max().item())
    release_blocks(model)
    assert model[1]._compiled_call_impl is None


@pytest.mark.slow
@pytest.mark.parametrize("family", ["gpt2", "bert"])
def test_a_pre_trained_encoders_layers_compile_too(tmp_path, family):
    make_pretrained(family, tmp_path)
    encoder, tokens = PretrainedTokenEncoder(str(tmp_path), layer=2), rows(3)
    want = encoder.hidden_states(tokens)
    compile_blocks(encoder.frozen())
    assert sum(part._compiled_call_impl is not None for part in encoder.frozen().modules()) == 2
    torch.testing.assert_close(encoder.hidden_states(tokens), want, rtol=1e-5, atol=1e-5)


def test_a_compiled_layer_may_be_computed_again_in_the_backward_pass(graphs):
    model, z = shaken(DiT(16, 8, width=16, layers=2, heads=2)), normal(4, 8, 16)
    t = torch.linspace(0, 1, 4)
    want = output_and_gradients(model, z, t, z)
    compile_blocks(model)
    for block in model.blocks:
        block.recompute = True
    for got, wanted in zip(output_and_gradients(model, z, t, z), want, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-6, atol=1e-6 * wanted.abs().max().item())
    assert graphs


def test_without_a_compiler_a_warning_says_so_and_the_result_is_right():
    model, z = shaken(TanhBlock(16)), normal(2, 16)
    want = output_and_gradients(model, z)
    obstacle.cache_clear()
    with inductor.patch({"cpp.cxx": ("no-such-compiler",)}):
        with pytest.warns(UserWarning, match=r"nothing is compiled.*no-such-compiler.*install a C\+\+ compiler"):
            compile_blocks(model)
        assert all(torch.equal(*pair) for pair in zip(output_and_gradients(model, z), want, strict=True))
        assert model._compiled_call_impl is None


def test_a_model_without_layers_to_compile_asks_for_no_compiler(monkeypatch):
    monkeypatch.setattr("ldlm.nn.compile.obstacle", lambda device: pytest.fail("a compiler was looked for"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        compile_blocks(nn.Linear(2, 2))


def test_an_unknown_mode_is_refused():
    with pytest.raises(ValueError, match=r"mode='fastest' is not one of torch\.compile's: default, .*max-autotune"):
        compile_blocks(TanhBlock(2), mode="fastest")


def test_rows_in_any_number_make_no_more_than_a_few_graphs(graphs):
    parts = [
        shaken(PerceiverResamplerEncoder(HIDDEN, 12, 8, width=16, layers=2, heads=2)),
        shaken(PerceiverResamplerDecoder(HIDDEN, 12, 8, width=16, layers=2, heads=2)),
    ]
    plain = copy.deepcopy(parts)
    for part in parts:
        compile_blocks(part)
    graphs.clear()

    def through(parts: list[nn.Module], count: int) -> Tensor:
        return parts[1](parts[0](normal(count, 8, HIDDEN)))

    def run(count: int) -> None:
        torch.testing.assert_close(through(parts, count), through(plain, count))

    for count in (4, 6, 1):
        run(count)
    seen = len(graphs)
    assert seen == 6 < MAX_GRAPHS  # for 2 widths: 4 rows, any number, a single one
    for count in (5, 3, 9, 2, 17):
        run(count)
    assert len(graphs) == seen


def test_a_copy_of_a_compiled_model_is_uncompiled(graphs):
    model = TanhBlock(4)
    compile_blocks(model)
    assert copy.deepcopy(model)._compiled_call_impl is None
