"""Two processes on the same global batch are one, and no bad number of one rank parts them."""

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.faults import KINDS
from helpers.runs import differences, run


def left(folder: Path, rank: int = 0) -> dict[str, Any]:
    return torch.load(folder / f"rank{rank}.pt", weights_only=True)


@pytest.mark.slow
def test_two_ranks_are_one_process_in_gradients_weights_statistics_metrics_and_texts(tmp_path):
    common = {"batch_size": 8, "save_every": 100, "max_steps": 7, "validation": 8}
    run({"folder": str(tmp_path / "one"), **common}, {"folder": str(tmp_path / "one2"), **common, "accumulated": 2})
    run(
        {"folder": str(tmp_path / "two"), "devices": 2, **common},
        {"folder": str(tmp_path / "two2"), "devices": 2, **common, "accumulated": 2},
    )
    one = left(tmp_path / "one")
    assert {"validation/diffusion", "validation/token", "validation/accuracy"} <= one["metrics"].keys()
    assert one["state"]["timesteps.den"].sum() > 30
    for name in ("one2", "two", "two2"):
        other = left(tmp_path / name)
        for key, value in one["gradients"].items():
            torch.testing.assert_close(
                other["gradients"][key], value, rtol=1e-5, atol=1e-7 + 1e-6 * value.abs().max().item()
            )
        for part in ("state", "raw", "metrics"):
            for key, value in one[part].items():
                # After a refresh the times follow the rounding of losses, and a row's share of an edge moves by the
                # number of bins, 100, times as much as its time.
                atol = 100 * 1e-5 if key.startswith("timesteps.") else 1e-5
                torch.testing.assert_close(
                    other[part][key], value, rtol=1e-4, atol=atol, msg=lambda m, key=key: f"{key}: {m}"
                )
        assert torch.equal(other["tokens"], one["tokens"])
        assert other["texts"] == one["texts"]
    assert len(set(one["texts"])) > 1


@pytest.mark.slow
def test_ranks_that_would_go_on_from_different_steps_are_refused(tmp_path):
    run({"folder": str(tmp_path / "first"), "max_steps": 2, "batch_size": 8})
    common = {"folder": str(tmp_path / "two"), "devices": 2, "max_steps": 6, "batch_size": 8}
    with pytest.raises(AssertionError, match=r"the ranks would go on from different steps, \[0, 2\]"):
        run({**common, "resume": str(tmp_path / "first" / "last.ckpt"), "resuming_rank": 1})


@pytest.mark.slow
def test_a_bad_number_of_one_rank_is_left_out_by_both(tmp_path):
    common = {"devices": 2, "batch_size": 8, "max_steps": 6}
    runs = [{"folder": str(tmp_path / kind), "poison": [kind, [3], 1], **common} for kind in KINDS]
    run({"folder": str(tmp_path / "whole"), **common}, *runs)
    for kind in KINDS:
        before, after, end = (
            torch.load(tmp_path / kind / f"step={step}.ckpt", weights_only=True) for step in (3, 4, 6)
        )
        for part in ("state_dict", "raw_parameters", "optimizer_states"):
            assert [d for d in differences(before[part], after[part], part) if ".lr: " not in d] == []
        assert differences(after["raw_parameters"], end["raw_parameters"]) != []
        assert differences(left(tmp_path / kind, 0), left(tmp_path / kind, 1)) == []
        assert left(tmp_path / kind)["metrics"]["train/skipped_steps"] == 1
    assert differences(left(tmp_path / "whole", 0), left(tmp_path / "whole", 1)) == []
    assert left(tmp_path / "whole")["metrics"]["train/skipped_steps"] == 0
    # All kinds left out the same step, so all ended alike.
    for kind in KINDS[1:]:
        assert differences(left(tmp_path / KINDS[0])["raw"], left(tmp_path / kind)["raw"]) == []
