"""What `ldlm bench` counts and divides, against closed forms, numpy and brute force; nothing depends on real time."""

import json
import platform
import statistics
import time
from argparse import Namespace

import lightning as L
import numpy as np
import pytest
import torch
from helpers.command import complaint
from helpers.tiny import (
    LENGTH,
    TimeOnlyDenoiser,
    generator,
    make_data,
    make_model,
    make_task,
    make_tokenizer,
    make_trainer,
    rows,
)
from torch.nn.functional import scaled_dot_product_attention
from torch.utils.flop_counter import FlopCounterMode
from transformers import BertConfig

from ldlm.benchmarks.packing import excerpt
from ldlm.benchmarks.sampling import random_model
from ldlm.benchmarks.timing import (
    Flops,
    count_flops,
    interleave,
    line,
    matmul_rate,
    peak_memory,
    quotients,
    rate,
    spread,
    utilisation,
)
from ldlm.benchmarks.training import WARMUP, Turns, measure
from ldlm.cli import main as cli
from ldlm.data.corpus import FileCorpus
from ldlm.nn.denoiser import DiT
from ldlm.objective import JointObjective

CPU = torch.device("cpu")
SMALL = ["--sequence_length", "8", "--width", "16", "--layers", "1", "--heads", "2", "--batch_size", "2", "--nfe", "3"]


# --- counting


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_denoisers_flops_are_those_of_its_shapes(dtype):
    b, m, d, w, layers = 3, 8, 12, 32, 2
    denoiser = DiT(d, m, width=w, layers=layers, heads=4).to(dtype)
    z = torch.randn(b, m, d, dtype=dtype)

    def call():
        next(denoiser.at_times(torch.tensor([0.5])))(z, z)

    linear = 2 * (2 * d * w + layers * 12 * w**2 + w * d)  # a latent: input, blocks, output
    attention = layers * 4 * m**2 * w  # a row: scores, and the values they weigh
    modulation = 2 * (256 * w + w**2 + layers * 6 * w**2 + 2 * w**2)  # a time: MLP of the sinusoid, blocks, last norm
    with torch.no_grad():
        assert count_flops(call) == b * (m * linear + attention) + modulation


def test_attention_and_its_gradient_take_seven_products_and_others_what_torch_counts():
    b, heads, n, e = 2, 3, 16, 8
    q, k, v = (torch.randn(b, heads, n, e, requires_grad=True) for _ in range(3))
    # Two in the forward pass; then the scores again, and the gradients of values, weights, queries and keys.
    assert count_flops(lambda: scaled_dot_product_attention(q, k, v).sum().backward()) == 7 * 2 * b * heads * n**2 * e
    network = torch.nn.Sequential(torch.nn.Linear(5, 7), torch.nn.GELU(), torch.nn.Linear(7, 3))
    with FlopCounterMode(display=False) as theirs:
        network(torch.randn(4, 5)).sum().backward()
    assert count_flops(lambda: network(torch.randn(4, 5)).sum().backward()) == theirs.get_total_flops()


def test_a_first_estimate_without_gradients_counts_as_a_call_for_half_the_rows():
    def step(share):
        model = make_model(self_conditioning=share)
        u, objective = torch.full((4,), 0.5), JointObjective()
        return count_flops(lambda: objective(model, rows(4), u, torch.ones(()), generator()).total.backward())

    model = make_model()
    z, t = torch.randn(2, LENGTH, model.denoiser.latent_size), torch.full((2,), 0.5)
    more = step(0.5) - step(0.0)
    with torch.no_grad():
        assert more == count_flops(lambda: model.denoiser(z, t, z))


def test_a_peak_is_what_is_held_beside_what_was_held_before():
    torch.ones(100_000_000)  # an earlier peak is forgotten
    kept = torch.ones(10_000_000)

    def run():
        for _ in range(3):  # one after the other: only one of them is held
            torch.ones(50_000_000)

    found = peak_memory(run, CPU)
    assert 190e6 < found["peak_memory_bytes"] - found["memory_before_bytes"] < 260e6
    assert found["memory_before_bytes"] > kept.nbytes


# --- timing, with a clock of our own


class Clock:
    """Time that passes only where a test says so."""

    seconds = 0.0

    def __call__(self):
        return self.seconds


def test_functions_run_in_turn_and_the_warm_up_is_not_counted():
    order, clock = [], Clock()

    def run(name, seconds):
        order.append(name)
        clock.seconds += seconds[len(order) // 2 - 1 if name == "b" else len(order) // 2]

    a, b = [100, 1, 2, 3], [200, 10, 20, 60]
    found = interleave({"a": lambda: run("a", a), "b": lambda: run("b", b)}, repeats=3, device=CPU, clock=clock)
    assert "".join(order) == "abababab"
    assert found == {"a": a[1:], "b": b[1:]}
    assert quotients(found["b"], found["a"])["all"] == [10, 10, 20]


def test_the_rate_of_matrix_products_is_the_best_sizes_best(monkeypatch):
    calls, clock = [], Clock()

    def product(one, other):
        calls.append(len(one))
        clock.seconds += {4: 2.0, 8: 10.0, 16: 100.0}[len(one)] * (0.5 if calls.count(len(one)) == 3 else 1)

    monkeypatch.setattr(torch, "matmul", product)
    assert matmul_rate(CPU, torch.float32, clock, (4, 8, 16), repeats=4) == max(
        2 * 4**3 / 1, 2 * 8**3 / 5, 2 * 16**3 / 50
    )
    assert calls == [4, 8, 16] * 5


def test_spreads_and_rates_are_those_of_statistics():
    values = [3.0, 1.0, 2.5, 9.0]
    assert spread(values, 10) == {
        "median": 10 * statistics.median(values),
        "min": 10.0,
        "max": 90.0,
        "all": [30.0, 10.0, 25.0, 90.0],
    }
    assert rate(18, values) == {"median": 18 / np.median(values), "min": 2.0, "max": 18.0}
    found = utilisation(36, values, best=72)
    assert found["mfu"] == {"median": 0.5 / np.median(values), "min": 0.5 / 9, "max": 0.5}


def test_a_fitted_line_is_numpys():
    x = [16, 32, 64, 128, 256]
    y = [1.9, 3.3, 6.2, 13.1, 25.4]
    found, (slope, intercept) = line(x, y), np.polyfit(x, y, 1)
    fitted = slope * np.array(x) + intercept
    assert found["slope"] == pytest.approx(slope)
    assert found["intercept"] == pytest.approx(intercept)
    assert found["r_squared"] == pytest.approx(1 - np.square(fitted - y).sum() / np.square(y - np.mean(y)).sum())
    assert found["worst_deviation"] == pytest.approx(np.abs(fitted / y - 1).max())


# --- sampling


def sampling(*words):
    cli.main(["bench", "sampling", *words, "--output", "bench.json"])
    with open("bench.json", encoding="utf-8") as file:
        return json.load(file)


def test_rivals_are_timed_by_the_calls_they_make_on_the_same_blocks(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    make_model(tokenizer=make_tokenizer()).save_pretrained("model")
    nfe, tokens = 40, 2 * LENGTH
    of = sampling("model", "--batch_size", "2", "--nfe", f"{nfe}", "--repeats", "2", "--peers")["measures"]
    calls = {name.removesuffix("_calls"): of[name] for name in of if name.endswith("_calls")}
    assert calls["masked"] == calls["masked_float64"] == calls["one_hot_flow"] == nfe
    # Each token changes once: without a call where none does, there are fewer than tokens, and a first one.
    assert 1 <= calls["masked_lazy"] <= tokens
    assert 1 <= calls["masked_cached"] <= tokens + 1
    ours = np.array(of["step_ms"]["all"])
    whole = nfe * ours + of["decode_ms"]["all"]
    for name, count in calls.items():
        each = np.array(of[f"{name}_call_ms"]["all"])
        assert of[f"{name}_call_over_step"]["all"] == pytest.approx((each / ours).tolist())
        assert of[f"{name}_texts_over_ours"]["all"] == pytest.approx((each * count / whole).tolist())
    make_model(denoiser=TimeOnlyDenoiser(), tokenizer=make_tokenizer()).save_pretrained("other")
    assert "TimeOnlyDenoiser" in complaint(capsys, "bench", "sampling", "other", "--nfe", "1", "--peers")


def test_sampling_numbers_agree_with_each_other(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    found = sampling(*SMALL, "--repeats", "3", "--precision", "bf16", "--cpu_time", "--scaling", "2", "4", "8")
    of = found["measures"]
    steps = [ms / 1e3 for ms in of["step_ms"]["all"]]
    assert len(steps) == 3
    assert of["step_ms"]["median"] == statistics.median(of["step_ms"]["all"])
    assert of["step_over_forward"]["median"] == pytest.approx(
        np.median(np.divide(of["step_ms"]["all"], of["forward_ms"]["all"]))
    )
    assert of["plain_over_step"]["all"] == pytest.approx(
        np.divide(of["plain_step_ms"]["all"], of["step_ms"]["all"]).tolist()
    )
    decodes = [ms / 1e3 for ms in of["decode_ms"]["all"]]
    whole = [3 * step + decode for step, decode in zip(steps, decodes, strict=True)]
    assert of["texts_per_second"]["median"] == pytest.approx(2 / statistics.median(whole))
    paper = [1024 * step + decode for step, decode in zip(steps, decodes, strict=True)]
    assert of["seconds_of_1024_nfe"]["all"] == pytest.approx(paper)
    assert of["flops_per_second"]["median"] == pytest.approx(of["flops_per_step"] / statistics.median(steps))
    assert of["mfu"]["max"] == pytest.approx(of["flops_per_second"]["max"] / of["matmul_flops_per_second"])
    assert of["peak_memory_bytes"] >= of["memory_before_bytes"] > 0
    scaling = found["scaling"]
    medians = [statistics.median(scaling["seconds"][str(nfe)]) for nfe in (2, 4, 8)]
    assert of["line_slope"] == pytest.approx(np.polyfit([2, 4, 8], medians, 1)[0])
    assert scaling["texts"] == [2, 4, 8, 16]
    assert found["seconds_of"] == "all threads' CPU time"
    where = found["surroundings"]
    assert where["versions"]["torch"] == torch.__version__
    assert (where["device"], where["threads"]) == (f"{platform.machine()} CPU", torch.get_num_threads())
    assert "--scaling 2 4 8" in found["command"]
    printed = capsys.readouterr().out
    assert f"{of['step_ms']['median']:.4g}" in printed
    assert "step over forward" in printed


def test_a_model_of_ones_own_is_measured_as_it_is(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    make_model(tokenizer=make_tokenizer()).save_pretrained("model")
    found = sampling("model", "--nfe", "2", "--batch_size", "2", "--repeats", "1")
    shape = {"latent_size": 12, "num_latents": 8, "width": 16, "layers": 1, "heads": 2}
    assert found["settings"]["denoiser"] == {"class_path": "ldlm.DiT", "init_args": shape}
    assert found["settings"]["source"]["name"] == "model"
    assert "plain_step_ms" not in found["measures"]  # it is plain already


def test_random_weights_are_nowhere_the_zeros_that_training_starts_with():
    model = random_model(Namespace(sequence_length=8, width=16, layers=2, heads=2))
    assert all(parameter.any() for parameter in model.denoiser.parameters())
    z = torch.randn(2, 8, 16)
    early, late = (model.denoiser(z, torch.full((2,), t), z) for t in (0.1, 0.9))
    assert (early - late).abs().max() > 1e-3


# --- training


class Bare(L.Callback):
    """Counts what each call of the Trainer multiplies."""

    def __init__(self):
        self.flops = []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.mode = Flops()
        self.mode.__enter__()

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.mode.__exit__(None, None, None)
        self.flops.append(self.mode.total)


@pytest.mark.parametrize("accumulated", [1, 2])
def test_the_trainer_and_the_bare_loop_take_turns_at_the_same_work(tmp_path, accumulated):
    task, counted = make_task(timestep_refresh=2), Bare()
    limits = {"max_steps": WARMUP + 2 * 3, "accumulate_grad_batches": accumulated, "gradient_clip_val": 1.0}
    trainer = make_trainer(tmp_path, [counted], **limits)
    options = Namespace(batch_size=4, steps=3, repeats=2, data=True, clock=time.process_time)
    found = measure(task, trainer, make_data(tmp_path, batch_size=4), options)
    of, settings = found["measures"], found["settings"]
    assert trainer.global_step == WARMUP + 2 * 3
    assert len(counted.flops) == accumulated * trainer.global_step
    observed = 2 * 4 * 3 * 101  # the Trainer also tells the timesteps: 4 losses, weights and squares, at 101 edges
    assert {*counted.flops} == {of["flops_per_token"] * 4 * LENGTH + observed}
    assert settings["calls_per_step"] == accumulated
    steps = [ms / 1e3 for ms in of["step_ms"]["all"]]
    assert len(steps) == len(of["bare_step_ms"]["all"]) == len(of["data_share"]["all"]) == 2
    tokens = accumulated * 4 * LENGTH
    assert of["tokens_per_second"]["median"] == pytest.approx(tokens / statistics.median(steps))
    flops = of["flops_per_token"] * tokens
    assert of["mfu"]["median"] == pytest.approx(flops / statistics.median(steps) / of["matmul_flops_per_second"])
    assert 0 < of["data_share"]["median"] < 1


def test_a_turn_is_of_so_many_calls_and_the_loops_follow_it(tmp_path):
    events = []

    class Tell(L.Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            events.append("call")

    turns = Turns(
        {"one": lambda n: events.append(("one", n)), "two": lambda n: events.append(("two", n))}, 3, 2, CPU, Clock()
    )
    trainer = make_trainer(tmp_path, [Tell(), turns], max_steps=8)
    loader = torch.utils.data.DataLoader(rows(32).view(8, 4, LENGTH), batch_size=None)
    trainer.fit(make_task(timestep_refresh=9), train_dataloaders=loader)
    first = ["call"] * 2 + [("one", 2), ("two", 2)]
    assert events == first + 2 * (["call"] * 3 + [("one", 3), ("two", 3)])
    assert [len(laps) for laps in turns.seconds.values()] == [3, 3, 3]


def test_training_takes_a_recipe_and_leaves_nothing_behind(tmp_path, monkeypatch):
    (tmp_path / "bert").mkdir()
    sizes = {"hidden_size": 384, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 8}
    BertConfig(vocab_size=30522, **sizes).save_pretrained(tmp_path / "bert")
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    words = ["--config", "quickstart", "--random_encoder", "../bert", "--sequence_length", "8", "--batch_size", "2"]
    words += ["--steps", "1", "--repeats", "2", "--trainer.precision", "32", "--model.denoiser.init_args.layers=1"]
    cli.main(["bench", "training", *words, "--output", "../bench.json"])
    assert list((tmp_path / "here").iterdir()) == []
    found = json.loads((tmp_path / "bench.json").read_text())
    settings = found["settings"]
    assert (settings["rows_per_call"], settings["sequence_length"], settings["precision"]) == (2, 8, "32-true")
    assert "AdaptiveTimestepUpdate" in settings["callbacks"]
    assert {"ModelCheckpoint", "ShowSamples"}.isdisjoint(settings["callbacks"])
    assert found["measures"]["tokens_per_second"]["median"] == pytest.approx(
        16e3 / found["measures"]["step_ms"]["median"]
    )


# --- packing


def test_packing_counts_the_tokens_of_all_documents_and_their_ends(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    make_tokenizer().save_pretrained("tokenizer")
    texts = [f"word{i % 30} word1 " * (1 + i % 5) for i in range(50)]
    with open("texts.jsonl", "w", encoding="utf-8") as file:
        file.writelines(json.dumps({"body": text}) + "\n" for text in texts)
    words = ["texts.jsonl", "--text_column", "body", "--tokenizer", "./tokenizer", "--sequence_length", "8"]
    words += ["--batch_size", "4", "--megabytes", "0.01", "--repeats", "2", "--output", "bench.json"]
    cli.main(["bench", "packing", *words])
    with open("bench.json", encoding="utf-8") as file:
        found = json.load(file)
    settings, of = found["settings"], found["measures"]
    times = -(-(10**4) // sum(len(text) for text in texts))
    assert settings["documents"] == 50 * times
    assert settings["tokens"] == times * sum(len(text.split()) + 1 for text in texts)
    assert settings["bytes"] == times * sum(len(text) for text in texts)
    quotient = of["megabytes_per_second"]["median"] / of["tokens_per_second"]["median"]
    assert quotient == pytest.approx(settings["bytes"] / 1e6 / settings["tokens"])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bench.json", "texts.jsonl", "tokenizer"]


def test_an_excerpt_is_the_first_documents_or_all_of_them_again_and_again(tmp_path):
    file = tmp_path / "texts.jsonl"
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in ["abc", "", "dé", "fgh"]), encoding="utf-8")
    corpus = FileCorpus(file)
    assert [len(excerpt(corpus, size)) for size in (1, 3, 4, 6, 7, 9)] == [1, 1, 3, 3, 4, 4]
    assert excerpt(corpus, 20) == ["abc", "", "dé", "fgh"] * 3
    file.write_text('{"text": ""}\n')
    with pytest.raises(ValueError, match="no text"):
        excerpt(FileCorpus(file), 1)


# --- bad input


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["sampling", *SMALL, "--batch_size", str(10**12)], "1000000000000 texts of 8 latents of width 16 do not fit"),
        (["sampling", "nothere.ckpt"], "nothere.ckpt does not exist"),
        (["sampling", "--nfe", "0"], "--nfe 0 must be at least 1"),
        (["sampling", "--batch_size", "-1"], "--batch_size -1 must be at least 1"),
        (["sampling", "--nfee", "1"], "did you mean '--nfe'?"),
        (["sampling", "x.ckpt", "--width", "8"], "x.ckpt has a shape of its own"),
        (["sampling", "--scaling", "8", "8", "16"], "at least three different NFE"),
        (["sampling", *SMALL, "--device", "nowhere"], "--device nowhere"),
        (["sampling", *SMALL, "--output", "."], "is a folder"),
        (["training"], "--config"),
        (["training", "--config", "quickstrt"], "did you mean 'quickstart'?"),
        (["training", "--config", "quickstart", "--model.sgma_dec", "3"], "did you mean '--model.sigma_dec'?"),
        (["training", "--config", "quickstart", "--random_encoder", "nowhere"], "model='nowhere' is neither"),
        (["training", "--config", "quickstart", "--batch_size", str(10**12)], "do not fit into memory"),
        (["packing", "nothere.txt"], "nothere.txt does not exist"),
        (["packing", "--megabytes", "0"], "--megabytes 0.0 must be above 0"),
        (["pack"], "'packing'"),
        ([], "required: sampling|training|packing"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_wrong_input_ends_in_one_sentence(tmp_path, monkeypatch, capsys, words, said):
    monkeypatch.chdir(tmp_path)
    assert said in complaint(capsys, "bench", *words)
    assert list(tmp_path.iterdir()) == []
