"""How much memory a test may take."""

import resource
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def at_most(megabytes: int) -> Iterator[None]:
    """Within, whatever asks for more than that, beyond what the process has, gets an error and no memory."""
    with open("/proc/self/statm") as file:
        now = int(file.read().split()[0]) * resource.getpagesize()
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (now + megabytes * 2**20, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
