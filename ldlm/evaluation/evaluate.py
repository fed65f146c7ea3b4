"""What ``ldlm evaluate`` does: models and files of samples scored over numbers of denoiser calls, measured and drawn.

In: models or files of samples, a scorer, perhaps real texts. Out: a table, a file of JSON, figures.
Paper: section 8 and Fig. 1, App. D (Tables 8 and 9); with ``--measure`` also Fig. 3 left and Fig. 5.
"""

import argparse
import json
import logging
import math
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor
from transformers import PreTrainedTokenizerBase
from transformers.utils import logging as transformers_logging

from ldlm._files import sha256, short, write_atomically
from ldlm.checkpoints.description import describe
from ldlm.data.corpus import open_corpus
from ldlm.diffusion.grids import TimeGrid
from ldlm.diffusion.samplers import Sampler
from ldlm.evaluation.environment import device_name, versions
from ldlm.evaluation.inputs import check_files, command, load_model, read_references, read_sources
from ldlm.evaluation.latent_space import measure_latents, pack
from ldlm.evaluation.plots import save
from ldlm.evaluation.report import Shown, write_report
from ldlm.evaluation.sampling import GRIDS, SAMPLERS, find_device, named, sample
from ldlm.evaluation.scores import Measure, Texts
from ldlm.evaluation.tables import Scores, caption, draw, labels, published, table
from ldlm.evaluation.trace import Trace, trace_text
from ldlm.hub import resolve
from ldlm.metrics.generative_perplexity import GenerativePerplexity
from ldlm.metrics.memorisation import known_ngrams
from ldlm.metrics.protocols import find_protocol
from ldlm.metrics.scorer import Scorer, load_scorer
from ldlm.model import LDLM
from ldlm.tokenizer import bos_id, load_tokenizer, tokenizer_digest

SHOWN = 36  # texts of a source in a report
UNLIKE = "Of the texts and the reference, one has special tokens between documents: compare them by --protocol plain"


def write_scores(options: argparse.Namespace) -> None:
    """Score texts, print a table, and write the scores and figures where the options say.

    Args:
        options: The command's, by the names that ``ldlm evaluate --help`` shows.

    Raises:
        ValueError: If an input is at fault. What can be checked before anything is generated is.
    """
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    start, device = time.perf_counter(), find_device(options.device)
    check_files(options)
    find_protocol(options.protocol)
    sampler, grid = named(options.sampler, SAMPLERS), named(options.grid, GRIDS)
    samples = read_sources(options)
    counts = [len(found.documents) if found is not None else options.num_samples for found in samples.values()]
    real = read_references(options, max(counts)) if options.reference else None
    tokenizer = load_tokenizer(options.tokenizer) if options.tokenizer else None
    theirs = published(options.published)
    known = known_ngrams(open_corpus(options.training, options.text_column)) if options.training else None
    if known is not None and not len(known):
        raise ValueError(f"--training {options.training} holds no four words in a row: give the text of the training")
    scorer = load_scorer(options.scorer, device=device)
    GenerativePerplexity(scorer, options.protocol, max_length=options.max_length)  # refuses what does not go together
    ends = zip(samples, labels(list(samples)), strict=True)
    names = {source: end if Path(source).exists() else source for source, end in ends}  # a hub id is kept whole
    sweep = Sweep(options, names, scorer, real, tokenizer, known, device)
    runs: dict[str, list[Scores]] = {}
    for source, texts in samples.items():
        runs[names[source]] = [sweep.score_file(source, texts)] if texts else sweep.score_model(source, sampler, grid)
    everything = [run for each in runs.values() for run in each]
    result = {
        **(everything[0] if len(everything) == 1 else {}),
        "runs": everything,
        "reference": everything[0]["reference"],
        "command": command(options.words, names),
        "measurements": {names[source]: found for source, found in sweep.measurements.items()},
        "published": theirs,
        "versions": versions(),
        "device": device_name(device),
        "seconds": round(time.perf_counter() - start, 1),
    }
    if options.output:
        with write_atomically(options.output) as file:
            text = json.dumps(without_nan(result), indent=2, ensure_ascii=False) + "\n"
            file.write(text.encode(errors="backslashreplace"))  # as JSON does; a file's name may be no UTF-8
    drawn = draw(runs, result) if options.figures or options.report else {}
    if options.figures:
        save(drawn, Path(options.figures))
    if options.report:
        captioned = {caption(name): figure for name, figure in drawn.items()}
        write_report(Path(options.report), without_nan(result), captioned, sweep.samples, sweep.trace)
    Console(width=None if sys.stdout.isatty() else 160).print(table(runs))


@dataclass
class Sweep:
    """Runs of one command, each the scores of one source at one number of denoiser calls.

    Attributes:
        options: The command's.
        names: What each source is called.
        scorer: Loaded once for all of them.
        real: Real texts, enough for each source.
        tokenizer: Whose ids entropy is over where a file has none.
        known: The training text's 4-grams.
        device: Where models run.
        measurements: Of each model, where they were asked for.
        samples: Some texts of each source, by its name, beside real ones, for a report; a model's of its last run.
        trace: A text of the last model, for a report.
    """

    options: argparse.Namespace
    names: dict[str, str]
    scorer: Scorer
    real: Texts | None
    tokenizer: PreTrainedTokenizerBase | None
    known: Tensor | None
    device: torch.device
    measurements: dict[str, Scores] = field(default_factory=dict)
    samples: dict[str, list[dict[str, Shown]]] = field(default_factory=dict)
    trace: Trace | None = None
    _references: dict[tuple[Any, ...], tuple[Scores, Tensor | None, list[Shown]]] = field(default_factory=dict)

    def score_file(self, source: str, texts: Texts) -> Scores:
        """The scores of somebody's samples."""
        name = "of " + short(self.options.tokenizer or "")
        measure = Measure(self.scorer, self.options.protocol, self.options.max_length, self.tokenizer, name, self.known)
        return self._run(self._identity(source), measure, [measure.split(texts)], None, time.perf_counter())

    def score_model(self, source: str, sampler: Sampler | None, grid: TimeGrid | None) -> list[Scores]:
        """The scores of a model's samples at each number of denoiser calls; its measurements, if they are wanted."""
        options, protocol = self.options, find_protocol(self.options.protocol)
        # The digest of a checkpoint is taken once, not for each number of calls: some are of gigabytes.
        about, model, runs = (
            self._identity(source),
            load_model(source, self.device, options.precision, options.compile),
            [],
        )
        max_length = options.max_length
        if max_length is None:
            max_length = protocol.limit(model.sequence_length, self.scorer)
        measure = Measure(self.scorer, options.protocol, max_length, model.tokenizer, "of the model", self.known)
        if options.measure and self.real is not None:
            documents = measure.split(self.real).whole
            with torch.no_grad():  # that there is no token encoder, or too little text, is better told before sampling
                model.encode(pack(model, documents, options.num_samples, True)[:1].to(self.device))
        for nfe in options.nfe:
            start, sets, seconds = time.perf_counter(), [], 0.0
            one = argparse.Namespace(**(vars(options) | {"nfe": nfe}))
            for seed in options.seeds:
                before = time.perf_counter()
                tokens = torch.cat([part.cpu() for part in sample(model, one, seed, sampler, grid)])
                seconds += time.perf_counter() - before
                sets.append(Texts(model.to_documents(tokens), tokens.tolist()))
            sampling = {name: vars(one)[name] for name in ("nfe", "seeds", "batch_size", "temperature", "precision")}
            sampling |= {
                "sampler": describe(model.sampler if sampler is None else sampler),
                "grid": describe(model.grid if grid is None else grid),
            }
            per_text = seconds / (len(options.seeds) * options.num_samples)
            sampling |= {"seconds": round(seconds, 3), "seconds_per_text": float(f"{per_text:.4g}")}
            runs.append(self._run(about, measure, sets, sampling, start))
        if options.measure:
            self.measurements[source] = self._measured(model, measure, tokens)
        if options.report:
            # Sampled again: decoding each call would count into the time per text.
            arguments = options.seeds[0], options.batch_size, options.temperature
            self.trace = trace_text(model, nfe, sampler, grid, *arguments)
        return runs

    def _identity(self, source: str) -> Scores:
        """`identity` by the name that tells it from other sources."""
        return identity(source) | {"name": self.names[source]}

    def _run(self, about: Scores, measure: Measure, sets: list[Texts], sampling: Scores | None, start: float) -> Scores:
        """One run as it is written down."""
        reference, real, beside = self._reference(measure, len(sets[0].documents))
        read = [measure.read(one, real is not None) for one in sets]
        shown = self.samples[about["name"]] = [{"generated": text} for text in measure.shown(sets[0], read[0], SHOWN)]
        for row, text in zip(shown, beside, strict=False):
            row["real"] = text
        scorer, protocol, scores = self.scorer, find_protocol(measure.protocol), measure.scores(sets, read, real)
        marks = "special_tokens_per_text"
        if protocol.special_tokens and reference and bool(scores[marks]) != bool(reference[marks]):
            scores["perplexity"]["warning"] = UNLIKE
        return {
            "source": about,
            **scores,
            "reference": reference,
            "protocol": {"name": measure.protocol, "definition": protocol.definition},
            "scorer": {"name": short(scorer.name), "sha256": scorer.sha256, "dtype": scorer.dtype}
            | {
                "context": scorer.context,
                "max_length": scorer.context if measure.max_length is None else measure.max_length,
            },
            "sampling": sampling,
            "versions": versions(),
            "device": device_name(self.device),
            "seconds": round(time.perf_counter() - start, 1),
        }

    def _reference(self, measure: Measure, count: int) -> tuple[Scores | None, Tensor | None, list[Shown]]:
        """Scores and features of the first real texts, and some of these; once for all runs that measure in one way."""
        if self.real is None:
            return None, None, []
        tokenizer = measure.tokenizer
        key = count, measure.max_length, tokenizer_digest(tokenizer) if tokenizer else None
        if key not in self._references:
            real = measure.split(self.real.first(count))
            read = measure.read(real, features=True)
            scores = {"source": identity(self.options.reference), **measure.scores([real], [read])}
            self._references[key] = scores, read.features, measure.shown(real, read, SHOWN)
        return self._references[key]

    def _measured(self, model: LDLM, scores: Measure, tokens: Tensor) -> Scores:
        """The model's measurements on the reference, packed into rows that are framed as its samples are [k n]."""

        def perplexity(rows: Tensor) -> float:
            return float(scores.read(Texts(model.to_documents(rows)), features=False).perplexity.compute())

        options, first = self.options, tokens[:, 0]
        framed = model.tokenizer is not None and bool((first == bos_id(model.tokenizer)).float().mean() > 0.5)
        rows = pack(model, scores.split(self.real).whole if self.real is not None else [], options.num_samples, framed)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=options.precision == "bf16"):
            found = measure_latents(model, rows, perplexity, options.seeds[0], options.batch_size)
        return {"texts": identity(options.reference), "framed": framed, **found}


def identity(name: str) -> Scores:
    """A source's name, and its digest if it is a file."""
    path = Path(resolve(name))
    return {"name": short(name), "sha256": sha256(path) if path.is_file() else None}


def without_nan(value: Any) -> Any:
    """Plain data with null for numbers that JSON has no word for: no text could be scored."""
    if isinstance(value, dict):
        return {key: without_nan(item) for key, item in value.items()}
    if isinstance(value, list):
        return [without_nan(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
