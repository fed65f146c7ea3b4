"""The same text gives the same documents however its lines end, whatever its file is called; a change is noticed."""

import gzip
import json
import os

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import yaml
from helpers.tiny import WORDS, make_task, make_tokenizer, make_trainer

from ldlm.data.corpus import TEXT_UNITS, FileCorpus, HubCorpus, open_corpus
from ldlm.data.datamodule import PackedTextDataModule
from ldlm.data.packing import pack
from ldlm.studies.plan import find_study
from ldlm.training.callbacks.hidden_state_cache import CacheHiddenStates

LINES = ["one two", "three", "", "fou\u2028r fi\x85ve", "si\x0cx", "", "", "é seven"]


@pytest.mark.parametrize("unit", TEXT_UNITS)
@pytest.mark.parametrize("end", ["\r\n", "\r"])
@pytest.mark.parametrize("last", ["", "{end}", "{end}{end}"])
@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
def test_a_text_gives_the_same_documents_however_its_lines_end(tmp_path, unit, end, last, mark):
    (tmp_path / "unix.txt").write_bytes("\n".join(LINES).encode())
    (tmp_path / "other.txt").write_bytes(mark + (end.join(LINES) + last.format(end=end)).encode())
    wanted = list(FileCorpus(tmp_path / "unix.txt", text_unit=unit))
    assert list(FileCorpus(tmp_path / "other.txt", text_unit=unit)) == wanted
    assert not any("\r" in text for text in wanted)


@pytest.mark.parametrize("unit", TEXT_UNITS)
def test_lines_end_where_python_ends_them_and_not_at_a_form_feed_or_a_unicode_separator(tmp_path, unit):
    mixed = "".join(line + "\r\n\r\n"[i % 3 : i % 3 + 1 + (i % 3 == 0)] for i, line in enumerate(LINES))
    (tmp_path / "mixed.txt").write_bytes(mixed.encode())
    with open(tmp_path / "mixed.txt", encoding="utf-8") as handle:  # universal newlines
        text = handle.read()
    wanted = {
        "line": [line for line in text.split("\n") if line.strip()],
        "paragraph": [part.strip("\n") for part in text.split("\n\n") if part.strip()],
        "document": [text.rstrip("\n")],
    }
    assert list(FileCorpus(tmp_path / "mixed.txt", text_unit=unit)) == wanted[unit]


def test_strings_in_json_and_parquet_keep_their_line_ends(tmp_path):
    texts = ["a\r\nb\n", "\rc\u2028d\x85"]
    lines = "\r\n".join(json.dumps({"text": text}, ensure_ascii=False) for text in texts)
    (tmp_path / "a.jsonl").write_bytes(b"\xef\xbb\xbf" + lines.encode())
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    pyarrow.parquet.write_table(pyarrow.table({"text": texts}), tmp_path / "c.parquet")
    assert list(FileCorpus(tmp_path)) == texts * 3


def grow(file):
    with open(file, "ab") as handle:
        handle.write(file.read_bytes())


def shrink(file):
    os.truncate(file, file.stat().st_size // 2)


def replace(file):
    file.with_suffix(".new").write_bytes(file.read_bytes()[::-1])
    os.replace(file.with_suffix(".new"), file)


def overwrite(file):
    file.write_bytes(b" " * file.stat().st_size)


def remove(file):
    file.unlink()


def write_texts(file, texts):
    if file.suffix == ".parquet":
        pyarrow.parquet.write_table(pyarrow.table({"text": texts}), file)
    elif file.suffix == ".txt":
        file.write_text("\n\n".join(texts))
    else:
        data = "".join(json.dumps({"text": text}) + "\n" for text in texts).encode()
        file.write_bytes(gzip.compress(data) if file.suffix == ".gz" else data)


@pytest.mark.parametrize("change", [grow, shrink, replace, overwrite, remove])
@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.jsonl.gz", "a.parquet"])
@pytest.mark.parametrize("moment", ["hashed", "read"])
def test_a_file_that_changes_while_it_is_packed_ends_with_a_sentence_and_leaves_nothing(
    tmp_path, monkeypatch, name, change, moment
):
    file = tmp_path / name
    write_texts(file, [" ".join(WORDS)] * 2000)
    corpus, cache = FileCorpus(file), tmp_path / "cache"
    if moment == "hashed":  # between its digest and its first line
        identity = corpus.identity
        monkeypatch.setattr(corpus, "identity", lambda: [identity(), change(file)][0])
    else:
        kind = type(corpus).__iter__

        def documents(self):
            for number, text in enumerate(kind(self)):
                if number == 5:
                    change(file)
                yield text

        monkeypatch.setattr(FileCorpus, "__iter__", documents)
    with pytest.raises(ValueError, match=rf"{name} changed while it was read: wait until") as caught:
        pack(corpus, make_tokenizer(), cache)
    assert "\n" not in str(caught.value)
    assert list(cache.iterdir()) == []


def test_a_file_that_grew_is_packed_whole_the_next_time(tmp_path):
    file = tmp_path / "a.txt"
    write_texts(file, WORDS[:10])
    corpus = FileCorpus(file)
    first = pack(corpus, make_tokenizer(), tmp_path / "cache")["train"]
    write_texts(file, WORDS[:20])
    second = pack(corpus, make_tokenizer(), tmp_path / "cache")["train"]
    assert first != second
    assert [len(np.fromfile(path, "<u2")) for path in (first, second)] == [20, 40]


NAMES = ["x" * 236, "é" * 118, "東" * 78, "🙂" * 59, "a 'quoted\" name\nof two lines; $(x) {y} %s", "a..b", "- "]


@pytest.mark.parametrize("name", NAMES)
def test_a_file_or_folder_of_any_name_is_packed_trained_on_and_its_hidden_states_kept(tmp_path, name):
    texts = [" ".join(WORDS[i : i + 9]) for i in range(24)]
    (tmp_path / f"{name}.txt").write_text("\n\n".join(texts))
    (tmp_path / name).mkdir()
    (tmp_path / name / f"{name}.txt").write_text("\n\n".join(texts))
    tokenizer, streams = make_tokenizer(), []
    for dataset in (tmp_path / f"{name}.txt", tmp_path / name):
        data = PackedTextDataModule(
            str(dataset), tokenizer, 8, 2, validation=0.25, cache_dir=str(tmp_path / "cache"), text_unit="paragraph"
        )
        data.prepare_data()
        data.setup()
        streams.append(data.train_dataset[[0, 1, 2]].tolist())
    assert streams[0] == streams[1]
    task = make_task(tokenizer=tokenizer, timestep_refresh=1)
    make_trainer(tmp_path, [CacheHiddenStates()], max_steps=2).fit(task, data)
    kept = [path.name for path in (tmp_path / "cache").iterdir() if "-states-" in path.name and path.suffix == ".bin"]
    assert len(kept) == 1
    assert all(len(os.fsencode(path.name)) <= 255 and "\n" not in path.name for path in (tmp_path / "cache").iterdir())


def test_a_hub_name_of_any_length_gives_a_short_name_for_files(monkeypatch):
    import datasets

    rows = datasets.Dataset.from_dict({"text": ["a"]})
    monkeypatch.setattr(datasets, "load_dataset", lambda *names, **options: rows)
    corpus = open_corpus("somebody/" + "東" * 250)
    assert isinstance(corpus, HubCorpus)
    assert len(corpus.stem.encode()) <= 160


def test_a_cell_whose_files_no_file_system_takes_is_refused_before_anything_is_trained(tmp_path):
    for name, fits in (("e" * 100, True), ("e" * 101, False), ("é", False)):
        study = {"base": {"laptop": []}, "cells": {name: {}}, "tables": {"T": {"r": {"cell": name}}}}
        (tmp_path / "study.yaml").write_text(yaml.safe_dump(study, allow_unicode=True))
        if fits:
            assert find_study(str(tmp_path / "study.yaml"))["cells"] == {name: {}}
            (tmp_path / f"{name}-seed10.json").touch()
        else:
            with pytest.raises(ValueError, match=r"study\.yaml: a cell's name must be of up to 100 letters"):
                find_study(str(tmp_path / "study.yaml"))
