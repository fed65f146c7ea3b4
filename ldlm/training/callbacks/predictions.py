"""What ``ldlm predict`` writes: each row beside its reconstruction.

In: batches and their reconstructions. Out: a file of JSON lines. No section of the paper.
"""

import json
from pathlib import Path
from typing import Any

import lightning as L
from rich.console import Console
from rich.text import Text
from torch import Tensor

from ldlm._files import is_special, visible, write_atomically
from ldlm.training.outputs import model_of


class ReconstructionWriter(L.Callback):
    """Writes what ``ldlm predict`` makes: each row and its reconstruction, as the JSON lines of `LDLM.to_lines`.

    Args:
        path: File to write; with several ranks each adds its number to the name.
    """

    def __init__(self, path: str = "reconstructions.jsonl") -> None:
        self.path = path
        self._lines: list[str] = []

    def on_predict_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: Tensor,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Collect one batch."""
        model = model_of(pl_module)
        for row, again in zip(model.to_lines(batch), model.to_lines(outputs, "reconstruction"), strict=True):
            self._lines.append(json.dumps(row | again, ensure_ascii=False))

    def on_predict_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Write the file whole."""
        path = Path(self.path)
        if trainer.world_size > 1 and not is_special(path):
            path = path.with_stem(f"{path.stem}-{trainer.global_rank}")
        with write_atomically(path) as file:
            file.write("".join(line + "\n" for line in self._lines).encode())
        Console(stderr=True).print(Text(f"{len(self._lines)} rows and their reconstructions are in {visible(path)}"))
        self._lines = []
