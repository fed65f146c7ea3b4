"""Time grids: where between noise and latents a sampler calls the denoiser.

The paper does not say where (§4.3 and App. C name the solver alone); uniform in t down to 0.01 is TEncDM's, by the same
authors.
In: a number of calls N, a schedule, perhaps adapted timesteps. Out: times t_0 = 1 > t_1 > … > t_N = t_min, float64.
"""

import abc

import torch
from torch import Tensor

from ldlm.diffusion.schedules import NoiseSchedule
from ldlm.diffusion.timesteps import TimestepSampler, UniformTimesteps, interpolate


class TimeGrid(abc.ABC):
    """Where a sampler looks. A subclass writes `place`.

    Args:
        t_min: the time at which a grid ends, in (0, 1), else ValueError. 0.01 as in TEncDM, by the paper's authors.
    """

    def __init__(self, t_min: float = 0.01) -> None:
        if not 0 < t_min < 1:
            raise ValueError(
                f"t_min is {t_min}, but a grid runs from t = 1 down to it: give one in (0, 1), such as 0.01"
            )
        self.t_min = t_min

    @abc.abstractmethod
    def place(self, nfe: int, schedule: NoiseSchedule, timesteps: TimestepSampler) -> Tensor:
        """Gives nfe + 1 strictly falling times, float64, any device; `times` pins the ends to exactly 1 and t_min."""

    def times(self, nfe: int, schedule: NoiseSchedule, timesteps: TimestepSampler | None = None) -> Tensor:
        """The times t_0 = 1 > … > t_N = t_min of N = `nfe` denoiser calls: [nfe + 1], float64, on the CPU.

        `timesteps` is whose adapted time an `AdaptedGrid` follows; None stands for F(u) = u.

        Raises:
            ValueError: nfe is below 1.
        """
        if nfe < 1:
            raise ValueError(f"nfe is {nfe}, but it counts calls of the denoiser: give at least 1")
        times = self.place(nfe, schedule, UniformTimesteps() if timesteps is None else timesteps).cpu()
        times[0], times[-1] = 1, self.t_min
        return times


class UniformGrid(TimeGrid):
    """Uniform in t."""

    def place(self, nfe: int, schedule: NoiseSchedule, timesteps: TimestepSampler) -> Tensor:
        """1 − (1 − t_min) k/N."""
        return torch.linspace(1, self.t_min, nfe + 1, dtype=torch.float64)


class LogSNRGrid(TimeGrid):
    """Uniform in log-SNR, which is −inf at t = 1: the first step goes to t_max and the others are even from there.

    Args:
        t_max: the second time of the grid, in (t_min, 1), else ValueError.
        t_min: the last.
    """

    def __init__(self, t_max: float = 0.999, t_min: float = 0.01) -> None:
        super().__init__(t_min)
        if not t_min < t_max < 1:
            raise ValueError(
                f"t_max is {t_max}, but the grid goes from 1 over t_max to t_min = {t_min}: give one between"
            )
        self.t_max = t_max

    def place(self, nfe: int, schedule: NoiseSchedule, timesteps: TimestepSampler) -> Tensor:
        """1, then the times of N log-SNRs in even steps from t_max to t_min."""
        last, first = schedule.log_snr(torch.tensor([self.t_min, self.t_max], dtype=torch.float64)).tolist()
        even = torch.linspace(last, first, nfe, dtype=torch.float64).flip(0)  # counted from t_min: with N = 1 it is all
        return torch.cat([torch.ones(1, dtype=torch.float64), schedule.time_at(even)])


class AdaptedGrid(TimeGrid):
    """Uniform in the adapted time q of the model's timestep sampler: each step covers the same rise of its loss."""

    def place(self, nfe: int, schedule: NoiseSchedule, timesteps: TimestepSampler) -> Tensor:
        """F⁻¹(q_k), q even from F(1) to F(t_min)."""
        ends = torch.tensor([1, self.t_min], dtype=torch.float64)
        first, last = timesteps.cdf(ends).tolist()
        return timesteps.inverse_cdf(torch.linspace(first, last, nfe + 1, dtype=torch.float64))


class MixedGrid(TimeGrid):
    """Quantiles of a mixture: in any stretch of t as many times as `first` and `second` would put there, weighted.

    Args:
        first: a grid, such as `AdaptedGrid`, which crowds the noise at which a latent is decided; None, `UniformGrid`.
        second: another; None, `LogSNRGrid`, which crowds the low noise at which it is refined.
        weight: the share of steps that follow `first`, in [0, 1], else ValueError.
    """

    _DENSE = 4096  # steps in which the two grids are compared: four to a step of 1,024 calls

    def __init__(self, first: TimeGrid | None = None, second: TimeGrid | None = None, weight: float = 0.5) -> None:
        first, second = UniformGrid() if first is None else first, LogSNRGrid() if second is None else second
        super().__init__(min(first.t_min, second.t_min))
        if not 0 <= weight <= 1:
            raise ValueError(
                f"weight is {weight}, but it is the share of steps that follow `first`: give one in [0, 1]"
            )
        self.first = first
        self.second = second
        self.weight = weight

    def place(self, nfe: int, schedule: NoiseSchedule, timesteps: TimestepSampler) -> Tensor:
        """G⁻¹(k/N) with G(t) the weighted share of the two grids' steps that lie above t."""
        share = torch.linspace(1, 0, self._DENSE + 1, dtype=torch.float64)
        first, second = (grid.times(self._DENSE, schedule, timesteps).flip(0) for grid in (self.first, self.second))
        t = torch.cat([first, second]).sort().values
        g = self.weight * interpolate(t, first, share) + (1 - self.weight) * interpolate(t, second, share)
        return interpolate(torch.linspace(0, 1, nfe + 1, dtype=torch.float64), g.flip(0), t.flip(0))
