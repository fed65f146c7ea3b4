"""A user's own small file."""

from ldlm.data.corpus import FileCorpus
from ldlm.hub import resolve


def own_text() -> str:
    """Forty paragraphs of the shipped corpus: a user's own small file."""
    address = next(iter(FileCorpus(resolve("package:ldlm/corpora/sotu.parquet"))))
    return "\n\n".join(address[i % 5 * 300 :][:300] for i in range(40))
