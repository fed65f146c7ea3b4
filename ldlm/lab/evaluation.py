"""What ``ldlm evaluate`` does: scores of a model's texts, or of texts in a file, with all it takes to repeat them.

In: a model or a file of samples, a scorer, perhaps real texts. Out: a table, and a file of JSON.
Paper: section 5 (generative perplexity, MAUVE, diversity, entropy over several sampling seeds) and App. E.
"""

import argparse
import importlib.util
import json
import logging
import math
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torchmetrics import Metric
from transformers import PreTrainedTokenizerBase
from transformers import __version__ as transformers_version
from transformers.utils import logging as transformers_logging

from ldlm import __version__
from ldlm.checkpoints import describe
from ldlm.corpus import FileCorpus, has_known_suffix
from ldlm.files import resolve, sha256, write_atomically
from ldlm.metrics import GenerativePerplexity, Mauve, NGramDiversity, UnigramEntropy
from ldlm.packing import load_tokenizer
from ldlm.scorer import Scorer, find_protocol, load_scorer
from ldlm.texts import GRIDS, SAMPLERS, check_output, find_device, load, named, sample, without_specials

DRAWS = 1000  # of the bootstrap, as is usual


@dataclass(frozen=True)
class Texts:
    """One set of texts that is scored as a whole.

    Attributes:
        texts: Without special tokens.
        ids: The model's token ids of each text, without special ones; None if nobody kept them.
        scored: What perplexity is measured on, if not ``texts``: mdlm keeps special tokens.
    """

    texts: list[str]
    ids: list[list[int]] | None = None
    scored: list[str] | None = None


def read_texts(name: str, count: int | None = None) -> Texts:
    """The texts of a file, or its first ``count``: ``text`` and perhaps ``ids`` of JSON lines, paragraphs of ``.txt``.

    Raises:
        ValueError: If the file is not there, has no texts or is of another kind, or only some lines have ``ids``.
    """
    path = Path(resolve(name))
    if not path.is_file():
        raise ValueError(f"there is no file {name}")
    texts = list(islice(FileCorpus(path), count))
    if not texts:
        raise ValueError(f"{name} holds no texts")
    if path.suffix.lower() != ".jsonl":
        return Texts(texts)
    lines = (line for line in path.read_text(encoding="utf-8-sig").split("\n") if line.strip())
    rows = [json.loads(line).get("ids") for line in islice(lines, count)]
    if all(row is None for row in rows):
        return Texts(texts)
    for number, row in enumerate(rows, start=1):
        if not isinstance(row, list) or not all(isinstance(token, int) for token in row):
            raise ValueError(f"{name}: text {number} has no list of integers as 'ids', but others do; mend or drop it")
    return Texts(texts, rows)


@dataclass(frozen=True)
class Measure:
    """Scores sets of texts, all in the same way.

    Attributes:
        scorer: Gives perplexity, MAUVE's features, and ids where there are no others.
        protocol: Name of the definition of perplexity.
        max_length: Tokens the scorer reads of a text; None for its context.
        tokenizer: Whose ids entropy is over where a set has none; None for the scorer's.
        tokenizer_name: What to call it.
    """

    scorer: Scorer
    protocol: str
    max_length: int | None
    tokenizer: PreTrainedTokenizerBase | None
    tokenizer_name: str

    def scores(self, sets: list[Texts], real: Texts | None = None) -> dict[str, Any]:
        """Each score's values over sets and their mean and deviation; counts and intervals are over all texts."""
        specials = self.tokenizer.all_special_ids if self.tokenizer else ()
        perplexities = [GenerativePerplexity(self.scorer, self.protocol, max_length=self.max_length) for _ in sets]
        entropies, diversities = [UnigramEntropy(specials) for _ in sets], [NGramDiversity() for _ in sets]
        for perplexity, entropy, diversity, one in zip(perplexities, entropies, diversities, sets, strict=True):
            perplexity.update(one.texts if one.scored is None else one.scored)
            entropy.update(self.ids(one)[0])
            diversity.update(one.texts)
        nats = torch.cat([metric.per_text for metric in perplexities])
        entropy_of_texts = torch.cat([metric.per_text for metric in entropies])
        result: dict[str, Any] = {
            "texts": len(sets[0].texts),
            "skipped": sum(int(metric.skipped) for metric in perplexities),
            "truncated": sum(int(metric.truncated) for metric in perplexities),
            "empty": sum(int(metric.empty) for metric in entropies),
            "mean_length": sum(int(metric.length) for metric in perplexities) / sum(len(one.texts) for one in sets),
            "perplexity": over_sets(perplexities) | interval(nats, perplexities[0].protocol.reduce),
            "entropy": over_sets(entropies) | interval(entropy_of_texts, torch.mean) | {"ids": self.ids(sets[0])[1]},
            "diversity": over_sets(diversities),
        }
        if real is not None:
            result["mauve"] = self.mauve(sets, real)
        return result

    def ids(self, one: Texts) -> tuple[list[list[int]], str]:
        """The token ids that entropy is over, and whose they are."""
        if one.ids is not None:
            return one.ids, "of the model"
        if self.tokenizer is not None:
            return self.tokenizer(one.texts, add_special_tokens=False, verbose=False).input_ids, self.tokenizer_name
        return self.scorer.encode(one.texts), "of the scorer"

    def mauve(self, sets: list[Texts], real: Texts) -> dict[str, Any]:
        """MAUVE of each set with the real texts, as many of them as it has."""
        features = self.scorer.features(real.texts)
        metrics = [Mauve(features.shape[1]) for _ in sets]
        for metric, one in zip(metrics, sets, strict=True):
            metric.update(features, real=True)
            metric.update(self.scorer.features(one.texts), real=False)
        return over_sets(metrics) | {"featuriser": short(self.scorer.name), "kmeans_seeds": list(metrics[0].seeds)}


def over_sets(metrics: Sequence[Metric]) -> dict[str, Any]:
    """Values over sets with their mean and (n-1) standard deviation; null for the latter if there is one set."""
    values = [float(metric.compute()) for metric in metrics]
    deviation = statistics.stdev(values) if len(values) > 1 else None
    return {"mean": statistics.fmean(values), "std": deviation, "per_seed": values}


def interval(per_text: Tensor, reduce: Callable[[Tensor], Tensor]) -> dict[str, Any]:
    """The 95 % percentile bootstrap interval of a mean over texts [num, ...]; null if there are none."""
    if not len(per_text):
        return {"interval_95": None}
    source = torch.Generator().manual_seed(0)
    picks = (torch.randint(len(per_text), (len(per_text),), generator=source) for _ in range(DRAWS))
    values = torch.stack([reduce(per_text[pick]) for pick in picks])
    return {"interval_95": values.quantile(values.new_tensor([0.025, 0.975])).tolist()}


def write_scores(options: argparse.Namespace) -> None:
    """Score texts, print a table, and write the scores where ``--output`` says.

    Args:
        options: The command's, by the names that ``ldlm evaluate --help`` shows.

    Raises:
        ValueError: If an input is at fault. What can be checked before anything is generated is.
    """
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    start, device = time.perf_counter(), find_device(options.device)
    check_output(options.output)
    protocol = find_protocol(options.protocol)
    sampler, grid = named(options.sampler, SAMPLERS), named(options.grid, GRIDS)
    samples = read_texts(options.source) if has_known_suffix(options.source) else None
    count = len(samples.texts) if samples else options.num_samples
    real = read_references(options.reference, count) if options.reference else None
    tokenizer = load_tokenizer(options.tokenizer) if options.tokenizer else None
    tokenizer_name, max_length = "of " + short(options.tokenizer or ""), options.max_length
    scorer = load_scorer(options.scorer, device=device)
    if samples:
        sets, sampling, specials = [samples], None, "as in the file"
    else:
        model = load(options.source).to(device)
        tokenizer, tokenizer_name = model.tokenizer, "of the model"
        if options.protocol == "mdlm" and max_length is None:  # MDLM reads as many tokens as its models write
            max_length = min(model.sequence_length, scorer.context)
        sets = []
        for seed in options.seeds:
            tokens = torch.cat(list(sample(model, options, seed, sampler, grid)))
            scored = model.to_text(tokens, protocol.special_tokens)
            sets.append(Texts(model.to_text(tokens), without_specials(model, tokens), scored))
        specials = "kept" if protocol.special_tokens else "removed"
        sampling = {name: vars(options)[name] for name in ("nfe", "seeds", "batch_size", "temperature", "precision")}
        sampling |= {"sampler": describe(sampler or model.sampler), "grid": describe(grid or model.grid)}
        sampling |= {"seconds": round(time.perf_counter() - start, 1)}
    measure = Measure(scorer, options.protocol, max_length, tokenizer, tokenizer_name)
    result = {
        "source": identity(options.source),
        **measure.scores(sets, real),
        "reference": {"source": identity(options.reference), **measure.scores([real])} if real else None,
        "protocol": {"name": options.protocol, "definition": protocol.definition, "special_tokens": specials},
        "scorer": {"name": short(scorer.name), "sha256": scorer.sha256, "dtype": scorer.dtype}
        | {"context": scorer.context, "max_length": max_length or scorer.context},
        "sampling": sampling,
        "versions": {"ldlm": __version__, "torch": torch.__version__, "transformers": transformers_version}
        | {"python": platform.python_version()},
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "seconds": round(time.perf_counter() - start, 1),
    }
    if options.output:
        with write_atomically(options.output) as file:
            file.write((json.dumps(without_nan(result), indent=2, ensure_ascii=False) + "\n").encode())
    Console().print(table(result))


def read_references(name: str, count: int) -> Texts:
    """The first ``count`` texts of a file; ValueError if there are fewer, or if nothing is there to compare them by."""
    if importlib.util.find_spec("mauve") is None:
        raise ValueError('--reference is for MAUVE, which needs mauve-text: pip install "ldlm[eval]"')
    real = read_texts(name, count)
    if len(real.texts) < count:
        raise ValueError(
            f"--reference {name} holds {len(real.texts)} texts for {count} samples: MAUVE compares as many with as many"
        )
    return real


def short(name: str) -> str:
    """A name without the folders of this machine, which mean nothing elsewhere."""
    return Path(name).name if Path(name).is_absolute() else name


def identity(name: str) -> dict[str, Any]:
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


def table(result: dict[str, Any]) -> Table:
    """The scores in short."""
    about = f"{result['protocol']['name']}, {result['scorer']['name']}, {result['texts']} texts a set"
    shown = Table("score", "mean", "std over sets", "95 % over texts", "reference", title=about)
    for name in ("perplexity", "entropy", "diversity", "mauve"):
        if name in result:
            score, real = result[name], (result["reference"] or {}).get(name, {})
            ends = score.get("interval_95")
            shown.add_row(
                name,
                f"{score['mean']:.4g}",
                "" if score["std"] is None else f"{score['std']:.2g}",
                f"{ends[0]:.4g} to {ends[1]:.4g}" if ends else "",
                f"{real['mean']:.4g}" if real else "",
            )
    shown.caption = f"skipped {result['skipped']}, truncated {result['truncated']}, empty {result['empty']}"
    return shown
