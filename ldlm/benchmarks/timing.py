"""How long something takes, and how much of the device it uses.

In: functions to call. Out: seconds with their spread, floating-point operations, bytes; the device they are of.
No section of the paper.

What is compared runs in turn, A B A B: a machine that slows down for a while slows down all of it, and quotients are
taken within a turn.
"""

import os
import re
import resource
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from ldlm.evaluation.environment import device_name, versions

Run = Callable[[], object]
Clock = Callable[[], float]
Numbers = dict[str, Any]

# Instruction sets that decide how fast a CPU multiplies, by PyTorch's names.
FLAGS = ("avx2", "avx512_f", "avx512_bf16", "avx512_fp16", "amx_bf16", "amx_fp16", "neon", "bf16", "sve")
MATMUL_SIZES = {"cpu": (512, 1024, 2048), "cuda": (2048, 4096, 8192)}
PROCESS = Path("/proc/self")
aten = torch.ops.aten
FORMULAS = flop_registry | {  # a CPU's attention, which PyTorch does not count, takes what a GPU's takes
    aten._scaled_dot_product_flash_attention_for_cpu: flop_registry[aten._scaled_dot_product_flash_attention],
    aten._scaled_dot_product_flash_attention_for_cpu_backward: flop_registry[
        aten._scaled_dot_product_flash_attention_backward
    ],
}


def synchronize(device: torch.device) -> None:
    """Wait until the device has done what it was told."""
    torch.get_device_module(device).synchronize()


def interleave(
    runs: Mapping[str, Run], repeats: int, device: torch.device, clock: Clock = time.perf_counter, warmup: int = 1
) -> dict[str, list[float]]:
    """Seconds of each call of each function, called in turn.

    Args:
        runs: Functions by name.
        repeats: Turns that count.
        device: Waited for before and after each call.
        clock: Tells the time, in seconds.
        warmup: Turns before them: compilation, caches, the allocator's first pages.
    """
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(-warmup, repeats):
        for name, run in runs.items():
            synchronize(device)
            start = clock()
            run()
            synchronize(device)
            if turn >= 0:
                seconds[name].append(clock() - start)
    return seconds


def spread(values: Sequence[float], scale: float = 1.0) -> Numbers:
    """Median, extremes and all of some values, each times ``scale``."""
    scaled = [value * scale for value in values]
    return {"median": statistics.median(scaled), "min": min(scaled), "max": max(scaled), "all": scaled}


def quotients(above: Sequence[float], below: Sequence[float], scale: float = 1.0) -> Numbers:
    """The spread of one function's seconds over another's, turn by turn, times ``scale``."""
    return spread([one / other for one, other in zip(above, below, strict=True)], scale)


def rate(amount: float, seconds: Sequence[float]) -> Numbers:
    """So much a second: of the median time, with the slowest and the fastest turn."""
    median = amount / statistics.median(seconds)
    return {"median": median, "min": amount / max(seconds), "max": amount / min(seconds)}


def utilisation(flops: float, seconds: Sequence[float], best: float) -> Numbers:
    """What calls of so many floating-point operations make a second, and the share (MFU) of the ``best`` rate."""
    reached = rate(flops, seconds)
    return {
        "flops_per_second": reached,
        "matmul_flops_per_second": best,
        "mfu": {name: value / best for name, value in reached.items()},
    }


def line(x: Sequence[float], y: Sequence[float]) -> Numbers:
    """The straight line of least squares through points, and how far they are from it.

    Returns:
        slope, intercept, r_squared, and worst_deviation, the largest |y - line| / |y|.
    """
    slope, intercept = statistics.linear_regression(x, y)
    worst = max(abs(slope * one + intercept - other) / abs(other) for one, other in zip(x, y, strict=True))
    # A constant has no correlation; its line goes through every point.
    r_squared = statistics.correlation(x, y) ** 2 if len(set(y)) > 1 else 1.0
    return {"slope": slope, "intercept": intercept, "r_squared": r_squared, "worst_deviation": worst}


class Flops(TorchDispatchMode):
    """Adds up floating-point operations by PyTorch's formulas.

    `FlopCounterMode` also keeps count of modules, and fails on one that is called without gradients in a model that has
    some, as self-conditioning does.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.total: int = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Do what is asked, and add what it took."""
        out = func(*args, **(kwargs or {}))
        formula = FORMULAS.get(func._overloadpacket)
        self.total += formula(*args, **(kwargs or {}), out_val=out) if formula else 0
        return out


def count_flops(run: Run) -> int:
    """Floating-point operations of matrix products and attention in one call; a multiplication and an addition are two.

    What is computed again in a backward pass counts again. Compiled code is not seen: count before compiling.
    """
    counter = Flops()
    with counter:
        run()
    return counter.total


def matmul_rate(
    device: torch.device,
    dtype: torch.dtype,
    clock: Clock = time.perf_counter,
    sizes: Sequence[int] = (),
    repeats: int = 5,
) -> float:
    """Floating-point operations a second of the device's best square matrix product: what utilisation is a share of.

    Args:
        device: What multiplies.
        dtype: Of the matrices.
        clock: Tells the time, in seconds.
        sizes: Sides to try; none for sizes that fill such a device.
        repeats: Calls of each that count; the fastest of all is the answer.
    """
    sides = sizes or MATMUL_SIZES.get(device.type, MATMUL_SIZES["cuda"])
    squares = {size: torch.randn(size, size, device=device).to(dtype) for size in sides}
    runs: dict[str, Run] = {str(size): partial(torch.matmul, square, square) for size, square in squares.items()}
    seconds = interleave(runs, repeats, device, clock)
    return max(2 * size**3 / min(seconds[str(size)]) for size in squares)


def peak_memory(run: Run, device: torch.device) -> Numbers:
    """Bytes held at most during one call, and when it began: of a GPU's allocations, or of what `memory_of` says."""
    _forget_peak(device)
    before = _peak(device)
    run()
    return {"peak_memory_bytes": _peak(device), "memory_before_bytes": before}


def _forget_peak(device: torch.device) -> bool:
    """Let the peak begin anew, which a process can on Linux alone; whether it did."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return True
    try:
        (PROCESS / "clear_refs").write_text("5")
    except OSError:
        return False
    return True


def _peak(device: torch.device) -> int:
    """The most allocated on a GPU, or the largest resident size of this process, in bytes."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    status = PROCESS / "status"
    if status.is_file() and (found := re.search(r"VmHWM:\s+(\d+) kB", status.read_text())):
        return 1024 * int(found[1])
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


@contextmanager
def fitting(sizes: str, remedy: str) -> Iterator[None]:
    """Turn a device that is out of memory into a sentence that names the sizes and what to lower.

    Raises:
        ValueError: If what runs inside asks for more memory than there is.
    """
    try:
        yield
    except (RuntimeError, MemoryError) as error:  # torch.OutOfMemoryError is a RuntimeError, and so is the CPU's
        if isinstance(error, torch.OutOfMemoryError | MemoryError) or "DefaultCPUAllocator" in str(error):
            raise ValueError(f"{sizes} do not fit into memory: {remedy}") from error
        raise


def surroundings(device: torch.device) -> Numbers:
    """What numbers depend on beside the code: versions, device, instruction sets, threads; what memory is counted."""
    processor = torch.cpu.get_capabilities()
    memory = "allocations on the device" if device.type == "cuda" else "resident size of the process"
    return {
        "versions": versions(),
        "device": device_name(device),
        "cpu": processor.get("cpu_name", processor.get("architecture")),
        "cpu_flags": [flag for flag in FLAGS if processor.get(flag)],
        "threads": torch.get_num_threads(),
        "cores": os.cpu_count(),
        "float32_matmul_precision": torch.get_float32_matmul_precision(),
        "memory_of": memory + ("" if _forget_peak(device) else ", the largest since it began"),
    }
