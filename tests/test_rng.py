"""Generators depend on their key alone; slices of the global batch tile it."""

import hashlib
import itertools
import subprocess
import sys

import pytest
import torch

from ldlm.data.rows import batch_slice
from ldlm.rng import RowNoise, generator, normal, uniform


def test_a_generators_seed_is_the_blake2b_digest_of_seed_and_key():
    digest = hashlib.blake2b(b'[7, "noise", 3, 0, 1]', digest_size=8).digest()
    assert generator(7, "noise", 3, 0, 1).initial_seed() == int.from_bytes(digest, "little")


def test_another_process_draws_the_same_numbers():
    code = (
        "import torch; from ldlm.rng import generator as g; print(torch.rand(3, generator=g(1, 'order', 2)).tolist())"
    )
    there = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert there.strip() == str(torch.rand(3, generator=generator(1, "order", 2)).tolist())


def test_every_part_of_the_key_matters_and_so_does_its_type():
    keys = [
        (0,),
        (1,),
        (0, 1),
        (0, "1"),
        (0, 1, 2),
        (0, 12),
        (0, "noise", 1, 0),
        (0, "noise", 0, 1),
        (0, "order", 1, 0),
    ]
    first = {key: tuple(torch.rand(2, generator=generator(*key)).tolist()) for key in keys}
    assert len(set(first.values())) == len(keys)


def test_neighbouring_steps_give_uncorrelated_noise():
    draws = torch.stack([torch.randn(4096, generator=generator(0, "noise", step)) for step in range(8)])
    correlation = torch.corrcoef(draws) - torch.eye(8)
    assert correlation.abs().max() < 5 / 4096**0.5  # five standard errors


@pytest.mark.parametrize("draw", [normal, uniform])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_row_gets_its_own_generators_numbers_whichever_slice_it_is_in(draw, dtype):
    plain = {normal: torch.randn, uniform: torch.rand}[draw]
    own = [generator(3, "noise", 7, row) for row in range(6)]
    want = [torch.stack([plain(5, 2, generator=g, dtype=dtype) for g in own]) for _ in range(2)]
    want.append(torch.stack([plain((), generator=g, dtype=dtype) for g in own]))
    for parts in ([range(6)], [range(3), range(3, 6)], [range(row, row + 1) for row in range(6)]):
        sources = [RowNoise(3, "noise", 7, rows=part, total=6) for part in parts]
        got = [torch.cat([draw((len(s.rows), 5, 2), s, dtype) for s in sources]) for _ in range(2)]
        got.append(torch.cat([draw((len(s.rows),), s, dtype) for s in sources]))
        for one, other in zip(got, want, strict=True):
            assert torch.equal(one, other)


def test_numbers_of_one_generator_are_torchs_own():
    assert torch.equal(normal((4, 3), generator(1)), torch.randn(4, 3, generator=generator(1)))
    assert torch.equal(uniform((4, 3), generator(1)), torch.rand(4, 3, generator=generator(1)))


def test_the_noise_of_neighbouring_rows_and_steps_is_uncorrelated():
    draws = [normal((8, 4096), RowNoise(0, "noise", step, rows=range(8), total=8)) for step in range(2)]
    correlation = torch.corrcoef(torch.cat(draws)) - torch.eye(16)
    assert correlation.abs().max() < 5 / 4096**0.5  # five standard errors


@pytest.mark.parametrize(("world_size", "micro_steps"), [(1, 1), (2, 3), (4, 2)])
def test_the_slices_of_all_calls_tile_the_global_batch_micro_step_first(world_size, micro_steps):
    calls = itertools.product(range(micro_steps), range(world_size))
    rows = [list(range(48))[batch_slice(48, rank, world_size, micro, micro_steps)] for micro, rank in calls]
    assert list(itertools.chain.from_iterable(rows)) == list(range(48))
    assert {len(part) for part in rows} == {48 // (world_size * micro_steps)}


def test_an_uneven_division_names_its_three_numbers():
    with pytest.raises(ValueError, match=r"batch_size=10 .* 2 ranks x 3 accumulated batches.* multiple of 6"):
        batch_slice(10, 0, 2, 0, 3)


def test_a_rank_outside_the_world_is_refused():
    with pytest.raises(ValueError, match="rank=2 of world_size=2"):
        batch_slice(8, 2, 2, 0, 1)
