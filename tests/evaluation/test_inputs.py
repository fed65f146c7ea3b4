"""What `ldlm evaluate` reads of other people's files, and what it refuses, before anything is sampled or written."""

import gzip
import json
import os
import shlex
from pathlib import Path

import datasets
import pandas
import pytest
import torch
from helpers.command import complaint, evaluate, evaluation_folder
from helpers.tiny import WORDS, make_model, make_pretrained, make_scorer_folder, make_tokenizer

from ldlm._files import check_output
from ldlm.cli import main as cli
from ldlm.evaluation import evaluate as sweep
from ldlm.evaluation.scores import read_texts
from ldlm.metrics.scorer import load_scorer
from ldlm.nn.token_encoders import PretrainedTokenEncoder

TEXTS = ["word1 word2\nword3", "word4 word5 word6", "word7 word8 word9 word1"]
LINES = [json.dumps({"text": text}) for text in TEXTS]
FILES = {
    "empty.jsonl": b"",
    "blank.txt": b" \n\n\t\n",
    "other.jsonl": b'{"txt": "word1", "index": 0}',
    "later.jsonl": b'{"text": "word1"}\n{"txt": "word1"}',
    "number.jsonl": b'{"text": 5}',
    "null.jsonl": b'{"text": "word1"}\n{"text": null}',
    "list.jsonl": b'{"text": ["word1"]}',
    "array.jsonl": b'["word1", "word2"]',
    "prose.jsonl": b"word1 word2",
    "half.jsonl": b'{"text": "word1 \\ud800"}',
    "binary.jsonl": bytes(range(128, 256)),
    "latin.txt": b"word1\nword\xe9",
    "wide.txt": "word1 word2".encode("utf-16"),
    "list.json": b'[{"text": "word1"}]',
    "cut.ckpt": b"PK\x03\x04" + bytes(100),
    "cut.jsonl.gz": gzip.compress("\n".join(LINES).encode())[:-9],
    "torn.parquet": b"PAR1" + bytes(40),
    "partly.jsonl": b'{"text": "word1", "ids": [1]}\n{"text": "word1"}',
    "words.jsonl": b'{"text": "word1", "ids": ["word1"]}',
    "huge.jsonl": b'{"text": "word1", "ids": [99999999999999999999]}',
    "split.jsonl": b'{"text": "word1", "documents": ["word1", 2]}',
    "edited.jsonl": b'{"text": "word1", "documents": ["word1"]}\n{"text": "word2", "documents": ["word1"]}',
    "unsplit.jsonl": b'{"text": "word1", "documents": []}',
    "one.txt": b"word1",
}


GIVEN = ["--scorer", "./scorer", "--output", "new/scores.json"]  # what is given again later counts


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sources")
    lines = evaluation_folder(folder, words=len(WORDS))
    (folder / "samples.jsonl").write_text("\n".join(lines[10:30]))
    for name, content in FILES.items():
        (folder / name).write_bytes(content)
    (folder / "folder.jsonl").mkdir()
    make_model().save_pretrained(folder / "mute")
    broken = load_scorer(str(make_scorer_folder(folder / "broken")))
    broken.model.lm_head.weight[3] = torch.nan
    broken.model.save_pretrained(folder / "broken")
    make_pretrained("bert", folder / "encoder")
    encoder = PretrainedTokenEncoder(str(folder / "encoder"))
    make_model(token_encoder=encoder, tokenizer=make_tokenizer()).save_pretrained(folder / "gone")
    (folder / "encoder").rename(folder / "moved")
    return folder


@pytest.fixture
def here(home, monkeypatch):
    monkeypatch.chdir(home)
    return home


def contents(folder: Path) -> dict[str, bytes | None]:
    return {str(path): path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ("none.jsonl", "there is no file none.jsonl"),
        ("none.ckpt", "there is no file none.ckpt"),
        ("none", "'none' is neither a folder here nor a model that could be fetched from the hub"),
        ("''", "'' holds no ldlm.json"),
        ("scorer", "'scorer' holds no ldlm.json: it is not an exported ldlm model"),
        ("folder.jsonl", "folder.jsonl is a folder; give a file of texts"),
        ("empty.jsonl", "empty.jsonl holds no texts"),
        ("blank.txt", "blank.txt holds no texts"),
        ("other.jsonl", "text_column='text' is not in other.jsonl, line 1; it has 'txt', 'index'"),
        ("later.jsonl", "text_column='text' is not in later.jsonl, line 2; it has 'txt'"),
        ("real.jsonl --text_column txt", "text_column='txt' is not in real.jsonl, line 1; it has 'text'"),
        ("number.jsonl", "number.jsonl, line 1: 'text' holds int, a text is wanted"),
        ("null.jsonl", "null.jsonl, line 2: 'text' holds NoneType, a text is wanted"),
        ("list.jsonl", "list.jsonl, line 1: 'text' holds list, a text is wanted"),
        ("array.jsonl", "array.jsonl, line 1 is not a JSON object such as {'text': …}"),
        ("prose.jsonl", "prose.jsonl, line 1 is not JSON"),
        ("half.jsonl", "half.jsonl, line 1: 'text' holds half a surrogate pair"),
        ("binary.jsonl", "binary.jsonl, line 1 is not UTF-8"),
        ("latin.txt", "latin.txt, line 2 is not UTF-8"),
        ("wide.txt", "wide.txt, line 1 is not UTF-8"),
        ("list.json", "list.json is no whole checkpoint, and samples have names in .txt, .jsonl, "),
        ("cut.ckpt", "cut.ckpt is no whole checkpoint"),
        ("cut.jsonl.gz", "cut.jsonl.gz is not a whole gzip file"),
        ("torn.parquet", "torn.parquet cannot be read as Parquet"),
        ("partly.jsonl", "partly.jsonl: text 2 has no list of token ids as 'ids', but others do"),
        ("words.jsonl", "words.jsonl: text 1 has no list of token ids"),
        ("huge.jsonl", "huge.jsonl: text 1 has no list of token ids"),
        ("split.jsonl", "split.jsonl: text 1 has no list of texts as 'documents'"),
        ("unsplit.jsonl", "unsplit.jsonl: text 1 is not its 'documents', joined by blanks; mend or drop these"),
        ("edited.jsonl", "edited.jsonl: text 2 is not its 'documents', joined by blanks; mend or drop these"),
        ("model ./model", "./model is given twice"),
        ("samples.jsonl none.jsonl", "there is no file none.jsonl"),
        ("real.jsonl --reference empty.jsonl", "empty.jsonl holds no texts"),
        ("real.jsonl --reference model", "model is a folder; give a file of texts"),
        ("real.jsonl --reference list.json", "list.json is no file of the kinds .txt, .jsonl, "),
        ("real.jsonl --reference one.txt", "--reference one.txt holds 1 texts for 40 samples"),
        ("model --reference real.jsonl", "--reference real.jsonl holds 40 texts for 256 samples"),
        ("real.jsonl --training none.txt", "none.txt does not exist"),
        ("real.jsonl --training blank.txt", "--training blank.txt holds no four words in a row"),
        ("real.jsonl --tokenizer model/none", "tokenizer='model/none' is neither"),
        ("real.jsonl --protocol mdml", "no protocol 'mdml' among plain, mdlm, hf_mean, tencdm, flow_matching; did "),
        ("real.jsonl --protocol MDLM", "did you mean 'mdlm'"),
        ("model --sampler Ancestor", "did you mean Ancestral"),
        ("real.jsonl --scorer no/such", "scorer 'no/such' is not to be had: check name and network, or give a folder"),
        ("real.jsonl --scorer none.gguf", "scorer 'none.gguf' is not to be had"),
        ("real.jsonl --scorer broken", "scorer 'broken' gives logits that are not finite: load it in float32"),
        ("model -n 2 --nfe 1 --scorer broken", "scorer 'broken' gives logits that are not finite"),
        ("real.jsonl --max_length 99", "max_length=99 must be from 2 to 32, ./scorer's context"),
        ("real.jsonl --max_length 1", "max_length=1 must be from 2 to 32"),
        ("real.jsonl --max_length 0", "max_length=0 must be from 2 to 32"),
        ("real.jsonl --max_length -1", "max_length=-1 must be from 2 to 32"),
        ("real.jsonl --max_length 2.5", "argument --max_length: invalid int value: '2.5'"),
        ("model --nfe 0", "--nfe 0 must be at least 1"),
        ("model --nfe 3,0", "--nfe 0 must be at least 1"),
        ("model --nfe 8,abc", "argument --nfe: '8,abc' is not whole numbers between commas, as in 8,64"),
        ("model --seeds 0.5", "argument --seeds: invalid int value: '0.5'"),
        ("model --seed one", "argument --seeds: invalid int value: 'one'"),
        ("model -n 0", "-n 0 must be at least 1"),
        ("model --batch_size 0", "--batch_size 0 must be at least 1"),
        ("model --temperature nan", "--temperature nan must be 0 (argmax) or a larger number"),
        ("model --temperature inf", "--temperature inf must be 0"),
        ("model --temperature -1", "--temperature -1.0 must be 0"),
        ("model --device nowhere", "--device nowhere: "),
        ("real.jsonl --refrence x", "no option --refrence; did you mean '--reference'"),
        ("samples.jsonl --published owl", "argument --published: invalid choice: 'owl'"),
        ("model --measure", "--measure needs real texts to encode: add --reference FILE"),
        ("samples.jsonl --measure --reference real.jsonl", "--measure is for models"),
        ("samples.jsonl --output .", "--output . is a folder"),
        ("samples.jsonl --output one.txt/scores.json", "one.txt is a file; give another name"),
        ("samples.jsonl --output samples.jsonl", "--output samples.jsonl would replace another file of this command"),
        ("samples.jsonl --reference real.jsonl --report ./real.jsonl", "--report ./real.jsonl would replace another"),
        ("samples.jsonl --training real.jsonl --output real.jsonl", "--output real.jsonl would replace another"),
        ("samples.jsonl --report new/scores.json", "--report new/scores.json would replace another file"),
        ("samples.jsonl --report model", "--report model is a folder"),
        ("samples.jsonl --report one.txt/a/page.html", "one.txt is a file; give another name"),
        ("samples.jsonl --figures one.txt", "one.txt is a file; give another name"),
        ("samples.jsonl --figures one.txt/figures", "one.txt is a file; give another name"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_said_in_one_sentence_and_nothing_is_written(here, capsys, words, told):
    before = contents(here)
    assert told in complaint(capsys, "evaluate", *GIVEN, *shlex.split(words))
    assert contents(here) == before


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ("model mute", "mute has no tokenizer to make text with"),
        ("mute", "mute has no tokenizer to make text with"),
        ("model none", "'none' is neither a folder here"),
        ("model --max_length 99", "max_length=99 must be from 2 to 32"),
        ("gone -n 3 --reference real.jsonl --measure", "neither a folder here nor a model that could"),
        ("model -n 1 --reference real.jsonl --measure", "the reference makes 1 rows of 8 tokens, and two are needed"),
    ],
)
def test_what_can_be_known_before_sampling_is_said_before(here, capsys, monkeypatch, words, told):
    monkeypatch.setattr(sweep, "sample", lambda *_: pytest.fail("it samples"))
    assert told in complaint(capsys, "evaluate", *GIVEN, *shlex.split(words))
    with pytest.raises(pytest.fail.Exception, match="it samples"):
        cli.main(["evaluate", *GIVEN, "model"])


def test_a_folder_without_permission_to_write_is_named(tmp_path, monkeypatch):
    # Whoever runs this may be root, who may write anywhere.
    monkeypatch.setattr(os, "access", lambda path, mode: (path, mode) != (tmp_path, os.W_OK))
    with pytest.raises(ValueError, match=rf"--output \S+ cannot be written: {tmp_path} is a folder without permission"):
        check_output(str(tmp_path / "new/scores.json"))


@pytest.mark.parametrize("name", ["samples.jsonl", "samples.txt"])
def test_line_endings_and_a_byte_order_mark_change_no_score(here, name):
    text = "\n".join(LINES) if name.endswith(".jsonl") else "\n\n".join(TEXTS)
    (here / f"unix-{name}").write_bytes(text.encode())
    (here / f"windows-{name}").write_bytes(b"\xef\xbb\xbf" + text.replace("\n", "\r\n").encode() + b"\r\n")
    assert read_texts(f"windows-{name}").joined("") == TEXTS
    one, two = (evaluate(f"{kind}-{name}", "--protocol", "plain") for kind in ("unix", "windows"))
    for score in ("texts", "perplexity", "entropy", "diversity", "mean_length"):
        assert one[score] == two[score]


def test_files_of_other_programs_are_read_as_they_were_meant(here):
    texts = [*TEXTS, "déjà vu", "", 'a\r\nb / "c" </s>\u2028d']
    rows = datasets.Dataset.from_dict({"sample": range(6), "generated": texts, "score": [None, *[0.5] * 5]})
    rows.to_json("theirs.jsonl")
    rows.to_parquet("theirs.parquet")
    pandas.DataFrame({"text": texts, "ids": [[1, 2]] * 6}).to_json("frame.jsonl", orient="records", lines=True)
    for name in ("theirs.jsonl", "theirs.parquet"):
        assert read_texts(name, column="generated").joined("") == texts
        assert evaluate(name, "--text_column", "generated")["texts"] == 6
    assert read_texts("frame.jsonl").joined("") == texts
    assert read_texts("frame.jsonl").ids == [[1, 2]] * 6


def test_blank_samples_and_those_too_short_or_too_long_are_counted(here, capsys):
    texts = ["word1 word2 word3", "", "  \n ", "word4", "word5 " * 40]
    (here / "odd.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in texts))
    result = evaluate("odd.jsonl", "--protocol", "plain", "--report", "out/page.html")
    counts = {"texts": 5, "empty": 2, "skipped": 3, "truncated": 1}
    assert {name: result[name] for name in counts} == counts
    assert "skipped 3, truncated 1, empty 2" in capsys.readouterr().out
    page = (here / "out/page.html").read_text()
    for name, count in counts.items():
        assert f"<dt>{name}</dt><dd>{count}</dd>" in page


def test_a_seed_given_twice_is_one_set_of_texts(here):
    result = evaluate("model", "-n", "2", "--nfe", "1", "--seeds", "4", "4")
    assert (result["sampling"]["seeds"], result["perplexity"]["std"]) == ([4], None)
