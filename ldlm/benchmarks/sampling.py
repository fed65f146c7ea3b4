"""``ldlm bench sampling``: a step of sampling beside a bare call of the denoiser, which bounds it.

In: options. Out: milliseconds, texts a second, their quotients, FLOPs, memory.
Paper: section 8 and Table 3 (time of sampling), App. C (compute).
"""

import argparse
import copy
from collections import deque
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from ldlm.baselines.sampling import Sampled, TokenBackbone, lazy_masked_diffusion, masked_diffusion, one_hot_flow
from ldlm.benchmarks.timing import (
    Numbers,
    Run,
    count_flops,
    fitting,
    interleave,
    line,
    matmul_rate,
    peak_memory,
    quotients,
    rate,
    spread,
    surroundings,
    utilisation,
)
from ldlm.checkpoints.description import describe
from ldlm.evaluation.evaluate import identity
from ldlm.evaluation.sampling import find_device, load
from ldlm.model import LDLM
from ldlm.nn.compile import compile_blocks
from ldlm.nn.denoiser import Denoiser, DiT
from ldlm.nn.latent_coders import IdentityEncoder, PerceiverResamplerDecoder
from ldlm.nn.layers import dtype_of
from ldlm.nn.token_decoders import TransformerTokenDecoder
from ldlm.nn.token_encoders import PretrainedTokenEncoder
from ldlm.rng import generator

Way = Callable[[int], Tensor]  # so many calls of the denoiser -> z0_hat [b m d]

VOCABULARY = 50_257  # GPT-2's, the paper's
PAPER_NFE = 1024


def ways(model: LDLM, denoiser: Denoiser, noise: Tensor) -> tuple[Way, Way]:
    """So many steps of the model's sampler from noise [b m d], and so many bare calls of the denoiser it makes."""

    def loop(nfe: int) -> Tensor:
        source = generator(0, "bench", device=noise.device)
        known = model.self_conditioning > 0
        where = model.schedule, noise, nfe, source, model.grid, model.timesteps
        return model.sampler.sample(denoiser, *where, self_condition=known)

    def forward(calls: int) -> Tensor:
        call = next(denoiser.at_times(torch.full((1,), 0.5, device=noise.device)))  # what depends on t alone is known
        z_t = noise.to(next(denoiser.parameters()).dtype)
        for _ in range(calls):
            z0_hat = call(z_t, z_t)
        return z0_hat

    return loop, forward


def peers(model: LDLM, options: argparse.Namespace, calls: dict[str, int]) -> dict[str, Run]:
    """Other text diffusions' loops on the model's own blocks; `calls` is told how often each calls its network."""
    denoiser, device = model.denoiser, model.device
    if not isinstance(denoiser, DiT):
        raise ValueError(f"--peers runs other loops on a DiT's blocks, and this model's denoiser is a {type(denoiser)}")
    backbone = TokenBackbone(denoiser, model.token_decoder.vocab_size)
    backbone.to(device, dtype_of(denoiser, torch.float32)).eval()
    loops: dict[str, Callable[..., Sampled]] = {
        "masked": masked_diffusion,
        "masked_float64": partial(masked_diffusion, sampling_dtype=torch.float64),
        "masked_cached": partial(masked_diffusion, cache=True),
        "masked_lazy": lazy_masked_diffusion,
        "one_hot_flow": one_hot_flow,
    }

    def run(name: str) -> None:
        source = generator(0, "peers", device=device)
        rows, n, nfe = options.batch_size, denoiser.num_latents, options.nfe
        calls[name] = loops[name](backbone, rows, n, nfe, source).calls

    return {name: partial(run, name) for name in loops}


def random_model(options: argparse.Namespace) -> LDLM:
    """The paper's model with random weights; its token encoder is never read, and nothing needs a latent encoder."""
    n, width, heads = options.sequence_length, options.width, options.heads
    model = LDLM(
        PretrainedTokenEncoder(hidden_size=width, vocab_size=VOCABULARY),
        IdentityEncoder(width, n),
        DiT(width, n, width, options.layers, heads),
        PerceiverResamplerDecoder(width, width, n, n, width, heads=heads),
        TransformerTokenDecoder(width, VOCABULARY, heads=heads),
        sequence_length=n,
    )
    for parameter in model.denoiser.parameters():
        if not parameter.any():  # AdaLN-zero starts as the prediction 0, with which nobody samples
            nn.init.normal_(parameter, std=0.02)
    return model


@torch.no_grad()
def bench_sampling(options: argparse.Namespace) -> Numbers:
    """A step of the sampler beside a bare call of its denoiser, and beside plain float32 if it is not that."""
    device, rows, nfe = find_device(options.device), options.batch_size, options.nfe
    model = load(options.source, device) if options.source else random_model(options).to(device).eval()
    denoiser, low = model.denoiser, options.precision == "bf16"
    m, d = denoiser.num_latents, denoiser.latent_size
    with fitting(f"{rows} texts of {m} latents of width {d}", "lower --batch_size, or take a smaller model"):
        noise = torch.randn(rows, m, d, generator=generator(0, "noise", device=device), device=device)
        if low:
            model.to_bfloat16()
        loop, forward = ways(model, denoiser, noise)
        flops = count_flops(partial(forward, 1))
        if options.compile:
            compile_blocks(denoiser, options.compile)
        z0_hat = loop(1)
        memory = peak_memory(lambda: model.decode(loop(nfe)), device)
        runs: dict[str, Run] = {"forward": partial(forward, nfe), "loop": partial(loop, nfe)}
        runs["decode"] = partial(model.decode, z0_hat)
        if options.compile or low:  # the copy of a compiled module is not compiled
            runs["plain"] = partial(ways(model, copy.deepcopy(denoiser).float(), noise)[0], nfe)
        best = matmul_rate(device, torch.bfloat16 if low else torch.float32, options.clock)
        calls: dict[str, int] = {}
        runs |= peers(model, options, calls) if options.peers else {}
        seconds = interleave(runs, options.repeats, device, options.clock)
        scaling = scale(model, loop, options) if options.scaling else {}
    pairs = list(zip(seconds["loop"], seconds["decode"], strict=True))
    whole = [loop + decode for loop, decode in pairs]
    measures: Numbers = {
        "step_ms": spread(seconds["loop"], 1e3 / nfe),
        "forward_ms": spread(seconds["forward"], 1e3 / nfe),
        "step_over_forward": quotients(seconds["loop"], seconds["forward"]),
        "decode_ms": spread(seconds["decode"], 1e3),
        "texts_per_second": rate(rows, whole),
        f"seconds_of_{PAPER_NFE}_nfe": spread([steps * PAPER_NFE / nfe + last for steps, last in pairs]),
        "flops_per_step": flops,
        **utilisation(flops * nfe, seconds["loop"], best),
        **memory,
    }
    if "plain" in seconds:
        measures["plain_step_ms"] = spread(seconds["plain"], 1e3 / nfe)
        measures["plain_over_step"] = quotients(seconds["plain"], seconds["loop"])
    for name, number in calls.items():
        measures[f"{name}_calls"] = number
        measures[f"{name}_call_ms"] = spread(seconds[name], 1e3 / number)
        measures[f"{name}_call_over_step"] = quotients(seconds[name], seconds["loop"], nfe / number)
        measures[f"{name}_texts_over_ours"] = quotients(seconds[name], whole)
    settings: Numbers = {"source": options.source and identity(options.source), "denoiser": describe(denoiser)}
    settings |= {"sampler": describe(model.sampler), "grid": describe(model.grid)}
    settings |= {"parameters": sum(p.numel() for p in denoiser.parameters())}
    settings |= {name: vars(options)[name] for name in ("batch_size", "nfe", "precision", "compile", "repeats")}
    measures |= scaling.pop("measures", {})
    return {"measures": measures, "settings": settings, "scaling": scaling, "surroundings": surroundings(device)}


def scale(model: LDLM, loop: Way, options: argparse.Namespace) -> Numbers:
    """Time and memory over the number of denoiser calls, memory over the number of texts."""
    nfes, rows, device = options.scaling, options.batch_size, model.device
    runs = {str(nfe): partial(loop, nfe) for nfe in nfes}
    seconds = interleave(runs, options.repeats, device, options.clock, warmup=0)
    medians = [spread(seconds[str(nfe)])["median"] for nfe in nfes]

    def sample(count: int) -> None:
        deque(model.sample_batches(count, options.nfe, batch_size=rows), maxlen=0)  # forgotten, as generate does

    texts = [rows * batches for batches in (1, 2, 4, 8)]
    over_nfe = [peak_memory(partial(loop, nfe), device)["peak_memory_bytes"] for nfe in nfes]
    over_texts = [peak_memory(partial(sample, count), device)["peak_memory_bytes"] for count in texts]
    measures = {f"line_{name}": value for name, value in line(nfes, medians).items()}
    measures["memory_growth_over_nfe"] = over_nfe[-1] / over_nfe[0]
    measures["memory_growth_over_texts"] = over_texts[-1] / over_texts[0]
    found = {"nfe": nfes, "seconds": seconds, "peak_memory_bytes": over_nfe}
    return {**found, "texts": texts, "texts_peak_memory_bytes": over_texts, "measures": measures}
