"""How much signal and how much noise a latent carries at each time (the paper's §3 and App. C).

In: schedule times t in [0, 1], a tensor of any shape. Out: alpha(t), sigma(t), beta(t) and the log-SNR, of that shape,
for the variance-preserving process

    z_t = alpha(t) z0 + sigma(t) eps,   eps ~ N(0, I),   alpha² + sigma² = 1,   beta = −2 d/dt log alpha,

and the time at which a given log-SNR is reached. t = 0 is the clean latent and t = 1 pure noise: alpha(1) is exactly 0.
"""

import abc
import math
from typing import NamedTuple

import torch
from torch import Tensor, nn


class Levels(NamedTuple):
    """A schedule at some times: amplitudes of signal and noise, and the rate of the forward SDE, in float64."""

    alpha: Tensor
    sigma: Tensor
    beta: Tensor


class NoiseSchedule(nn.Module, abc.ABC):
    """A variance-preserving noise schedule.

    A subclass writes `levels` and `time_at`; both are handed float64 and answer in float64. The other methods take
    t of any shape and answer in its dtype, float32 for anything narrower: near t = 1 alpha falls through magnitudes
    at which float32 trigonometry returns signs (tan(π/2) < 0), so nothing narrower than float64 is computed in.
    """

    @abc.abstractmethod
    def levels(self, t: Tensor) -> Levels:
        """Gives alpha, sigma and beta at `t` (float64, any shape), each of its shape; beta at t = 1 may be inf."""

    @abc.abstractmethod
    def time_at(self, log_snr: Tensor) -> Tensor:
        """The time t at which log alpha²/sigma² (nats, any shape) is `log_snr`: the inverse of `log_snr(t)`."""

    def alpha(self, t: Tensor) -> Tensor:
        """Gives the amplitude of the clean latent in z_t; it falls from 1 at t = 0 to 0 at t = 1."""
        return self.levels(t.double()).alpha.to(_answer_dtype(t))

    def sigma(self, t: Tensor) -> Tensor:
        """Gives the standard deviation of the noise in z_t; it rises from 0 at t = 0 to 1 at t = 1."""
        return self.levels(t.double()).sigma.to(_answer_dtype(t))

    def beta(self, t: Tensor) -> Tensor:
        """Gives −2 d/dt log alpha, the rate of dz = −½ beta z dt + √beta dw; inf at t = 1, so samplers clip t."""
        return self.levels(t.double()).beta.to(_answer_dtype(t))

    def log_snr(self, t: Tensor) -> Tensor:
        """Gives log alpha²/sigma² in nats; it falls from inf at t = 0 to −inf at t = 1 with slope −beta/sigma²."""
        alpha, sigma, _ = self.levels(t.double())
        return (2 * torch.log(alpha / sigma)).to(_answer_dtype(t))


class TangentSchedule(NoiseSchedule):
    """alpha = 1/√(1 + d²T²), sigma = dT/√(1 + d²T²) with T = tan(πt/2): log-SNR = −2 log(dT) (App. C).

    Args:
        d: how much sooner noise takes over than in the cosine schedule (d = 1): log-SNR is lower by 2 log d at every
            t. The paper uses 3.

    Raises:
        ValueError: d is not a positive number.
    """

    def __init__(self, d: float = 3.0) -> None:
        super().__init__()
        if not 0 < d < math.inf:
            raise ValueError(
                f"d is {d}, but it multiplies the noise-to-signal ratio: give a number above 0, such as 3.0"
            )
        self.d = d

    def levels(self, t: Tensor) -> Levels:
        """With c = sin(π(1−t)/2), s = sin(πt/2), r = √(c² + d²s²): c/r, ds/r and πd²s/(c r²)."""
        # c is a sine and not cos(πt/2), so that it is exactly 0 at t = 1.
        c, s = torch.sin(math.pi / 2 * (1 - t)), torch.sin(math.pi / 2 * t)
        r = torch.hypot(c, self.d * s)
        return Levels(alpha=c / r, sigma=self.d * s / r, beta=math.pi * self.d**2 * s / (c * r**2))

    def time_at(self, log_snr: Tensor) -> Tensor:
        """(2/π) arctan(exp(−log_snr/2)/d)."""
        return 2 / math.pi * torch.atan(torch.exp(-log_snr / 2) / self.d)


class CosineSchedule(NoiseSchedule):
    """alpha = cos(πt/2), sigma = sin(πt/2): the tangent schedule with d = 1."""

    def levels(self, t: Tensor) -> Levels:
        """c, s and πs/c with c = sin(π(1−t)/2), s = sin(πt/2)."""
        c, s = torch.sin(math.pi / 2 * (1 - t)), torch.sin(math.pi / 2 * t)
        return Levels(alpha=c, sigma=s, beta=math.pi * s / c)

    def time_at(self, log_snr: Tensor) -> Tensor:
        """(2/π) arctan(exp(−log_snr/2))."""
        return 2 / math.pi * torch.atan(torch.exp(-log_snr / 2))


def _answer_dtype(t: Tensor) -> torch.dtype:
    return torch.promote_types(t.dtype, torch.float32)
