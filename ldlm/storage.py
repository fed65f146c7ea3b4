"""Storage: the model's checkpoints and exports, and the model made again from either.

In: a `.ckpt` file of a Trainer, or a folder of safetensors and JSON. Out: the same, or a model.
No section of the paper. ``state_dict`` holds averaged parameters where `callbacks.EMA` keeps
some, and the raw ones stand beside it.
"""

import hashlib
import json
import pickle
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Self

import lightning as L
import torch
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.pytorch.callbacks import ModelCheckpoint
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor
from transformers import PreTrainedTokenizerBase

import ldlm
from ldlm._files import sha256, write_atomically
from ldlm._sizes import building_at_most, storage_numbers
from ldlm.checkpoints.description import DESCRIPTION, FORMAT, describe, make, read_json
from ldlm.checkpoints.integrity import is_remote
from ldlm.checkpoints.io import CheckpointFiles, check_readable, not_finite, prepare
from ldlm.checkpoints.pretrained import check_weights, exported, read_checkpoint, read_export
from ldlm.checkpoints.training_state import CheckedStates
from ldlm.generation import Generation
from ldlm.hub import only_the_file
from ldlm.tokenizer import pack_tokenizer, unpack_tokenizer
from ldlm.training.resuming import record_run

WEIGHTS = "model.safetensors"  # of an export


class Storage(Generation):
    """Saving and loading, in terms of parts that `LDLM`'s constructor puts in place.

    Attributes:
        averaged: The averaged parameters by name, float32; None without `callbacks.EMA`.
        raw: The raw parameters while the averaged ones stand in their place; None otherwise.
    """

    averaged: dict[str, Tensor] | None
    raw: dict[str, Tensor] | None
    _packed: tuple[PreTrainedTokenizerBase, dict[str, Tensor]] | None = None

    @property
    def kind(self) -> type:
        """The class that a file makes this model again as. A seam for modules that train another model's parts."""
        return type(self)

    def description(self) -> dict[str, Any]:
        """The model as plain data: parts, arguments, versions."""
        model = describe(self, leave_out=("tokenizer", "allow_changes"), kind=self.kind)
        return {"format": FORMAT, "version": ldlm.__version__, "model": model}

    def about_run(self) -> dict[str, Any]:
        """The description, and what else changes the result of the run at hand."""
        if self._trainer is None:  # saved by ``trainer.strategy.connect(model)``, which no run stands behind
            return self.description()
        about = self.description() | {"run": record_run(self.trainer, self.tokenizer) | self.sources()}
        # By way of JSON a number is of no class of its own, such as numpy's, which reading would refuse.
        return dict(json.loads(json.dumps(about)))

    def sources(self) -> dict[str, Any]:
        """What a module that trains another model's parts took them from; a hook for such modules."""
        return {}

    @torch.no_grad()
    def averages_stand(self) -> bool:
        """Whether the averaged parameters of a fit are up to date: nobody has put others into the model since."""
        if self.averaged is None or self.raw is None:
            return True
        now = dict(self.named_parameters())
        return all(name in now and torch.equal(a.to(now[name]), now[name]) for name, a in self.averaged.items())

    def configure_model(self) -> None:
        """Put our reader, writer and checks of files in the place of Lightning's own; refuse what could never be saved.

        The hook is the first after callbacks know their folders, and stands before a checkpoint is read.
        """
        trainer = self.trainer
        CheckedStates.look_at(trainer)
        if type(trainer.strategy.checkpoint_io) is TorchCheckpointIO:  # else it is the user's choice
            trainer.strategy.checkpoint_io = CheckpointFiles()
        if isinstance(files := trainer.strategy.checkpoint_io, CheckpointFiles):
            files.training = trainer.training
        if not trainer.training:
            return
        self._packed = None
        self._pack_tokenizer()  # needs a temporary folder, which a save during the run must not
        self.check_finite()
        for callback in trainer.checkpoint_callbacks:
            folder = callback.dirpath if isinstance(callback, ModelCheckpoint) else None
            if folder and trainer.is_global_zero and not is_remote(folder):
                prepare(Path(folder))

    def check_finite(self) -> None:
        """Raise ValueError if a weight or a buffer could never be saved."""
        if names := not_finite(self.state_dict()):
            raise ValueError(
                f"{names[0]} is not finite before training: give finite weights; a buffer that is to hold infinities "
                "is registered with persistent=False"
            )

    def on_train_start(self) -> None:
        """Refuse now what no checkpoint could be read with, be it a callback's state: there is nothing to lose yet."""
        trainer = self.trainer
        data: L.LightningDataModule | None = trainer.datamodule  # type: ignore[attr-defined]
        if not trainer.checkpoint_callbacks or not isinstance(trainer.strategy.checkpoint_io, CheckpointFiles):
            return
        callbacks: list[L.Callback] = trainer.callbacks  # type: ignore[attr-defined]
        kept = {
            "callbacks": {callback.state_key: callback.state_dict() for callback in callbacks},
            "lr_schedulers": [config.scheduler.state_dict() for config in trainer.lr_scheduler_configs],
            "hyper_parameters": dict(self.hparams),
            "state_dict": self.state_dict(),
        }
        if data is not None:
            kept |= {type(data).__qualname__: data.state_dict(), "datamodule_hyper_parameters": dict(data.hparams)}
        try:
            check_readable(kept)
        except pickle.PicklingError as error:
            raise ValueError(str(error)) from error

    def on_fit_end(self) -> None:
        """Raise OSError if the last save failed: the run is not to end as if all were well."""
        files = self.trainer.strategy.checkpoint_io
        if not isinstance(files, CheckpointFiles):
            return
        files.training = False
        if files.failures:
            raise OSError("the last checkpoint of this run was not written: a warning above says why")

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Describe the model; put averaged parameters into ``state_dict`` and raw ones beside it."""
        checkpoint["ldlm"] = self.about_run()
        if (tokenizer := self._pack_tokenizer()) is not None:
            checkpoint["tokenizer"] = tokenizer
        if self.averaged is not None and self.averages_stand():
            live = {name: checkpoint["state_dict"][name] for name in self.averaged} if self.raw is None else self.raw
            checkpoint["raw_parameters"] = live
            checkpoint["state_dict"] = checkpoint["state_dict"] | self.averaged

    def _pack_tokenizer(self) -> dict[str, Tensor] | None:
        """The tokenizer's files, made once a fit."""
        if self.tokenizer is None:
            return None
        if self._packed is None or self._packed[0] is not self.tokenizer:
            self._packed = self.tokenizer, pack_tokenizer(self.tokenizer)
        return self._packed[1]

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Take the raw parameters when training goes on; `callbacks.EMA` takes the averaged ones."""
        check_weights(self, checkpoint["state_dict"], "the checkpoint")
        if self.trainer.training and "optimizer_states" not in checkpoint:
            raise ValueError("this checkpoint holds weights alone (save_weights_only): training cannot go on from it")
        if "raw_parameters" in checkpoint and self.trainer.training:
            if self.averaged is None:
                raise ValueError(
                    "this checkpoint holds averaged weights, but nothing here goes on averaging: add EMA() to the "
                    "trainer's callbacks"
                )
            for name, average in self.averaged.items():
                average.copy_(checkpoint["state_dict"][name])
            checkpoint["state_dict"] = checkpoint["state_dict"] | checkpoint["raw_parameters"]
        elif self.averaged is not None and self.trainer.training:  # averaging begins with this run
            for name, average in self.averaged.items():
                average.copy_(checkpoint["state_dict"][name])

    @classmethod
    def load_from_checkpoint(cls, checkpoint_path: str | Path, map_location: str | torch.device = "cpu") -> Self:  # type: ignore[override]
        """The model of a checkpoint, with its averaged weights, in eval mode.

        Args:
            checkpoint_path: A ``.ckpt`` file made by a Trainer with this model, from the command or from a script.
            map_location: Device the model is put on.

        Raises:
            ValueError: If the file is missing, damaged, of something else, or uses classes that are not imported.
        """
        checkpoint = read_checkpoint(checkpoint_path)
        files = checkpoint.get("tokenizer")
        tokenizer = unpack_tokenizer(files, str(checkpoint_path)) if files is not None else None
        return cls._rebuilt(checkpoint["ldlm"], checkpoint["state_dict"], tokenizer, str(checkpoint_path), map_location)

    def save_pretrained(self, folder: str | Path) -> None:
        """Write ``model.safetensors``, ``ldlm.json`` and the tokenizer's files into a folder.

        An earlier export there is replaced once the new one is on the disk, and its files that the new one has not are
        removed. Other files stay.

        Raises:
            ValueError: If the folder holds a file that the export has too, and that no export wrote.
            OSError: If the disk is full, or the folder cannot be written to.
        """
        folder = Path(folder)
        if folder.exists() and not folder.is_dir():
            raise ValueError(f"{folder} is no folder, and an export is one: give another name")
        about = folder / DESCRIPTION
        tokenizer = {} if self.tokenizer is None else pack_tokenizer(self.tokenizer)
        files = {name: content.numpy().tobytes() for name, content in tokenizer.items()}
        files[WEIGHTS] = save({name: tensor.contiguous() for name, tensor in self.state_dict().items()})
        digests = {name: hashlib.sha256(content).hexdigest() for name, content in files.items()}
        earlier = exported(read_json(about), str(folder)) if about.exists() else {}
        for name in files.keys() - earlier.keys():
            if (folder / name).exists():
                raise ValueError(f"{folder}/{name} is no file of an earlier export, and stays: give another folder")
        with ExitStack() as stack:
            for name, content in files.items():
                file = stack.enter_context(write_atomically(folder / name))
                file.write(content)
                file.flush()
            # All is on the disk. Until each file has its place, the folder says which are an export's, and is none.
            _write_json(about, {"sha256": earlier | digests})
        for name in earlier.keys() - files.keys():
            if (folder / name).is_file() and sha256(folder / name) == earlier[name]:
                (folder / name).unlink()
        _write_json(about, self.description() | {"sha256": digests})

    @classmethod
    def from_pretrained(
        cls, path_or_repo: str | Path, revision: str | None = None, map_location: str | torch.device = "cpu"
    ) -> Self:
        """The model of an exported folder, local or on the hub, in eval mode.

        Args:
            path_or_repo: A folder written by `save_pretrained` or ``ldlm export``, or a hub id.
            revision: Branch, tag or commit on the hub.
            map_location: Device the model is put on.

        Raises:
            ValueError: If there is no such folder or repository, or it holds something else.
        """
        source = str(path_or_repo)
        about, files = read_export(source, revision)
        try:
            state = load(files.pop(WEIGHTS))
        except (KeyError, SafetensorError) as error:
            raise ValueError(f"{source}/{WEIGHTS} could not be read ({error}): export the model again") from error
        tensors = {name: torch.frombuffer(bytearray(content), dtype=torch.uint8) for name, content in files.items()}
        tokenizer = unpack_tokenizer(tensors, source) if files else None
        return cls._rebuilt(about, state, tokenizer, source, map_location)

    @classmethod
    def _rebuilt(
        cls,
        about: dict[str, Any],
        state: dict[str, Tensor],
        tokenizer: PreTrainedTokenizerBase | None,
        source: str,
        device: str | torch.device,
    ) -> Self:
        """A model from its description, its tensors and its tokenizer.

        It is made twice: without memory, to be compared with the tensors, and for real once it has their sizes. The
        second time also fills what is in no file, such as buffers registered with ``persistent=False``.
        """
        arguments = about["model"]["init_args"] | {"tokenizer": tokenizer}
        sizes = len(state), storage_numbers(state.values())
        with only_the_file():
            with building_at_most(*sizes, source), torch.random.fork_rng(devices=[]), torch.device("meta"):
                check_weights(make(cls, arguments), state, source)
            model = make(cls, arguments)
        try:
            model.load_state_dict(state)
        except RuntimeError as error:  # of a kind that cannot be copied, such as sparse ones
            raise ValueError(f"{source} holds tensors that no weights can be taken from ({error})") from error
        return model.to(device).eval()


def _write_json(path: Path, content: dict[str, Any]) -> None:
    with write_atomically(path) as file:
        file.write((json.dumps(content, indent=2) + "\n").encode())
