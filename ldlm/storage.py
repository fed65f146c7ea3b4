"""Storage: the model's checkpoints and exports, and the model made again from either.

In: a `.ckpt` file of a Trainer, or a folder of safetensors and JSON. Out: the same, or a model.
No section of the paper. ``state_dict`` holds averaged parameters where `callbacks.EMA` keeps
some, and the raw ones stand beside it.
"""

import json
from pathlib import Path
from typing import Any, Self

import torch
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.pytorch.callbacks import ModelCheckpoint
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor
from transformers import PreTrainedTokenizerBase

import ldlm
from ldlm.checkpoints import (
    FORMAT,
    check_description,
    check_weights,
    describe,
    make,
    pack_tokenizer,
    read_checkpoint,
    read_json,
    read_tokenizer,
    unpack_tokenizer,
)
from ldlm.files import sha256, write_atomically
from ldlm.generation import Generation
from ldlm.hub import local_folder
from ldlm.saving import CheckpointFiles, is_remote, last_checkpoint, not_finite, prepare

__all__ = ["Storage", "last_checkpoint"]


class Storage(Generation):
    """Saving and loading, in terms of parts that `LDLM`'s constructor puts in place.

    Attributes:
        averaged: The averaged parameters by name, float32; None without `callbacks.EMA`.
        raw: The raw parameters while the averaged ones stand in their place; None otherwise.
    """

    averaged: dict[str, Tensor] | None
    raw: dict[str, Tensor] | None

    @property
    def kind(self) -> type:
        """The class that a file makes this model again as. A seam for modules that train another model's parts."""
        return type(self)

    def description(self) -> dict[str, Any]:
        """The model as plain data: parts, arguments, versions."""
        model = describe(self, leave_out=("tokenizer",), kind=self.kind)
        return {"format": FORMAT, "version": ldlm.__version__, "model": model}

    def configure_model(self) -> None:
        """Put our reader and writer of files in the place of Lightning's own; refuse what could never be saved.

        The hook is the first after callbacks know their folders, and stands before a checkpoint is read.
        """
        trainer = self.trainer
        if type(trainer.strategy.checkpoint_io) is TorchCheckpointIO:  # else it is the user's choice
            trainer.strategy.checkpoint_io = CheckpointFiles()
        if isinstance(files := trainer.strategy.checkpoint_io, CheckpointFiles):
            files.training = trainer.training
        if not trainer.training:
            return
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
        checkpoint["ldlm"] = self.description()
        if self.tokenizer is not None:
            checkpoint["tokenizer"] = pack_tokenizer(self.tokenizer)
        if self.averaged is not None:
            raw = self.raw or {name: checkpoint["state_dict"][name] for name in self.averaged}
            checkpoint["raw_parameters"] = raw
            checkpoint["state_dict"] = checkpoint["state_dict"] | self.averaged

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
        """Write ``model.safetensors``, ``ldlm.json`` and the tokenizer's files into a folder."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        about = folder / "ldlm.json"
        about.unlink(missing_ok=True)  # written last: without it the folder is no export
        names = [] if self.tokenizer is None else self.tokenizer.save_pretrained(str(folder))
        with write_atomically(folder / "model.safetensors") as file:
            file.write(save({name: tensor.contiguous() for name, tensor in self.state_dict().items()}))
        written = [folder / "model.safetensors", *map(Path, names)]
        digests = {path.name: sha256(path) for path in written if path.is_file()}
        with write_atomically(about) as file:
            file.write((json.dumps(self.description() | {"sha256": digests}, indent=2) + "\n").encode())

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
        folder = local_folder(str(path_or_repo), revision, "*.json", "*.safetensors", "*.txt", "*.model")
        if not (folder / "ldlm.json").is_file():
            raise ValueError(
                f"'{path_or_repo}' holds no ldlm.json: it is not an exported ldlm model, or its export was cut short"
            )
        about = check_description(read_json(folder / "ldlm.json"), f"{path_or_repo}")
        try:
            state = load_file(folder / "model.safetensors")
        except (OSError, SafetensorError) as error:
            raise ValueError(
                f"{folder}/model.safetensors could not be read ({error}): export the model again"
            ) from error
        digests = about.get("sha256", {})
        for file in folder.iterdir():  # the folder's names and not the digests', which could lead anywhere
            if isinstance(digests, dict) and file.name in digests and sha256(file) != digests[file.name]:
                raise ValueError(f"{path_or_repo}/{file.name} was altered after the export: export the model again")
        with_tokenizer = (folder / "tokenizer_config.json").is_file()
        tokenizer = read_tokenizer(folder, str(path_or_repo)) if with_tokenizer else None
        return cls._rebuilt(about, state, tokenizer, str(folder), map_location)

    @classmethod
    def _rebuilt(
        cls,
        about: dict[str, Any],
        state: dict[str, Tensor],
        tokenizer: PreTrainedTokenizerBase | None,
        source: str,
        device: str | torch.device,
    ) -> Self:
        """A model from its description, its tensors and its tokenizer."""
        model = make(cls, about["model"]["init_args"] | {"tokenizer": tokenizer})
        check_weights(model, state, source)
        try:
            model.load_state_dict(state)
        except RuntimeError as error:  # of a kind that cannot be copied, such as sparse ones
            raise ValueError(f"{source} holds tensors that no weights can be taken from ({error})") from error
        return model.to(device).eval()
