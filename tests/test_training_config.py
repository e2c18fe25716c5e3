"""Settings: every recipe parses, the command line overrides, and each mistake is told before any work."""

import dataclasses

import pytest
import yaml
from training_utils import tiny_recipe

from hfclip.errors import UsageError
from training.config import CONFIG_FOLDER, PATHS, SECTIONS, Config, load_yaml, parse_arguments


def write(folder, values):
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(values) if isinstance(values, dict) else values)
    return str(path)


@pytest.mark.parametrize("recipe", sorted(path.stem for path in CONFIG_FOLDER.glob("*.yaml")))
def test_every_shipped_recipe_is_valid(recipe):
    assert isinstance(Config.from_dict(load_yaml(recipe)), Config)


def test_no_arguments_mean_the_quickstart():
    config, resume = parse_arguments([])
    assert config == Config.from_dict(load_yaml("quickstart"))
    assert config.data.train == "scenes"
    assert resume is None


def test_flags_that_name_data_or_a_model_need_no_recipe():
    flags = ["--data.train", "shards/{000..099}.tar", "--model.preset", "ViT-B/32", "--model.tokenizer", "bpe.gz"]
    model = {"preset": "ViT-B/32", "tokenizer": "bpe.gz"}
    expected = Config.from_dict({"model": model, "data": {"train": "shards/{000..099}.tar"}})
    assert parse_arguments(flags)[0] == expected

    name = "openai/clip-vit-base-patch32"
    config, _ = parse_arguments(["--model.checkpoint", name, "--data.train", "my/folder", "--optim.lr", "1e-5"])
    data = {"train": "my/folder"}
    assert config == Config.from_dict({"model": {"checkpoint": name}, "data": data, "optim": {"lr": 1e-5}})
    assert config.data.max_samples is None and config.eval.zero_shot is None and config.eval.retrieval is None
    assert config.run.output_dir == "runs/clip"


def test_command_line_overrides_the_file(tmp_path):
    path = write(tmp_path, tiny_recipe(tmp_path))
    arguments = ["--optim.lr", "1e-2", "--data.train=x.tar", "--run.trackers", "tensorboard,wandb", "--model.compile"]
    arguments += ["--model.config", "null", "--model.preset", "ViT-B/32", "--optim.max_grad_norm", "1"]
    config, resume = parse_arguments(["--config", path, "--resume", "auto", *arguments])
    assert (config.optim.lr, config.data.train, resume) == (0.01, "x.tar", "auto")
    assert config.run.trackers == ["tensorboard", "wandb"]
    assert config.model.compile and config.model.config is None and config.model.preset == "ViT-B/32"
    assert isinstance(config.optim.max_grad_norm, float)
    assert config.optim.batch_size == 16  # of the file


def test_inline_model_may_be_given_on_the_command_line():
    config, _ = parse_arguments(["--model.config", "{projection_dim: 8}", "--model.tokenizer", "train"])
    assert config.model.config == {"projection_dim": 8}


def test_saved_config_names_the_same_run(tmp_path):
    config, _ = parse_arguments(["--optim.lr", "3e-7", "--data.max_samples", "100"])
    config.save(tmp_path / "saved.yaml")
    assert parse_arguments(["--config", str(tmp_path / "saved.yaml")])[0] == config


def test_every_path_expands_the_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    named = [name for name in PATHS if name not in ("model.checkpoint", "model.vision_checkpoint", "distill.teacher")]
    arguments = [word for name in named if name != "model.text_checkpoint" for word in (f"--{name}", f"~/{name}")]
    (tmp_path / "recipe.yaml").write_text("run: {seed: 3}")
    config, resume = parse_arguments(["--config", "~/recipe.yaml", "--resume", "~/checkpoint-1", *arguments])
    assert resume == f"{tmp_path}/checkpoint-1" and config.run.seed == 3
    assert {config.value(name) for name in named} == {f"{tmp_path}/{name}" for name in named if config.value(name)} | {
        None
    }
    two = {"vision_checkpoint": "~/v", "text_checkpoint": "~/t"}
    for model, key in (({"checkpoint": "~/c"}, "checkpoint"), (two, "vision_checkpoint"), (two, "text_checkpoint")):
        config = Config.from_dict(
            {"model": model, "distill": {"teacher": "~/x"}, "data": {"train": {"~/a": 1, "b": 2}}}
        )
        assert getattr(config.model, key).startswith(f"{tmp_path}/") and config.distill.teacher == f"{tmp_path}/x"
        assert list(config.data.train) == [f"{tmp_path}/a", "b"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--optim.lrr", "1"], ["--optim.lrr", "Did you mean '--optim.lr'"]),
        (["--batch_size", "1"], ["Did you mean '--optim.batch_size'"]),
        (["--optim.lr"], ["--optim.lr", "expected one argument"]),
        (["--optim.lr", "fast"], ["optim.lr", "'fast'", "number"]),
        (["--optim.lr", "-1"], ["optim.lr", "-1.0", "above 0"]),
        (["--optim.lr", "nan"], ["optim.lr", "nan", "above 0"]),
        (["--optim.batch_size", "2.5"], ["optim.batch_size", "2.5", "int"]),
        (["--optim.batch_size", "true"], ["optim.batch_size", "True", "int"]),
        (["--optim.batch_size", "1"], ["optim.batch_size", "no negatives"]),
        (["--optim.batch_size", "[1"], ["optim.batch_size", "not a YAML value"]),
        (["--run.precision", "fp8"], ["run.precision", "'fp8'", "'bf16', 'fp16', 'fp32'"]),
        (["--data.num_workers", "few"], ["data.num_workers", "'few'", "int or null"]),
        (["--config", "quickstart", "--model.preset", "ViT-B/32"], ["preset and config", "exactly one", "null"]),
        (["--model.preset", "ViT-B/32"], ["model.tokenizer", "null", '"train"', "merges file"]),
        (["--data.train", "x.tar"], ["nothing names the model"]),
        (["--model.vision_checkpoint", "x"], ["set alone", "text_checkpoint"]),
        (["--model.patch_dropout", "1"], ["patch_dropout", "0 <= value < 1"]),
        (["--config", "quickstrat"], ["quickstrat", "recipes", "quickstart"]),
        (["--config", ""], ["--config: found an empty word"]),
        (["--config", "quickstart", "--resume", ""], ["--resume: found an empty word"]),
    ],
)
def test_rejects_mistaken_arguments(arguments, words):
    with pytest.raises(UsageError) as error:
        parse_arguments(arguments)
    assert all(word in str(error.value) for word in words), str(error.value)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"optim": {"learning_rate": 1}}, ["optim.learning_rate"]),
        ({"optim": {"bach_size": 8}}, ["Did you mean 'optim.batch_size'"]),
        ({"optimizer": {"lr": 1}}, ["section 'optimizer'", "Did you mean 'optim'"]),
        ({"optim": [1, 2]}, ["optim", "[1, 2]", "mapping"]),
        ({"run": {"trackers": [1]}}, ["run.trackers", "[1]", "list of text"]),
        ("optim: {lr: 1", ["not a YAML file", "line 1"]),
        ("optim: {lr: 1}\nrun: {seed: 1}\noptim: {steps: 2}", ["'optim' is given twice, in lines 1 and 3"]),
        ("optim:\n  lr: 1\n  steps: 2\n  lr: 2", ["'lr' is given twice, in lines 2 and 4"]),
        ("just text", ["'just text'", "mapping of sections"]),
        ("data: {train: {{DATA}}}", ["not a YAML file", "unhashable key"]),
    ],
)
def test_rejects_mistaken_files(values, words, tmp_path):
    with pytest.raises(UsageError) as error:
        parse_arguments(["--config", write(tmp_path, values)])
    assert all(word in str(error.value) for word in words), str(error.value)


def test_yaml_may_merge_mappings_whose_keys_it_overrides(tmp_path):
    text = "optim: &a {lr: 1.0, steps: 2}\nmodel: {config: {vision_config: &b {<<: *a, lr: 3}, text_config: {<<: *b, lr: 4}}}"
    values = load_yaml(write(tmp_path, text))
    assert values["model"]["config"]["text_config"] == {"lr": 4, "steps": 2}


def test_help_explains_every_setting(capsys):
    with pytest.raises(SystemExit) as end:
        parse_arguments(["--help"])
    text = capsys.readouterr().out
    assert end.value.code == 0
    for name, section in SECTIONS.items():
        for field in dataclasses.fields(section):
            flag = f"--{name}.{field.name} "
            assert flag in text
            assert "(default:" in text[text.index(flag) :][:800]
    assert "quickstart, if none of them names data or a model (--data.train," in " ".join(text.split())
    assert "Weights and optimizer state are float32" in " ".join(text.split())  # a field's docstring


def test_settings_stay_few():
    """A new setting needs a reason, and perhaps one less elsewhere."""
    assert sum(len(dataclasses.fields(section)) for section in SECTIONS.values()) <= 62
