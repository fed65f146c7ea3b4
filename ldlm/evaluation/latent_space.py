"""What a latent space is like: smoothness, losses over time, robustness of the decoders, spectrum.

In: a model with its token encoder; real texts; a way to score texts. Out: plain numbers.
Paper: Fig. 3 left (interpolation; its middle point, over trainings with other noise, is Fig. 4 right) and Fig. 5. The
spectrum, and reconstruction under more noise, look closer at one model than the paper does.

Legend: k rows, n tokens a row, m latents a row, d latent width. Sums are float64; noise is a function of the seed.
"""

from collections.abc import Callable, Iterator
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from ldlm.model import LDLM
from ldlm.objective import denoising_loss, normal_like
from ldlm.rng import generator
from ldlm.tokenizer import bos_id, eos_id, token_id_function, unknown_id

MIXTURES = 11  # points of a path between two latents
TIMES = 48
NOISE = (0.0, 0.25, 0.5, 0.75, 1.0, 1.25, 1.5, 2.0, 3.0)  # in units of the noise the decoders were trained with


def measure_latents(
    model: LDLM, tokens: Tensor, perplexity: Callable[[Tensor], float], seed: int, batch_size: int
) -> dict[str, Any]:
    """All measurements of a model on real texts.

    Args:
        model: On its device.
        tokens: Rows of token ids [k n], at least 2.
        perplexity: Of the texts of rows of token ids [k n].
        seed: Of noise and pairs.
        batch_size: Rows that go through the model together.

    Raises:
        ValueError: If the token encoder is not to be had.
    """
    with torch.no_grad():
        z = torch.cat([model.encode(part) for part in torch.split(tokens.to(model.device), batch_size)])
        return {
            "rows": len(tokens),
            "seed": seed,
            "sigma_dec": model.sigma_dec,
            "interpolation": interpolation(model, z, perplexity, seed, batch_size),
            "loss_over_time": loss_over_time(model, z, seed, batch_size),
            "reconstruction": reconstruction(model, z, tokens.to(model.device), seed, batch_size),
            "spectrum": spectrum(z),
        }


def pack(model: LDLM, texts: list[str], count: int, framed: bool) -> Tensor:
    """The first rows [count n] of texts joined by end-of-text tokens, as a `PackedTextDataModule` makes them.

    Args:
        model: Whose tokenizer and row length are used.
        texts: Real texts.
        count: Rows wanted at most.
        framed: Whether a row begins with [BOS] and ends with [EOS].

    Raises:
        ValueError: If the texts make less than 2 rows, or the model has no tokenizer.
    """
    tokenizer, n = model.tokenizer, model.sequence_length
    if tokenizer is None:
        raise ValueError("this model has no tokenizer to read texts with: give LDLM(tokenizer=...)")
    begin, end = bos_id(tokenizer), eos_id(tokenizer)
    body = n - 2 if framed else n
    stream = torch.tensor(list(chain.from_iterable([*row, end] for row in token_id_function(tokenizer)(texts))))
    rows = stream[: min(count, len(stream) // body) * body].view(-1, body)
    if len(rows) < 2:
        raise ValueError(f"the reference makes {len(rows)} rows of {n} tokens, and two are needed: give more texts")
    frame = rows.new_tensor([[begin, end]]).expand(len(rows), 2)
    return torch.cat([frame[:, :1], rows, frame[:, 1:]], dim=1) if framed else rows


def interpolation(
    model: LDLM, z: Tensor, perplexity: Callable[[Tensor], float], seed: int, batch_size: int
) -> dict[str, list[float]]:
    """Perplexity of texts decoded on the straight path (1 − a) z_i + a z_j, for a from 0 to 1.

    Each text is the beginning of one path and the end of another, so that both ends are reconstructions of all texts.

    Args:
        model: Whose decoders are used.
        z: Latents of real texts [k m d].
        perplexity: Of the texts of rows of token ids [k n].
        seed: Of the pairs.
        batch_size: Rows decoded together.
    """
    order = torch.randperm(len(z), generator=generator(seed, "pairs")).to(z.device)
    start, stop = z[order], z[order.roll(-1)]
    found = []
    mixtures = torch.linspace(0, 1, MIXTURES, dtype=torch.float64).tolist()
    for a in mixtures:
        # Not lerp: it would not give back the ends exactly.
        path = torch.split((1 - a) * start + a * stop, batch_size)
        found.append(perplexity(torch.cat([model.decode(part) for part in path]).cpu()))
    return {"a": mixtures, "perplexity": found}


def loss_over_time(model: LDLM, z: Tensor, seed: int, batch_size: int) -> dict[str, list[float]]:
    """Mean diffusion loss of all rows at each of some times; half of these are even in u, half in F(u).

    Args:
        model: Whose denoiser, schedule and timesteps are used.
        z: Latents of real texts [k m d].
        seed: Of the noise, which is the same at every time: what differs is the time alone.
        batch_size: Rows denoised together.

    Returns:
        ``u``, ``adapted`` (F(u)), ``loss`` (mean squared error per element), rising in u.
    """
    even = (torch.arange(TIMES // 2, dtype=torch.float64) + 0.5) / (TIMES // 2)
    quantiles = model.timesteps.inverse_cdf(even.to(z.device)).cpu()
    times = torch.cat([even, quantiles]).sort().values.to(z.device)
    losses = []
    for u in times:
        total = torch.zeros((), dtype=torch.float64, device=z.device)
        for number, part in enumerate(torch.split(z, batch_size)):
            noise = generator(seed, "loss over time", number, device=z.device)
            total += denoising_loss(model, part, u.to(part).expand(len(part)), noise).double().sum()
        losses.append(total / len(z))
    adapted = model.timesteps.cdf(times)
    return {"u": times.tolist(), "adapted": adapted.tolist(), "loss": torch.stack(losses).tolist()}


def reconstruction(model: LDLM, z: Tensor, tokens: Tensor, seed: int, batch_size: int) -> dict[str, list[float]]:
    """Share of tokens that come back from latents with noise of several deviations added; unknown ones never do.

    Args:
        model: Whose decoders are used.
        z: Latents [k m d].
        tokens: What they are latents of [k n].
        seed: Of the noise, which is the same at every level but for its scale.
        batch_size: Rows decoded together.
    """
    levels = [level * (model.sigma_dec or 1.0) for level in NOISE]
    lost, found = None if model.tokenizer is None else unknown_id(model.tokenizer), []
    tokens = tokens if lost is None else tokens.masked_fill(tokens == lost, -1)
    for level in levels:
        right = torch.zeros((), dtype=torch.int64, device=z.device)
        for number, (part, want) in enumerate(_parts(z, tokens, batch_size)):
            noise = normal_like(part, generator(seed, "reconstruction", number, device=z.device))
            right += (model.decode(part + level * noise) == want).sum()
        found.append(right.item() / tokens.numel())
    return {"noise": levels, "accuracy": found}


def _parts(z: Tensor, tokens: Tensor, batch_size: int) -> Iterator[tuple[Tensor, Tensor]]:
    return zip(torch.split(z, batch_size), torch.split(tokens, batch_size), strict=True)


def spectrum(z: Tensor) -> dict[str, Any]:
    """Eigenvalues of the covariance of latent vectors [k m d], over rows and positions together, and their deviations.

    Returns:
        ``eigenvalues``: Falling, as shares of their sum [d]. ``std``: Of each coordinate, falling [d]. ``dimensions``:
        How many equal eigenvalues would be as concentrated, (Σ λ)²/Σ λ². ``vectors``: How many there were; below d,
        the last eigenvalues are 0 for want of data.
    """
    vectors = z.double().flatten(0, 1).cpu()
    covariance = torch.cov(vectors.T).view(vectors.shape[1], -1)
    eigenvalues = torch.linalg.eigvalsh(covariance).flip(0).clamp(min=0)
    total = eigenvalues.sum()
    return {
        "eigenvalues": (eigenvalues / total).tolist(),
        "std": covariance.diagonal().sqrt().sort(descending=True).values.tolist(),
        "dimensions": (total.square() / eigenvalues.square().sum()).item(),
        "vectors": len(vectors),
    }
