"""``ldlm fit | fit-decoder | validate | test | predict``: LightningCLI with named recipes and short errors.

In: words from a shell. Out: a Trainer's run.
No section of the paper.

``--sequence_length``, ``--num_latents``, ``--tokenizer`` and ``--seed_everything`` are given once and reach the data,
the model and every part that has such an argument. ``--warmup.steps`` is the diffusion-to-encoder warm-up's length.
``validate``, ``test`` and ``predict`` with ``--ckpt_path`` take the model from the checkpoint and ``fit-decoder`` from
``--stage.checkpoint``, whatever a recipe says of it. ``--ckpt_path`` takes a folder, too, for the newest whole
checkpoint in it, and ``fit --ckpt_path last`` goes on with the run that saved last, if there is one.
"""

import logging
import sys
import tempfile
import warnings
from pathlib import Path
from typing import Any, NoReturn

import lightning as L
import torch
import transformers
import yaml
from jsonargparse import ActionConfigFile, ArgumentParser, Namespace, get_loader, set_loader
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback

import ldlm
from ldlm._files import check_output
from ldlm.checkpoints.pretrained import read_checkpoint
from ldlm.checkpoints.resume import last_checkpoint, last_of_run
from ldlm.cli.arguments import Fault, explain, fail, value_of
from ldlm.cli.modules import IMPORTED, NamedModules
from ldlm.data.datamodule import PackedTextDataModule, check_detokenizer
from ldlm.model import LDLM
from ldlm.nn.token_encoders import FrozenTokenEncoder
from ldlm.presets import recipe_file
from ldlm.recipes import check
from ldlm.tokenizer import load_tokenizer, name_tokenizer, tokenizer_digest
from ldlm.training.callbacks.predictions import ReconstructionWriter
from ldlm.training.callbacks.warmup import DiffusionToEncoderWarmup
from ldlm.training.checks import check_encoder
from ldlm.training.resuming import begin_anew, left_by_another_job
from ldlm.training.stages import FixedLatents, TokenDecoderStage

# Each public name is imported here: jsonargparse finds a class by its name alone only once it is.
CLASSES = [name for name in ldlm.__all__ if isinstance(getattr(ldlm, name), type)]
KEYWORDS = ("best", "last", "hpc", "registry")  # values of --ckpt_path that Lightning looks up itself


def load_yaml(text: str) -> Any:
    """A value on the command line, in a recipe or in a file that a recipe names, checked as recipes are."""
    try:
        check(text)
    except ValueError as error:
        raise ValueError(f"the value or file that begins with {text[:40]!r} cannot be read as YAML: {error}") from None
    NamedModules.take(text)
    return get_loader("yaml")(text)


set_loader("recipe", load_yaml, (yaml.YAMLError,))


class NamedConfig(ActionConfigFile):  # type: ignore[misc]  # jsonargparse is read as untyped
    """``--config`` that knows the shipped recipes by name."""

    @staticmethod
    def apply_config(parser: ArgumentParser, cfg: Namespace, dest: str, value: str, *rest: Any) -> None:
        """Resolve the name, then as usual."""
        try:
            file = recipe_file(value)
        except ValueError as error:  # which jsonargparse would take for its own and explain
            raise Fault(str(error)) from None
        ActionConfigFile.apply_config(parser, cfg, dest, file, *rest)


class ShortErrors(LightningArgumentParser):
    """A parser that says what is wrong in one sentence, with the nearest known name."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Exit with status 2."""
        fail(explain(message, [option for action in self._actions for option in action.option_strings], CLASSES))


class LDLMCLI(LightningCLI):
    """LightningCLI for one model class and one data module.

    Args:
        words: The command and its options.
        checkpoint: Of ``validate``, ``test`` and ``predict``: the file the model is taken from.
        stage: Whether a `TokenDecoderStage` is trained and not an `LDLM`.
    """

    def __init__(self, words: list[str], checkpoint: str | None, stage: bool) -> None:
        self.checkpoint = checkpoint
        self.stage = stage
        self.stored: LDLM | None = None
        self.tokenizer_folder: tempfile.TemporaryDirectory[str] | None = None
        if checkpoint is not None:
            self.stored = LDLM.load_from_checkpoint(checkpoint)
            self.tokenizer_folder = tempfile.TemporaryDirectory()
            if self.stored.tokenizer is not None:
                self.stored.tokenizer.save_pretrained(self.tokenizer_folder.name)
        super().__init__(
            LDLM,
            PackedTextDataModule,
            args=words,
            parser_class=ShortErrors,
            parser_kwargs={"version": f"ldlm {ldlm.__version__}"},
            save_config_callback=SaveConfigCallback if words[0] == "fit" else None,  # others leave no file behind
            save_config_kwargs={"overwrite": True},
            seed_everything_default=0,
            auto_configure_optimizers=False,
            trainer_defaults={},
        )

    def init_parser(self, **kwargs: Any) -> LightningArgumentParser:
        """A parser whose ``--config`` takes names."""
        parser = ShortErrors(dump_header=[f"ldlm=={ldlm.__version__}"], parser_mode="recipe", **kwargs)
        parser.add_argument("-c", "--config", action=NamedConfig, help="a recipe's name (ldlm presets) or a file")
        return parser

    def add_core_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Trainer, model and data; with a checkpoint, what the recipe says of the model is read past."""
        if self.stored is None and not self.stage:
            super().add_core_arguments_to_parser(parser)
            return
        parser.add_lightning_class_args(self.trainer_class, "trainer")
        parser.add_lightning_class_args(PackedTextDataModule, "data")
        unused: dict[str, Any] = {"model": dict, "warmup": dict, "num_latents": int | None, "latents": str | None}
        for key, kind in (unused | ({} if self.stage else {"stage": dict})).items():
            parser.add_argument(
                f"--{key}", type=kind, default=None, help="not used: the checkpoint describes its model"
            )

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """The options that several things share."""
        stored = self.stored
        length = stored.sequence_length if stored is not None else 128
        tokenizer = self.tokenizer_folder.name if self.tokenizer_folder is not None else "gpt2"
        parser.add_argument("--sequence_length", type=int, default=length, help="tokens a row, for data and model")
        parser.add_argument("--tokenizer", type=str, default=tokenizer, help="hub id, folder or package:NAME/folder")
        parser.link_arguments("sequence_length", "data.sequence_length")
        parser.link_arguments("tokenizer", "data.tokenizer")
        parser.link_arguments("seed_everything", "data.seed", compute_fn=int)
        if stored is not None or self.stage:
            parser.add_argument("--encoder", type=str | None, default=None, help="where the token encoder is now")
            parser.add_argument("--output", default="reconstructions.jsonl", help="of predict: file to write")
            if self.stage:
                parser.add_class_arguments(TokenDecoderStage, "stage")
                parser.link_arguments("seed_everything", "stage.seed", compute_fn=int)
            return
        parser.add_lightning_class_args(DiffusionToEncoderWarmup, "warmup")
        parser.add_argument(
            "--latents", type=str | None, default=None, help="checkpoint whose coders are taken, frozen (FixedLatents)"
        )
        parser.add_argument("--stage", type=dict, default=None, help="of fit-decoder; not used here")
        parser.add_argument(
            "--num_latents", type=int | None, default=None, help="latent vectors a row (default: sequence_length)"
        )
        parser.link_arguments("sequence_length", "model.sequence_length")
        parser.link_arguments("tokenizer", "model.tokenizer")
        parser.link_arguments("seed_everything", "model.seed", compute_fn=int)
        for part in ("latent_encoder", "latent_decoder", "token_decoder"):
            parser.link_arguments("sequence_length", f"model.{part}.init_args.sequence_length")
        for part in ("latent_encoder", "latent_decoder", "denoiser"):
            parser.link_arguments(
                ("num_latents", "sequence_length"),
                f"model.{part}.init_args.num_latents",
                compute_fn=lambda latents, tokens: tokens if latents is None else latents,
            )

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Read words and recipes, whose classes may be in the current folder."""
        for word in args:
            NamedModules.take(word)
        super().parse_arguments(parser, args)
        data = self.config[self.config.subcommand].data
        data.detokenize = find_detokenizer(data.detokenize)

    def _parse_ckpt_path(self) -> None:
        """Take nothing from a checkpoint into the configuration: Lightning 2.6.6 merges its hyperparameters there."""

    def instantiate_classes(self) -> None:
        """Take the model from the checkpoint where there is one, and compare what was given with what it holds."""
        trainer = self.config[self.config.subcommand].trainer
        if trainer.accelerator == "auto" and torch.backends.mps.is_available():
            trainer.accelerator = "cpu"  # Apple's GPUs have no float64, which the timesteps' statistics need
        super().instantiate_classes()
        given = self.config[self.config.subcommand]
        callbacks: list[L.Callback] = self.trainer.callbacks  # type: ignore[attr-defined]
        if self.config.subcommand == "predict":
            check_output(given.output)
            callbacks.append(ReconstructionWriter(given.output))
        if self.stage:
            self.model = self.config_init[self.config.subcommand].stage
            move_encoder(self.model, given.encoder)
        elif self.stored is not None:
            self._take_stored(self.stored, given)
        elif given.latents is not None:
            callbacks.insert(0, FixedLatents(given.latents))  # before EMA asks what is trainable
        if self.config.subcommand == "fit":
            last = given.get("ckpt_path") == "last"
            if last:
                self.config_init["fit"].ckpt_path = last_of_run(self.trainer)
            if self.config_init["fit"].ckpt_path is None and (last or left_by_another_job(self.trainer)):
                begin_anew(self.trainer)
            check_encoder(self.model.token_encoder, self.model.tokenizer)  # now, and not after hours of packing

    def _take_stored(self, stored: LDLM, options: Namespace) -> None:
        """Compare what was given with what the checkpoint holds."""
        given = self.datamodule
        if given.sequence_length != stored.sequence_length:
            raise Fault(
                f"--sequence_length {given.sequence_length}: {self.checkpoint} was trained with "
                f"{stored.sequence_length} tokens a row; leave the option out"
            )
        if stored.tokenizer is not None:
            theirs = load_tokenizer(given.tokenizer)
            if tokenizer_digest(theirs) != tokenizer_digest(stored.tokenizer):
                raise Fault(
                    f"--tokenizer {given.tokenizer} is {name_tokenizer(theirs)}, but {self.checkpoint} was trained "
                    f"with another, of {len(stored.tokenizer):,} tokens; leave the option out"
                )
        move_encoder(stored, options.encoder)
        self.model = stored


def find_detokenizer(name: Any) -> Any:
    """The function that a recipe names as MODULE.FUNCTION, of a module named by ``--import``; else what is given.

    Raises:
        ValueError: If the name is of another function, or of none.
    """
    module, _, function = str(name).rpartition(".")
    found = vars(sys.modules[module]).get(function, name) if module in IMPORTED else name
    check_detokenizer(found)
    return found


def move_encoder(model: LDLM, folder: str | None) -> None:
    """Tell a model where its token encoder's files are now."""
    if folder is not None and isinstance(model.token_encoder, FrozenTokenEncoder):
        model.token_encoder.model = folder


def run(words: list[str], command: type[LDLMCLI] = LDLMCLI) -> LDLMCLI:
    """Run one of Lightning's commands.

    Args:
        words: The command and its options.
        command: What reads them and does something with the model, the data and the Trainer that they make.

    Raises:
        Fault: If something is wrong that the user can mend.
    """
    quiet()
    checkpoint = value_of("--ckpt_path", words)
    fitting, named = words[0].startswith("fit"), checkpoint not in (None, *KEYWORDS)
    if checkpoint == "":
        raise Fault("--ckpt_path is empty: name a checkpoint or a folder, or leave the option out")
    if checkpoint is not None and Path(checkpoint).is_dir():
        words = [*words, "--ckpt_path", str(found := last_checkpoint(checkpoint))]
        if found is None:
            raise Fault(f"--ckpt_path {checkpoint}: no checkpoint in this folder is whole; name a file, or train")
        checkpoint = str(found)
    if checkpoint == "last" and not fitting:
        raise Fault(f"--ckpt_path last is for fit: give {words[0]} the folder of the run, such as ldlm_runs/quickstart")
    if fitting and named:
        read_checkpoint(str(checkpoint))  # before LightningCLI opens it; LDLMCLI reads it for the other commands
    if not fitting and checkpoint is None and not {"-h", "--help", "--print_config"} & {*words}:
        raise Fault(f"{words[0]} needs a model: give --ckpt_path CHECKPOINT")
    try:
        return command(
            ["fit" if fitting else words[0], *words[1:]],
            checkpoint if named and not fitting else None,
            words[0] == "fit-decoder",
        )
    except (MisconfigurationException, ValueError) as error:
        raise Fault(explain(str(error), [], CLASSES)) from error


class Prepared(LDLMCLI):
    """Makes what ``ldlm fit`` would run, and leaves running it to others."""

    def before_instantiate_classes(self) -> None:
        """LightningCLI calls this when options are read: a tokenizer may be out of reach, and nothing here is text."""
        self.config["fit"]["model"]["tokenizer"] = None

    def fit(self, **arguments: object) -> None:
        """LightningCLI calls this in place of the Trainer's."""


def prepare_fit(words: list[str]) -> tuple[LDLM, L.Trainer, PackedTextDataModule]:
    """What ``ldlm fit`` with these words would run, without a tokenizer."""
    made = run(["fit", *words], Prepared)
    return made.model, made.trainer, made.datamodule


def quiet() -> None:
    """Keep other libraries' chatter off the terminal; their warnings about this run stay."""
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    logging.getLogger("lightning.pytorch.utilities.rank_zero").addFilter(lambda r: "Tip" not in r.getMessage())
    warnings.filterwarnings("ignore", message=".*LeafSpec.*")
    warnings.filterwarnings("ignore", message=".*does not have many workers.*")
    warnings.filterwarnings("ignore", message="LightningCLI's args parameter.*")
    # About a save's contents and not about reading; and what one asks for who goes on in a run's folder.
    saves = logging.getLogger("lightning.pytorch.trainer.connectors.checkpoint_connector")
    saves.addFilter(lambda r: "weights_only" not in r.getMessage())
    warnings.filterwarnings("ignore", message=".*Checkpoint directory .* exists and is not empty.*")
