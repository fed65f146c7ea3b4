"""The two CPU measurements behind docs/decisions.md: OMP_NUM_THREADS=1 python scripts/measure_cpu.py."""

import time
from collections.abc import Callable

import torch
import torch.nn.functional as F


def milliseconds(run: Callable[[], object], times: int = 30) -> float:
    """CPU time of one call, after one that does not count."""
    run()
    start = time.process_time()
    for _ in range(times):
        run()
    return (time.process_time() - start) / times * 1e3


for dtype in (torch.bfloat16, torch.float32):
    q, k, v, gradient = (torch.randn(64, 4, 32, 64, dtype=dtype) for _ in range(4))
    q, k, v = (part.requires_grad_() for part in (q, k, v))
    spent = milliseconds(lambda: F.scaled_dot_product_attention(q, k, v).backward(gradient))  # noqa: B023
    print(f"attention, 64 rows x 4 heads x 32 tokens x 64 wide, forward and backward, {dtype}: {spent:.1f} ms of CPU")

torch.manual_seed(0)
features, targets = torch.randn(512, 384), torch.randint(0, 30522, (512,))
weight = torch.randn(30522, 384) * 0.05
exact = F.cross_entropy(features @ weight.T, targets).item()
low = F.linear_cross_entropy(features.bfloat16(), weight.bfloat16(), targets)
float32 = F.cross_entropy((features.bfloat16() @ weight.bfloat16().T).float(), targets).item()
print(f"cross-entropy of float32 logits {exact:.4f}, of float32 copies of bfloat16 logits {float32:.4f}")
print(f"linear_cross_entropy on bfloat16 inputs {low.item():.4f} ({low.dtype})")
