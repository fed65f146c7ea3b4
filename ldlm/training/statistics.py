"""The hidden states' mean and standard deviation, measured on the rows that a fit will train on.

In: a task at the start of its fit. Out: statistics in its token encoder.
No section of the paper: see docs/decisions.md.
"""

from lightning.pytorch.utilities import CombinedLoader

from ldlm.data.datamodule import PackedTextDataModule
from ldlm.training.outputs import Task


def measure_statistics(task: Task, rows: int) -> None:
    """Measure them on the training loader's first rows, in the order of training.

    Args:
        task: Whose trainer has the loader.
        rows: At least so many over all ranks: of a `PackedTextDataModule`, complete optimizer steps are read, however
            they are divided into calls.

    Raises:
        ValueError: If there are several training loaders, or no rows in one.
    """
    trainer = task.trainer
    trainer.fit_loop.setup_data()
    loader, data = trainer.train_dataloader, trainer.datamodule  # type: ignore[attr-defined]
    loaders = [] if loader is None else CombinedLoader(loader).flattened
    if len(loaders) > 1:
        raise ValueError(f"the trainer was given {len(loaders)} training loaders together: give one")
    batches = (task._on_before_batch_transfer(batch) for loader in loaders for batch in loader)
    if isinstance(data, PackedTextDataModule):
        rows = -(-rows // data.batch_size) * data.batch_size
    task.model.token_encoder.fit_statistics(batches, rows)
