"""MAUVE (arXiv 2102.01454): the divergence between generated and real texts in a scorer's feature space.

In: texts. Out: a torchmetrics metric. Paper: section 6 (metrics).
"""

import os
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor
from torchmetrics.utilities import dim_zero_cat

from ldlm.metrics.text import PerText

FEW_TEXTS = 500  # below so many, MAUVE is mostly noise


class Mauve(PerText):
    """MAUVE between generated and real texts, in [0, 1], by mauve-text with its defaults, averaged over k-means seeds.

    One seed moves it by 0.005 to 0.01. Always report the numbers of texts, their length, and the featuriser.

    Args:
        num_features: Width h of the features, which `Scorer.features` makes.
        seeds: Of k-means; 25, mauve-text's own, and those after it.

    Raises:
        ValueError: From ``update`` if features have another width; from ``compute`` if mauve-text is not installed or
            one side has no texts.
    """

    real: list[Tensor]
    generated: list[Tensor]

    def __init__(self, num_features: int, seeds: Sequence[int] = (25, 26, 27, 28, 29)) -> None:
        super().__init__()
        self.num_features, self.seeds = num_features, tuple(seeds)
        if not self.seeds:
            raise ValueError("seeds=() must name at least one seed of k-means")
        for name in ("real", "generated"):
            self._keep(name, torch.empty(0, num_features))

    def update(self, features: Tensor, real: bool) -> None:
        """Take features of texts, [num h], real ones or generated ones."""
        if features.dim() != 2 or features.shape[1] != self.num_features:
            raise ValueError(f"features have shape {list(features.shape)}, but [num, {self.num_features}] is expected")
        (self.real if real else self.generated).append(features.float().to(self.device))

    def compute(self) -> Tensor:
        """Mean over the k-means seeds, float64. Warns under 500 texts a side."""
        try:
            from mauve import compute_mauve  # GPL-3, so only where it is asked for
        except ImportError as error:
            raise ValueError('MAUVE needs mauve-text: pip install "ldlm[eval]"') from error
        real, generated = (dim_zero_cat(state).cpu().numpy() for state in (self.real, self.generated))
        if not len(real) or not len(generated):
            raise ValueError(f"MAUVE compares {len(generated)} generated with {len(real)} real texts; both are needed")
        if min(len(real), len(generated)) < FEW_TEXTS:
            told = f"MAUVE of {len(generated)} texts and {len(real)} real ones: under {FEW_TEXTS} it says little"
            warnings.warn(told, stacklevel=2)
        with _silence():
            scores = [compute_mauve(real, generated, seed=seed).mauve for seed in self.seeds]
        return torch.tensor(scores, dtype=torch.float64, device=self.device).mean()


@contextmanager
def _silence() -> Iterator[None]:
    """Nothing on standard error, not even from C++: faiss warns at mauve-text's own number of clusters, always."""
    sys.stderr.flush()
    kept = os.dup(2)
    try:
        with open(os.devnull, "wb") as nowhere:
            os.dup2(nowhere.fileno(), 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
