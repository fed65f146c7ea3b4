"""What is measured of generated texts: torchmetrics, and the scorers that some of them need."""

from ldlm.metrics.generative_perplexity import GenerativePerplexity
from ldlm.metrics.mauve import Mauve
from ldlm.metrics.memorisation import Memorisation
from ldlm.metrics.protocols import PROTOCOLS, Protocol, find_protocol
from ldlm.metrics.scorer import Scorer, load_scorer
from ldlm.metrics.text import NGramDiversity, UnigramEntropy

__all__ = [
    "PROTOCOLS",
    "GenerativePerplexity",
    "Mauve",
    "Memorisation",
    "NGramDiversity",
    "Protocol",
    "Scorer",
    "UnigramEntropy",
    "find_protocol",
    "load_scorer",
]
