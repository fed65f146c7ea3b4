"""Training state of an untrusted checkpoint: looked at before Lightning takes it.

In: what a checkpoint holds besides weights. Out: the same, without paths outside the run's own folder; or a ValueError
that says which part of it is of another kind than this run would write. No section of the paper.

Lightning 2.6.6 adopts a file's paths, counts and attributes as they stand. What is restored here has the keys and kinds
of this run's own state, so that a malformed file ends before the first step and not within training.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint, Timer
from lightning.pytorch.callbacks.early_stopping import EarlyStoppingReason
from lightning.pytorch.trainer.connectors.checkpoint_connector import _CheckpointConnector
from lightning.pytorch.trainer.states import RunningStage
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor

from ldlm.checkpoints.integrity import is_remote

MOST = 2**53  # of any count: beyond it a float, as loggers write them, tells two steps apart no more


class CheckedStates(_CheckpointConnector):
    """Lightning's restoring, with each state checked first; an error in it is one sentence."""

    @classmethod
    def look_at(cls, trainer: L.Trainer) -> None:
        """Take the place of a trainer's own."""
        if not isinstance(trainer._checkpoint_connector, cls):
            checked = cls(trainer)
            vars(checked).update(vars(trainer._checkpoint_connector))
            trainer._checkpoint_connector = checked

    def resume_start(self, *arguments: Any, **named: Any) -> None:
        """Read the file; Lightning migrates what says that it is of an older version."""
        with one_sentence("it"):
            super().resume_start(*arguments, **named)
        checkpoint = self._loaded_checkpoint
        check_like({key: checkpoint[key] for key in {"epoch", "global_step"} & checkpoint.keys()}, COUNTS, "")

    def restore_datamodule(self) -> None:
        """The state of the data, a dictionary."""
        data: L.LightningDataModule | None = self.trainer.datamodule  # type: ignore[attr-defined]
        name = type(data).__qualname__
        if data is not None and name in self._loaded_checkpoint:
            check_kind(self._loaded_checkpoint[name], dict, name)
        with one_sentence("its state of the data"):
            super().restore_datamodule()

    def restore_model(self) -> None:
        """Weights, by names and shapes."""
        with one_sentence("its weights"):
            super().restore_model()

    def restore_callbacks(self) -> None:
        """Callbacks' states; those of Lightning and ours are compared, a user's own judges for itself."""
        states = self._loaded_checkpoint.get("callbacks")
        if states is not None:
            check_kind(states, dict, "callbacks")
            callbacks: list[L.Callback] = self.trainer.callbacks  # type: ignore[attr-defined]
            self._loaded_checkpoint["callbacks"] = states | {
                callback.state_key: checked_state(callback, states[callback.state_key])
                for callback in callbacks
                if states.get(callback.state_key)
            }
        with one_sentence("its state of a callback"):
            super().restore_callbacks()

    def restore_training_state(self) -> None:
        """Counts of the loops, the loss scaler, optimizers and their schedulers."""
        checkpoint, trainer = self._loaded_checkpoint, self.trainer
        checkpoint.pop("native_amp_scaling_state", None)  # another place of the loss scaler's, of old versions
        with one_sentence("its state of the training"):
            if "loops" in checkpoint:
                check_like(checkpoint["loops"], self._get_loops_state_dict(), "loops")
            precision = trainer.precision_plugin
            if (scaler := checkpoint.get(name := type(precision).__qualname__)) is not None:
                check_like(scaler, precision.state_dict(), name)
                check_above_zero(scaler, name)
            if trainer.training and checkpoint:
                schedulers = [configuration.scheduler for configuration in trainer.lr_scheduler_configs]
                check_each("lr_schedulers", checkpoint, [scheduler.state_dict() for scheduler in schedulers])
                check_each("optimizer_states", checkpoint, [options(own) for own in trainer.optimizers])
                for state, own in zip(checkpoint["optimizer_states"], trainer.optimizers, strict=True):
                    check_counts(state["param_groups"], own)
                    check_moments(state["state"], own)
            super().restore_training_state()
        if trainer.training and checkpoint and checkpoint.get("global_step") != trainer.global_step:
            raise wrong("global_step", checkpoint.get("global_step"), f"its loops' own {trainer.global_step}")


COUNTS = {"epoch": 0, "global_step": 0}


@contextmanager
def one_sentence(what: str) -> Iterator[None]:
    """Tell what is wrong with a state as a ValueError; its values can make whoever takes them raise anything."""
    try:
        yield
    except (OSError, MisconfigurationException, torch.OutOfMemoryError):
        raise
    except Exception as error:
        if type(error) is ValueError:  # a sentence already, while its subclasses are of odd versions and encodings
            raise
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        raise ValueError(
            f"training cannot go on from this checkpoint: {what} cannot be taken ({reason}); use another checkpoint, "
            "or begin a new run"
        ) from error


def wrong(name: str, found: object, wanted: str) -> ValueError:
    """The error for a state of another kind; its own values are not shown, as they can be of any size."""
    return ValueError(
        f"training cannot go on from this checkpoint: its {name.lstrip('.')[:100]!r} is of the type "
        f"{type(found).__name__} or out of range, and {wanted} is wanted; use another checkpoint, or begin a new run"
    )


def check_kind(found: object, kind: type, name: str) -> None:
    """ValueError unless a state is of a type."""
    if not isinstance(found, kind):
        raise wrong(name, found, f"a {kind.__name__}")


def check_like(found: Any, own: Any, name: str) -> None:
    """Compare a state with what this run would write in its place.

    Args:
        found: The file's.
        own: This run's. Where it is None, or empty, anything of its type may be found.
        name: What errors call it.

    Raises:
        ValueError: If a key is unknown, or a value is of another type, or a number is not finite, negative where it
            counts something, or too large to count anything.
    """
    if isinstance(own, dict):
        check_kind(found, dict, name)
        for key, value in found.items():
            if key == "combined_loader":  # states of loaders, of which each judges its own
                check_like(value, [], f"{name}.{key}")
            elif key in own:
                check_like(value, own[key], f"{name}.{key}")
            elif own:
                raise wrong(f"{name}.{key}", value, f"nothing but {', '.join(map(str, own))[:200]}")
    elif isinstance(own, list | tuple):
        if not isinstance(found, list | tuple) or (own and len(found) != len(own)):
            raise wrong(name, found, f"a list of {len(own)}" if own else "a list")
        for index, (value, mine) in enumerate(zip(found, own, strict=False)):
            check_like(value, mine, f"{name}.{index}")
    elif isinstance(own, bool):
        check_kind(found, bool, name)
    elif isinstance(own, int):
        if isinstance(found, bool) or not isinstance(found, int) or not min(own, 0) <= found < MOST:
            raise wrong(name, found, f"a whole number of at least {min(own, 0)} and below {MOST}")
    elif isinstance(own, float):
        number = isinstance(found, int | float) and not isinstance(found, bool)
        if not number or (math.isfinite(own) and not abs(found) < math.inf):
            raise wrong(name, found, "a finite number")
    elif isinstance(own, Tensor):
        if not isinstance(found, Tensor) or found.shape != own.shape or found.layout != own.layout:
            raise wrong(name, found, f"a tensor of the shape {[*own.shape]}")
    elif own is not None:
        check_kind(found, type(own), name)


def check_above_zero(scaler: dict[str, Any], name: str) -> None:
    """ValueError if a loss scaler would scale by 0, or turn signs."""
    for key, value in scaler.items():
        if isinstance(value, float) and value <= 0:
            raise wrong(f"{name}.{key}", value, "a number above 0")


def check_each(name: str, checkpoint: dict[str, Any], own: list[dict[str, Any]]) -> None:
    """Compare the states of optimizers or schedulers with this run's."""
    states = checkpoint.get(name)
    if not isinstance(states, list) or len(states) != len(own):
        raise wrong(name, states, f"a list of {len(own)}")
    for index, (state, mine) in enumerate(zip(states, own, strict=True)):
        check_like(state, mine, f"{name}.{index}")
        if "last_epoch" in mine and "last_epoch" not in state:  # torch would begin the schedule anew
            raise wrong(f"{name}.{index}.last_epoch", None, "a number of steps")


def options(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """An optimizer's state but for parameters, which torch counts, and their tensors, for which see `check_moments`."""
    groups = [{**group, "params": []} for group in optimizer.param_groups]
    return {**optimizer.state_dict(), "state": {}, "param_groups": groups}


def check_counts(groups: list[dict[str, Any]], optimizer: torch.optim.Optimizer) -> None:
    """ValueError if an optimizer's state is of another number of parameters, as where another part was frozen."""
    theirs, ours = ([len(group["params"]) for group in these] for these in (groups, optimizer.param_groups))
    if theirs != ours:
        raise ValueError(
            f"the checkpoint's optimizer has {sum(theirs)} parameters and this model trains {sum(ours)}: freeze the "
            "same parts as its run did, or begin a new run with its weights"
        )


def check_moments(states: dict[int, dict[str, Any]], optimizer: torch.optim.Optimizer) -> None:
    """Compare the tensors that an optimizer keeps for each parameter with the parameters.

    A fused step reads as many numbers of each tensor as the parameter has, whatever the tensor's own shape.

    Raises:
        ValueError: If a parameter is unknown, or a tensor of Adam's has another shape than it.
    """
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    for index, state in states.items():
        name = f"optimizer_states.{index}"
        if not isinstance(index, int) or not 0 <= index < len(parameters):
            raise wrong(name, index, f"a number of one of {len(parameters)} parameters")
        check_kind(state, dict, name)
        if isinstance(optimizer, torch.optim.Adam):
            like = torch.empty_like(parameters[index], device="meta")
            own = {"step": torch.zeros(()), "exp_avg": like, "exp_avg_sq": like, "max_exp_avg_sq": like}
            check_like(state, own, name)
            if missing := {"step", "exp_avg", "exp_avg_sq"} - state.keys():
                raise wrong(f"{name}.{min(missing)}", None, "a tensor")
            if not 0 <= float(state["step"]) < MOST:
                raise wrong(f"{name}.step", state["step"], "a number of steps")


def checked_state(callback: L.Callback, state: Any) -> Any:
    """A callback's state, if it is of the kind that the callback writes; of a `ModelCheckpoint`, with its own paths.

    A `ModelCheckpoint` removes and overwrites files by the paths in its state, so it is given only those of
    checkpoints in its folder. What `EarlyStopping` is told by its user is not taken from the file.
    """
    name = f"state of {type(callback).__name__}"
    if isinstance(callback, ModelCheckpoint):
        check_like(state, callback.state_dict() | SCORES, name)
        return with_own_paths(callback, state)
    if isinstance(callback, EarlyStopping):
        check_like(state, callback.state_dict(), name)
        if state.get("stopping_reason", 0) not in [reason.value for reason in EarlyStoppingReason]:
            raise wrong(f"{name}.stopping_reason", state["stopping_reason"], "the number of one")
        return state | {"patience": callback.patience}
    if isinstance(callback, Timer):  # which has seen 0 seconds, a whole number, before it starts
        check_like(state, {"time_elapsed": {stage.value: 0.0 for stage in RunningStage}}, name)
    elif type(callback).__module__.partition(".")[0] in ("lightning", "ldlm"):
        check_like(state, callback.state_dict(), name)
    return state


# What is None, or empty, in the state of a `ModelCheckpoint` that has saved nothing.
SCORES: dict[str, Any] = {
    "monitor": None,
    "best_model_score": None,
    "current_score": None,
    "dirpath": None,
    "best_k_models": {},
}


def with_own_paths(callback: ModelCheckpoint, state: dict[str, Any]) -> dict[str, Any]:
    """The state of a `ModelCheckpoint` without paths outside its folder."""

    def kept(path: object) -> bool:
        return isinstance(path, str) and is_own(path, callback)

    def score(value: object) -> bool:
        return isinstance(value, Tensor) and value.numel() == 1 and not value.is_complex()

    paths = {name: state.get(name, "") for name in ("best_model_path", "last_model_path", "kth_best_model_path")}
    models = state.get("best_k_models", {})
    foreign = [path for path in [*paths.values(), *models] if path and not kept(path)]
    if foreign:
        rank_zero_info(
            f"the checkpoint names {len(foreign)} files outside {callback.dirpath} as its run's: none of them is taken "
            "over, removed or written to"
        )
    for name in ("best_model_score", "current_score"):
        if state.get(name) is not None and not score(state[name]):
            raise wrong(f"state of ModelCheckpoint.{name}", state[name], "a tensor of one number")
    best = {path: value for path, value in models.items() if kept(path) and score(value)}
    worst = paths["kth_best_model_path"]
    if worst not in best or not score(state.get("kth_value")):  # Lightning looks the one up among the others
        best, worst = {}, ""
    own = {"best_k_models": best, "kth_best_model_path": worst}
    own |= {name: path if kept(path) else "" for name, path in paths.items() if name != "kth_best_model_path"}
    own["kth_value"] = state["kth_value"] if best else callback.kth_value
    return {"best_model_score": None, **state, **own}


def is_own(path: str, callback: ModelCheckpoint) -> bool:
    """Say whether a path is of a checkpoint in a callback's folder, wherever links on the way lead."""
    folder = callback.dirpath
    if folder is None or not path.endswith(callback.FILE_EXTENSION):
        return False
    if is_remote(folder) or is_remote(path):
        inner = path.removeprefix(f"{str(folder).rstrip('/')}/")
        return inner != path and not {"", ".", ".."} & {*inner.split("/")}
    return Path(folder).resolve() in Path(path).resolve().parents
