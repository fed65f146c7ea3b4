"""Today's code computes what was recorded: the same losses, weights and texts from the same seeds."""

import json

import pytest
import torch
from helpers import recorded

TOLD = json.loads(recorded.FILE.read_text())


@pytest.fixture(autouse=True)
def one_thread():
    """Sums over two threads are other sums."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize("name", recorded.CASES)
def test_losses_weights_and_generated_ids_are_those_that_were_recorded(tmp_path, name):
    found, told = recorded.CASES[name](tmp_path), TOLD[name]
    if recorded.arithmetic() == TOLD["arithmetic"]:  # else another CPU's kernels round otherwise
        assert found == told
    # AdamW divides by the root of small second moments, so that rounding grows from step to step: by 10³ in 20.
    first = [[float.fromhex(loss) for loss in one["losses"][:8]] for one in (found, told)]
    assert first[0] == pytest.approx(first[1], rel=1e-5)


def test_a_corpus_is_packed_into_the_bytes_that_were_recorded(tmp_path):
    assert recorded.pack(tmp_path) == TOLD["packed corpus"]
