"""Documents come out as they were written, one by one; what cannot be read is named by file and line."""

import gzip
import json
from pathlib import Path

import datasets
import pyarrow
import pyarrow.parquet
import pytest

from ldlm.data.corpus import FileCorpus, HubCorpus, is_local, lm1b_detokenizer, open_corpus


def _write(path: Path, data: bytes) -> Path:
    path.write_bytes(data)
    return path


PLAIN = "one\ntwo\n\n \n\nthree é\r\n\r\nfour"


def test_text_units_agree_with_what_each_is_defined_as(tmp_path):
    file = _write(tmp_path / "a.txt", PLAIN.encode())
    assert list(FileCorpus(file, text_unit="line")) == ["one", "two", "three é", "four"]
    assert list(FileCorpus(file, text_unit="paragraph")) == ["one\ntwo", "three é", "four"]
    assert list(FileCorpus(file, text_unit="document")) == [PLAIN.replace("\r\n", "\n")]


@pytest.mark.parametrize("unit", ["line", "paragraph", "document"])
def test_clean_text_divides_as_the_datasets_library_divides_it(tmp_path, unit):
    file = _write(tmp_path / "a.txt", b"one\ntwo\n\nthree\nfour\n\nfive")
    theirs = datasets.load_dataset(
        "text", data_files=str(file), sample_by=unit, split="train", cache_dir=str(tmp_path / "cache")
    )["text"]
    assert list(FileCorpus(file, text_unit=unit)) == [text for text in theirs if text]


def test_a_byte_order_mark_is_no_text(tmp_path):
    assert list(FileCorpus(_write(tmp_path / "a.txt", b"\xef\xbb\xbfhello"))) == ["hello"]


def test_every_kind_of_file_in_a_folder_is_read_in_sorted_order(tmp_path):
    (tmp_path / "sub").mkdir()
    lines = "".join(json.dumps({"body": text}) + "\n" for text in ("j1", "j\n2"))
    _write(tmp_path / "b.jsonl", lines.encode())
    _write(tmp_path / "sub" / "c.jsonl.gz", gzip.compress(b'{"body": "g1"}\n\n{"body": "g2", "x": 1}'))
    pyarrow.parquet.write_table(pyarrow.table({"id": [1, 2], "body": ["p1", "p2"]}), tmp_path / "a.parquet")
    _write(tmp_path / "z.txt", b"t1\n\nt2")
    _write(tmp_path / "ignored.csv", b"x")
    corpus = FileCorpus(tmp_path, "body")
    assert list(corpus) == ["p1", "p2", "j1", "j\n2", "g1", "g2", "t1", "t2"]
    assert len(corpus) == 8
    assert [file["name"] for file in corpus.identity()["files"]] == ["a.parquet", "b.jsonl", "sub/c.jsonl.gz", "z.txt"]


def test_identity_changes_with_the_contents_and_not_with_the_place(tmp_path):
    (tmp_path / "x").mkdir()
    (tmp_path / "y").mkdir()
    one, two = _write(tmp_path / "x" / "a.txt", b"same"), _write(tmp_path / "y" / "a.txt", b"same")
    assert FileCorpus(one).identity() == FileCorpus(two).identity()
    _write(two, b"sama")
    assert FileCorpus(one).identity() != FileCorpus(two).identity()


def test_the_packaged_corpus_has_233_addresses():
    corpus = open_corpus("package:ldlm/corpora/sotu.parquet")
    assert len(corpus) == 233
    assert next(iter(corpus)).startswith("Fellow-Citizens of the Senate and House of Representatives")


@pytest.mark.parametrize(
    ("name", "data", "words"),
    [
        ("a.txt", b"good\n\nbad \xff\n", "a.txt, line 3 is not UTF-8"),
        ("a.jsonl", b'{"text": "x"}\n{"text": \n', "a.jsonl, line 2 is not JSON"),
        ("a.jsonl", b"[1]\n", "a.jsonl, line 1 is not a JSON object"),
        ("a.jsonl", b'{"body": "x", "id": 1}\n', "text_column='text' is not in .*a.jsonl, line 1; it has 'body', 'id'"),
        ("a.jsonl", b'{"text": null}\n', "line 1: 'text' holds NoneType, a text is wanted"),
        ("a.jsonl", b'{"text": "\\ud800"}\n', "line 1: 'text' holds half a surrogate pair"),
        ("a.jsonl.gz", gzip.compress(b'{"text": "x"}\n' * 99)[:-12], "a.jsonl.gz is not a whole gzip file"),
        ("a.jsonl.gz", b"no gzip", "a.jsonl.gz is not a whole gzip file"),
        ("a.parquet", b"PAR1 no parquet", "a.parquet cannot be read as Parquet"),
        ("a.csv", b"x", "a.csv is no file of the kinds .txt, .jsonl, .jsonl.gz, .parquet"),
    ],
)
def test_an_unreadable_file_is_named_with_the_place(tmp_path, name, data, words):
    with pytest.raises(ValueError, match=words) as caught:
        list(FileCorpus(_write(tmp_path / name, data)))
    assert "\n" not in str(caught.value)


def test_a_missing_parquet_column_names_those_there_are(tmp_path):
    pyarrow.parquet.write_table(pyarrow.table({"id": [1], "body": ["b"]}), tmp_path / "a.parquet")
    with pytest.raises(ValueError, match=r"text_column='text' is not in .*; it has 'id', 'body'"):
        list(FileCorpus(tmp_path / "a.parquet"))
    with pytest.raises(ValueError, match="row 1: 'id' holds int"):
        list(FileCorpus(tmp_path / "a.parquet", "id"))


def test_a_missing_file_and_an_empty_folder_say_what_is_wanted(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nothing\.txt does not exist; .*\.parquet file, or a folder"):
        open_corpus(str(tmp_path / "nothing.txt"))
    with pytest.raises(FileNotFoundError, match=r"is a folder without any of \.txt"):
        open_corpus(str(tmp_path))


def test_names_are_told_from_paths(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here").mkdir()
    paths = ["a.txt", "x/b.JSONL.gz", "./x", "/x", "~/x", "x/", "here", "package:p/q"]
    assert all(is_local(name) for name in paths)
    assert not any(is_local(name) for name in ["openwebtext", "Skylion007/openwebtext", "dvruette/lm1b"])


def test_a_hub_data_set_out_of_reach_is_named_with_the_way_round():
    with pytest.raises(FileNotFoundError, match=r"dataset='nobody/nothing' .*could not be loaded.* give a local \.txt"):
        open_corpus("nobody/nothing")


@pytest.fixture
def hub(monkeypatch):
    """The hub's `load_dataset`, answered from memory."""
    splits = {"train": ["a", "b", "c"], "test": ["t"]}

    def load(name, config_name, split, revision):
        if split not in splits:
            raise ValueError(f"Unknown split {split!r}. Should be one of {list(splits)}.")
        return datasets.Dataset.from_dict({"text": splits[split], "id": list(range(len(splits[split])))})

    monkeypatch.setattr(datasets, "load_dataset", load)


def test_a_hub_data_set_gives_its_column_count_and_identity(hub):
    corpus = open_corpus("some/set", revision="abc")
    assert isinstance(corpus, HubCorpus)
    assert list(corpus) == ["a", "b", "c"]
    assert len(corpus) == 3
    assert corpus.identity()["revision"] == "abc"
    assert corpus.identity()["hub_fingerprint"] != open_corpus("some/set", split="test").identity()["hub_fingerprint"]


def test_a_missing_hub_column_or_split_is_named(hub):
    with pytest.raises(ValueError, match="text_column='body' is not in some/set; it has 'text', 'id'"):
        open_corpus("some/set", text_column="body")
    with pytest.raises(ValueError, match=r"split='tset'.*Should be one of"):
        open_corpus("some/set", split="tset")


@pytest.mark.parametrize(
    ("tokenised", "plain"),
    [
        ("http : / / example.com / x", "http://example.com/x"),
        ("it 's the dogs , they 're 5 : 30 ; really ?", "it's the dogs, they're 5: 30; really?"),
        ("He did . Then : nothing !", "He did. Then: nothing!"),
        ('he said " go home " to me', 'he said "go home" to me'),
        ("the ' good ' one ( or so ) and [ sic ]", "the 'good' one (or so) and [sic]"),
        ("$ 5 or £ 6", "$5 or £6"),
        ("and / or", "and/or"),
        ("nothing to do here", "nothing to do here"),
    ],
)
def test_the_lm1b_detokenizer_follows_each_of_mdlms_rules(tokenised, plain):
    assert lm1b_detokenizer(tokenised) == plain
