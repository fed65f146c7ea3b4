"""What a run is compared by when it is resumed: all that changes its result, the model's arguments and the run's.

In: a checkpoint, and the model, the trainer and the data that would go on from it. Out: a record for the next
checkpoint; a log of what changes from here on; a ValueError for what must not change unless it is insisted on by name.
No section of the paper.
"""

import math
import os
from collections.abc import Collection, Iterator, Mapping
from typing import Any

import lightning as L
import torch
from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor

from ldlm._files import brief
from ldlm.checkpoints.description import check_description
from ldlm.checkpoints.pretrained import check_weights
from ldlm.data.datamodule import PackedTextDataModule
from ldlm.nn.token_encoders import FrozenTokenEncoder, TokenEncoder
from ldlm.training.outputs import Task
from ldlm.training.records import name_job

# What may change when a run is resumed: the new value is used from there on, and both are logged.
APPLIED = (
    "learning_rate",
    "lr_decay",
    "weight_decay",
    "gradient_clip_val",
    "gradient_clip_algorithm",
    "precision",
    "devices",
    "accumulate_grad_batches",
    "limit_train_batches",
    "max_steps",
    "max_epochs",
)
# What one of the two runs may be without. (That averaging ends is refused by `LDLMTask`.)
OPTIONAL = ("EMA.decay", "tokenizer", "frozen")
# Training does not depend on them; of the last two, what the callbacks were told is compared.
FREE = ("sampler", "grid", "batches", "job", "warmup_steps", "timestep_refresh")
LISTED = 12  # differences that an error tells of


def check_resumed(
    checkpoint: Mapping[str, Any],
    about: Mapping[str, Any],
    encoder: TokenEncoder,
    data: L.LightningDataModule | None,
    allowed: Collection[str],
) -> None:
    """Compare a checkpoint's run with the one that would go on from it; log what changes.

    Args:
        checkpoint: What the file holds.
        about: What the next checkpoint would say of the model and its run.
        encoder: The model's token encoder. The weights of a frozen one are read, since a path says little.
        data: What the trainer reads its rows from, if that is known.
        allowed: Names that may change though they are not in `APPLIED`. A part's name stands for all its arguments.

    Raises:
        ValueError: If something differs that must not, naming both values; or if ``allowed`` has an unknown name.
    """
    old, new = (
        flat(told["model"]["init_args"]) | flat(read_training(told)) | read_run(told)
        for told in (checkpoint["ldlm"], about)
    )
    if isinstance(encoder, FrozenTokenEncoder) and old.get("token_encoder.sha256") is not None:
        encoder.frozen()
        new["token_encoder.sha256"] = encoder.sha256
        if encoder.sha256 == old["token_encoder.sha256"]:  # the same weights, wherever they are kept
            for name in ("token_encoder.model", "token_encoder.revision"):
                old.pop(name, None)
                new.pop(name, None)
    pairs = [(old, new)]
    if isinstance(data, PackedTextDataModule):
        stored = checkpoint.get(type(data).__qualname__)
        if isinstance(stored, dict):
            pairs.insert(0, (stored, data.state_dict()))
    elif PackedTextDataModule.__qualname__ in checkpoint:
        rank_zero_info("the rows of the checkpoint's run cannot be compared with those of a loader of one's own")
    known = {name for pair in pairs for values in pair for name in values if name not in FREE}
    if unknown := sorted(name for name in allowed if not any(_covers(name, other) for other in known)):
        raise ValueError(f"allow_changes names {unknown}, but there are only {', '.join(sorted(known))}")
    refused: dict[str, tuple[Any, Any]] = {}
    for theirs, ours in pairs:
        for name, was, now in differences(theirs, ours):
            free = name in APPLIED or (name in OPTIONAL and None in (was, now))
            if any(_covers(word, name) for word in allowed) or free:
                rank_zero_info(f"{brief(name)}: {brief(was)} in the checkpoint's run, {brief(now)} from here on")
            else:
                refused.setdefault(name, (was, now))
    if refused:
        name, (was, now) = next(iter(refused.items()))
        names = [*map(brief, [*refused][:LISTED])]
        others = [f"{brief(other)} ({brief(then)}, {brief(here)})" for other, (then, here) in refused.items()]
        others = others[1:LISTED] + [f"and {len(refused) - LISTED} more"] * (len(refused) > LISTED)
        raise ValueError(
            f"the checkpoint's run has {brief(name)} {brief(was)} and this one would go on with {brief(now)}: give "
            f"the same, or insist with allow_changes={names} of the task, --training.allow_changes "
            f"'[{', '.join(names)}]'{'; different too: ' if others else ''}{', '.join(others)}"
        )


def check_continues(
    checkpoint: dict[str, Any],
    about: Mapping[str, Any],
    task: Task,
    allowed: Collection[str],
) -> tuple[int, float] | None:
    """Refuse a checkpoint that a task's run could not continue from; else prepare Lightning's counts in it.

    Args:
        checkpoint: What the file holds.
        about: What the next checkpoint would say.
        task: That would continue.
        allowed: Names that may change, as in `check_resumed`.

    Returns:
        What `count_calls` says of the checkpoint's run.

    Raises:
        ValueError: Naming what does not fit.
    """
    told = check_description(checkpoint.get("ldlm"), "the checkpoint")
    run, data = read_run(told), task.trainer.datamodule  # type: ignore[attr-defined]
    check_requeued(task.trainer.ckpt_path, run, task.trainer)
    check_resumed(checkpoint, about, task.model.token_encoder, data, allowed)
    reopen_epoch(checkpoint.get("loops"))
    check_weights(task.model, checkpoint["state_dict"], "the checkpoint")
    if "optimizer_states" not in checkpoint:
        raise ValueError("this checkpoint holds weights alone (save_weights_only): training cannot go on from it")
    return count_calls(run)


def read_training(about: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of the task that wrote a description's file, by name; ValueError if it does not say them."""
    training = about.get("training")
    if not isinstance(training, dict) or not isinstance(arguments := training.get("init_args"), dict):
        raise ValueError("the checkpoint does not say how its model was trained: use one that an LDLMTask wrote")
    return arguments


def read_run(about: Mapping[str, Any]) -> dict[str, Any]:
    """What a description's file says of the run that wrote it; ValueError if it says no such thing."""
    run = about.get("run")
    if not isinstance(run, dict) or not all(isinstance(name, str) for name in run):
        raise ValueError("the checkpoint does not say what its run was like: training cannot go on from it")
    return run


def count_calls(run: Mapping[str, Any]) -> tuple[int, float] | None:
    """The accumulated batches of a run and the calls of its epochs, infinity if not known; None if neither is told."""
    parts, calls = run.get("accumulate_grad_batches"), run.get("batches")
    if isinstance(parts, int) and isinstance(calls, int | float) and parts > 0 and calls > 0:
        return parts, calls
    return None


def check_requeued(path: str | os.PathLike[str] | None, run: Mapping[str, Any], trainer: L.Trainer) -> None:
    """Refuse another SLURM job's requeue file, which Lightning takes where no checkpoint is named; ValueError."""
    if not SLURMEnvironment.detect() or run.get("job") == name_job(trainer):
        return
    if path is not None and str(path) == trainer._checkpoint_connector._hpc_resume_path:
        raise ValueError(
            f"{path} was left by the SLURM job {brief(run.get('job'))}, and Lightning would go on from it in this "
            "one: move it away to train from scratch; to go on from it, give it another name and name that as ckpt_path"
        )


def left_by_another_job(trainer: L.Trainer) -> bool:
    """Say whether Lightning (2.6.6) would go on from another SLURM job's requeue file, if no checkpoint is named."""
    path = trainer._checkpoint_connector._hpc_resume_path if SLURMEnvironment.detect() else None
    if path is None:
        return False
    try:
        job = torch.load(path, map_location="cpu", weights_only=True, mmap=True)["ldlm"]["run"]["job"]
    except Exception:  # untrusted bytes can make the reader raise anything; whose they are is not known then
        job = None
    other = bool(job != name_job(trainer))
    if other:
        rank_zero_info(f"{path} was left by the SLURM job {job}: it is passed over, and training starts from scratch")
    return other


def begin_anew(trainer: L.Trainer) -> None:
    """Let a trainer that is given no checkpoint look for none.

    In a SLURM job Lightning would take the newest requeue file of ``default_root_dir``, whichever run left it there.
    """
    trainer._checkpoint_connector._user_managed = True  # as if `trainer.ckpt_path` had been set, to None


def reopen_epoch(loops: Any) -> None:
    """Let an epoch that was cut short go on: Lightning counts it as finished in files written after its last step.

    Args:
        loops: A checkpoint's state of Lightning's (2.6.6) loops, changed in place.

    Raises:
        ValueError: If it is something else.
    """
    try:
        fit = loops["fit_loop"]
        epochs, batches = fit["epoch_progress"], fit["epoch_loop.batch_progress"]
        cut = not batches["is_last_batch"] and batches["current"]["ready"] > 0
        if cut and epochs["current"]["processed"] == epochs["current"]["ready"]:
            for counts in (epochs["total"], epochs["current"]):
                counts["completed"] = counts["processed"] = counts["processed"] - 1
        # Our loader's state is empty, and does not keep a run from going on with another loader.
        if not any(fit["state_dict"].get("combined_loader", [])):
            fit["state_dict"].pop("combined_loader", None)
    except (AttributeError, KeyError, TypeError) as error:
        raise ValueError(f"the checkpoint does not say how far its run came ({error!r}): use another") from error


def flat(arguments: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """A description's arguments by dotted names; a part's own name stands for its class.

    >>> flat({"d": 3, "schedule": {"class_path": "ldlm.Tangent", "init_args": {"d": 1}}})
    {'d': 3, 'schedule': 'ldlm.Tangent', 'schedule.d': 1}
    """
    values: dict[str, Any] = {}
    for name, value in arguments.items():
        part = isinstance(value, dict) and value.keys() == {"class_path", "init_args"}
        if part and isinstance(value["init_args"], dict):
            values[f"{prefix}{name}"] = value["class_path"]
            values |= flat(value["init_args"], f"{prefix}{name}.")
        else:
            values[f"{prefix}{name}"] = value
    return values


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> Iterator[tuple[str, Any, Any]]:
    """Name and both values of what differs; of two parts of different classes the classes alone."""
    other: list[str] = []
    for name in [*new, *(name for name in old if name not in new)]:
        was, now = old.get(name), new.get(name)
        if any(_covers(word, name) for word in (*FREE, *other)):
            continue
        # By their text, so that whatever a file holds can be compared; 1 and 1.0 are the same.
        numbers = isinstance(was, int | float) and isinstance(now, int | float) and was == now
        if numbers or repr(was) == repr(now):
            continue
        if any(key.startswith(f"{name}.") for key in (*old, *new)):
            other.append(name)
        yield name, was, now


def _covers(word: str, name: str) -> bool:
    return name == word or name.startswith(f"{word}.")


def align_progress(trainer: L.Trainer, counted: tuple[int, float] | None) -> None:
    """See that ranks are at the same step, and make Lightning count this run's calls, not those of the one before.

    Lightning 2.6.6 counts the calls of an epoch, of which another number of accumulated batches or of rows makes
    more or fewer. The same share of the epoch is counted as done, in complete steps: a checkpoint may have been
    written between two accumulated batches (by ``train_time_interval``, or in the first step after resuming), whose
    gradient is in no checkpoint, so that their step is begun anew.

    Args:
        trainer: At the start of its training.
        counted: Accumulated batches, and calls of an epoch, of the run that is resumed; None in a new one.

    Raises:
        ValueError: If ranks are at different steps.
    """
    step = torch.tensor([trainer.global_step], device=trainer.strategy.root_device)
    steps: Tensor = trainer.strategy.all_gather(step)
    if (steps != trainer.global_step).any():
        raise ValueError(
            f"the ranks would go on from different steps, {steps.flatten().tolist()}: give --ckpt_path a file that "
            "all of them can read"
        )
    loop = trainer.fit_loop.epoch_loop
    progress = loop.batch_progress
    parts, batches = trainer.accumulate_grad_batches, trainer.num_training_batches
    parts_then, batches_then = counted or (parts, batches)
    ready = progress.current.ready
    before, done = progress.total.ready - ready, ready - ready % parts_then
    if progress.is_last_batch:  # the last batch of an epoch is stepped on whatever was accumulated
        done = ready
    if math.inf not in (batches, batches_then):
        before, done = before * int(batches) // int(batches_then), done * int(batches) // int(batches_then)
    if not progress.is_last_batch:
        done -= done % parts
        if ready % parts_then and loop.restarted_on_train_batch_end:
            loop._batches_that_stepped -= 1  # the step of the loggers, which Lightning takes for made
    for counts, now in ((vars(progress.current), done), (vars(progress.total), before + done)):
        shift = now - counts["ready"]
        for name in counts:  # ready, started, processed, completed
            counts[name] += shift
