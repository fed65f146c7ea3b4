"""What numbers were computed with: versions of packages, the device's name.

In: nothing, a device. Out: plain data for a JSON file. No section of the paper.
"""

import hashlib
import platform
from importlib.metadata import version
from pathlib import Path

import torch

import ldlm
from ldlm._files import sha256


def versions() -> dict[str, str]:
    """What a result was made with; the digest is of this package's own code, which a version number does not tell."""
    code = sorted(Path(ldlm.__file__).parent.rglob("*.py"))
    digest = hashlib.sha256("".join(sha256(file) for file in code).encode()).hexdigest()[:12]
    packages = {name: version(name) for name in ("torch", "lightning", "transformers")}
    return {"ldlm": f"{ldlm.__version__} ({digest})", **packages, "python": platform.python_version()}


def device_name(device: torch.device) -> str:
    """A GPU's name, or the kind of any other device with the machine's."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{platform.machine()} CPU" if device.type == "cpu" else device.type
