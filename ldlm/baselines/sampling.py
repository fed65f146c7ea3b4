"""What other text diffusions do at every step, on our own denoiser: a ratio of speeds is then measured, not quoted.

In: a `DiT` between an embedding of tokens and a head over the vocabulary; rows, and steps. Out: token ids [b n].
Paper: section 8 and Table 3, which compare with MDLM (masked diffusion) and FLM (flow matching on one-hot vectors).

The update rules are the published ones; the loops get what our own sampler has: modulations come from a table, and
nothing waits for the device but where a comment says so. Generators live on the backbone's device.
Legend: b rows, n tokens a row, d width, v vocabulary.
"""

from collections.abc import Iterator, Sequence
from itertools import repeat
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, float32, float64, nn

from ldlm.nn.denoiser import TIMES, DiT


class TokenBackbone(nn.Module):
    """The blocks of a `DiT` that read tokens, or points around the simplex, and answer with logits over the vocabulary.

    The DiT's own first and last layer, Linear(2d → d) and Linear(d → d), are not used: only latents need them.

    Args:
        dit: Whose blocks, positions and modulations are used; d is its width.
        vocab_size: Tokens v that can be answered with. The mask is one more, id v: the head has no logit for it, which
            is the zero probability that MDLM gives it.
    """

    def __init__(self, dit: DiT, vocab_size: int) -> None:
        super().__init__()
        if vocab_size < 1:
            raise ValueError(f"vocab_size is {vocab_size}, but there must be a token to draw: give at least 1")
        self.dit = dit
        self.vocab_size = self.mask = vocab_size
        self.embedding = nn.Embedding(vocab_size + 1, dit.width)
        self.head = nn.Linear(dit.width, vocab_size)

    def embed(self, tokens: Tensor) -> Tensor:
        """Token ids, the mask's among them, [b n] -> [b n d]."""
        out: Tensor = self.embedding(tokens)
        return out

    def embed_points(self, points: Tensor) -> Tensor:
        """Any points of the vocabulary's space [... v] -> [... d], linearly; a one-hot vector as its token."""
        weight = self.embedding.weight[: self.vocab_size]
        return points.to(weight.dtype) @ weight

    def at_times(self, times: Tensor) -> Iterator[Sequence[Tensor]]:
        """The modulations at each of `times` [k], as `features` takes them."""
        for part in torch.split(times, TIMES):
            yield from zip(*(torch.split(table, 1) for table in self.dit.modulations(part)), strict=True)

    def features(self, x: Tensor, modulations: Sequence[Tensor]) -> Tensor:
        """Embedded tokens or points [b n d] -> inputs of the head [b n d]."""
        x = x.to(self.embedding.weight.dtype) + self.dit.positions[: x.shape[1]]
        for block, modulation in zip(self.dit.blocks, modulations, strict=False):
            x = block(x, modulation)
        shift, scale = modulations[-1].unsqueeze(1).chunk(2, dim=-1)
        out: Tensor = self.dit.norm(x) * (1 + scale) + shift
        return out

    def forward(self, x: Tensor, modulations: Sequence[Tensor]) -> Tensor:
        """[b n d] -> logits [b n v]."""
        out: Tensor = self.head(self.features(x, modulations))
        return out


class Sampled(NamedTuple):
    """Token ids [b n], none of them the mask, and how many calls of the network they took."""

    tokens: Tensor
    calls: int


@torch.no_grad()
def masked_diffusion(
    backbone: TokenBackbone,
    rows: int,
    n: int,
    nfe: int,
    generator: Generator,
    sampling_dtype: torch.dtype = float32,
    cache: bool = False,
) -> Sampled:
    """Ancestral sampling of masked diffusion with the log-linear schedule, alpha_t = 1 − t (MDLM, arXiv 2406.07524).

    At t = 1 every token is masked. From t to s < t, in `nfe` even steps down to 0, a masked token is unmasked with
    probability (alpha_s − alpha_t)/(1 − alpha_t), as a draw from softmax(logits); the others stay what they are.

    MDLM draws whether and what from one categorical over v + 1: the same law, but it takes normalised probabilities.
    Its time stops at 10⁻⁵, where one more call puts the likeliest tokens for the masks that are left; ours ends at 0.

    Args:
        backbone: The network.
        rows: Rows b.
        n: Tokens a row.
        nfe: Steps, and calls unless `cache` saves some.
        generator: Draws when a token is unmasked, and what it becomes.
        sampling_dtype: Of the noise, float32 (as MDLM) or float64 (as ReMDM and Duo). In float32 no Gumbel noise is
            above 16.7, and unlikely tokens come too rarely.
        cache: Do not call the network again while no token has changed, as MDLM's faster sampler. That takes a network
            that is not told the time: it is told 0 at every step.

    Raises:
        ValueError: If a size is impossible or the dtype too coarse.
    """
    _check(backbone, rows, n, nfe, sampling_dtype)
    device = backbone.embedding.weight.device
    noise = torch.empty(rows, n, backbone.vocab_size, dtype=sampling_dtype, device=device)
    tokens = torch.full((rows, n), backbone.mask, device=device)
    times = 1 - torch.arange(nfe, device=device) / nfe
    steps = repeat(next(backbone.at_times(torch.zeros_like(times[:1]))), nfe) if cache else backbone.at_times(times)
    logits, calls = None, 0
    for k, modulations in enumerate(steps):
        if logits is None:
            logits, calls = backbone(backbone.embed(tokens), modulations), calls + 1
        probability = 1 / (nfe - k)  # (alpha_s − alpha_t)/(1 − alpha_t) with t = 1 − k/nfe, s = t − 1/nfe
        unmasked = (tokens == backbone.mask) & (torch.rand(rows, n, generator=generator, device=device) < probability)
        before, tokens = tokens, torch.where(unmasked, draw(logits, noise, generator), tokens)
        if not (cache and torch.equal(tokens, before)):  # like the published check, it waits for the device
            logits = None
    return Sampled(tokens, calls)


@torch.no_grad()
def lazy_masked_diffusion(
    backbone: TokenBackbone, rows: int, n: int, nfe: int, generator: Generator, sampling_dtype: torch.dtype = float32
) -> Sampled:
    """The law of `masked_diffusion` without the work that it throws away. Arguments and errors as there.

    When a token is unmasked does not depend on the network: each of the `nfe` steps is as likely. Drawn beforehand, as
    the first-hitting sampler does in continuous time (arXiv 2409.02908), it tells at which tokens to take the head and
    to draw, and which steps need no call, even of a network that is told the time.
    """
    _check(backbone, rows, n, nfe, sampling_dtype)
    device = backbone.embedding.weight.device
    when = torch.randint(nfe, (rows * n,), generator=generator, device=device)
    counts = torch.bincount(when, minlength=nfe).tolist()  # waits for the device, once
    steps = [k for k, count in enumerate(counts) if count]
    places = torch.split(when.argsort(), [counts[k] for k in steps])
    noise = torch.empty(max(counts), backbone.vocab_size, dtype=sampling_dtype, device=device)
    tokens = torch.full((rows, n), backbone.mask, device=device)
    times = 1 - torch.tensor(steps, device=device) / nfe
    for place, modulations in zip(places, backbone.at_times(times), strict=True):
        features = backbone.features(backbone.embed(tokens), modulations).flatten(0, 1)[place]
        tokens.view(-1)[place] = draw(backbone.head(features), noise[: len(place)], generator)
    return Sampled(tokens, len(steps))


def draw(logits: Tensor, noise: Tensor, generator: Generator) -> Tensor:
    """One draw from each softmax(logits), [... v] -> [...], by Gumbel-max: argmax(logits − log(−log u)), u in [0, 1).

    `noise` has the logits' shape, is written over, and its dtype is the one that is drawn in.
    """
    noise.uniform_(generator=generator).log_().neg_().log_()  # u = 0 gives ∞, which never wins
    return torch.sub(logits, noise, out=noise).max(dim=-1).indices  # on a CPU, faster than argmax


@torch.no_grad()
def one_hot_flow(
    backbone: TokenBackbone, rows: int, n: int, nfe: int, generator: Generator, sampling_dtype: torch.dtype = float32
) -> Sampled:
    """Flow matching on one-hot vectors by Euler's method (FLM, arXiv 2602.16813). Arguments and errors as above.

    x_t = (1 − t) x_0 + t x_1, with x_0 from N(0, I) and x_1 one-hot, [b n v]. The network's softmax(logits) = p is its
    E[x_1 | x_t], so dx/dt = (p − x)/(1 − t) and from t to s, x becomes x + (s − t)/(1 − t) (p − x). The last step ends
    in p itself, whose argmax is the answer. FLM also learns where to put its times; here they are even.

    The network sees x through a matrix alone, so x times that matrix, [b n d], is what goes from step to step: to embed
    p costs what it costs to embed x, and x itself costs no pass over [b n v]. `sampling_dtype` is that of x.
    """
    _check(backbone, rows, n, nfe, sampling_dtype)
    device, v = backbone.embedding.weight.device, backbone.vocab_size
    # A row at a time: v is large.
    noise = (torch.randn(n, v, generator=generator, dtype=sampling_dtype, device=device) for _ in range(rows))
    x = torch.stack([backbone.embed_points(row) for row in noise]).to(sampling_dtype)
    for k, modulations in enumerate(backbone.at_times(torch.arange(nfe, device=device) / nfe)):
        logits = backbone(x, modulations)
        if k + 1 < nfe:
            p = F.softmax(logits, dim=-1, dtype=float32)
            x = x.lerp(backbone.embed_points(p).to(x), 1 / (nfe - k))  # (s − t)/(1 − t) with t = k/nfe
    return Sampled(logits.max(dim=-1).indices, nfe)


def _check(backbone: TokenBackbone, rows: int, n: int, nfe: int, dtype: torch.dtype) -> None:
    longest = backbone.dit.num_latents
    if rows < 1 or not 1 <= n <= longest:
        raise ValueError(f"{rows} rows of {n} tokens: give at least 1 row, and 1 to {longest} tokens, the positions")
    if nfe < 1:
        raise ValueError(f"nfe is {nfe}, but it counts steps: give at least 1")
    if dtype not in (float32, float64):
        raise ValueError(f"sampling_dtype is {dtype}, too coarse to draw from a vocabulary: give float32 or float64")
