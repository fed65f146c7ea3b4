"""Where the time of one call of the paper's denoiser goes on a CPU: python scripts/measure_profile.py."""

import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile

from ldlm import DiT

ROWS, CALLS = 2, 5

torch.set_num_threads(1)
torch.manual_seed(0)
denoiser = DiT().eval()
for parameter in denoiser.parameters():
    if not parameter.any():  # AdaLN-zero starts as the prediction 0
        nn.init.normal_(parameter, std=0.02)
for dtype in (torch.float32, torch.bfloat16):
    z_t = torch.randn(ROWS, denoiser.num_latents, denoiser.latent_size).to(dtype)
    with torch.no_grad():
        call = next(denoiser.to(dtype).at_times(torch.tensor([0.5])))
        call(z_t, z_t)
        with profile(activities=[ProfilerActivity.CPU]) as found:
            for _ in range(CALLS):
                call(z_t, z_t)
    events = sorted(found.key_averages(), key=lambda event: -event.self_cpu_time_total)
    total = sum(event.self_cpu_time_total for event in events)
    print(dtype)
    for event in events[:8]:
        print(f"  {event.key:<50}{event.self_cpu_time_total / total:6.1%}")
