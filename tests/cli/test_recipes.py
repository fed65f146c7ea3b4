"""The shipped recipes and overlays, merged by the real command: the numbers of the paper's tables."""

import contextlib
import io
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from helpers import ROOT
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from ldlm.cli import main as cli
from ldlm.model import LDLM
from ldlm.training.callbacks.warmup import DiffusionToEncoderWarmup
from ldlm.training.task import LDLMTask

RECIPES = sorted(Path(str(cli.CONFIGS)).glob("*.yaml"))
OVERLAYS = sorted((Path(str(cli.CONFIGS)) / "overlays").glob("*.yaml"))
STUDIES = sorted((Path(str(cli.CONFIGS)) / "studies").glob("*.yaml"))


@pytest.mark.parametrize("path", [*RECIPES, *OVERLAYS, *STUDIES], ids=lambda path: path.stem)
def test_a_shipped_file_says_in_its_first_line_what_it_is_and_the_line_is_listed(path, capsys):
    first, *rest = path.read_text(encoding="utf-8").splitlines()
    assert first.startswith("# ")
    assert not rest[0].startswith("# ")  # nobody's sentence goes on where the listing cannot show it
    cli.main(["presets"])
    line = f"  {path.stem:<22}{first[2:]}"
    assert line in capsys.readouterr().out.splitlines()
    assert len(line) <= 150


# --- what the command makes of them


def test_a_command_alone_knows_every_public_class_by_its_name(tmp_path):
    code = "import sys, ldlm, ldlm.cli.fit; print(*sorted({*ldlm._HOMES.values()} - {*sys.modules}))"
    words = [
        ["-c", code],
        ["-P", "-m", "ldlm", "fit", "--config", "quickstart", "--config", "laptop", "--print_config"],
    ]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, sys.path)])}
    missing, printed = (
        subprocess.run(
            [sys.executable, *each], capture_output=True, text=True, check=True, env=environment, cwd=tmp_path
        )
        for each in words
    )
    assert missing.stdout.split() == []
    classes = [each["class_path"] for each in yaml.safe_load(printed.stdout)["trainer"]["callbacks"]]
    assert "ldlm.LikelihoodBound" in classes


def merged(*configs: str, command: str = "fit", words: tuple[str, ...] = ()) -> dict[str, Any]:
    """The configuration that a command would run with, as {"model.sigma_dec": 1.0, ...}."""
    named = [word for config in configs for word in ("--config", config)]
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), pytest.raises(SystemExit) as stop:
        cli.main([command, *named, *words, "--print_config"])
    assert stop.value.code in (0, None)
    leaves: dict[str, Any] = {}

    def walk(node: Any, name: str) -> None:
        if isinstance(node, dict) and node:
            for key, value in node.items():
                walk(value, f"{name}.{key}".lstrip("."))
        else:
            leaves[name] = node

    walk(yaml.safe_load(printed.getvalue()), "")
    return leaves


APPENDIX_C = {
    "data.batch_size": 512,
    "training.learning_rate": 3e-4,
    "training.weight_decay": 0.01,
    "training.betas": [0.9, 0.98],
    "training.eps": 1e-8,
    "training.lr_warmup_steps": 5000,
    "training.lr_decay": 0.0,
    "trainer.gradient_clip_val": 1.0,
    "model.schedule.class_path": "ldlm.TangentSchedule",
    "model.schedule.init_args.d": 3.0,
    "model.token_encoder.init_args.model": "gpt2",
    "model.token_encoder.init_args.layer": -3,
    "model.timesteps.class_path": "ldlm.AdaptiveTimesteps",
    "model.timesteps.init_args.bins": 100,
    "training.timestep_refresh": 5000,  # section 5.3
    "model.self_conditioning": 0.5,
    "training.objective.class_path": "ldlm.JointObjective",
    "training.objective.init_args.diffusion_weight": 1.0,
    "training.objective.init_args.reconstruction_weight": 1.0,
    "training.objective.init_args.token_weight": 1.0,
    "training.objective.init_args.token_gradient": False,
    "training.objective.init_args.token_fraction": 1.0,
    "training.objective.init_args.hidden_masking": 0.0,
}
OWN = {
    # section 6: 128 tokens, 500k iterations, warm-up 10k, decoder noise 1
    "owt128": {
        "sequence_length": 128,
        "trainer.max_steps": 500_000,
        "training.warmup_steps": 10_000,
        "model.sigma_dec": 1.0,
    },
    # App. C: 1M iterations
    "owt": {
        "sequence_length": 1024,
        "trainer.max_steps": 1_000_000,
        "training.warmup_steps": 50_000,
        "model.sigma_dec": 3.0,
    },
    "lm1b": {
        "sequence_length": 128,
        "trainer.max_steps": 1_000_000,
        "training.warmup_steps": 25_000,
        "model.sigma_dec": 3.0,
    },
}


@pytest.mark.parametrize("name", OWN)
def test_the_papers_recipes_have_the_papers_numbers(name):
    found = merged(name)
    assert {key: found[key] for key in (*APPENDIX_C, *OWN[name])} == APPENDIX_C | OWN[name]
    # The warm-up's shape is the callback's own, unless a recipe brings another: App. A.2.
    assert "ldlm.DiffusionToEncoderWarmup" not in [each["class_path"] for each in found["trainer.callbacks"]]
    shape = DiffusionToEncoderWarmup(found["training.warmup_steps"]).settings()
    assert shape == {"steps": OWN[name]["training.warmup_steps"], "gamma_min": 0.0, "k": 10.0, "c": 0.8}


def test_all_recipes_but_the_quickstart_are_known_here():
    assert {path.stem for path in RECIPES} == {*OWN, "quickstart"}


IDENTITY = {
    "model.latent_encoder.class_path": "ldlm.IdentityEncoder",
    "model.latent_decoder.class_path": "ldlm.IdentityDecoder",
}
SELF_ATTENTION = {
    "model.latent_encoder.class_path": "ldlm.SelfAttentionEncoder",
    "model.latent_decoder.class_path": "ldlm.SelfAttentionDecoder",
}
SCRATCH = {
    "model.token_encoder.class_path": "ldlm.EmbeddingTokenEncoder",
    "model.token_encoder.init_args.hidden_size": 768,
    "model.token_encoder.init_args.vocab_size": 50257,
}
FIXED = {"model.latent_encoder.init_args.unit_variance": True, "model.sigma_dec": 0.5, "training.warmup_steps": 0}
POSITIONS = {"model.token_decoder.init_args.learned_positions": True}
# What each overlay changes of owt128, and nothing else. Amounts that are ours are marked.
CHANGES: dict[str, dict[str, Any]] = {
    # Table 1
    "loss-mse": {},
    "loss-ce": {
        "training.objective.init_args.reconstruction_weight": 0.0,
        "training.objective.init_args.token_gradient": True,
    },
    "loss-ce-mse": {"training.objective.init_args.token_gradient": True},
    "encoder-shallow": {"model.token_encoder.class_path": "ldlm.ShallowTokenEncoder"},
    "encoder-scratch": SCRATCH,
    "warmup-0": {"training.warmup_steps": 0},
    "warmup-5k": {"training.warmup_steps": 5_000},
    "warmup-10k": {},
    "warmup-25k": {"training.warmup_steps": 25_000},
    "warmup-50k": {"training.warmup_steps": 50_000},
    "warmup-100k": {"training.warmup_steps": 100_000},
    "timesteps-uniform": {"model.timesteps.class_path": "ldlm.UniformTimesteps"},
    "timesteps-adaptive": {},
    "sigma-0.1": {"model.sigma_dec": 0.1},
    "sigma-0.5": {"model.sigma_dec": 0.5},
    "sigma-1": {},
    "sigma-2": {"model.sigma_dec": 2.0},
    "sigma-3": {"model.sigma_dec": 3.0},
    "sigma-4": {"model.sigma_dec": 4.0},
    # Table 2; noise and masking are ours
    "tencdm": IDENTITY
    | {"training.objective.init_args.reconstruction_weight": 0.0, "model.sigma_dec": 0.2, "training.warmup_steps": 0},
    "cosmos-autoencoder": FIXED
    | {
        "training.objective.init_args.diffusion_weight": 0.0,
        "training.objective.init_args.token_gradient": True,
        "training.objective.init_args.hidden_masking": 0.3,
    },
    "cosmos": FIXED
    | {"training.objective.init_args.reconstruction_weight": 0.0, "training.objective.init_args.token_weight": 0.0},
    "embeddings": IDENTITY
    | POSITIONS
    | {
        "model.token_encoder.class_path": "ldlm.ShallowTokenEncoder",
        "training.objective.init_args.reconstruction_weight": 0.0,
        "model.sigma_dec": 0.2,
        "training.warmup_steps": 0,
    },
    "embeddings-scratch": IDENTITY
    | POSITIONS
    | SCRATCH
    | {
        "training.objective.init_args.reconstruction_weight": 0.0,
        "training.objective.init_args.token_gradient": True,
        "model.sigma_dec": 0.2,
        "training.warmup_steps": 0,
    },
    # Table 4
    "layer-1": {"model.token_encoder.init_args.layer": -1},
    "layer-2": {"model.token_encoder.init_args.layer": -2},
    "layer-3": {},
    "layer-4": {"model.token_encoder.init_args.layer": -4},
    # Table 5
    "no-token-decoder": {"training.objective.init_args.token_weight": 0.0},
    # Table 6
    "encoder-bert": {
        "tokenizer": "bert-base-cased",
        "model.token_encoder.init_args.model": "bert-base-cased",
        "model.token_decoder.init_args.vocab_size": 28996,
    },
    # Table 7
    "coders-perceiver": {},
    "coders-self-attention": SELF_ATTENTION,
    # beyond the paper
    "latents-64": {"num_latents": 64},
}
LAYERS = {"decoder-1": 1, "decoder-2": 2, "decoder-3": 3, "decoder-6": 6, "decoder-linear": 0}


@pytest.fixture(scope="module")
def owt128() -> dict[str, Any]:
    return merged("owt128")


def test_every_overlay_is_known_here():
    assert {path.stem for path in OVERLAYS} == {*CHANGES, *LAYERS, "laptop"}


@pytest.mark.parametrize("name", CHANGES)
def test_an_overlay_changes_what_the_papers_row_says_and_nothing_else(name, owt128):
    found, want = merged("owt128", name), CHANGES[name]
    changed = {key: value for key, value in found.items() if owt128.get(key) != value}
    assert changed == want
    # Arguments go only with the class that had them.
    for key in owt128.keys() - found.keys():
        assert f"{key.partition('.init_args.')[0]}.class_path" in want


@pytest.mark.parametrize("name", LAYERS)
def test_a_decoder_overlay_has_table_5s_layers_and_200k_iterations_of_512_rows(name):
    base = merged("owt128", "sigma-3", command="fit-decoder", words=("--stage.checkpoint", "x.ckpt"))
    found = merged("owt128", "sigma-3", name, command="fit-decoder", words=("--stage.checkpoint", "x.ckpt"))
    changed = {key: value for key, value in found.items() if base[key] != value}
    want = {"stage.layers": LAYERS[name], "trainer.max_steps": 200_000}
    assert changed == {key: value for key, value in want.items() if base[key] != value}
    assert (found["stage.layers"], found["trainer.max_steps"]) == (LAYERS[name], 200_000)
    assert found["data.batch_size"] == 512
    assert found["stage.sigma_dec"] is None  # the checkpoint's
    assert (found["training.learning_rate"], found["training.lr_warmup_steps"]) == (3e-4, 5000)
    assert found["stage.heads"] == 12


def test_cross_entropy_that_reaches_the_encoder_is_taken_on_every_position():
    reaching = [name for name, changes in CHANGES.items() if changes.get("training.objective.init_args.token_gradient")]
    assert len(reaching) == 4
    assert (
        merged("quickstart")["training.objective.init_args.token_fraction"] < 1
    )  # which is free behind a stop-gradient, and only there
    for name in reaching:
        assert merged("quickstart", name)["training.objective.init_args.token_fraction"] == 1.0


def test_the_laptop_overlay_is_the_quickstart_cut_to_five_minutes():
    quick, laptop = merged("quickstart"), merged("quickstart", "laptop")
    changed = {key: value for key, value in laptop.items() if quick.get(key) != value and ".callbacks" not in key}
    assert changed == {
        "data.batch_size": 16,
        "training.learning_rate": 1.5e-3,
        "training.lr_warmup_steps": 50,
        "model.sampler.init_args.noise_scale": 1.0,
        "training.warmup_steps": 500,
        "training.timestep_refresh": 50,
        "trainer.max_steps": 1600,
        "trainer.val_check_interval": 1600,
    }


# --- they train


def train(folder: Path, *words: str, command: str = "fit") -> Path:
    """A few steps at the quickstart's scale; the folder of the run."""
    checkpoint = folder / "run" / "checkpoints" / "last.ckpt"
    few = ["--data.batch_size", "4", "--data.validation_rows", "8", "--trainer.max_steps", "2"]
    few += ["--trainer.val_check_interval", "2", "--trainer.log_every_n_steps", "1"]
    few += ["--trainer.enable_progress_bar", "false", "--trainer.precision", "32"]
    if command == "fit":
        few += ["--training.lr_warmup_steps", "1", "--training.statistics_rows", "8"]
    logger = ["--trainer.logger.save_dir", str(folder), "--trainer.logger.name", "run", "--trainer.logger.version", ""]
    cli.main([command, "--config", "quickstart", "--config", "laptop", *words, *few, *logger])
    assert torch.load(checkpoint, weights_only=True)["global_step"] == 2
    return checkpoint


def losses_of(checkpoint: Path) -> set[str]:
    """Which losses the run logged; cross-entropy may be 0, where decoder and embeddings start as one."""
    events = EventAccumulator(str(checkpoint.parent.parent), size_guidance={"scalars": 0})
    events.Reload()
    kinds = {"diffusion", "reconstruction", "token"}
    logged = {tag.partition("/")[2] for tag in events.Tags()["scalars"] if tag.startswith("train/")} & kinds
    assert all(event.value >= 0 for name in logged for event in events.Scalars(f"train/{name}"))
    return logged


def with_config(*names: str) -> list[str]:
    return [word for name in names for word in ("--config", name)]


NARROW = ["--model.denoiser.init_args.latent_size", "384"]
TABLE = ["--model.token_encoder.init_args.hidden_size", "384", "--model.token_encoder.init_args.vocab_size", "30522"]
ALL = {"diffusion", "reconstruction", "token"}
NO_MSE = {"diffusion", "token"}
FAST_RUNS = [
    (with_config("loss-ce", "encoder-scratch") + TABLE, NO_MSE),
    (with_config("tencdm", "layer-1") + NARROW, NO_MSE),
]
SLOW_RUNS = [
    (with_config("loss-ce"), NO_MSE),
    (with_config("loss-ce", "encoder-shallow"), NO_MSE),
    (with_config("loss-ce-mse"), ALL),
    (with_config("loss-mse", "timesteps-uniform", "warmup-0"), ALL),
    (with_config("no-token-decoder"), {"diffusion", "reconstruction"}),
    (with_config("embeddings") + NARROW, NO_MSE),
    (with_config("embeddings-scratch") + NARROW + TABLE, NO_MSE),
    (with_config("coders-self-attention", "layer-4"), ALL),
    ([*with_config("sigma-4"), "--num_latents", "16"], ALL),
]


def called(value: list[str] | set[str]) -> str:
    """The overlays of a run."""
    return " ".join(word for word in value if not word.startswith("--")) if isinstance(value, list) else ""


def check_run(folder: Path, words: list[str], losses: set[str]) -> None:
    checkpoint = train(folder, *words)
    assert losses_of(checkpoint) == losses
    task = LDLMTask.load_from_checkpoint(checkpoint)
    model = task.model
    task.objective.prepare(model)  # as a fit does
    # What stood still stands where it started, and what trained has moved: AdamW has a state for it.
    states = torch.load(checkpoint, weights_only=True)["optimizer_states"][0]["state"]
    assert len(states) == len([p for p in model.parameters() if p.requires_grad])
    tokens = model.sample_tokens(2, nfe=2)
    assert tokens.shape == (2, 32)
    assert 0 <= tokens.min() <= tokens.max() < 30522


@pytest.mark.parametrize(("words", "losses"), FAST_RUNS, ids=called)
def test_an_overlay_trains_with_the_losses_it_says(tmp_path, monkeypatch, words, losses):
    monkeypatch.chdir(tmp_path)
    check_run(tmp_path, words, losses)


@pytest.mark.slow
@pytest.mark.parametrize(("words", "losses"), SLOW_RUNS, ids=called)
def test_every_other_overlay_trains_with_the_losses_it_says(tmp_path, monkeypatch, words, losses):
    monkeypatch.chdir(tmp_path)
    check_run(tmp_path, words, losses)


@pytest.mark.slow
def test_an_autoencoder_diffusion_on_its_latents_and_new_decoders_follow_each_other(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    first = train(tmp_path / "first", *with_config("cosmos-autoencoder"))
    assert losses_of(first) == {"reconstruction", "token"}
    second = train(tmp_path / "second", *with_config("cosmos"), "--latents", str(first))
    assert losses_of(second) == {"diffusion"}
    one, other = (torch.load(path, weights_only=True)["state_dict"] for path in (first, second))
    moved = {name.partition(".")[0] for name in one if not torch.equal(one[name], other[name])}
    assert moved == {"denoiser", "timesteps"}
    for name in LAYERS:
        words = [*with_config(name), "--stage.heads", "4", "--stage.checkpoint", str(second)]
        last = train(tmp_path / name, *words, command="fit-decoder")
        assert losses_of(last) == {"token"}
        model = LDLM.load_from_checkpoint(last)
        assert (model.sigma_dec, model.latent_decoder.hidden_size) == (0.5, 256)
        assert model.sample_tokens(1, nfe=1).shape == (1, 32)
