"""A text taking shape: when tokens changed, what each adds to the text, and that looking changes nothing."""

import json
import re

import pytest
import torch
from helpers.tiny import VOCAB, Calls, generator, make_model, make_tokenizer

from ldlm.cli import main as cli
from ldlm.diffusion.grids import LogSNRGrid, UniformGrid
from ldlm.diffusion.samplers import DDIM, Ancestral
from ldlm.evaluation.trace import Trace, make_trace, pieces, trace_text, write_trace
from ldlm.nn.denoiser import DiT

TEXTS = [
    'Unaffable naïveté, isn\'t it?  Two  blanks - and "quotes".',
    "日本語のテキスト 🙂🙃 mixed",
    "\n\nlines\n\n\tand tabs",
    "",
]


def random_ids(nfe: int, length: int, kinds: int = 4, seed: int = 0):
    """Of few kinds, so that many stay as they are."""
    return torch.randint(VOCAB - kinds, VOCAB, (nfe, length), generator=generator(seed))


def traced(ids, steps: int = 1000) -> Trace:
    return make_trace(ids, torch.linspace(1, 0.1, len(ids)), make_tokenizer(), steps)


def last_change(ids, call: int, place: int) -> int:
    """By going back until the token was another."""
    while call > 1 and ids[call - 2][place] == ids[call - 1][place]:
        call -= 1
    return call


@pytest.mark.parametrize("seed", range(3))
def test_each_frame_tells_since_which_call_every_token_has_been_what_it_is(seed):
    ids = random_ids(9, 6, seed=seed)
    rows = ids.tolist()
    trace = traced(ids)
    assert trace.nfe == len(trace.frames) == 9
    for frame in trace.frames:
        assert [token.changed for token in frame.tokens] == [last_change(rows, frame.call, i) for i in range(6)]
        assert frame.final == sum(a == b for a, b in zip(rows[frame.call - 1], rows[-1], strict=True))
    # A token that comes back counts from its return, not from when it was there first.
    assert [token.changed for token in traced(torch.tensor([[5], [6], [5], [5]])).frames[-1].tokens] == [3]


def test_a_change_between_two_frames_that_are_shown_is_dated_to_the_call():
    ids = torch.full((9, 1), 5)
    ids[3:] = 6
    assert [(frame.call, frame.tokens[0].changed) for frame in traced(ids, 3).frames] == [(1, 1), (5, 4), (9, 4)]


@pytest.mark.parametrize(
    ("nfe", "steps", "calls"),
    [(9, 3, [1, 5, 9]), (7, 100, [1, 2, 3, 4, 5, 6, 7]), (6, 1, [6]), (1, 16, [1]), (64, 4, [1, 22, 43, 64])],
)
def test_the_frames_are_evenly_spread_and_the_last_is_always_among_them(nfe, steps, calls):
    frames = traced(random_ids(nfe, 3), steps).frames
    assert [frame.call for frame in frames] == calls
    times = torch.linspace(1, 0.1, nfe)
    assert [frame.t for frame in frames] == [float(times[call - 1]) for call in calls]


@pytest.mark.parametrize("which", ["bert_tokenizer", "gpt2_tokenizer"])
def test_what_the_tokens_add_is_together_what_the_tokenizer_decodes(which, request):
    tokenizer = request.getfixturevalue(which)
    rows = [tokenizer(text, add_special_tokens=False).input_ids for text in TEXTS]
    # Noise decodes to any tokens, incomplete characters and pieces without a word's beginning among them.
    rows += torch.randint(0, 20000, (8, 60), generator=generator()).tolist()
    rows += torch.randint(100, 256, (8, 60), generator=generator()).tolist()
    for row in rows:
        row = [token for token in row if token not in tokenizer.all_special_ids]
        found = pieces(row, tokenizer)
        assert len(found) == len(row)
        assert "".join(found) == tokenizer.decode(row, skip_special_tokens=True)


def test_words_in_pieces_read_as_words_and_a_character_in_pieces_belongs_to_the_last(bert_tokenizer, gpt2_tokenizer):
    ids = bert_tokenizer("so unaffable, no", add_special_tokens=False).input_ids
    assert pieces(ids, bert_tokenizer) == ["so", " una", "ffa", "ble", ",", " no"]
    ids = gpt2_tokenizer("a 🦦 b").input_ids
    assert len(ids) > 4
    assert pieces(ids, gpt2_tokenizer) == ["a", *[""] * (len(ids) - 3), " 🦦", " b"]


def test_special_tokens_are_named_but_are_no_part_of_the_text():
    (frame,) = traced(torch.tensor([[1, 3, 2, 4, 2]])).frames
    assert [(token.text, token.special) for token in frame.tokens] == [
        ("<s>", True),
        ("word0", False),
        ("</s>", True),
        (" word1", False),
        ("</s>", True),
    ]
    assert frame.text == "word0 word1"


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize(("sampler", "grid"), [(None, None), (DDIM(), LogSNRGrid()), (Ancestral(), UniformGrid())])
def test_the_last_frame_is_the_text_that_generate_gives_for_the_same_seed(sampler, grid, temperature):
    model = make_model(tokenizer=make_tokenizer())
    arguments = {"nfe": 6, "sampler": sampler, "grid": grid, "seed": 7, "batch_size": 3, "temperature": temperature}
    trace = trace_text(model, **arguments)
    assert trace.frames[-1].text == model.generate(2, **arguments)[0]
    times = (grid or model.grid).times(6, model.schedule, model.timesteps)
    assert [frame.t for frame in trace.frames] == times[:-1].tolist()


def test_each_frame_is_what_the_prediction_of_its_call_decodes_to():
    model = make_model(tokenizer=make_tokenizer())
    answers = Calls(model).answers
    trace = trace_text(model, nfe=9, batch_size=2, steps=4)
    assert len(answers) == 9
    with torch.no_grad():
        texts = [model.to_text(model.decode(answers[frame.call - 1]))[0] for frame in trace.frames]
    assert [frame.text for frame in trace.frames] == texts
    assert len(set(texts)) > 1


@pytest.fixture
def here(tmp_path, monkeypatch):
    make_model(tokenizer=make_tokenizer()).save_pretrained(tmp_path / "model")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_generate_writes_the_same_texts_by_as_many_calls_with_a_trace_as_without(here, monkeypatch, capsys):
    calls, denoise = [], DiT.denoise

    def counted(self, z_t, self_condition, modulations):
        calls.append(len(z_t))
        return denoise(self, z_t, self_condition, modulations)

    monkeypatch.setattr(DiT, "denoise", counted)
    common = ["generate", "model", "-n", "5", "--nfe", "6", "--batch_size", "2", "--temperature", "1", "--output"]
    cli.main([*common, "plain.jsonl"])
    assert calls == [2] * 18
    calls.clear()
    cli.main([*common, "traced.jsonl", "--trace", "out/trace.html", "--trace_steps", "3"])
    assert calls == [2] * 18
    assert (here / "traced.jsonl").read_text() == (here / "plain.jsonl").read_text()
    assert "text 0 takes shape in out/trace.html" in capsys.readouterr().out
    page = (here / "out/trace.html").read_text()
    assert re.findall(r'<li data-call="(\d+)">', page) == ["1", "4", "6"]
    shown = re.findall(r'<p class="text">(.*?)</p>', page, re.S)[-1]
    words = re.findall(r'<span class=""[^>]*>([^<]*)</span>', shown) + re.findall(
        r'<span class="fresh"[^>]*>([^<]*)</span>', shown
    )
    first = json.loads((here / "plain.jsonl").read_text().splitlines()[0])["text"]
    assert sorted(word.strip() for word in words) == sorted(first.split())


def test_a_trace_needs_a_tokenizer_and_says_so():
    with pytest.raises(ValueError, match=r"has no tokenizer to make text with: give LDLM\(tokenizer=\.\.\.\)"):
        trace_text(make_model(), nfe=1)


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--trace", "."], "--trace . is a folder; give the name of a file in it"),
        (["--trace", "t.html", "--trace_steps", "0"], "--trace_steps 0 must be at least 1"),
    ],
)
def test_what_is_wrong_with_a_trace_is_said_before_anything_is_generated(here, capsys, words, told):
    with pytest.raises(SystemExit) as stop:
        cli.main(["generate", "model", *words])
    assert stop.value.code == 2
    assert told in capsys.readouterr().err
    assert not list(here.glob("*.html"))


def test_a_page_of_one_call_is_a_page(tmp_path):
    write_trace(tmp_path / "one.html", traced(random_ids(1, 3)), "a <b>title</b>")
    page = (tmp_path / "one.html").read_text()
    assert page.count("<li data-call=") == 1
    assert "a &lt;b&gt;title&lt;/b&gt;" in page
