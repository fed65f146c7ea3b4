"""How sets of texts are scored: each score's mean, deviation and interval, and what it takes to repeat them.

In: texts of a file or of a model, a scorer, perhaps real texts. Out: plain numbers by name.
Paper: section 6 (generative perplexity, MAUVE, diversity, entropy over several sampling seeds) and App. E.

A set of texts is scored in one way, whether a model made it, it is a file of samples or it is the reference: perplexity
and MAUVE read it with or without special tokens, as the protocol says; diversity and memorisation read words; entropy
counts all token ids.
"""

import json
import re
import statistics
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import chain, islice
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torchmetrics import Metric
from transformers import PreTrainedTokenizerBase

from ldlm._files import short
from ldlm.data.corpus import FileCorpus
from ldlm.evaluation.report import Shown
from ldlm.hub import resolve
from ldlm.metrics.generative_perplexity import GenerativePerplexity
from ldlm.metrics.mauve import FEW_TEXTS, Mauve
from ldlm.metrics.memorisation import Memorisation
from ldlm.metrics.protocols import find_protocol
from ldlm.metrics.scorer import FEATURE_TOKENS, Scorer
from ldlm.metrics.text import NGramDiversity, UnigramEntropy
from ldlm.model import scored_fields
from ldlm.tokenizer import boundary_tokens, join_documents

DRAWS = 1000  # of the bootstrap, as is usual
KEPT, REMOVED = "kept", "removed"  # what a score says of special tokens


@dataclass(frozen=True)
class Texts:
    """One set of texts that is scored as a whole.

    Attributes:
        documents: Of each text, what stands between its special tokens, as `split_documents` gives it.
        ids: The model's token ids of each text, special ones among them; None if nobody kept them.
        plain: Whether each text is one document yet, with special tokens written out: a file tells nothing more.
    """

    documents: list[list[str]]
    ids: list[list[int]] | None = None
    plain: bool = False

    def first(self, count: int) -> "Texts":
        """The first so many of them."""
        return replace(self, documents=self.documents[:count], ids=self.ids and self.ids[:count])

    def split_at(self, tokenizers: Iterable[PreTrainedTokenizerBase]) -> "Texts":
        """The same in documents, where plain texts have a special token of one of these tokenizers written out."""
        if not self.plain:
            return self
        known = list(tokenizers)
        ends = sorted({token for tokenizer in known for token in boundary_tokens(tokenizer)}, key=len, reverse=True)
        others = {token for tokenizer in known for token in tokenizer.all_special_tokens} - set(ends)
        documents = []
        for (text,) in self.documents:
            for token in sorted(others, key=len, reverse=True):
                text = re.sub(f" ?{re.escape(token)}", "", text)  # as decoding leaves them out
            documents.append(re.split("|".join(re.escape(token) for token in ends), text) if ends else [text])
        return replace(self, documents=documents, plain=False)

    def joined(self, boundary: str | None = None) -> list[str]:
        """Each text as `join_documents` makes it."""
        return [join_documents(documents, boundary) for documents in self.documents]

    def encode(self, tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
        """Token ids of each text; between its documents stands what ends one."""
        ends = list(boundary_tokens(tokenizer).values())[:1]
        flat = list(chain.from_iterable(self.documents))
        ids = iter(tokenizer(flat, add_special_tokens=False, split_special_tokens=True, verbose=False).input_ids)
        rows = []
        for documents in self.documents:
            row = list(next(ids))
            for document in islice(ids, len(documents) - 1):
                row += [*ends, *document]
            rows.append(row)
        return rows

    @property
    def whole(self) -> list[str]:
        """All documents that are not empty, one after another."""
        return [document for documents in self.documents for document in documents if document.strip()]

    @property
    def specials(self) -> float:
        """Special tokens between documents, a text."""
        return sum(len(documents) - 1 for documents in self.documents) / len(self.documents)


def read_texts(name: str, count: int | None = None, column: str = "text") -> Texts:
    """The texts of a file, or its first ``count``: a column of JSON lines, paragraphs of ``.txt``.

    JSON lines that `LDLM.to_lines` made say what their ids and documents are; those of others may have either.

    Raises:
        ValueError: If the file is not there, has no texts or is of another kind, if only some lines have such a field,
            or if documents are not the text.
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
        return Texts([[text] for text in texts], plain=True)
    lines = (line for line in path.read_text(encoding="utf-8-sig").split("\n") if line.strip())
    fields = [json.loads(line) for line in islice(lines, count)]
    id_field, document_field = scored_fields(column)

    def values(field: str, what: str, fits: Callable[[Any], bool]) -> list[Any] | None:
        found = [line.get(field) for line in fields]
        if all(value is None for value in found):
            return None
        for number, value in enumerate(found, start=1):
            if not isinstance(value, list) or not all(map(fits, value)):
                told = f"{name}: text {number} has no list of {what} as {field!r}, but others do; mend or drop it"
                raise ValueError(told)
        return found

    ids = values(id_field, "token ids", lambda token: type(token) is int and 0 <= token < 2**63)
    documents = values(document_field, "texts", lambda document: isinstance(document, str))
    for number, (text, parts) in enumerate(zip(texts, documents or [], strict=False), start=1):
        if not parts or join_documents(parts) != text:  # edited since, or a field of another meaning
            raise ValueError(
                f"{name}: text {number} is not its {document_field!r}, joined by blanks; mend or drop these"
            )
    return Texts(documents or [[text] for text in texts], ids, plain=documents is None)


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

    def split(self, one: Texts) -> Texts:
        """Texts of a file in documents, at the special tokens of the scorer, and of the tokenizer if there is one."""
        return one.split_at(filter(None, [self.scorer.tokenizer, self.tokenizer]))

    def read(self, one: Texts, features: bool) -> Read:
        """Read a set, once if perplexity and MAUVE see the same tokens of each text, else twice."""
        protocol = find_protocol(self.protocol)
        shared, texts = features and not protocol.bos, one.joined(protocol.boundary(self.scorer))
        metric = GenerativePerplexity(self.scorer, self.protocol, max_length=self.max_length, keep_features=shared)
        metric.update(texts)
        if not features:
            return Read(metric, None)
        # A lower limit than MAUVE's cuts its features as well, unless no text was so long.
        shared = shared and (metric.max_length >= min(FEATURE_TOKENS, self.scorer.context) or not metric.truncated)
        return Read(metric, metric.features if shared else self.scorer.features(texts))

    def scores(self, sets: list[Texts], read: list[Read], real: Tensor | None = None) -> dict[str, Any]:
        """Each score's values over sets and their mean and deviation; counts and intervals are over all texts.

        Args:
            sets: Texts.
            read: Each of these as `read` gives it.
            real: Features of real texts for MAUVE, as many as a set has [num h].
        """
        perplexities, words = [each.perplexity for each in read], [one.joined() for one in sets]
        entropies, diversities = [UnigramEntropy() for _ in sets], [NGramDiversity() for _ in sets]
        for entropy, diversity, one, texts in zip(entropies, diversities, sets, words, strict=True):
            entropy.update(self.ids(one)[0])
            diversity.update(texts)
        protocol = find_protocol(self.protocol)
        kept = KEPT if protocol.special_tokens else REMOVED
        nats = torch.cat([metric.per_text for metric in perplexities])
        entropy_of_texts = torch.cat([metric.per_text for metric in entropies])
        result: dict[str, Any] = {
            "texts": len(words[0]),
            "special_tokens_per_text": statistics.fmean(one.specials for one in sets),
            "skipped": sum(int(metric.skipped) for metric in perplexities),
            "truncated": sum(int(metric.truncated) for metric in perplexities),
            "empty": sum(not text for texts in words for text in texts),
            "mean_length": sum(int(metric.length) for metric in perplexities) / sum(map(len, words)),
            "perplexity": over_sets(perplexities) | interval(nats, protocol.reduce) | {"special_tokens": kept},
            "entropy": over_sets(entropies)
            | interval(entropy_of_texts, torch.mean)
            | {"ids": self.ids(sets[0])[1], "special_tokens": KEPT},
            "diversity": over_sets(diversities) | {"special_tokens": REMOVED},
        }
        if self.known is not None:
            memorised = [Memorisation(self.known) for _ in sets]
            for metric, texts in zip(memorised, words, strict=True):
                metric.update(texts)
            result["memorisation"] = over_sets(memorised) | {"known": len(self.known), "special_tokens": REMOVED}
        if real is not None:
            features = [each.features for each in read if each.features is not None]
            result["mauve"] = self.mauve(features, real) | {"special_tokens": kept}
        return result

    def shown(self, one: Texts, read: Read, count: int) -> list[Shown]:
        """The first texts of a set, each with its own perplexity and entropy."""
        rows, found = self.ids(one.first(count))[0], []
        nats = read.perplexity.every_text[:count].unbind(1)
        for text, row, value in zip(one.first(count).joined(), rows, (nats[0] / nats[1]).exp().tolist(), strict=True):
            entropy = UnigramEntropy()
            entropy.update([row])
            found.append(Shown(text, value, float(entropy.compute())))
        return found

    def ids(self, one: Texts) -> tuple[list[list[int]], str]:
        """The token ids that entropy is over, and whose they are."""
        if one.ids is not None:
            return one.ids, "of the model"
        if self.tokenizer is not None:
            return one.encode(self.tokenizer), self.tokenizer_name
        return one.encode(self.scorer.tokenizer), "of the scorer"

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
