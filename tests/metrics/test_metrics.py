"""The measures of generated text against other people's programs, brute force and hand counts."""

import json
import math
import struct
import sys
from pathlib import Path

import numpy as np
import pytest
import scipy.stats
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from helpers.tiny import HIDDEN, VOCAB, WORDS, generator, make_pretrained, make_scorer_folder
from torch import nn
from torchmetrics.text import Perplexity
from transformers import BertConfig, BertLMHeadModel

from ldlm.metrics.generative_perplexity import GenerativePerplexity
from ldlm.metrics.mauve import Mauve
from ldlm.metrics.memorisation import Memorisation, known_ngrams
from ldlm.metrics.protocols import PROTOCOLS
from ldlm.metrics.scorer import load_scorer
from ldlm.metrics.text import NGramDiversity, UnigramEntropy

BOS, EOS = 1, 2


def some_texts(count: int, seed: int = 0, shortest: int = 2) -> list[str]:
    lengths = torch.randint(shortest, 13, (count,), generator=generator(seed)).tolist()
    picks = torch.randint(0, len(WORDS), (count, 13), generator=generator(seed + 1)).tolist()
    return [" ".join(WORDS[i] for i in row[:length]) for row, length in zip(picks, lengths, strict=True)]


@pytest.fixture(scope="module")
def scorer(tmp_path_factory):
    return load_scorer(str(make_scorer_folder(tmp_path_factory.mktemp("scorer"))))


def loss_of(scorer, ids: list[int]) -> tuple[float, int]:
    """transformers' own mean loss of one row alone, and over how many tokens it is."""
    row = torch.tensor([ids])
    with torch.no_grad():
        return scorer.model(row, labels=row).loss.double().item(), len(ids) - 1


def perplexity(scorer, texts: list[str], protocol: str, **arguments) -> float:
    metric = GenerativePerplexity(scorer, protocol, **arguments)
    metric.update(texts)
    return metric.compute().item()


def test_plain_perplexity_is_that_of_transformers_losses_and_of_torchmetrics(scorer):
    texts = some_texts(20)
    losses = [loss_of(scorer, row) for row in scorer.encode(texts)]
    want = math.exp(sum(loss * count for loss, count in losses) / sum(count for _, count in losses))
    assert perplexity(scorer, texts, "plain") == pytest.approx(want, rel=1e-5)
    theirs = Perplexity(ignore_index=-1)
    for row in scorer.encode(texts):
        with torch.no_grad():
            theirs.update(scorer.model(torch.tensor([row])).logits[:, :-1], torch.tensor([row[1:]]))
    assert perplexity(scorer, texts, "plain") == pytest.approx(theirs.compute().item(), rel=1e-5)


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_no_result_depends_on_which_texts_are_read_together(scorer, protocol):
    texts = [*some_texts(24, shortest=0), "word1 </s> word2 </s> word3"]
    want = perplexity(scorer, texts, protocol)
    for batch_tokens in (1, 17, 60):
        assert perplexity(scorer, texts, protocol, batch_tokens=batch_tokens) == pytest.approx(want, rel=1e-5)
    assert perplexity(scorer, texts[::-1], protocol) == pytest.approx(want, rel=1e-5)


def test_mean_of_texts_protocols_are_those_of_transformers_losses(scorer):
    texts = some_texts(45)
    alone = [math.exp(loss_of(scorer, row)[0]) for row in scorer.encode(texts)]
    begun = sorted(math.exp(loss_of(scorer, [BOS, *row])[0]) for row in scorer.encode(texts))
    assert perplexity(scorer, texts, "flow_matching") == pytest.approx(np.mean(alone), rel=1e-5)
    assert perplexity(scorer, texts, "hf_mean") == pytest.approx(np.mean(begun), rel=1e-5)
    trimmed = scipy.stats.trim_mean(begun, 0.05)  # 45 texts: 2 at either end
    assert perplexity(scorer, texts, "tencdm") == pytest.approx(trimmed, rel=1e-5)
    assert np.mean(begun) != pytest.approx(trimmed, rel=1e-3)


def test_mdlm_scores_the_first_end_of_text_even_a_padded_one_and_no_later_one(scorer):
    texts = [
        "<s> word1 word2 word3 word4 word5 word6",  # the longest: no padding, and no end of text
        "word7 word8 </s> word9 </s> word3",  # the first </s> counts, and so does word9 behind it
        "</s> word1 word2 </s>",  # as packed rows of a GPT-2 model: the first is context, the last is the second
        "word1 word2",  # padded
        "</s> </s>",  # nothing to score
        "word4",  # padded: one token
    ]
    rows = [[*row, *[EOS] * 7][:7] for row in scorer.encode(texts)]
    counted = torch.tensor(
        [
            [1, 1, 1, 1, 1, 1],
            [1, 1, 1, 0, 1, 0],
            [1, 1, 0, 0, 0, 0],
            [1, 1, 0, 0, 0, 0],
            [0, 0, 0, 0, 0, 0],
            [1, 0, 0, 0, 0, 0],
        ]
    )
    ids = torch.tensor(rows)
    with torch.no_grad():
        logits = scorer.model(ids).logits
    nats = F.cross_entropy(logits[:, :-1].transpose(1, 2), ids[:, 1:], reduction="none")
    want = ((nats * counted).sum() / counted.sum()).exp().item()
    metric = GenerativePerplexity(scorer, "mdlm")
    metric.update(texts)
    assert metric.compute().item() == pytest.approx(want, rel=1e-5)
    assert metric.per_text[:, 1].tolist() == [6, 4, 2, 2, 1]
    assert metric.skipped == 1
    assert metric.length == 7 + 6 + 4 + 2 + 2 + 1


def test_texts_too_short_or_too_long_are_counted(scorer):
    texts = ["", "word1", "word1 word2 word3", " ".join(WORDS[:30])]
    for protocol, skipped, length in (("plain", 2, 0 + 1 + 3 + 10), ("hf_mean", 1, 0 + 1 + 3 + 9)):
        metric = GenerativePerplexity(scorer, protocol, max_length=10)
        metric.update(texts[:2])
        metric.update([])
        metric.update(texts[2:])
        counts = (metric.skipped, metric.truncated, metric.length)
        assert [int(count) for count in counts] == [skipped, 1, length]
    assert metric.per_text[:, 1].tolist() == [1, 3, 9]
    begun = [[BOS, *row][:10] for row in scorer.encode(texts[1:])]
    assert metric.compute().item() == pytest.approx(np.mean([math.exp(loss_of(scorer, row)[0]) for row in begun]))
    assert math.isnan(perplexity(scorer, texts[:2], "plain"))


def test_a_trainers_autocast_changes_no_score(scorer):
    texts = some_texts(8)
    want, hidden = perplexity(scorer, texts, "plain"), scorer.features(texts)
    with torch.autocast("cpu", torch.bfloat16):
        assert perplexity(scorer, texts, "plain") == want
        assert torch.equal(scorer.features(texts), hidden)


def test_states_keep_their_precision_and_leave_the_scorer_out_of_checkpoints(scorer):
    class Module(nn.Module):
        def __init__(self):
            super().__init__()
            self.perplexity, self.entropy = GenerativePerplexity(scorer), UnigramEntropy()

    module = Module().to(torch.bfloat16).half()
    module.perplexity.update(some_texts(4))
    module.entropy.update([[1, 2]])
    assert module.perplexity.per_text.dtype == module.entropy.per_text.dtype == torch.float64
    assert module.perplexity.skipped.dtype == torch.int64
    assert scorer.model.dtype == torch.float32
    assert list(module.parameters()) == []
    assert not module.state_dict()


def test_logits_that_are_not_finite_are_an_error(tmp_path):
    broken = load_scorer(str(make_scorer_folder(tmp_path)))
    with torch.no_grad():
        broken.model.lm_head.weight[5] = torch.nan
    with pytest.raises(ValueError, match="gives logits that are not finite: load it in float32"):
        GenerativePerplexity(broken).update(["word1 word2"])


def test_wrong_arguments_are_named(scorer, tmp_path):
    with pytest.raises(ValueError, match=r"no protocol 'mdml' among plain, .*; did you mean 'mdlm'"):
        GenerativePerplexity(scorer, "mdml")
    with pytest.raises(ValueError, match="max_length=33 must be from 2 to 32"):
        GenerativePerplexity(scorer, max_length=33)
    with pytest.raises(ValueError, match=r"scorer 'no/such' is not to be had: .* give a folder"):
        load_scorer("no/such")
    with pytest.raises(ValueError, match=r"no protocol 'MDLM' .*; did you mean 'mdlm'"):
        GenerativePerplexity(scorer, "MDLM")
    with pytest.raises(ValueError, match=r"scorer '.*none\.gguf' is not to be had: check name and network"):
        load_scorer(str(tmp_path / "none.gguf"))
    with pytest.raises(ValueError, match=r"scorer.*package no_such_package is not installed: pip install"):
        load_scorer("package:no_such_package/a.gguf")
    with pytest.raises(ValueError, match="dtype='float8' is none of float32, "):
        load_scorer("gpt2", dtype="float8")
    with pytest.raises(ValueError, match="must be one or more lengths"):
        NGramDiversity(())


@pytest.mark.parametrize(
    ("spoil", "told"),
    [
        (lambda at: cut_short(at / "model.safetensors"), "cannot be read .Error while deserializing header"),
        (lambda at: cut_short(at / "config.json"), "cannot be read .It looks like the config file"),
        (lambda at: (at / "model.safetensors").unlink(), "cannot be read .* holds no model.safetensors"),
        (lambda at: [file.unlink() for file in at.glob("tok*")], "has a tokenizer of 0 tokens and embeddings of 40"),
        (lambda at: make_pretrained("llama", at), "has no weights that fit lm_head.weight: give a causal"),
        (lambda at: with_config(at, vocab_size=50), "has no weights that fit transformer.wte.weight"),
        (lambda at: with_config(at, n_layer=3), r"fit transformer.h.2.attn.c_attn.bias, .* \.\.\.: give a causal"),
        (lambda at: tiny_bert(VOCAB).save_pretrained(at), "lets a token see those behind it: give a causal"),
        (lambda at: tiny_bert(20, is_decoder=True).save_pretrained(at), "tokenizer of 40 tokens and embeddings of 20"),
    ],
)
def test_what_loads_but_cannot_score_is_no_scorer(tmp_path, spoil, told):
    folder = make_scorer_folder(tmp_path / "scorer")
    spoil(folder)
    with pytest.raises(ValueError, match=f"scorer '{folder}' .*{told}"):
        load_scorer(str(folder))


def cut_short(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-100])


def with_config(folder: Path, **changes: int) -> None:
    (folder / "config.json").write_text(json.dumps(json.loads((folder / "config.json").read_text()) | changes))


def tiny_bert(vocab_size: int, is_decoder: bool = False) -> BertLMHeadModel:
    sizes = {"num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32, "max_position_embeddings": 32}
    about = {"vocab_size": vocab_size, "hidden_size": HIDDEN, "is_decoder": is_decoder, "initializer_range": 0.5}
    return BertLMHeadModel(BertConfig(**about, **sizes))


@pytest.mark.parametrize("content", [b"", b"no such thing", b"GGUF" + struct.pack("<IQQ", 3, 5, 5) + b"\x14"])
def test_a_gguf_that_is_not_whole_is_no_scorer(tmp_path, content):
    (tmp_path / "cut.gguf").write_bytes(content)
    with pytest.raises(ValueError, match=r"scorer '.*cut\.gguf' cannot be read \(.+\): mend it"):
        load_scorer(str(tmp_path / "cut.gguf"))


def test_entropy_is_scipys_over_the_ids_that_are_not_ignored():
    rows = torch.randint(0, 9, (12, 30), generator=generator(3))
    metric = UnigramEntropy(ignore=[0, 4])
    metric.update(rows[:5])
    metric.update([row.tolist() for row in rows[5:]])
    want = [scipy.stats.entropy(np.unique(r[(r != 0) & (r != 4)], return_counts=True)[1]) for r in rows.numpy()]
    assert metric.per_text.tolist() == pytest.approx(want, abs=1e-12)
    metric.update([[0, 4, 4], []])
    assert metric.compute().item() == pytest.approx(np.mean(want), abs=1e-12)
    assert metric.empty == 2
    one = UnigramEntropy()
    one.update([[7, 7, 7, 7], [1, 2, 3, 4]])
    assert one.compute().item() == pytest.approx(math.log(4) / 2)


def test_diversity_is_counted_over_all_texts():
    metric = NGramDiversity()
    metric.update(["a b, a b"])  # ab b, ,a ab | ab, b,a ,ab | ab,a b,ab
    metric.update(["a b c", "A b"])  # ab bc Ab | abc
    metric.update([])
    assert metric.compute().item() == pytest.approx(5 / 7 * 4 / 4 * 2 / 2)
    metric.update(["a b, a b"])
    assert metric.compute().item() == pytest.approx(5 / 11 * 4 / 7 * 2 / 4)
    metric.reset()
    metric.update(["a b c"])  # no 4-gram
    assert metric.compute().item() == 0


def test_features_are_the_last_hidden_states_of_each_text_read_alone(scorer):
    texts = [*some_texts(9), "word1", "", " ".join(WORDS[:35])]
    rows = [scorer.tokenizer(text).input_ids[:32] or [EOS] for text in texts]
    with torch.no_grad():
        want = [scorer.model(torch.tensor([row]), output_hidden_states=True).hidden_states[-1][0, -1] for row in rows]
    for batch_tokens in (1, 40, 4096):
        got = scorer.features(texts, batch_tokens=batch_tokens)
        torch.testing.assert_close(got, torch.stack(want), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("protocol", ["plain", "mdlm", "flow_matching"])
def test_one_pass_of_the_scorer_gives_perplexity_and_the_features_of_every_text(scorer, protocol):
    texts = [*some_texts(9), "word1", "", "word1 </s> word2", " ".join(WORDS[:35])]
    passes = []
    with scorer.model.register_forward_hook(lambda model, given, out: passes.append(out.logits.shape[0])):
        metric = GenerativePerplexity(scorer, protocol, keep_features=True, batch_tokens=40)
        metric.update(texts[:6])
        metric.update(texts[6:])
    assert sum(passes) == len(texts)
    torch.testing.assert_close(metric.features, scorer.features(texts), rtol=1e-4, atol=1e-5)
    without = GenerativePerplexity(scorer, protocol, batch_tokens=40)
    without.update(texts[:6])
    without.update(texts[6:])
    assert metric.compute() == without.compute()
    assert metric.skipped == without.skipped > 0


def test_no_features_come_from_behind_a_bos(scorer):
    with pytest.raises(ValueError, match="'hf_mean' reads BOS before each text"):
        GenerativePerplexity(scorer, "hf_mean", keep_features=True)


def test_mauve_is_the_mean_of_mauve_texts_own_over_seeds_and_is_quiet(capfd):
    from mauve import compute_mauve

    real = torch.randn(60, 6, generator=generator(1))
    generated = 0.6 * torch.randn(60, 6, generator=generator(2)) + 0.5
    want = [compute_mauve(real.numpy(), generated.numpy(), seed=seed, verbose=False).mauve for seed in (25, 26)]
    capfd.readouterr()
    metric = Mauve(6, seeds=(25, 26))
    for part in (slice(0, 20), slice(20, 60)):
        metric.update(real[part], real=True)
        metric.update(generated[part], real=False)
    with pytest.warns(UserWarning, match="of 60 texts and 60 real ones: under 500"):
        assert metric.compute().item() == pytest.approx(np.mean(want), abs=1e-9)
    assert capfd.readouterr() == ("", "")


def test_mauve_says_what_it_lacks(monkeypatch):
    metric = Mauve(6)
    with pytest.raises(ValueError, match=r"shape \[3, 5\], but \[num, 6\]"):
        metric.update(torch.zeros(3, 5), real=True)
    metric.update(torch.zeros(3, 6), real=True)
    with pytest.raises(ValueError, match="compares 0 generated with 3 real"):
        metric.compute()
    monkeypatch.setitem(sys.modules, "mauve", None)
    with pytest.raises(ValueError, match=r'mauve-text: pip install "ldlm\[eval\]"'):
        metric.compute()


TEXTS = [*some_texts(9, seed=7), "", "word3 word3 word3 word3"]


def measure(folder: str, mine: list[str]) -> dict[str, object]:
    """All metrics on some of `TEXTS`; `features` stands for what synchronised lists hold."""
    scorer = load_scorer(f"{folder}/scorer")
    metrics = {"perplexity": GenerativePerplexity(scorer, "hf_mean"), "entropy": UnigramEntropy()}
    metrics |= {"diversity": NGramDiversity(), "mauve": Mauve(HIDDEN)}
    metrics |= {"memorisation": Memorisation(known_ngrams(TEXTS[::2]))}
    for metric in metrics.values():  # as a trainer does when an epoch begins
        metric.reset()
    if mine:  # a rank that was given no text never calls update
        metrics["perplexity"].update(mine)
        metrics["entropy"].update(scorer.encode(mine))
        metrics["diversity"].update(mine)
        metrics["memorisation"].update(mine)
        metrics["mauve"].update(scorer.features(mine), real=True)
    found: dict[str, object] = {}
    for name in ("perplexity", "entropy", "diversity", "memorisation"):
        found[name] = metrics[name].compute().item()
    for metric in metrics.values():
        if dist.is_initialized():
            metric.sync()
    counted = metrics["perplexity"]
    found["counts"] = [int(c) for c in (counted.skipped, counted.truncated, counted.length, metrics["entropy"].empty)]
    real = metrics["mauve"].real
    found["features"] = torch.cat([real] if isinstance(real, torch.Tensor) else real)
    return found


def measure_on_one_of_two_ranks(rank: int, folder: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    for case, cut in (("uneven", 4), ("idle", len(TEXTS))):
        found = measure(folder, TEXTS[:cut] if rank == 0 else TEXTS[cut:])
        torch.save(found, f"{folder}/{case}{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.filterwarnings("ignore:The ``compute`` method")
def test_two_ranks_measure_what_one_does_even_if_one_has_no_text(tmp_path: Path):
    make_scorer_folder(tmp_path / "scorer")
    mp.spawn(measure_on_one_of_two_ranks, args=(str(tmp_path),), nprocs=2)
    alone = measure(str(tmp_path), TEXTS)
    assert alone["counts"][0] == 1
    assert 0 < alone["diversity"] < 1
    assert 0 < alone["memorisation"] < 1
    for case in ("uneven", "idle"):
        for rank in range(2):
            found = torch.load(tmp_path / f"{case}{rank}.pt", weights_only=True)
            torch.testing.assert_close(found.pop("features"), alone["features"], rtol=1e-4, atol=1e-5)
            assert found.pop("counts") == alone["counts"]
            assert found == pytest.approx({name: alone[name] for name in found}, rel=1e-5)


def test_the_tiny_scorer_is_worth_testing_with(scorer):
    assert scorer.context == 32
    assert abs(math.log(perplexity(scorer, some_texts(20), "plain")) - math.log(VOCAB)) > 0.2
