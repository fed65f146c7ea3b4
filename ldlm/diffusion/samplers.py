"""From noise to latents: samplers (the paper's §4.3 and App. C; Euler–Maruyama is the paper's).

In: Gaussian noise [b m d], which is z at t = 1, a denoiser and a schedule. Out: predicted clean latents [b m d].

A `TimeGrid` (`grids.py`) places the times t_0 = 1 > t_1 > … > t_N = t_min. A `Sampler` calls the denoiser at t_0, …,
t_{N−1}, once each, feeding every prediction back as the next call's self-condition, and answers with the N-th
prediction: what a first-order step on to t = 0 would end in. Between two calls the state moves linearly,

    z_s = a z_t + b z0_hat + c z0_hat_before + e eps,   eps ~ N(0, I),

so a solver is nothing but its four weights as functions of the times. Weights and whatever else of the network depends
on time alone are computed before the loop; in it are the network, one update, and nothing that waits for the device.
"""

import abc
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from ldlm.diffusion.grids import TimeGrid
from ldlm.diffusion.schedules import NoiseSchedule
from ldlm.diffusion.timesteps import TimestepSampler
from ldlm.nn.denoiser import Denoise, Denoiser, at_times
from ldlm.nn.layers import dtype_of

OnStep = Callable[[int, Tensor], None]  # calls of the denoiser so far, z0_hat [b m d]


class StepWeights(NamedTuple):
    """The weights of z_s = a z_t + b z0_hat + c z0_hat_before + e eps: numbers, or 0-d float64 tensors on the CPU."""

    a: Tensor | float
    b: Tensor | float
    c: Tensor | float = 0.0
    e: Tensor | float = 0.0


def move(z: Tensor, z0_hat: Tensor, before: Tensor | None, eps: Tensor | None, weights: Tensor) -> Tensor:
    """One update, a z + b z0_hat + c before + e eps, weights [4]; None where all of a run's weights are 0."""
    a, b, c, e = weights.unbind()
    z = torch.addcmul(a * z, b, z0_hat)
    z = z if before is None else torch.addcmul(z, c, before)
    return z if eps is None else torch.addcmul(z, e, eps)


class Sampler(abc.ABC):
    """Owns the loop from noise to latents; a subclass writes `step`, the weights of one update."""

    @abc.abstractmethod
    def step(self, schedule: NoiseSchedule, t: Tensor, s: Tensor, before: Tensor | None) -> StepWeights:
        """Gives the weights that move the state from time t to s < t (0-d, float64).

        `before` is the time of the previous call, None on the first. At t = 1 alpha is 0, and beta and the log-SNR are
        infinite; the weights are finite all the same.
        """

    def table(self, schedule: NoiseSchedule, times: Tensor) -> Tensor:
        """The weights of the updates t_0 → t_1, …, t_{N−2} → t_{N−1}, which is all there are: [nfe − 1, 4] float64."""
        t = list(times[:-1])
        steps = [self.step(schedule, t[k], t[k + 1], t[k - 1] if k else None) for k in range(len(t) - 1)]
        return torch.tensor([[float(w) for w in weights] for weights in steps], dtype=torch.float64).reshape(-1, 4)

    @torch.no_grad()
    def sample(
        self,
        denoise: Denoise,
        schedule: NoiseSchedule,
        noise: Tensor,
        nfe: int,
        generator: torch.Generator,
        grid: TimeGrid,
        timesteps: TimestepSampler | None = None,
        on_step: OnStep | None = None,
        self_condition: bool = True,
    ) -> Tensor:
        """Turns noise into predicted clean latents with exactly `nfe` calls of `denoise`.

        Args:
            denoise: (z_t [b m d], t [b] float32, self_condition [b m d]) -> z0_hat [b m d]. A `Denoiser` is asked for
                all times at once (`Denoiser.at_times`) and is fed in its own dtype; any other function is called as it
                is.
            schedule: the one the denoiser was trained with.
            noise: z at t = 1, [b m d]. The state keeps its dtype, float32 at least, whatever `denoise` computes in.
            nfe: number of calls; below 1 is a ValueError.
            generator: draws eps, on its own device.
            grid: where the calls happen.
            timesteps: whose adapted time an `AdaptedGrid` follows; None stands for F(u) = u.
            on_step: told after each call how many there have been, and its prediction, which it must leave as it is.
            self_condition: whether predictions are fed back; False for a denoiser that was trained without: it gets 0.

        Returns:
            The last prediction, [b m d].
        """
        times = grid.times(nfe, schedule, timesteps)
        table = self.table(schedule, times)
        _, _, multistep, stochastic = table.any(0).tolist()  # asked on the CPU: nothing below waits for the device
        z = noise.to(torch.promote_types(noise.dtype, torch.float32))
        times, table = times[:nfe].to(z.device, torch.float32), table.to(z)
        dtype = dtype_of(denoise, z.dtype) if isinstance(denoise, Denoiser) else z.dtype
        calls = denoise.at_times(times) if isinstance(denoise, Denoiser) else at_times(denoise, times)
        z0_hat = nothing = torch.zeros_like(z)
        for k, call in enumerate(calls):
            # Where blocks are captured as CUDA graphs, what they gave in the last call may be written over.
            torch.compiler.cudagraph_mark_step_begin()  # type: ignore[no-untyped-call]
            known = z0_hat if self_condition else nothing
            before, z0_hat = z0_hat, call(z.to(dtype), known.to(dtype)).to(z)
            if on_step is not None:
                on_step(k + 1, z0_hat)
            if k + 1 < nfe:
                eps = None
                if stochastic:
                    eps = torch.randn(z.shape, generator=generator, device=generator.device, dtype=z.dtype).to(z.device)
                z = move(z, z0_hat, before if multistep else None, eps, table[k])
        return z0_hat


class EulerMaruyama(Sampler):
    """The reverse SDE dz = [−½ beta z − beta score] dt + √beta dw, score = −(z − alpha z0_hat)/sigma², dt < 0.

    Args:
        beta_t_max: beta is taken at min(t, beta_t_max), because it is infinite at t = 1; in (0, 1), else ValueError.
            0.95 as in TEncDM.
    """

    def __init__(self, beta_t_max: float = 0.95) -> None:
        if not 0 < beta_t_max < 1:
            raise ValueError(
                f"beta_t_max is {beta_t_max}, but beta is infinite at t = 1: give one in (0, 1), such as 0.95"
            )
        self.beta_t_max = beta_t_max

    def step(self, schedule: NoiseSchedule, t: Tensor, s: Tensor, before: Tensor | None) -> StepWeights:
        """With r = beta (t − s): a = 1 + r (½ − 1/sigma²), b = r alpha/sigma², e = √r."""
        alpha, sigma, _ = schedule.levels(t)
        r = schedule.beta(t.clamp(max=self.beta_t_max)) * (t - s)
        return StepWeights(a=1 + r * (0.5 - 1 / sigma**2), b=r * alpha / sigma**2, e=r.sqrt())


class Ancestral(Sampler):
    """Draws from q(z_s | z_t, z0 = z0_hat), the exact posterior of the forward process.

    Args:
        noise_scale: multiplies the posterior's deviation. 1 is the posterior; less is a lower temperature, which trades
            variety for likelihood; not negative, else ValueError.
    """

    def __init__(self, noise_scale: float = 1.0) -> None:
        if not noise_scale >= 0:
            raise ValueError(
                f"noise_scale is {noise_scale}, but it multiplies a deviation: give 0 or more, such as 1.0"
            )
        self.noise_scale = noise_scale

    def step(self, schedule: NoiseSchedule, t: Tensor, s: Tensor, before: Tensor | None) -> StepWeights:
        """With r = 1 − SNR(t)/SNR(s): a = alpha_t sigma_s²/(alpha_s sigma_t²), b = alpha_s r, e = scale sigma_s √r."""
        (alpha_t, sigma_t, _), (alpha_s, sigma_s, _) = schedule.levels(t), schedule.levels(s)
        r = -torch.expm1(schedule.log_snr(t) - schedule.log_snr(s))  # 1 at t = 1
        return StepWeights(
            a=alpha_t * sigma_s**2 / (alpha_s * sigma_t**2), b=alpha_s * r, e=self.noise_scale * sigma_s * r.sqrt()
        )


class DDIM(Sampler):
    """Keeps the predicted noise and replaces a share of it by fresh noise.

    Args:
        eta: from 0, the deterministic first-order solver, to 1, which is `Ancestral`; else ValueError.
    """

    def __init__(self, eta: float = 0.0) -> None:
        if not 0 <= eta <= 1:
            raise ValueError(f"eta is {eta}, but it goes from 0 (deterministic) to 1 (ancestral)")
        self.eta = eta

    def step(self, schedule: NoiseSchedule, t: Tensor, s: Tensor, before: Tensor | None) -> StepWeights:
        """With r as in `Ancestral`: a = sigma_s/sigma_t √(1 − eta² r), b = alpha_s − a alpha_t, e = eta sigma_s √r."""
        (alpha_t, sigma_t, _), (alpha_s, sigma_s, _) = schedule.levels(t), schedule.levels(s)
        r = -torch.expm1(schedule.log_snr(t) - schedule.log_snr(s))
        a = sigma_s / sigma_t * (1 - self.eta**2 * r).sqrt()
        return StepWeights(a=a, b=alpha_s - a * alpha_t, e=self.eta * sigma_s * r.sqrt())


class DPMSolver2M(Sampler):
    """DPM-Solver++(2M) in data prediction: `DDIM` with z0_hat extrapolated by half a step of log-SNR.

    The first step is first order, and so is the second, whose previous log-SNR is −inf. Of the usual last step at first
    order nothing needs to be done: taken on to t = 0 it ends in the prediction, which is the answer.

    Args:
        eta: from 0, which solves the ODE, to 1, which solves the SDE (SDE-DPM-Solver++(2M)); else ValueError.
    """

    def __init__(self, eta: float = 0.0) -> None:
        self.first_order = DDIM(eta)
        self.eta = eta

    def step(self, schedule: NoiseSchedule, t: Tensor, s: Tensor, before: Tensor | None) -> StepWeights:
        """DDIM's weights on z0_hat + h/(2 h_before) (z0_hat − z0_hat_before), h the changes of log-SNR."""
        a, b, _, e = self.first_order.step(schedule, t, s, before)
        if before is None:
            return StepWeights(a=a, b=b, e=e)
        log_snr_s, log_snr_t, log_snr_before = schedule.log_snr(torch.stack([s, t, before]))
        ahead = (log_snr_s - log_snr_t) / (2 * (log_snr_t - log_snr_before))  # 0 where `before` is t = 1
        return StepWeights(a=a, b=b * (1 + ahead), c=-b * ahead, e=e)
