"""Contract checks for a part of your own, to be called in a test: `check_latent_encoder(MyEncoder(), 32)`.

In: a part, built. Out: nothing, or a ValueError whose one sentence says what the part did and what its contract wants.
No section of the paper; the contracts are those of the abstract classes, which `docs/extending.md` lists.
"""

import copy
import json

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldlm.checkpoints.description import build, describe
from ldlm.diffusion.grids import UniformGrid
from ldlm.diffusion.samplers import Sampler
from ldlm.diffusion.schedules import NoiseSchedule, TangentSchedule
from ldlm.diffusion.timesteps import TimestepSampler
from ldlm.nn.denoiser import Denoiser
from ldlm.nn.latent_coders import LatentDecoder, LatentEncoder
from ldlm.nn.token_decoders import TokenDecoder
from ldlm.nn.token_encoders import TokenEncoder

__all__ = [
    "check_denoiser",
    "check_description",
    "check_latent_decoder",
    "check_latent_encoder",
    "check_sampler",
    "check_schedule",
    "check_timesteps",
    "check_token_decoder",
    "check_token_encoder",
]

ROWS, MEAN, STD = 4, 0.7, 0.5  # of a batch; of the Gaussian data that samplers are checked on


def check_description(part: object) -> None:
    """A checkpoint can describe the part and make it again; every other check begins with this one."""
    again = describe(build(json.loads(json.dumps(told := describe(part)))))
    want(again == told, part, f" made again from {told} is another; keep each argument as it was given")


def check_token_encoder(encoder: TokenEncoder, sequence_length: int = 8) -> None:
    """Tokens [b n] to float32 [b n h], which `fit_statistics` normalises; `embeddings` has a row for every token."""
    tokens = torch.arange(ROWS * sequence_length).view(ROWS, -1) * 7919 % encoder.vocab_size  # a prime: they differ
    _check_network(encoder, (tokens,), (ROWS, sequence_length, encoder.hidden_size))
    fitted = copy.deepcopy(encoder).eval()
    fitted.fit_statistics([tokens], ROWS)
    with torch.no_grad():
        hidden, rows = fitted(tokens).flatten(0, 1), len(encoder.embeddings())
    want(hidden.dtype == torch.float32, encoder, f" gives {hidden.dtype}; a TokenEncoder gives float32")
    want(rows == encoder.vocab_size, encoder, f".embeddings() has {rows} rows for {encoder.vocab_size} tokens")
    off = max(float(hidden.mean(0).abs().max()), float(hidden.std(0, correction=0).max()) - 1)
    want(
        off < 0.05, encoder, f" is off mean 0 and deviation 1 by {off:.2g} after fit_statistics; do not replace forward"
    )


def check_latent_encoder(encoder: LatentEncoder, sequence_length: int) -> None:
    """Hidden states [b n h] to latents [b m d]."""
    shape = (ROWS, encoder.num_latents, encoder.latent_size)
    _check_network(encoder, (_normal(ROWS, sequence_length, encoder.hidden_size),), shape)


def check_latent_decoder(decoder: LatentDecoder, sequence_length: int) -> None:
    """Latents [b m d] to hidden states [b n h]."""
    z = _normal(ROWS, decoder.num_latents, decoder.latent_size)
    _check_network(decoder, (z,), (ROWS, sequence_length, decoder.hidden_size))


def check_token_decoder(decoder: TokenDecoder, sequence_length: int = 8) -> None:
    """Hidden states [b n h] to logits [b n v]; `loss` is their mean cross-entropy in nats, `predict` their argmax."""
    hidden, tokens = _normal(ROWS, sequence_length, decoder.hidden_size), torch.arange(ROWS * sequence_length)
    tokens = tokens.view(ROWS, -1) % decoder.vocab_size
    _check_network(decoder, (hidden,), (ROWS, sequence_length, decoder.vocab_size))
    still = copy.deepcopy(decoder).eval()
    with torch.no_grad():
        logits = still(hidden).float()
        for chosen in (torch.arange(ROWS * sequence_length), torch.arange(1, ROWS * sequence_length, 2)):
            true = float(F.cross_entropy(logits.flatten(0, 1)[chosen], tokens.flatten()[chosen]))
            loss = float(still.loss(hidden, tokens, chosen))
            want(abs(loss / true - 1) < 1e-3, decoder, f".loss is {loss:.5g}; the mean over its logits is {true:.5g}")
        predicted = still.predict(hidden)
    want(torch.equal(predicted, logits.argmax(-1)), decoder, ".predict gives other tokens than its logits' argmax")


def check_denoiser(denoiser: Denoiser) -> None:
    """Noised latents [b m d], times [b] from 0 to 1, self-condition [b m d] to latents; `at_times` as `forward`."""
    z = _normal(ROWS, denoiser.num_latents, denoiser.latent_size)
    _check_network(denoiser, (z, torch.linspace(0, 1, ROWS), z), tuple(z.shape))
    still, times = copy.deepcopy(denoiser).eval(), torch.tensor([1, 0.5, 0.01])
    with torch.no_grad():
        for t, call in zip(times, still.at_times(times), strict=True):
            want_z, found = still(z, t.expand(ROWS), z), call(z, z)
            off = float((found - want_z).abs().max()) > 1e-3 * float(want_z.abs().max())
            want(not off, denoiser, f" answers otherwise at t = {t:g} by `at_times` than by `forward`; change both")


def check_schedule(schedule: NoiseSchedule) -> None:
    """alpha² + sigma² = 1; alpha falls from 1 to exactly 0; beta = −2 d/dt log alpha; `time_at` inverts `log_snr`."""
    check_description(schedule)
    t, h = torch.linspace(0, 1, 1001, dtype=torch.float64), 1e-5
    alpha, sigma, beta = schedule.levels(t)
    off = float((alpha**2 + sigma**2 - 1).abs().max())
    want(off < 1e-9, schedule, f" has alpha² + sigma² off 1 by {off:.2g}; it must preserve variance")
    want(bool((alpha.diff() < 0).all()), schedule, " has an alpha that does not fall everywhere")
    first, last = (float(alpha[0]), float(sigma[0])), (float(alpha[-1]), float(sigma[-1]))
    want(abs(first[0] - 1) + first[1] < 1e-9, schedule, f" begins at alpha, sigma = {first}; they are 1, 0 at t = 0")
    want(last == (0, 1), schedule, f" ends at alpha, sigma = {last}; they are exactly 0, 1 at t = 1")
    inside = t[20:-20]
    slope = (schedule.levels(inside - h).alpha.log() - schedule.levels(inside + h).alpha.log()) / h
    off = float((beta[20:-20] / slope - 1).abs().max())
    want(off < 1e-3, schedule, f" has a beta off −2 d/dt log alpha by a factor of up to 1 ± {off:.2g}")
    off = float((schedule.time_at(schedule.log_snr(inside)) - inside).abs().max())
    want(off < 1e-6, schedule, f".time_at(log_snr(t)) is off t by {off:.2g}; the one inverts the other")


def check_timesteps(timesteps: TimestepSampler) -> None:
    """`cdf` and `inverse_cdf` are inverse, `sample` draws from them, and what was learned is in the state_dict."""
    check_description(timesteps)
    taught, u, q = copy.deepcopy(timesteps), torch.linspace(1e-3, 1, 1000), torch.linspace(0, 1, 101).double()
    taught.observe(u, u**2)
    taught.synchronize()
    taught.refresh()
    for sampler in (timesteps, taught):
        times = sampler.inverse_cdf(q)
        off = float((sampler.cdf(times) - q).abs().max())
        want(off < 1e-6, timesteps, f".cdf(inverse_cdf(q)) is off q by {off:.2g}; the one inverts the other")
        drawn, again = (sampler.sample(4096, torch.Generator().manual_seed(0)) for _ in range(2))
        want(torch.equal(drawn, again), timesteps, ".sample gives two answers for one generator; draw from it alone")
        right = drawn.shape == (4096,) and drawn.dtype == torch.float32 and bool((drawn > 0).all() & (drawn <= 1).all())
        want(right, timesteps, f".sample(4096) gives {drawn.dtype} {list(drawn.shape)}; want float32 [4096] in (0, 1]")
        far = float((sampler.cdf(drawn.double()).sort().values - (torch.arange(4096) + 0.5) / 4096).abs().max())
        want(far < 2.5 / 64, timesteps, f".sample is {far:.2g} away from its cdf, more than chance allows")  # p < 1e-5
    copied = build(describe(timesteps))
    copied.load_state_dict(taught.state_dict())
    same = torch.equal(copied.cdf(q), taught.cdf(q))
    want(same, timesteps, " forgets over state_dict what it learned; keep that in buffers")


def check_sampler(sampler: Sampler, nfe: int = 256) -> None:
    """Exactly nfe calls from t = 1; Gaussian data end in the posterior mean's own mean and variance."""
    check_description(sampler)
    schedule, grid, calls = TangentSchedule(), UniformGrid(), list[float]()

    def exact(z: Tensor, t: Tensor, self_condition: Tensor) -> Tensor:
        calls.append(float(t[0]))
        alpha, sigma = schedule.alpha(t[0]), schedule.sigma(t[0])
        return MEAN + alpha * STD**2 / (alpha**2 * STD**2 + sigma**2) * (z - alpha * MEAN)

    for count in (1, 2, nfe):
        calls.clear()
        end = sampler.sample(exact, schedule, _normal(64, 1, 512), count, torch.Generator().manual_seed(1), grid)
        right = len(calls) == count and calls[0] == 1
        want(right, sampler, f" called the denoiser {len(calls)} times, first at t = {calls[:1]}; want {count}, from 1")
    alpha, sigma, _ = schedule.levels(grid.times(nfe, schedule)[-2])  # of the last call, whose prediction is the answer
    mean = float(end.mean()) - MEAN
    variance = float(end.var() * (alpha**2 * STD**2 + sigma**2) / (alpha**2 * STD**4)) - 1
    want(abs(mean) < 0.05 * STD, sampler, f" ends {mean:+.2g} off the mean of Gaussian data; their denoiser was exact")
    want(abs(variance) < 0.1, sampler, f" ends {variance:+.0%} off the posterior mean's variance on Gaussian data")


def want(holds: bool, part: object, sentence: str) -> None:
    """Raise ValueError with the part's class and the sentence unless the condition holds."""
    if not holds:
        raise ValueError(type(part).__name__ + sentence)


def _normal(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def _check_network(part: nn.Module, inputs: tuple[Tensor, ...], shape: tuple[int, ...]) -> None:
    """Description, shape, determinism and independence of rows in eval mode, gradients."""
    check_description(part)
    still = copy.deepcopy(part).eval()
    with torch.no_grad():
        out, again, alone = still(*inputs), still(*inputs), still(*(x[:1] for x in inputs))
    want(out.shape == shape, part, f" gives {list(out.shape)} for {list(inputs[0].shape)}; want {list(shape)}")
    want(bool(out.isfinite().all()), part, " gives values that are not finite")
    want(torch.equal(out, again), part, " gives two answers for one input in eval mode; draw nothing there")
    apart = float((alone - out[:1]).abs().max()) > 0.05 * float(out.abs().max())  # bfloat16 is not bit-stable
    want(not apart, part, " gives a row another answer beside other rows; each row must stand alone")
    sources: dict[str, Tensor] = dict(part.named_parameters())
    frozen = [name for name, p in sources.items() if not p.requires_grad]
    want(not frozen, part, f" has frozen weights in parameters(): {', '.join(frozen[:3])}; keep them in a plain list")
    if inputs[0].is_floating_point():
        sources["its input"] = inputs[0].clone().requires_grad_()
        inputs = (sources["its input"], *inputs[1:])
    out = part(*inputs).sum() + torch.zeros((), requires_grad=True)  # something to differentiate, even if all is cut
    found = torch.autograd.grad(out, list(sources.values()), allow_unused=True) if sources else ()
    cut = [name for name, gradient in zip(sources, found, strict=True) if gradient is None]
    want(not cut, part, f" passes no gradient to {', '.join(cut[:3])}; use it in forward, or keep it out of the module")
