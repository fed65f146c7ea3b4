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

from ldlm.noise import Source, uniform


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

    [0, 1] is cut into N bins. Each of the N + 1 edges u_i = i/N keeps a running mean of the loss around it,

        num_i ← rho num_i + Σ w_i loss,   den_i ← rho den_i + Σ w_i,   L_i = num_i/den_i,   w_i = max(0, 1 − |N u − i|),

    summed over the rows of one optimizer step on all ranks, and a bin is drawn with probability

        p_i = (1 − floor) (M_{i+1} − M_i)/(M_N − M_0) + floor/N,   M_i = max(L_0, …, L_i),

    uniformly inside. A loss that nowhere rises gives the uniform density.

    Args:
        bins: N; the paper uses 100.
        rho: how much of the running sums a step keeps.
        floor: the share of draws that stays uniform, so that no bin is ever given up.

    Attributes:
        num: Σ w loss per edge, [N + 1] float64.
        den: Σ w per edge, [N + 1] float64.
        density: p_i per bin, [N] float64, summing to 1.

    Raises:
        ValueError: `bins` is below 1, `rho` outside [0, 1) or `floor` outside (0, 1].
    """

    num: Tensor
    den: Tensor
    density: Tensor

    def __init__(self, bins: int = 100, rho: float = 0.99, floor: float = 1e-3) -> None:
        super().__init__()
        if bins < 1:
            raise ValueError(f"bins is {bins}, but times are drawn from bins: give at least 1, such as 100")
        if not 0 <= rho < 1:
            raise ValueError(f"rho is {rho}, but it is the share of the past kept each step: give 0 <= rho < 1")
        if not 0 < floor <= 1:
            raise ValueError(f"floor is {floor}, but F needs a positive density to be inverted: give 0 < floor <= 1")
        self.bins = bins
        self.rho = rho
        self.floor = floor
        self.register_buffer("num", torch.zeros(bins + 1, dtype=torch.float64))
        self.register_buffer("den", torch.zeros(bins + 1, dtype=torch.float64))
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
        finite = loss.isfinite()
        sums = torch.stack([torch.where(finite, loss, 0), finite]).double() @ weight  # Σ w loss, Σ w
        self._pending = sums if self._pending is None else self._pending + sums

    @torch.no_grad()
    def synchronize(self, skipped: Tensor | None = None) -> None:
        """Adds what was observed, summed over all ranks, to the running sums; every rank must call it."""
        pending = torch.stack([self.num, self.den]).zero_() if self._pending is None else self._pending
        if dist.is_available() and dist.is_initialized():
            dist.all_reduce(pending)
        left_out = torch.zeros_like(self.den[0]) if skipped is None else skipped.to(self.den)
        kept = self.rho + (1 - self.rho) * left_out
        self.num.mul_(kept).add_(pending[0] * (1 - left_out))
        self.den.mul_(kept).add_(pending[1] * (1 - left_out))
        self._pending = None

    def edge_losses(self) -> Tensor:
        """L_i, [N + 1] float64; an edge nothing was seen at is interpolated from its neighbours, 0 if nothing was."""
        n, seen = self.bins, self.den > 0
        index = torch.arange(n + 1, device=self.den.device)
        below = torch.where(seen, index, -1).cummax(0).values  # the nearest seen edge to the left, −1 if none
        above = torch.where(seen, index, n + 1).flip(0).cummin(0).values.flip(0)
        left = torch.where(below < 0, above, below).clamp(max=n)
        right = torch.where(above > n, below, above).clamp(min=0)
        loss = torch.where(seen, self.num / self.den, 0)
        return loss[left].lerp(loss[right], (index - left).double() / (right - left).clamp(min=1))

    @torch.no_grad()
    def refresh(self) -> None:
        """Sets `density` to p_i; the same on all ranks, because the running sums are."""
        envelope = self.edge_losses().cummax(0).values
        rise = envelope[-1] - envelope[0]
        # Losses come in float32: a rise below its resolution is rounding and not a slope.
        rises = rise.isfinite() & (rise > 1e-6 * envelope[-1].abs())
        share = torch.where(rises, envelope.diff() / rise, 1 / self.bins)
        self.density.copy_((1 - self.floor) * share + self.floor / self.bins)

    def _edges(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """u_i = i/N and F(u_i), both [N + 1] float64 and exactly 1 at the end."""
        cumulative = torch.cat([self.density.new_zeros(1), self.density.cumsum(0)]).to(device, torch.float64)
        u = torch.arange(self.bins + 1, dtype=torch.float64, device=device) / self.bins
        return u, cumulative / cumulative[-1]


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
