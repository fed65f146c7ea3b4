"""A run that is told to stop: it saves at the end of a step, on all ranks, and exits with status 143.

In: SIGTERM, SIGUSR1, or one rank's exception. Out: a last checkpoint; no process left behind. No section of the paper.
"""

import signal
import subprocess
import threading
import time
from types import FrameType
from typing import Any

import lightning as L
import torch
import torch.distributed as dist
from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies.launchers import _SubprocessScriptLauncher
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor

from ldlm._files import exit_on_signal, visible
from ldlm.checkpoints.io import CheckpointFiles
from ldlm.training.stability import DeferredRead

SECONDS = 2.0  # of training between two times that ranks compare notes; the answer is read as long after
GRACE = 10.0  # seconds that other processes of this machine get to say what happened to them


class Stopped(SystemExit):
    """A run that ended early and well, on a signal: status 143, as shells report SIGTERM."""


class StopOnSignal(L.Callback):
    """On SIGTERM or SIGUSR1, saves at the end of the step and exits with status 143.

    The handler notes the signal and does nothing else. A process on its own looks at the note after each step; several
    compare notes by a collective that runs beside the training, about every two seconds of it, and go by the answer
    one interval later. A validation is finished first. Before the first step nothing is there to save.

    The checkpoint is the last one of the trainer's `ModelCheckpoint`, or ``last.ckpt`` in its folder. Under SLURM with
    Lightning's auto-requeue, SIGUSR1 then leads to ``scontrol requeue``, with Lightning's own ``hpc_ckpt`` beside it.

    An exception on one rank ends the other processes that Lightning started on its machine.

    Args:
        every_n_steps: Optimizer steps between two comparisons at most.
    """

    def __init__(self, every_n_steps: int = 25) -> None:
        if every_n_steps < 1:
            raise ValueError(f"every_n_steps={every_n_steps} must be at least 1")
        self.every_n_steps = every_n_steps
        self.received = 0
        self._previous: dict[int, Any] = {}

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Listen, in place of Lightning, from before the weights are restored."""
        if stage != "fit" or threading.current_thread() is not threading.main_thread():
            return
        # Last, so that averages and statistics of the step are in the checkpoint. A new list: this one is iterated.
        trainer.callbacks = [c for c in trainer.callbacks if c is not self] + [self]  # type: ignore[attr-defined]
        self.received = 0
        wanted = {s for s in signal.Signals if s.name in ("SIGTERM", "SIGUSR1") or s in _requeue_signals(trainer)}
        self._previous = {s: signal.signal(s, self._note) for s in wanted}
        silence_lightning(trainer)

    def _note(self, signum: int, frame: FrameType | None) -> None:
        self.received = max(self.received, signum)
        previous = self._previous.get(signum)
        if callable(previous) and previous is not exit_on_signal:
            previous(signum, frame)

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Note the step, which a resumed run knows only now."""
        self._next, self._later = trainer.global_step + 1, DeferredRead()
        self._since = trainer.global_step, time.perf_counter()

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: object, batch: Tensor, batch_idx: int
    ) -> None:
        """At the end of a step, see whether this is the end of the run."""
        step = trainer.global_step
        if step < self._next:  # also within a step
            return
        self._next = step + 1
        signum = self.received
        if trainer.world_size > 1:
            signum, seconds = (0, SECONDS) if (answer := self._later.read()) is None else (int(answer[0]), answer[1])
            # All ranks go by the slowest one's step, so that they come here at the same steps.
            self._next = step + min(max(int(SECONDS / max(seconds, 1e-6)), 1), self.every_n_steps)
            start, began = self._since
            self._since = (step, time.perf_counter())
            taken = (self._since[1] - began) / (step - start)
            note = torch.tensor([float(self.received), taken], device=trainer.strategy.root_device)
            if not signum:
                self._later.send(note, dist.all_reduce(note, dist.ReduceOp.MAX, async_op=True))
        if signum:
            self._stop(trainer, signum)

    def _stop(self, trainer: L.Trainer, signum: int) -> None:
        path = path_of_last(trainer)
        if path is not None:
            trainer.save_checkpoint(path)
        files = trainer.strategy.checkpoint_io
        saved = f"go on with --ckpt_path {path}" if path else "nothing was saved: the trainer keeps no checkpoints"
        if isinstance(files, CheckpointFiles) and files.failures:
            saved = f"{path} could not be written (a warning above says why): go on from what was saved before"
        rank_zero_info(f"{signal.Signals(signum).name} after step {trainer.global_step}: {visible(saved)}")
        if signum in _requeue_signals(trainer):  # saves where Lightning looks in a requeued job, and calls scontrol
            trainer._signal_connector._slurm_sigusr_handler_fn(signal.Signals(signum), None)  # type: ignore[arg-type]
        raise Stopped(128 + signal.SIGTERM)

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Let other processes of this machine say what happened to them; then end them."""
        self._forget(trainer)
        if isinstance(launcher := trainer.strategy.launcher, _SubprocessScriptLauncher):
            children, end = [*launcher.procs], time.perf_counter() + GRACE
            launcher.procs.clear()  # else Lightning's observer kills this process as soon as one of them has ended
            for child in children:
                try:
                    child.wait(max(end - time.perf_counter(), 0.1))
                except subprocess.TimeoutExpired:
                    child.kill()  # it waits in a collective for this process, most likely
                    child.wait()

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Give the signals back."""
        self._forget(trainer)

    def _forget(self, trainer: L.Trainer) -> None:
        for signum, handler in self._previous.items():
            signal.signal(signum, handler)
        self._previous = {}
        unsilence_lightning(trainer)


def silence_lightning(trainer: L.Trainer) -> None:
    """Keep Lightning's own handling of signals out of a fit.

    Seen in 2.6.6: it broadcasts inside its SIGTERM handler, which can hang, and once a step, which waits for the
    device.
    """
    trainer._signal_connector.register_signal_handlers = _nothing  # type: ignore[method-assign]
    trainer.fit_loop.epoch_loop._broadcast_sigterm_tensor = _nothing  # type: ignore[method-assign]


def unsilence_lightning(trainer: L.Trainer) -> None:
    """Undo `silence_lightning`."""
    for owner, name in [
        (trainer._signal_connector, "register_signal_handlers"),
        (trainer.fit_loop.epoch_loop, "_broadcast_sigterm_tensor"),
    ]:
        vars(owner).pop(name, None)


def check_signals(trainer: L.Trainer) -> None:
    """End the run if a signal has come: for long work before the first step, when there is nothing to save.

    Raises:
        Stopped: If it is to stop.
    """
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, StopOnSignal) and callback.received:
            rank_zero_info(f"{signal.Signals(callback.received).name} before the first step: there is nothing to save")
            raise Stopped(128 + signal.SIGTERM)


def path_of_last(trainer: L.Trainer) -> str | None:
    """Where the trainer's first `ModelCheckpoint` has its last checkpoint, or would have it; None without any."""
    callback = trainer.checkpoint_callback
    if not isinstance(callback, ModelCheckpoint):
        return None
    name = f"{callback.CHECKPOINT_NAME_LAST}{callback.FILE_EXTENSION}"
    return callback.last_model_path or f"{callback.dirpath}/{name}"


def _requeue_signals(trainer: L.Trainer) -> list[int]:
    """The signal on which a SLURM job is to be put back into the queue, if that is wanted."""
    environment = trainer._accelerator_connector.cluster_environment
    requeued = isinstance(environment, SLURMEnvironment) and environment.auto_requeue and environment.requeue_signal
    return [requeued] if requeued else []


def _nothing() -> None:
    pass
