"""What makes the host wait for its device."""

from torch.utils._python_dispatch import TorchDispatchMode

WAITS = {f"aten::{name}" for name in ("_local_scalar_dense", "is_nonzero", "nonzero", "equal", "allclose")}


class Waits(TorchDispatchMode):
    """Listens for operations that bring a number from the device to Python."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def hear(self, name: str) -> None:
        self.found.append(name)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.name().partition(".")[0]
        if name in WAITS:
            self.hear(name)
        return function(*args, **(kwargs or {}))
