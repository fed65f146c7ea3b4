"""``ldlm fit | fit-decoder | validate | test | predict``: LightningCLI with named recipes and short errors.

In: words from a shell. Out: a Trainer's run.
No section of the paper.

A recipe has four blocks: ``model``, ``training``, ``data``, ``trainer``. ``--sequence_length``, ``--num_latents``,
``--tokenizer`` and ``--seed_everything`` are given once and reach all parts that have such an argument. ``validate``,
``test`` and ``predict`` with ``--ckpt_path`` take model and objective from the checkpoint and ``fit-decoder`` the model
from ``--stage.checkpoint``, whatever a recipe says of it. ``--ckpt_path`` takes a folder, too, for the newest complete
checkpoint in it, and ``fit --ckpt_path last`` resumes the run that saved last, if there is one.
"""

import abc
import logging
import sys
import tempfile
import warnings
from collections.abc import Mapping
from inspect import signature
from itertools import chain
from pathlib import Path
from typing import Any, NoReturn

import lightning as L
import torch
import torch.utils.tensorboard  # looks for a tensorflow, which is not to be the current folder's: see `NamedModules`
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
from ldlm.objective import JointObjective, TokenObjective
from ldlm.presets import recipe_file
from ldlm.recipes import check
from ldlm.tokenizer import load_tokenizer, name_tokenizer, tokenizer_digest
from ldlm.training.callbacks.predictions import ReconstructionWriter
from ldlm.training.checks import check_encoder
from ldlm.training.resuming import begin_anew, left_by_another_job
from ldlm.training.stages import FixedLatents, token_decoder_stage
from ldlm.training.task import LDLMTask

# Imported, so that the public classes can be named in YAML without a path.
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
        # What a recipe says is read by the parser above those of Lightning's commands, which know the options.
        below = [action.choices.values() for action in self._actions if isinstance(action.choices, Mapping)]
        actions = [action for parser in (self, *chain(*below)) for action in parser._actions]
        options = dict.fromkeys(option for action in actions for option in action.option_strings)
        if "--training.objective" in options:
            options |= dict.fromkeys(
                f"--training.objective.init_args.{name}" for name in signature(JointObjective).parameters
            )
        fail(explain(message, [*options], CLASSES))


class Command(LightningCLI):
    """What Lightning's commands share: a data module, a Trainer, named recipes, short errors.

    Args:
        words: The command and its options.
        length: Tokens a row, if none are given.
        tokenizer: Whose texts are read, if none is given.
    """

    def __init__(self, words: list[str], length: int = 128, tokenizer: str = "gpt2") -> None:
        self.length, self.tokenizer = length, tokenizer
        super().__init__(
            LDLMTask,
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
        """The blocks of a recipe that every command has: ``trainer`` and ``data``."""
        parser.add_lightning_class_args(self.trainer_class, "trainer")
        parser.add_lightning_class_args(PackedTextDataModule, "data")

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """The options that several things share."""
        parser.add_argument("--sequence_length", type=int, default=self.length, help="tokens a row, for data and model")
        parser.add_argument(
            "--tokenizer", type=str, default=self.tokenizer, help="hub id, folder or package:NAME/folder"
        )
        parser.link_arguments("sequence_length", "data.sequence_length")
        parser.link_arguments("tokenizer", "data.tokenizer")
        parser.link_arguments("seed_everything", "data.seed", compute_fn=int)

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Read words and recipes, whose classes may be in the current folder."""
        for word in args:
            NamedModules.take(word)
        super().parse_arguments(parser, args)
        data = self.config[self.config.subcommand].data
        data.detokenize = find_detokenizer(data.detokenize)

    def _parse_ckpt_path(self) -> None:
        """Take nothing from a checkpoint into the configuration: Lightning 2.6.6 merges its hyperparameters there."""

    @abc.abstractmethod
    def make_task(self, options: Namespace) -> LDLMTask:
        """The task, of what the parser made of the command's options."""

    def instantiate_classes(self) -> None:
        """Make what is to run, and see whether it can."""
        trainer = self.config[self.config.subcommand].trainer
        if trainer.accelerator == "auto" and torch.backends.mps.is_available():
            trainer.accelerator = "cpu"  # Apple's GPUs have no float64, which the timesteps' statistics need
        super().instantiate_classes()
        self.model = self.make_task(self.config_init[self.config.subcommand])
        if self.config.subcommand == "fit":
            last = self.config["fit"].get("ckpt_path") == "last"
            if last:
                self.config_init["fit"].ckpt_path = last_of_run(self.trainer)
            if self.config_init["fit"].ckpt_path is None and (last or left_by_another_job(self.trainer)):
                begin_anew(self.trainer)
            model = self.model.model
            check_encoder(model.token_encoder, model.tokenizer)  # now, and not after hours of packing


class Fit(Command):
    """``ldlm fit``: a model and its task from the blocks ``model`` and ``training``."""

    def add_core_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """All four blocks."""
        super().add_core_arguments_to_parser(parser)
        parser.add_class_arguments(LDLM, "model", fail_untyped=False, sub_configs=True)
        parser.add_class_arguments(
            LDLMTask, "training", skip={"model"}, instantiate=False, fail_untyped=False, sub_configs=True
        )
        # So that options and overlays may give its arguments without its name.
        parser.set_defaults({"training.objective": {"class_path": "ldlm.JointObjective"}})

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """The options that model and data share."""
        super().add_arguments_to_parser(parser)
        parser.add_argument(
            "--latents", type=str | None, default=None, help="checkpoint whose coders are taken, frozen (FixedLatents)"
        )
        parser.add_argument("--stage", type=dict, default=None, help="of fit-decoder; not used here")
        parser.add_argument(
            "--num_latents", type=int | None, default=None, help="latent vectors a row (default: sequence_length)"
        )
        parser.link_arguments("sequence_length", "model.sequence_length")
        parser.link_arguments("tokenizer", "model.tokenizer")
        parser.link_arguments("seed_everything", "training.seed", compute_fn=int)
        for part in ("latent_encoder", "latent_decoder", "token_decoder"):
            parser.link_arguments("sequence_length", f"model.{part}.init_args.sequence_length")
        for part in ("latent_encoder", "latent_decoder", "denoiser"):
            parser.link_arguments(
                ("num_latents", "sequence_length"),
                f"model.{part}.init_args.num_latents",
                compute_fn=latents_of_row,
            )

    def make_task(self, options: Namespace) -> LDLMTask:
        """The recipe's."""
        if options.latents is not None:
            callbacks: list[L.Callback] = self.trainer.callbacks  # type: ignore[attr-defined]
            callbacks.insert(0, FixedLatents(options.latents))
        return LDLMTask(options.model, **vars(options.training))


class FitDecoder(Command):
    """``ldlm fit-decoder``: another token decoder for the fixed latents of ``--stage.checkpoint``."""

    def add_core_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """``stage`` says what is trained and ``training`` how; what a recipe says of the model is read past."""
        super().add_core_arguments_to_parser(parser)
        ours = {"objective": dict | None, "warmup_steps": int | None, "timestep_refresh": int | None}
        parser.add_class_arguments(
            LDLMTask, "training", skip={"model", *ours}, instantiate=False, fail_untyped=False, sub_configs=True
        )
        parser.add_function_arguments(token_decoder_stage, "stage", fail_untyped=False, sub_configs=True)
        parser.add_argument(
            "--stage.token_fraction", type=float, default=1.0, help="share of the positions with cross-entropy"
        )
        unused = {f"training.{name}": kind for name, kind in ours.items()}
        add_unused(parser, unused, "the cross-entropy alone is minimised, by TokenObjective")
        model = {"model": dict, "num_latents": int | None, "latents": str | None}
        add_unused(parser, model, "the model is that of --stage.checkpoint")

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """The options that the stage and data share."""
        super().add_arguments_to_parser(parser)
        parser.add_argument("--encoder", type=str | None, default=None, help="where the token encoder is now")
        parser.add_argument("--output", type=str | None, default=None, help="of predict; not used here")
        parser.link_arguments("seed_everything", "training.seed", compute_fn=int)

    def make_task(self, options: Namespace) -> LDLMTask:
        """Of the checkpoint's model, with `TokenObjective`."""
        stage, training = vars(options.stage).copy(), vars(options.training).copy()
        for name in ("objective", "warmup_steps", "timestep_refresh"):
            training.pop(name)
        objective = TokenObjective(stage.pop("token_fraction"))
        model = token_decoder_stage(**stage)
        move_encoder(model, options.encoder)
        return LDLMTask(model, objective, warmup_steps=0, **training)


class Stored(Command):
    """``ldlm validate | test | predict``: the task of a checkpoint, whatever a recipe says of it.

    Args:
        words: The command and its options.
        checkpoint: The file; None where only help is asked for.
    """

    def __init__(self, words: list[str], checkpoint: str | None) -> None:
        self.checkpoint = checkpoint
        if checkpoint is None:
            super().__init__(words)
            return
        self.stored = LDLMTask.load_from_checkpoint(checkpoint)
        self.stored.eval()
        with tempfile.TemporaryDirectory() as folder:
            tokenizer = self.stored.model.tokenizer
            if tokenizer is not None:
                tokenizer.save_pretrained(folder)
            super().__init__(words, self.stored.model.sequence_length, folder)

    def add_core_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """What a recipe says of model and training is read past."""
        super().add_core_arguments_to_parser(parser)
        unused = {"model": dict, "training": dict, "num_latents": int | None, "latents": str | None, "stage": dict}
        add_unused(parser, unused, "the checkpoint says what its model is and how it was trained")

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Where things are, and go."""
        super().add_arguments_to_parser(parser)
        parser.add_argument("--encoder", type=str | None, default=None, help="where the token encoder is now")
        parser.add_argument("--output", default="reconstructions.jsonl", help="of predict: file to write")

    def make_task(self, options: Namespace) -> LDLMTask:
        """The checkpoint's, once what was given is compared with what it holds."""
        if self.config.subcommand == "predict":
            check_output(options.output)
            callbacks: list[L.Callback] = self.trainer.callbacks  # type: ignore[attr-defined]
            callbacks.append(ReconstructionWriter(options.output))
        given, stored = self.datamodule, self.stored.model
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
        return self.stored


def add_unused(parser: LightningArgumentParser, options: dict[str, Any], reason: str) -> None:
    """Let a recipe say what a command does not read."""
    for name, kind in options.items():
        parser.add_argument(f"--{name}", type=kind, default=None, help=f"not used: {reason}")


def latents_of_row(num_latents: int | None, sequence_length: int) -> int:
    """As many latent vectors a row as were asked for; else one a token."""
    return sequence_length if num_latents is None else num_latents


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


def run(words: list[str], fit: type[Fit] = Fit) -> Command:
    """Run one of Lightning's commands.

    Args:
        words: The command and its options.
        fit: What reads the words of ``fit``.

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
    if checkpoint in KEYWORDS and not fitting:
        folder = "such as ldlm_runs/quickstart"
        raise Fault(f"--ckpt_path {checkpoint} is for fit: give {words[0]} the folder of the run, {folder}")
    if fitting and named:
        read_checkpoint(str(checkpoint))  # before LightningCLI opens it; `Stored` reads it for the other commands
    if not fitting and checkpoint is None and not {"-h", "--help", "--print_config"} & {*words}:
        raise Fault(f"{words[0]} needs a model: give --ckpt_path CHECKPOINT")
    try:
        if words[0] == "fit":
            return fit(words)
        if words[0] == "fit-decoder":
            return FitDecoder(["fit", *words[1:]])
        return Stored(words, checkpoint if named else None)
    except (MisconfigurationException, ValueError) as error:
        raise Fault(explain(str(error), [], CLASSES)) from error


class Prepared(Fit):
    """Makes what ``ldlm fit`` would run, and leaves running it to others."""

    def before_instantiate_classes(self) -> None:
        """LightningCLI calls this when options are read: a tokenizer may be out of reach, and nothing here is text."""
        self.config["fit"]["model"]["tokenizer"] = None

    def fit(self, **arguments: object) -> None:
        """LightningCLI calls this in place of the Trainer's."""


def prepare_fit(words: list[str]) -> tuple[LDLMTask, L.Trainer, PackedTextDataModule]:
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
