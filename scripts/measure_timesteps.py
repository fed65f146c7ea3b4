"""How far the adaptive timesteps' F is from a truth that is known: python scripts/measure_timesteps.py --help.

The loss is sigma²(u) of the tangent schedule (d = 3) with some noise a row. It rises from 0 to 1, so it is its own F.
Times are drawn by the sampler itself, step by step, as in training. What is printed for each refresh is the largest
|F − sigma²| over u, the worst over the seeds.
"""

import argparse

import torch
from torch import Tensor

from ldlm import AdaptiveTimesteps, TangentSchedule

parser = argparse.ArgumentParser(description="Error of the adaptive timesteps' F on a known curve.")
parser.add_argument("--rows", type=int, default=64, help="rows of a step (default: %(default)s)")
parser.add_argument("--steps", type=int, default=100, help="steps between refreshes (default: %(default)s)")
parser.add_argument("--refreshes", type=int, default=15, help="(default: %(default)s)")
parser.add_argument("--seeds", type=int, default=10, help="(default: %(default)s)")
parser.add_argument("--noise", type=float, default=0.1, help="of a row's loss, as its share (default: %(default)s)")
parser.add_argument("--turn", type=int, help="the refresh after which the curve is that of d = 1 (default: never)")


def curve(u: Tensor, d: float = 3.0) -> Tensor:
    """sigma² at times u, float64."""
    return TangentSchedule(d).sigma(u.double()) ** 2


def measure(
    timesteps: AdaptiveTimesteps,
    rows: int,
    steps: int,
    refreshes: int,
    seed: int,
    noise: float,
    turn: int | None = None,
) -> list[float]:
    """The error of F after each refresh."""
    generator, grid, errors = torch.Generator().manual_seed(seed), torch.linspace(0, 1, 1001).double(), []
    for refresh in range(refreshes):
        d = 3.0 if turn is None or refresh < turn else 1.0
        for _ in range(steps):
            u = timesteps.sample(rows, generator)
            loss = curve(u, d) * (1 + noise * torch.randn(rows, generator=generator).double())
            timesteps.observe(u, loss.float())
            timesteps.synchronize()
        timesteps.refresh()
        errors.append(float((timesteps.cdf(grid) - curve(grid, d)).abs().max()))
    return errors


if __name__ == "__main__":
    options = parser.parse_args()
    arguments = options.rows, options.steps, options.refreshes
    found = [
        measure(AdaptiveTimesteps(), *arguments, seed, options.noise, options.turn) for seed in range(options.seeds)
    ]
    worst = torch.tensor(found).amax(0).tolist()
    print(f"{options.rows} rows, {options.steps} steps, {options.seeds} seeds: worst error of F at each refresh")
    print(" ".join(f"{error:.3f}" for error in worst))
    print(f"after the first refresh: {max(worst[1:], default=0):.3f}")
