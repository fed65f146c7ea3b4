"""Which times the denoiser is trained at (the paper's §5.3 and Eq. 5).

In: a generator and how many times are wanted; after the loss is known, those times and each row's loss. Out: times u in
(0, 1]. A time is drawn as u = F⁻¹(q) with q uniform, where F is the cumulative distribution function of u; q = F(u) is
the *adapted time*. Choosing the density dF/du ∝ dL/du makes the loss L grow linearly in q, so that every stretch of q
teaches the denoiser as much as any other. The schedule and the denoiser are always given u, never q.
"""

import abc

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ldlm.rng import Source, uniform

CERTAINTY = 2.5  # standard errors: with 2, one refresh in a hundred takes noise on a flat loss for a rise


class TimestepSampler(nn.Module, abc.ABC):
    """A distribution of training times, which may learn from the losses it led to.

    A subclass writes `cdf` and `inverse_cdf`. One that adapts also writes the three hooks `observe`, `synchronize` and
    `refresh`, which do nothing here: they are the seams of this class.
    """

    @abc.abstractmethod
    def cdf(self, u: Tensor) -> Tensor:
        """F(u), the adapted time in [0, 1], for times `u` in [0, 1] of any shape."""

    @abc.abstractmethod
    def inverse_cdf(self, q: Tensor) -> Tensor:
        """F⁻¹(q), the time in [0, 1], for adapted times `q` in [0, 1] of any shape."""

    def sample(self, count: int, source: Source) -> Tensor:
        """Draws `count` times u = F⁻¹(q): [count], float32, in (0, 1], on the source's device."""
        q = uniform((count,), source, torch.float64)
        return self.inverse_cdf(1 - q).float()  # rand includes 0 and not 1; a time of 0 carries no noise to remove

    def observe(self, u: Tensor, loss: Tensor) -> None:
        """Takes in the losses [b] of rows noised at times `u` [b]; called once per micro-step on every rank."""

    def synchronize(self, skipped: Tensor | None = None) -> None:
        """Closes an optimizer step: what all micro-steps and ranks observed since the last call becomes one update.

        Args:
            skipped: 1 on all ranks if the step was left out for numbers that are not finite: then nothing changes and
                what was observed is forgotten. A scalar on the device. None, and 0, mean that it was not.
        """

    def refresh(self) -> None:
        """Recomputes F from what was observed; until the first call F is as constructed."""


class UniformTimesteps(TimestepSampler):
    """u uniform on (0, 1]: F(u) = u."""

    def cdf(self, u: Tensor) -> Tensor:
        """F(u) = u."""
        return u

    def inverse_cdf(self, q: Tensor) -> Tensor:
        """F⁻¹(q) = q."""
        return q


class AdaptiveTimesteps(TimestepSampler):
    """Times drawn with density proportional to dL/du, the slope of the measured loss (Eq. 5).

    [0, 1] is cut into N bins. Each of the N + 1 edges u_i = i/N keeps the mean loss of the rows around it,

        num_i = Σ w_i loss,   den_i = Σ w_i,   w_i = max(0, 1 − |N u − i|),

    over the rows of all steps and ranks. L_i is the isotonic regression of num_i/den_i with weights den_i, and a bin is
    drawn with probability

        p_i = (1 − f) (L_{i+1} − L_i)/(L_N − L_0) + f/N,   f = max(floor, e),

    uniformly inside. e is the error of F that n = Σ den rows leave: the share of the rise that equals 2.5 standard
    errors of the mean of e n rows. A rise that is no larger than its error (e = 1), and a loss that nowhere rises, give
    the uniform density.

    The memory is told in rows. A refresh scales the sums down to a fifth, which is a quarter of the rows since the last
    one, but to no fewer than `memory` rows: where few rows pass between two refreshes, it spans several of them.

    Args:
        bins: N; the paper uses 100.
        memory: how many rows are remembered however many steps ago they were seen; 50 a bin of the paper's.
        floor: the least share of draws that stays uniform, so that no bin is ever given up.

    Attributes:
        num: Σ w loss per edge, [N + 1] float64.
        den: Σ w per edge, [N + 1] float64.
        square: Σ w loss² per edge, [N + 1] float64, which tells how much the losses of an edge scatter.
        density: p_i per bin, [N] float64, summing to 1.

    Raises:
        ValueError: `bins` or `memory` is below 1, or `floor` outside (0, 1].
    """

    num: Tensor
    den: Tensor
    square: Tensor
    density: Tensor

    def __init__(self, bins: int = 100, memory: int = 5_000, floor: float = 1e-3) -> None:
        super().__init__()
        if bins < 1:
            raise ValueError(f"bins is {bins}, but times are drawn from bins: give at least 1, such as 100")
        if memory < 1:
            raise ValueError(f"memory is {memory}, but it is how many rows a refresh leaves: give at least 1")
        if not 0 < floor <= 1:
            raise ValueError(f"floor is {floor}, but F needs a positive density to be inverted: give 0 < floor <= 1")
        self.bins = bins
        self.memory = memory
        self.floor = floor
        for name in ("num", "den", "square"):
            self.register_buffer(name, torch.zeros(bins + 1, dtype=torch.float64))
        self.register_buffer("density", torch.full((bins,), 1 / bins, dtype=torch.float64))
        # Not a buffer: DDP copies rank 0's buffers over everybody's before a forward pass, in the midst of a step.
        self._pending: Tensor | None = None

    def cdf(self, u: Tensor) -> Tensor:
        """F(u), exact and piecewise linear; in u's dtype and on its device."""
        return interpolate(u.double(), *self._edges(u.device)).to(u.dtype)

    def inverse_cdf(self, q: Tensor) -> Tensor:
        """F⁻¹(q), exact and piecewise linear; in q's dtype and on its device."""
        u, cumulative = self._edges(q.device)
        return interpolate(q.double(), cumulative, u).to(q.dtype)

    @torch.no_grad()
    def observe(self, u: Tensor, loss: Tensor) -> None:
        """Shares each row's loss [b] between the edges next to its time `u` [b], and leaves out what is not finite."""
        index = torch.arange(self.bins + 1, device=loss.device)
        weight = (1 - (self.bins * u.double().unsqueeze(-1) - index).abs()).clamp(min=0)  # [b, N + 1]
        finite = loss.double().square().isfinite()
        loss = torch.where(finite, loss, 0).double()
        sums = torch.stack([loss, finite.double(), loss**2]) @ weight  # Σ w loss, Σ w, Σ w loss²
        self._pending = sums if self._pending is None else self._pending + sums

    @torch.no_grad()
    def synchronize(self, skipped: Tensor | None = None) -> None:
        """Adds what was observed, summed over all ranks, to the sums; every rank must call it."""
        pending = self.num.new_zeros(3, self.bins + 1) if self._pending is None else self._pending
        if dist.is_available() and dist.is_initialized():
            dist.all_reduce(pending)
        if skipped is not None:
            pending = torch.where(skipped > 0, 0, pending)
        for total, seen in zip((self.num, self.den, self.square), pending, strict=True):
            total.add_(seen)
        self._pending = None

    @torch.no_grad()
    def edge_losses(self) -> tuple[Tensor, Tensor]:
        """L_i, [N + 1] float64, and e, the error of F, a scalar in [0, 1]; 0 and 1 if no row was seen.

        An edge at which nothing was seen is interpolated from its neighbours. Isotonic regression would take the mean
        of the last few rows for L_N, however few: an end may lie only so far beyond what e n rows say of it.
        """
        seen, rows = self.den > 0, self.den.sum()
        scatter = (self.square - torch.where(seen, self.num**2 / self.den, 0)).sum().clamp(min=0) / rows
        # A large e asks for long windows at the ends, whose means are nearer to each other, which asks for a larger e:
        # from 0, e rises to the least one that fits, or to 1.
        error = rows.new_zeros(())
        for _ in range(20):
            low, high = self._ends(error * rows)
            rise = (high - low).clamp(min=0)
            fitting = (CERTAINTY**2 * scatter / (rise**2 * rows)) ** (1 / 3)
            error = torch.maximum(error, fitting).nan_to_num(nan=1).clamp(max=1)
        # Where rows follow the rise, e n of them at an end hold the share e of it, and half of that is past their mean.
        beyond = error * rise / 2
        loss = isotonic(self.num, self.den).clamp(low - beyond, high + beyond)
        index = torch.arange(self.bins + 1, device=self.den.device)
        below = torch.where(seen, index, -1).cummax(0).values  # the nearest seen edge to the left, −1 if none
        above = torch.where(seen, index, self.bins + 1).flip(0).cummin(0).values.flip(0)
        left = torch.where(below < 0, above, below).clamp(max=self.bins)
        right = torch.where(above > self.bins, below, above).clamp(min=0)
        between = (index - left).double() / (right - left).clamp(min=1)
        return torch.where(rows > 0, loss[left].lerp(loss[right], between), 0), error

    @torch.no_grad()
    def refresh(self) -> None:
        """Sets `density` to p_i and forgets; the same on all ranks, because the sums are."""
        loss, error = self.edge_losses()
        rise = loss[-1] - loss[0]
        # Losses come in float32: a rise below its resolution is rounding and not a slope.
        share = torch.where(rise > 1e-6 * loss[-1].abs(), loss.diff() / rise, 1 / self.bins)
        uniform = error.clamp(min=self.floor)
        self.density.copy_((1 - uniform) * share + uniform / self.bins)
        kept = (self.memory / self.den.sum()).clamp(0.2, 1)
        for total in (self.num, self.den, self.square):
            total.mul_(kept)

    def _ends(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """The lowest mean loss of at least so many rows from the left end on, and the highest up to the right end."""
        rows = rows * (1 - 1e-9)  # all rows are enough, however their sum is rounded
        num, den = self.num.cumsum(0), self.den.cumsum(0)
        low = torch.where((den >= rows) & (den > 0), num / den, torch.inf).min()
        num, den = self.num.flip(0).cumsum(0), self.den.flip(0).cumsum(0)
        return low, torch.where((den >= rows) & (den > 0), num / den, -torch.inf).max()

    def _edges(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """u_i = i/N and F(u_i), both [N + 1] float64 and exactly 1 at the end."""
        cumulative = torch.cat([self.density.new_zeros(1), self.density.cumsum(0)]).to(device, torch.float64)
        u = torch.arange(self.bins + 1, dtype=torch.float64, device=device) / self.bins
        return u, cumulative / cumulative[-1]


def isotonic(num: Tensor, den: Tensor) -> Tensor:
    """The rising L with the least Σ den (L − num/den)², [k], in closed form.

        L_i = max over j ≤ i of min over l ≥ i of (num_j + … + num_l)/(den_j + … + den_l)

    Args:
        num: weighted sums of what is fitted, [k].
        den: their weights, at least 0, [k]; where it is 0, L takes a neighbour's value; 0 everywhere gives infinities.
    """
    num, den = (sums.expand(len(sums), -1).triu().cumsum(1) for sums in (num, den))  # [j, l]
    mean = torch.where(den > 0, num / den, torch.inf)
    least = mean.flip(1).cummin(1).values.flip(1)  # over l from i on, [j, i]
    allowed = torch.ones_like(least, dtype=torch.bool).triu() & least.isfinite()
    return torch.where(allowed, least, -torch.inf).amax(0)


def interpolate(x: Tensor, knots: Tensor, values: Tensor) -> Tensor:
    """The piecewise linear function through (knots, values) at `x`; constant outside the knots, exact at each of them.

    Args:
        x: where, any shape.
        knots: rising, [k]; repeats do no harm.
        values: [k].
    """
    right = torch.searchsorted(knots, x.contiguous()).clamp(1, len(knots) - 1)
    left = right - 1
    width = (knots[right] - knots[left]).clamp(min=torch.finfo(knots.dtype).tiny)
    return values[left].lerp(values[right], ((x - knots[left]) / width).clamp(0, 1))
