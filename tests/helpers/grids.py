"""Time grids of every kind."""

import torch

from ldlm.diffusion.grids import AdaptedGrid, LogSNRGrid, MixedGrid, UniformGrid
from ldlm.diffusion.schedules import TangentSchedule
from ldlm.diffusion.timesteps import AdaptiveTimesteps

SCHEDULE = TangentSchedule(3.0)


def adapted(power: int = 4) -> AdaptiveTimesteps:
    timesteps = AdaptiveTimesteps()
    u = torch.linspace(0, 1, 5001)
    timesteps.observe(u, u**power)
    timesteps.synchronize()
    timesteps.refresh()
    return timesteps


ADAPTED = adapted()  # the timesteps whose adapted time every grid is offered


GRIDS = [
    UniformGrid(),
    LogSNRGrid(),
    AdaptedGrid(),
    MixedGrid(AdaptedGrid(), LogSNRGrid()),
    MixedGrid(UniformGrid(), UniformGrid(), weight=0.3),
    MixedGrid(UniformGrid(t_min=0.2), LogSNRGrid(t_min=0.01), weight=0.9),
]
