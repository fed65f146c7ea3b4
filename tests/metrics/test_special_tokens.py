"""Special tokens in what is scored: one rule for models, files and references, and the paper's own entropies."""

import json
import math

import pytest
import torch
from helpers.command import evaluate, evaluation_folder
from helpers.tiny import LENGTH, WORDS, make_model, make_tokenizer
from score import entropy

from ldlm.cli import main as cli
from ldlm.evaluation.scores import Texts, read_texts
from ldlm.metrics.protocols import PROTOCOLS
from ldlm.metrics.scorer import load_scorer
from ldlm.metrics.text import UnigramEntropy
from ldlm.model import LDLM
from ldlm.tokenizer import boundary_tokens, join_documents, split_documents

# The paper's six samples of LM1B (Fig. 7) under GPT-2's tokenizer, typographic quotes straightened: 128 ids each,
# once 127. How
# many end-of-text tokens there are, how many other ids occur how often, and the entropy printed above the text.
PRINTED = [
    (5, {1: 80, 2: 9, 3: 2, 4: 3, 7: 1}, 4.40),
    (6, {1: 92, 2: 4, 3: 4, 4: 1, 5: 1}, 4.51),
    (4, {1: 85, 2: 6, 3: 2, 4: 1, 5: 2, 7: 1}, 4.41),
    (5, {1: 70, 2: 10, 3: 5, 4: 2, 5: 2}, 4.34),
    (7, {1: 80, 2: 8, 3: 2, 4: 1, 5: 1, 10: 1}, 4.32),
    (5, {1: 83, 2: 10, 3: 1, 5: 2, 7: 1}, 4.42),
]
SAMPLING = ["-n", "12", "--nfe", "3", "--batch_size", "5", "--temperature", "1"]


@pytest.fixture
def here(tmp_path, monkeypatch):
    evaluation_folder(tmp_path, words=len(WORDS))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def with_histogram(specials: int, others: dict[int, int]) -> list[int]:
    """Ids of which 0 occurs `specials` times, and `number` others `count` times each."""
    counts = [specials, *(count for count, number in others.items() for _ in range(number))]
    return [token for token, count in enumerate(counts) for _ in range(count)]


def test_the_entropies_that_the_paper_prints_are_those_of_all_ids_special_ones_among_them():
    rows = [with_histogram(specials, others) for specials, others, _ in PRINTED]
    assert [len(row) for row in rows] == [128, 127, 128, 128, 128, 128]
    whole, without = UnigramEntropy(), UnigramEntropy(ignore=[0])
    whole.update(rows)
    without.update(rows)
    # 4.417 and 4.423 are printed as 4.41 and 4.42: cut, or of a text whose quotes were others.
    assert whole.per_text.tolist() == pytest.approx([printed for *_, printed in PRINTED], abs=0.0075)
    assert without.per_text[[1, 4]].tolist() == pytest.approx([4.529, 4.347], abs=5e-4)  # printed: 4.51 and 4.32


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_rows_score_alike_as_a_model_s_as_samples_as_a_reference_and_written_out(here, protocol):
    words = ["--protocol", protocol, "--max_length", str(LENGTH + 2)]
    model = LDLM.from_pretrained("model")
    tokens = model.sample_tokens(12, nfe=3, seed=4, batch_size=5, temperature=1.0)
    marks = sum(((tokens == 1) | (tokens == 2)).sum(1).tolist())
    assert marks > 6
    assert (tokens[:, 1:-1] == 2).any()  # between words, where documents would run into one another
    cli.main(["generate", "model", *SAMPLING, "--seed", "4", "--output", "samples.jsonl"])
    lines = [json.dumps({"text": text}) for text in make_tokenizer().batch_decode(tokens.tolist())]
    (here / "written.jsonl").write_text("\n".join(lines))
    results = [
        evaluate("model", *SAMPLING, "--seeds", "4", *words, "--reference", "samples.jsonl"),
        evaluate("samples.jsonl", *words, "--reference", "written.jsonl"),
        evaluate("written.jsonl", *words, "--reference", "samples.jsonl"),
    ]
    for result in results:
        for each in (result, result["reference"]):
            for name in ("perplexity", "diversity", "mean_length", "skipped", "empty", "special_tokens_per_text"):
                assert each[name] == results[0][name]
        assert result["mauve"] == results[0]["mauve"]
    assert results[0]["special_tokens_per_text"] == pytest.approx(marks / 12)
    for each in (results[0], results[0]["reference"], results[1]):
        assert each["entropy"]["mean"] == pytest.approx(entropy(tokens), rel=1e-9)
    kept = "kept" if PROTOCOLS[protocol].special_tokens else "removed"
    told = {name: results[0][name]["special_tokens"] for name in ("perplexity", "mauve", "entropy", "diversity")}
    assert told == {"perplexity": kept, "mauve": kept, "entropy": "kept", "diversity": "removed"}


def test_a_reconstruction_is_scored_by_its_own_ids_and_documents(here):
    model, tokens = make_model(tokenizer=make_tokenizer()), torch.tensor([[1, 3, 4, 5, 2, 6, 7, 2]] * 2)
    again = tokens.clone()
    again[:, 2] = 3
    rows = zip(model.to_lines(tokens), model.to_lines(again, "reconstruction"), strict=True)
    (here / "both.jsonl").write_text("\n".join(json.dumps(row | other) for row, other in rows))
    for column, ids in (("text", tokens), ("reconstruction", again)):
        found = read_texts("both.jsonl", column=column)
        assert found.ids == ids.tolist()
        assert found.documents == model.to_documents(ids)


def test_documents_of_real_tokenizers_stay_apart_and_bert_s_marks_become_the_scorer_s(gpt2_tokenizer, bert_tokenizer):
    end, begin, stop = gpt2_tokenizer.eos_token_id, bert_tokenizer.cls_token_id, bert_tokenizer.sep_token_id
    first, second = "The end.", "Next: <|endoftext|> é 🦦 is text"

    def ids(tokenizer, text):
        return tokenizer(text, add_special_tokens=False, split_special_tokens=True).input_ids

    row = [end, *ids(gpt2_tokenizer, first), end, *ids(gpt2_tokenizer, second), end]
    (documents,) = split_documents(gpt2_tokenizer, [row])
    assert documents == ["", first, second, ""]
    assert join_documents(documents) == f"{first} {second}"
    assert join_documents(documents, "<|endoftext|>") == gpt2_tokenizer.decode(row)
    assert Texts([documents]).encode(gpt2_tokenizer) == [row]  # what looks like a special token is none
    row = [begin, *ids(bert_tokenizer, "unaffable, no"), stop, *ids(bert_tokenizer, "yes [sep]"), stop]
    (documents,) = split_documents(bert_tokenizer, [row])
    plain = [bert_tokenizer.decode(ids(bert_tokenizer, text)) for text in ("unaffable, no", "yes [sep]")]
    assert join_documents(documents, "<|endoftext|>") == "<|endoftext|>{}<|endoftext|>{}<|endoftext|>".format(*plain)
    written = Texts([["[CLS] unaffable, no [SEP] yes [SEP] "]], plain=True).split_at([gpt2_tokenizer, bert_tokenizer])
    assert written.joined() == ["unaffable, no yes"]
    assert written.specials == 3
    assert set(boundary_tokens(bert_tokenizer)) == {"[SEP]", "[CLS]", "[PAD]"}
    assert next(iter(boundary_tokens(bert_tokenizer).values())) == stop


def test_what_is_measured_is_packed_from_the_documents_of_the_reference(here):
    texts = Texts([["", "word1 word2", " "], ["word3", "word4"]])
    assert texts.whole == ["word1 word2", "word3", "word4"]
    lines = [{"text": "word1 word2 word3", "documents": ["", "word1 word2", "word3", ""]}] * 12
    (here / "rows.jsonl").write_text("\n".join(map(json.dumps, lines)))
    found = evaluate("model", *SAMPLING, "--reference", "rows.jsonl", "--measure")["measurements"]["model"]
    rows = 12 * (3 + 2) // (LENGTH - 2 * found["framed"])  # each document's end is a token
    assert found["rows"] == rows


def test_texts_with_special_tokens_beside_a_reference_without_are_warned_of_where_they_count(here, capsys):
    for protocol, warned in (("mdlm", True), ("plain", False)):
        result = evaluate("model", *SAMPLING, "--reference", "real.jsonl", "--protocol", protocol)
        assert (result["special_tokens_per_text"] > 0, result["reference"]["special_tokens_per_text"]) == (True, 0)
        assert ("warning" in result["perplexity"]) == warned
        assert ("one has special tokens between documents" in " ".join(capsys.readouterr().out.split())) == warned


def test_a_text_in_a_report_has_its_own_perplexity_and_entropy(here):
    (here / "two.txt").write_text("word1 word2 word1\n\nword3")
    evaluate("two.txt", "--protocol", "plain", "--report", "page.html")
    page = (here / "page.html").read_text(encoding="utf-8")
    scorer = load_scorer("./scorer")
    (row, _) = scorer.encode(["word1 word2 word1", "word3"])
    alone = torch.tensor([row])
    with torch.no_grad():
        loss = scorer.model(alone, labels=alone).loss.item()
    two_thirds = math.log(3) - 2 / 3 * math.log(2)
    assert f"perplexity {math.exp(loss):.1f}, entropy {two_thirds:.3f}" in page
    assert "perplexity –, entropy 0" in page  # one token has nothing before it
