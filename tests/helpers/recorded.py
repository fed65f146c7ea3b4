"""What the tiny model computes, bit for bit: losses of 20 steps, final weights, generated ids; and a packed corpus.

``cd tests; python -m helpers.recorded`` writes them anew into ``data/recorded.json``, which a change of structure must
not.
"""

import hashlib
import json
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn

from helpers import ROOT
from helpers.tiny import LENGTH, make_data, make_task, make_trainer
from ldlm.objective import TokenObjective
from ldlm.training.callbacks.ema import EMA
from ldlm.training.stages import token_decoder_stage
from ldlm.training.task import LDLMTask

FILE = ROOT / "tests" / "data" / "recorded.json"
STEPS = 20


def digest(tensors: dict[str, Tensor]) -> str:
    whole = hashlib.sha256()
    for name, tensor in tensors.items():
        whole.update(name.encode() + tensor.cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return whole.hexdigest()


def arithmetic() -> str:
    """A digest of this machine's float32: where it differs, so may the last bits of everything else."""
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(4, 8, 16, generator=draw, requires_grad=True)
    w = torch.randn(16, 16, generator=draw, requires_grad=True)
    heads = (x @ w).view(4, 8, 2, 8).transpose(1, 2)
    y = nn.functional.scaled_dot_product_attention(heads, heads, heads).transpose(1, 2).reshape(4, 8, 16)
    y = nn.functional.gelu(nn.functional.layer_norm(y, (16,))) * torch.sigmoid(x)
    loss = nn.functional.cross_entropy(y.flatten(0, 1), torch.arange(32) % 16) + y.exp().square().mean()
    loss.backward()
    version = torch.tensor(list(torch.__version__.encode()))
    return digest({"loss": loss.detach(), "x": x.grad, "w": w.grad, "torch": version})


class Losses(L.Callback):
    """Each call's loss, appended to a file by rank 0, as processes that a strategy starts end with what they know."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def setup(self, trainer, pl_module, stage) -> None:
        torch.set_num_threads(1)  # as in the process that recorded; a strategy may have started this one

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        if trainer.global_rank == 0:
            with self.file.open("a") as file:
                file.write(f"{float(outputs['loss']).hex()}\n")


def fit(folder: Path, task: LDLMTask, callbacks: list[L.Callback], **trainer: Any) -> dict[str, Any]:
    losses = folder / "losses"
    make_trainer(folder, [*callbacks, Losses(losses)], max_steps=STEPS, **trainer).fit(task, make_data(folder))
    model = task.model
    ids = model.sample_tokens(3, nfe=4, seed=1, batch_size=3).tolist()
    return {"losses": losses.read_text().split(), "weights": digest(model.state_dict()), "ids": ids}


def task() -> LDLMTask:
    return make_task(warmup_steps=10, timestep_refresh=5)


def stage(folder: Path) -> dict[str, Any]:
    trainer = make_trainer(folder, [], max_steps=2)
    trainer.fit(task(), make_data(folder))
    trainer.save_checkpoint(folder / "first.ckpt")
    torch.manual_seed(1)
    model = token_decoder_stage(str(folder / "first.ckpt"), layers=1, heads=2)
    return fit(folder, LDLMTask(model, TokenObjective(), warmup_steps=0, lr_warmup_steps=0), [])


CASES = {
    "joint": lambda folder: fit(folder, task(), []),
    "EMA": lambda folder: fit(folder, task(), [EMA(0.9)]),
    "accumulated": lambda folder: fit(folder, task(), [], accumulate_grad_batches=2),
    "token decoder alone": stage,
    "two ranks": lambda folder: fit(folder, task(), [], devices=2, strategy="ddp_spawn"),
}


def pack(folder: Path) -> str:
    data = make_data(folder)
    data.prepare_data()
    data.setup("fit")
    return hashlib.sha256(data.train_dataset.path.read_bytes()).hexdigest()


def main() -> None:
    torch.set_num_threads(1)
    told: dict[str, Any] = {"arithmetic": arithmetic(), "length": LENGTH}
    for name, case in CASES.items():
        with TemporaryDirectory() as folder:
            told[name] = case(Path(folder))
    with TemporaryDirectory() as folder:
        told["packed corpus"] = pack(Path(folder))
    FILE.write_text(json.dumps(told, indent=1) + "\n")


if __name__ == "__main__":
    main()
