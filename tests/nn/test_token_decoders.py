"""Chunked loss and prediction against the plain ones on all logits, and draws against the softmax."""

import math

import pytest
import torch
import torch.nn.functional as F
from helpers.tiny import FixedTokenEncoder, generator, rows
from scipy import stats
from torch import Tensor

from ldlm.nn import token_decoders as decoders
from ldlm.nn.token_decoders import LinearTokenDecoder, TokenDecoder, TransformerTokenDecoder

H, V, N = 16, 40, 8


def make(kind: str, **changes) -> TokenDecoder:
    torch.manual_seed(0)
    if kind == "linear":
        return LinearTokenDecoder(H, V, **changes).double()
    return TransformerTokenDecoder(H, V, layers=1, heads=2, **changes).double()


def hidden_states(count: int = 6) -> Tensor:
    return torch.randn(count, N, H, generator=generator(), dtype=torch.float64).requires_grad_()


def most_rows_of_logits(decoder: TokenDecoder) -> list[int]:
    """Fills with the rows of logits of each call of the head."""
    seen: list[int] = []
    decoder.head.register_forward_hook(lambda _module, _inputs, logits: seen.append(logits.numel() // V))
    return seen


@pytest.mark.parametrize("kind", ["linear", "transformer"])
@pytest.mark.parametrize("chunk", [1, 7, 16, 47, 48, 2048])
@pytest.mark.parametrize("subset", [False, True])
def test_loss_and_gradients_in_chunks_are_those_of_plain_cross_entropy(monkeypatch, kind, chunk, subset):
    monkeypatch.setattr(decoders, "CHUNK", chunk)
    decoder, hidden, tokens = make(kind), hidden_states(), rows(6)
    positions = torch.randperm(6 * N, generator=generator(1))[:29] if subset else None
    chosen = torch.arange(6 * N) if positions is None else positions
    leaves = [hidden, *decoder.parameters()]

    plain = F.cross_entropy(decoder(hidden).flatten(0, 1)[chosen], tokens.flatten()[chosen])
    want = torch.autograd.grad(plain, leaves)
    seen = most_rows_of_logits(decoder)
    loss = decoder.loss(hidden, tokens, positions)
    got = torch.autograd.grad(loss, leaves)

    torch.testing.assert_close(loss, plain, rtol=1e-12, atol=0)
    for one, other in zip(got, want, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)
    assert max(seen) <= chunk
    passes = 2 if len(chosen) > chunk else 1  # each chunk's logits are made again for the backward pass
    assert sum(seen) == passes * len(chosen)


@pytest.mark.parametrize(("chunk", "kept"), [(8, False), (48, True)])
def test_no_chunks_logits_are_kept_for_the_backward_pass(monkeypatch, chunk, kept):
    monkeypatch.setattr(decoders, "CHUNK", chunk)
    shapes: list[torch.Size] = []

    def pack(tensor: Tensor) -> Tensor:
        shapes.append(tensor.shape)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        make("linear").loss(hidden_states(), rows(6))
    assert any(shape == (chunk, V) for shape in shapes) == kept  # one that is no longer than a chunk keeps its own


def test_under_bfloat16_the_loss_is_float32_and_not_rounded_to_bfloat16(monkeypatch):
    decoder, hidden, tokens = make("linear").float(), hidden_states().float(), rows(6)
    losses = []
    for chunk in (7, 2048):
        monkeypatch.setattr(decoders, "CHUNK", chunk)
        with torch.autocast("cpu", torch.bfloat16):
            losses.append(decoder.loss(hidden, tokens))
    with torch.autocast("cpu", torch.bfloat16):
        logits = decoder(hidden).flatten(0, 1)
    assert logits.dtype == torch.bfloat16
    want = F.cross_entropy(logits.float(), tokens.flatten())
    for loss in losses:
        assert loss.dtype == torch.float32
        torch.testing.assert_close(loss, want, rtol=1e-6, atol=0)
    assert want != want.bfloat16().float()
    whole = decoder.bfloat16().loss(hidden.bfloat16(), tokens)  # weights in bfloat16, and no autocast to help
    assert whole.dtype == torch.float32
    want = F.cross_entropy(decoder(hidden.bfloat16()).flatten(0, 1).float(), tokens.flatten())
    torch.testing.assert_close(whole, want, rtol=1e-6, atol=0)


@pytest.mark.parametrize("kind", ["linear", "transformer"])
@pytest.mark.parametrize("chunk", [5, 2048])
def test_predict_is_the_argmax_of_the_logits(monkeypatch, kind, chunk):
    monkeypatch.setattr(decoders, "CHUNK", chunk)
    decoder, hidden = make(kind), hidden_states()
    want = decoder(hidden).argmax(-1)
    seen = most_rows_of_logits(decoder)
    assert torch.equal(decoder.predict(hidden), want)
    assert max(seen) <= chunk


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_draws_at_a_temperature_follow_the_softmax(monkeypatch, temperature):
    monkeypatch.setattr(decoders, "CHUNK", 1000)
    decoder = make("linear")
    with torch.no_grad():
        decoder.head.weight.mul_(3)
    hidden = torch.randn(H, generator=generator(4), dtype=torch.float64).expand(2500, N, H)
    drawn = decoder.predict(hidden, temperature, generator(2))
    counts = torch.bincount(drawn.flatten(), minlength=V).double().numpy()
    expected = 2500 * N * F.softmax(decoder(hidden[:1, :1]).double().flatten() / temperature, -1).detach().numpy()
    keep = expected > 5
    observed = [*counts[keep], counts[~keep].sum() + 1e-9]
    wanted = [*expected[keep], expected[~keep].sum() + 1e-9]
    assert stats.chisquare(observed, wanted).pvalue > 0.01
    assert torch.equal(drawn, decoder.predict(hidden, temperature, generator(2)))


def test_a_start_from_embeddings_reads_them_on_hidden_states_that_are_normalised_no_more():
    encoder = FixedTokenEncoder()
    encoder.fit_statistics([rows(20)], 20)
    decoder = make("linear", from_embeddings=True).float()
    decoder.start(encoder)
    decoder.double()  # from here on; what it starts from are float32 parameters
    tokens, table = rows(2), encoder.table.double()
    hidden = (table[tokens] - encoder.mean) / encoder.std
    torch.testing.assert_close(decoder(hidden), table[tokens] @ table.T, rtol=1e-5, atol=1e-4)


def test_without_being_asked_a_start_changes_nothing():
    for kind in ("linear", "transformer"):
        decoder = make(kind)
        before = {name: value.clone() for name, value in decoder.state_dict().items()}
        decoder.start(FixedTokenEncoder())
        assert all(torch.equal(before[name], value) for name, value in decoder.state_dict().items())


def test_the_transformer_decoder_looks_at_all_positions_and_the_linear_one_at_its_own():
    for kind, reads in (("transformer", N), ("linear", 1)):
        decoder, hidden = make(kind), hidden_states(2)
        (gradient,) = torch.autograd.grad(decoder(hidden)[0, 3].square().sum(), hidden)
        assert gradient[0].abs().sum(-1).gt(0).sum() == reads
        assert not gradient[1].any()


def test_the_papers_token_decoders_have_66_and_38_million_parameters():
    with torch.device("meta"):
        three, linear = TransformerTokenDecoder(), LinearTokenDecoder()
    head = 768 * 50257 + 50257
    counts = [sum(p.numel() for p in decoder.parameters()) for decoder in (three, linear)]
    assert counts == [head + 3 * (16 * 768**2 + 17 * 768) + 2 * 768, head]
    assert 66e6 < counts[0] < 67.5e6
    assert 38e6 < counts[1] < 39e6


def test_positions_alone_let_a_transformer_decoder_use_the_order_of_tokens_and_cost_an_embedding_each():
    order = torch.tensor([1, 0, *range(2, N)])
    blind, sighted = make("transformer"), make("transformer", learned_positions=True, sequence_length=N)
    hidden = hidden_states()
    torch.testing.assert_close(blind(hidden[:, order]), blind(hidden)[:, order])  # for a permutation says nothing new
    other = sighted(hidden[:, order]) - sighted(hidden)[:, order]
    assert other[:, 2:].abs().max() > 0.01  # what stands elsewhere is read otherwise, too
    counts = [sum(p.numel() for p in decoder.parameters()) for decoder in (blind, sighted)]
    assert counts[1] - counts[0] == N * H
    with pytest.raises(ValueError, match=f"sequence_length={N} learned positions for rows of {N - 1} tokens"):
        sighted(hidden[:, 1:])


def test_on_static_embeddings_a_token_is_learnt_from_its_place_only_with_positions():
    # Every row holds one embedding N times: what belongs where is in the positions or nowhere.
    torch.manual_seed(0)
    hidden, tokens = torch.randn(1, 1, H).double().expand(4, N, H), torch.arange(N).expand(4, N)
    nats = []
    for positions in (False, True):
        decoder = make("transformer", learned_positions=positions, sequence_length=N)
        optimizer = torch.optim.Adam(decoder.parameters(), 3e-3)
        for _ in range(150):
            loss = decoder.loss(hidden, tokens)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        nats.append(loss.item())
    assert nats[0] > math.log(N) - 1e-3  # nothing is better than a guess among N
    assert nats[1] < 0.1 * math.log(N)


def test_heads_that_do_not_divide_the_width_are_refused():
    with pytest.raises(ValueError, match="heads=5 does not divide width=16"):
        TransformerTokenDecoder(H, V, heads=5)
