"""How sets of texts are scored: each score's mean, deviation and interval, and what it takes to repeat them.

In: texts of a file or of a model, a scorer, perhaps real texts. Out: plain numbers by name.
Paper: section 5 (generative perplexity, MAUVE, diversity, entropy over several sampling seeds) and App. E.
"""

import json
import statistics
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torchmetrics import Metric
from transformers import PreTrainedTokenizerBase

from ldlm.corpus import FileCorpus
from ldlm.files import resolve, short
from ldlm.memorisation import Memorisation
from ldlm.metrics import FEW_TEXTS, GenerativePerplexity, Mauve, NGramDiversity, UnigramEntropy
from ldlm.scorer import FEATURE_TOKENS, Scorer, find_protocol

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

    def first(self, count: int) -> "Texts":
        """The first so many of them."""
        ids, scored = self.ids and self.ids[:count], self.scored and self.scored[:count]
        return Texts(self.texts[:count], ids, scored)


def read_texts(name: str, count: int | None = None, column: str = "text") -> Texts:
    """The texts of a file, or its first ``count``: a column and perhaps ``ids`` of JSON lines, paragraphs of ``.txt``.

    Raises:
        ValueError: If the file is not there, has no texts or is of another kind, or only some lines have ``ids``.
    """
    path = Path(resolve(name))
    if not path.is_file():
        raise ValueError(f"{name} is a folder; give a file of texts" if path.is_dir() else f"there is no file {name}")
    texts = list(islice(FileCorpus(path, column), count))
    if not texts:
        raise ValueError(f"{name} holds no texts")
    if path.suffix.lower() == ".txt":
        texts = [text.replace("\r\n", "\n") for text in texts]  # of the file, not of its texts: tokens tell them apart
    if path.suffix.lower() != ".jsonl":
        return Texts(texts)
    lines = (line for line in path.read_text(encoding="utf-8-sig").split("\n") if line.strip())
    rows = [json.loads(line).get("ids") for line in islice(lines, count)]
    if all(row is None for row in rows):
        return Texts(texts)
    for number, row in enumerate(rows, start=1):
        if not isinstance(row, list) or not all(type(token) is int and 0 <= token < 2**63 for token in row):
            raise ValueError(f"{name}: text {number} has no list of token ids as 'ids', but others do; mend or drop it")
    return Texts(texts, rows)


class Read(NamedTuple):
    """What the scorer's pass over a set gives.

    Attributes:
        perplexity: With the scores of the set's texts.
        features: What MAUVE compares [num h]; None if nobody asked.
    """

    perplexity: GenerativePerplexity
    features: Tensor | None


@dataclass(frozen=True)
class Measure:
    """Scores sets of texts, all in the same way.

    Attributes:
        scorer: Gives perplexity, MAUVE's features, and ids where there are no others.
        protocol: Name of the definition of perplexity.
        max_length: Tokens the scorer reads of a text; None for its context.
        tokenizer: Whose ids entropy is over where a set has none; None for the scorer's.
        tokenizer_name: What to call it.
        known: The training text's 4-grams, of `known_ngrams`; None leaves memorisation out.
    """

    scorer: Scorer
    protocol: str
    max_length: int | None
    tokenizer: PreTrainedTokenizerBase | None
    tokenizer_name: str
    known: Tensor | None = None

    def read(self, one: Texts, features: bool) -> Read:
        """Read a set, once if perplexity and MAUVE see the same tokens of each text, else twice."""
        scored = one.texts if one.scored is None else one.scored
        shared = features and scored == one.texts and not find_protocol(self.protocol).bos
        metric = GenerativePerplexity(self.scorer, self.protocol, max_length=self.max_length, keep_features=shared)
        metric.update(scored)
        if not features:
            return Read(metric, None)
        # A lower limit than MAUVE's cuts its features as well, unless no text was so long.
        shared = shared and (metric.max_length >= min(FEATURE_TOKENS, self.scorer.context) or not metric.truncated)
        return Read(metric, metric.features if shared else self.scorer.features(one.texts))

    def scores(self, sets: list[Texts], read: list[Read], real: Tensor | None = None) -> dict[str, Any]:
        """Each score's values over sets and their mean and deviation; counts and intervals are over all texts.

        Args:
            sets: Texts.
            read: Each of these as `read` gives it.
            real: Features of real texts for MAUVE, as many as a set has [num h].
        """
        specials = self.tokenizer.all_special_ids if self.tokenizer is not None else ()
        perplexities = [each.perplexity for each in read]
        entropies, diversities = [UnigramEntropy(specials) for _ in sets], [NGramDiversity() for _ in sets]
        for entropy, diversity, one in zip(entropies, diversities, sets, strict=True):
            entropy.update(self.ids(one)[0])
            diversity.update(one.texts)
        nats = torch.cat([metric.per_text for metric in perplexities])
        entropy_of_texts = torch.cat([metric.per_text for metric in entropies])
        result: dict[str, Any] = {
            "texts": len(sets[0].texts),
            "skipped": sum(int(metric.skipped) for metric in perplexities),
            "truncated": sum(int(metric.truncated) for metric in perplexities),
            "empty": sum(not text.strip() for one in sets for text in one.texts),
            "mean_length": sum(int(metric.length) for metric in perplexities) / sum(len(one.texts) for one in sets),
            "perplexity": over_sets(perplexities) | interval(nats, perplexities[0].protocol.reduce),
            "entropy": over_sets(entropies) | interval(entropy_of_texts, torch.mean) | {"ids": self.ids(sets[0])[1]},
            "diversity": over_sets(diversities),
        }
        if self.known is not None:
            memorised = [Memorisation(self.known) for _ in sets]
            for metric, one in zip(memorised, sets, strict=True):
                metric.update(one.texts)
            result["memorisation"] = over_sets(memorised) | {"known": len(self.known)}
        if real is not None:
            result["mauve"] = self.mauve([each.features for each in read if each.features is not None], real)
        return result

    def ids(self, one: Texts) -> tuple[list[list[int]], str]:
        """The token ids that entropy is over, and whose they are."""
        if one.ids is not None:
            return one.ids, "of the model"
        if self.tokenizer is not None:
            return self.tokenizer(one.texts, add_special_tokens=False, verbose=False).input_ids, self.tokenizer_name
        return self.scorer.encode(one.texts), "of the scorer"

    def mauve(self, sets: list[Tensor], real: Tensor) -> dict[str, Any]:
        """MAUVE of each set's features with those of real texts."""
        metrics = [Mauve(real.shape[1]) for _ in sets]
        for metric, features in zip(metrics, sets, strict=True):
            metric.update(real, real=True)
            metric.update(features, real=False)
        about = {"featuriser": short(self.scorer.name), "kmeans_seeds": list(metrics[0].seeds)}
        if len(real) < FEW_TEXTS:
            about["warning"] = f"MAUVE of under {FEW_TEXTS} texts says little"
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "MAUVE of", UserWarning)  # it is said once, below the table
            return over_sets(metrics) | about


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
