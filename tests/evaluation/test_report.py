"""The report: it stands alone, shows the numbers that were written down, and texts in it do nothing."""

import base64
import copy
import io
import json
import math
import re
import shutil
import subprocess
from html.parser import HTMLParser

import pytest
import torch
from helpers.tiny import make_tokenizer
from matplotlib.figure import Figure
from PIL import Image

from ldlm.evaluation.report import Shown, number, write_report
from ldlm.evaluation.trace import make_trace

VOID = {"meta", "input", "img", "br", "link"}
HOSTILE = [
    "<script>document.title = 'taken'</script>",
    "</p></main></script><img src='https://example.org/x.png' onerror=\"document.title = 'taken'\">",
    "{{ 7 * 7 }} {% raw %} ${x} & &amp; \u202e",
    "",
]


def score(mean, std=None, interval=None):
    return {"mean": mean, "std": std, "per_seed": [mean], "interval_95": interval}


RUN = {
    "source": {"name": "model/last.ckpt", "sha256": "ab" * 32},
    "texts": 1256,
    "skipped": 3,
    "truncated": 2,
    "empty": 1,
    "mean_length": 32.25,
    "perplexity": score(1791.4754701, 13.3459261, [1754.1481, 1836.40493]),
    "entropy": score(2.94490221, 0.0136781, [2.93093, 2.95888]) | {"ids": "of the model"},
    "mauve": {"mean": 0.11026, "std": None, "per_seed": [0.11026], "featuriser": "tiny", "kmeans_seeds": [25, 26]},
    "reference": {
        "source": {"name": "real.jsonl", "sha256": "cd" * 32},
        "texts": 1256,
        "perplexity": score(113.435281, None, [104.566, 122.96]),
        "entropy": score(3.219676),
    },
    "protocol": {"name": "plain", "definition": "exp of the mean <over> all tokens", "special_tokens": "removed"},
    "scorer": {"name": "tiny/scorer", "sha256": "ef" * 32, "dtype": "float32", "context": 32, "max_length": 32},
    "sampling": {
        "nfe": 64,
        "seeds": [0, 1],
        "sampler": {"class_path": "ldlm.Ancestral", "init_args": {"noise_scale": 0.75}},
        "seconds_per_text": 0.2787,
    },
    "versions": {"ldlm": "0.1.0", "torch": "2.13.0"},
    "device": "an abacus",
    "seconds": 180.5,
}
PUBLISHED = [
    {"name": "Peer", "nfe": 32, "where": "a paper, Table 8", "protocol": "theirs", "perplexity": score(97.531, 0.8)},
    {"name": "real text", "nfe": None, "where": "a paper, Table 8", "protocol": "theirs", "entropy": score(4.37)},
]


class Page(HTMLParser):
    """Elements with their attributes and ancestors, and a complaint where one is not closed."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.found: list[tuple[str, dict[str, str], list[str]]] = []
        self.text: dict[str, list[str]] = {}
        self.data: list[tuple[float, str, list[str]]] = []  # value, what is shown, where
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        here = dict(attributes)
        self.found.append((tag, here, list(self.open)))
        name = ".".join([tag, *here.get("class", "").split()])
        if tag == "data":
            self.data.append((float(here["value"]), "", list(self.open)))
        if tag not in VOID:
            self.open.append(name)
            self.text.setdefault(name, []).append("")

    def handle_endtag(self, tag):
        assert self.open.pop().split(".")[0] == tag

    def handle_data(self, data):
        for name in self.open:
            self.text[name][-1] += data
        if self.open and self.open[-1] == "data":
            value, shown, where = self.data[-1]
            self.data[-1] = (value, shown + data, where)

    def elements(self, tag):
        return [attributes for name, attributes, _ in self.found if name == tag]


def drawing() -> Figure:
    figure = Figure(figsize=(2, 1))
    figure.subplots().plot([1, 2])
    return figure


def trace():
    return make_trace(
        torch.tensor([[1, 9, 8, 2], [1, 5, 8, 2], [1, 5, 6, 2]]), torch.tensor([1, 0.5, 0.2]), make_tokenizer()
    )


def report(folder, result=RUN, figures=None, samples=(), frames=None):
    write_report(folder / "report.html", result, figures or {}, {"model": list(samples)} if samples else {}, frames)
    return (folder / "report.html").read_text(encoding="utf-8")


@pytest.fixture
def full(tmp_path):
    samples = [
        {"generated": Shown(text, 67.25, 4.404), "real": Shown(f"real {text}", 31.5, 4.2)} for text in HOSTILE * 4
    ]
    result = copy.deepcopy(RUN) | {"published": PUBLISHED, "command": "ldlm evaluate '<ckpt>' --nfe 64"}
    return report(tmp_path, result, {"Loss & <time>": drawing(), "Another": drawing()}, samples, trace())


def test_the_page_refers_to_nothing_outside_itself(full):
    page = Page(full)
    addresses = [
        value
        for _, attributes, _ in page.found
        for name, value in attributes.items()
        if name in ("src", "href", "srcset", "action", "poster", "data", "background", "xlink:href")
    ]
    assert len(addresses) == 2
    assert all(address.startswith("data:image/png;base64,") for address in addresses)
    (style,) = page.text["style"]
    assert "url(" not in style
    assert "@import" not in style
    (script,) = page.text["script"]
    assert not re.search(r"fetch|XMLHttp|import|http", script)
    assert not page.elements("link") + page.elements("iframe") + page.elements("object")
    policy = [meta["content"] for meta in page.elements("meta") if meta.get("http-equiv") == "Content-Security-Policy"]
    assert policy[0].startswith("default-src 'none'; img-src data:;")


def test_the_figures_are_pictures_that_decode_and_have_captions(full):
    page = Page(full)
    for image in page.elements("img"):
        picture = Image.open(io.BytesIO(base64.b64decode(image["src"].partition("base64,")[2])))
        picture.load()
        assert picture.size == (400, 200)  # 2 by 1 inches at 200 dots an inch
    assert page.text["figcaption"] == ["Loss & <time>", "Another"]
    assert [image["alt"] for image in page.elements("img")] == ["Loss & <time>", "Another"]


def test_texts_are_shown_as_they_are_and_whatever_is_in_them_does_nothing(full):
    page = Page(full)
    assert page.text["blockquote"] == [text or "(empty)" for text in HOSTILE * 4]
    assert page.text["blockquote.real"] == [f"real {text}" for text in HOSTILE * 4]
    assert page.text["p.unit.own"] == ["perplexity 67.2, entropy 4.40", "perplexity 31.5, entropy 4.20"] * 16
    assert len(page.elements("script")) == 1
    assert len(page.elements("img")) == 2
    assert not [name for _, attributes, _ in page.found for name in attributes if name.startswith("on")]


def test_a_name_or_a_definition_with_tags_is_text_as_well(full, tmp_path):
    assert "ldlm evaluate '<ckpt>' --nfe 64" in Page(full).text["pre"]
    assert "exp of the mean <over> all tokens" in Page(full).text["dd"]
    hostile = copy.deepcopy(RUN)
    hostile["source"]["name"] = HOSTILE[0]
    page = Page(report(tmp_path, hostile))
    assert page.text["h1"] == page.text["title"] == [HOSTILE[0]]
    assert len(page.elements("script")) == 1


def numbers(one) -> list[float]:
    return [value for value in (one["mean"], one.get("std"), *(one.get("interval_95") or [])) if value is not None]


def test_the_numbers_on_the_page_are_those_of_the_json_and_what_is_shown_rounds_them(full):
    data = Page(full).data
    cards = [value for value, _, where in data if "ul.cards" in where]
    real = RUN["reference"]
    assert cards == [
        *numbers(RUN["perplexity"]),
        real["perplexity"]["mean"],
        *numbers(RUN["entropy"]),
        real["entropy"]["mean"],
        *numbers(RUN["mauve"]),
    ]
    table = [value for value, _, where in data if "div.wide" in where and "details.elsewhere" not in where]
    ours = [number for name in ("perplexity", "entropy", "mauve") for number in numbers(RUN[name])]
    theirs = [number for name in ("perplexity", "entropy") for number in numbers(real[name])]
    assert table == [*ours, 1256, 0.2787, *theirs, 1256]
    for value, shown, _ in data:
        digits = len(shown.partition(".")[2])
        assert abs(float(shown.replace(",", "")) - value) <= 0.5 * 10**-digits
        assert abs(float(shown.replace(",", "")) - value) <= 0.06 * abs(value)


def test_what_others_published_stands_apart_and_says_so(full):
    page = Page(full)
    apart = [value for value, _, where in page.data if "details.elsewhere" in where]
    assert apart == [97.531, 0.8, 4.37]
    assert not [value for value, _, where in page.data if value in apart and "details.elsewhere" not in where]
    (shown,) = page.text["details.elsewhere"]
    assert re.search(r"Published elsewhere: 2 rows.*Not measured here.*a paper, Table 8. theirs.*Peer.*32", shown, re.S)


def test_everything_that_is_needed_to_repeat_it_is_on_the_page(full, tmp_path):
    page = Page(full)
    facts = dict(zip(page.text["dt"], page.text["dd"], strict=True))
    assert facts["sampling, sampler"] == "Ancestral(noise_scale=0.75)"
    assert facts["sampling, seeds"] == "0, 1"
    assert facts["scorer, sha256"] == "ef" * 32
    assert facts["entropy, ids"] == "of the model"
    assert facts["mauve, kmeans seeds"] == "25, 26"
    assert facts["protocol, definition"] == RUN["protocol"]["definition"]
    for name, value in [("skipped", "3"), ("truncated", "2"), ("empty", "1"), ("device", "an abacus")]:
        assert facts[name] == value
    assert json.loads(Page(report(tmp_path)).text["pre"][-1]) == RUN


def test_several_runs_have_a_row_each_and_what_differs_between_them_is_a_table(tmp_path):
    other = copy.deepcopy(RUN)
    other["sampling"]["nfe"], other["perplexity"]["mean"], other["device"] = 8, 2500.25, "another abacus"
    other["texts"] = 30
    page = Page(report(tmp_path, {"runs": [RUN, other], "published": [], "seconds": 400.0, "measurements": {"a": {}}}))
    cards = [value for value, _, where in page.data if "ul.cards" in where]
    assert cards[:3] == [1791.4754701, 2500.25, 113.435281]
    assert " ".join(page.text["p.lede"][0].split()).startswith("1,256 or 30 texts for each of 2 sampling seeds, 2 runs")
    assert page.text["h1"] == ["model/last.ckpt"]
    rows = [" ".join(row.split()) for row in page.text["tr"]]
    assert [row for row in rows if row.startswith("sampling")] == ["sampling, nfe648"]
    assert [row for row in rows if row.startswith("device")] == ["devicean abacusanother abacus"]
    assert sum(row.startswith("model/last.ckpt") for row in rows) == 2
    assert sum(row.startswith("real text") for row in rows) == 1
    facts = dict(zip(page.text["dt"], page.text["dd"], strict=True))
    assert facts["seconds in all"] == "400.0"
    assert "device" not in facts


def test_a_score_that_could_not_be_had_is_none_and_a_file_of_samples_has_no_sampling(tmp_path):
    run = copy.deepcopy(RUN) | {"sampling": None, "reference": None, "perplexity": score(None)}
    run["perplexity"]["interval_95"] = None
    page = Page(report(tmp_path, run, samples=[{"generated": Shown("alone", math.nan, math.nan)}]))
    assert "none" in " ".join(page.text["td"])
    assert "Generative perplexity" not in page.text["h3"]
    assert page.text["blockquote"] == ["alone"]
    assert "blockquote.real" not in page.text


def test_numbers_read_as_people_write_them():
    assert [number(value) for value in (123456.7, 1000, 999.94, 12.345, 0.00049, float("nan"), float("inf"))] == [
        "123,457", "1,000", "999.9", "12.35", "0.000490", "–", "–",
    ]  # fmt: skip


def test_a_report_that_fails_leaves_no_file(tmp_path):
    with pytest.raises(Exception, match="scorer"):
        report(tmp_path, {key: value for key, value in RUN.items() if key != "scorer"})
    assert list(tmp_path.iterdir()) == []


def test_the_text_taking_shape_shows_all_its_frames_without_a_script(full):
    page = Page(full)
    frames = [attributes for attributes in page.elements("li") if "data-call" in attributes]
    assert [frame["data-call"] for frame in frames] == ["1", "2", "3"]
    assert ["".join(text.split()) for text in page.text["p.text"]] == [
        "<s>word6word5</s>",
        "<s>word2word5</s>",
        "<s>word2word3</s>",
    ]
    assert [text for text in page.text["span.fresh"] if "word" in text] == ["word2", " word3"]
    (controls,) = [a for a in page.elements("div") if a.get("class") == "controls"]
    assert "hidden" in controls
    titles = [a["title"] for a in page.elements("span") if "title" in a]
    assert titles[-4:] == ["since call 1", "since call 2", "since call 3", "since call 1"]


DRIVE = """
const key = (name) => document.body.dispatchEvent(new KeyboardEvent("keydown", { key: name, bubbles: true }));
const now = () => document.querySelector("li.now").dataset.call;
const button = (name) => document.querySelector(".controls " + name);
const seen = [now()];
for (const name of ["ArrowLeft", "ArrowLeft", "ArrowLeft", "ArrowRight"]) { key(name); seen.push(now()); }
button(".back").click(); seen.push(now());
button(".on").click(); seen.push(now());
button(".bars i:last-child").click(); seen.push(now());
button(".play").click(); seen.push(now(), button(".play").textContent);
button("input").value = 1; button("input").dispatchEvent(new Event("input")); seen.push(now());
seen.push(button(".play").textContent);
button(".on").click(); button(".play").click(); seen.push(now());
setTimeout(() => { document.title = [...seen, now(), button(".play").textContent].join(" "); }, 5000);
"""


@pytest.mark.slow
def test_a_browser_steps_through_the_text_and_has_no_complaints(full, tmp_path):
    browser = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if browser is None:
        pytest.skip("no Chromium to open the report in")

    def opened(page: str) -> tuple[Page, str]:
        (tmp_path / "page.html").write_text(page, encoding="utf-8")
        words = [browser, "--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr", "--v=0"]
        words += [f"--user-data-dir={tmp_path / 'profile'}", "--virtual-time-budget=10000", "--dump-dom"]
        done = subprocess.run(
            [*words, f"file://{tmp_path}/page.html"], capture_output=True, text=True, check=True, timeout=300
        )
        return Page(done.stdout.partition(">")[2]), done.stderr

    page, said = opened(full)
    assert "CONSOLE" not in said
    assert page.text["title"] == ["model/last.ckpt"]  # nothing that stands in a sample has run
    assert [a["data-call"] for a in page.elements("li") if a.get("class") == "now"] == ["3"]
    assert not [a for a in page.elements("div") if "hidden" in a]
    values = [a["aria-valuetext"] for a in page.elements("input")]
    assert values == ["call 3 of 3, t = 0.2: 4 of 4 tokens are as in the end"]
    page, said = opened(full.replace("</body>", f"<script>{DRIVE}</script></body>"))
    assert "CONSOLE" not in said
    assert page.text["title"] == ["3 2 1 1 2 1 2 3 1 Pause 2 Play 1 3 Play"]
    page, said = opened(full.replace("</body>", "<script>missing()</script></body>"))
    assert "CONSOLE" in said  # else the lines above would prove nothing
