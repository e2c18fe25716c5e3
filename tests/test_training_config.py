"""Settings: every recipe parses, the command line overrides, and each mistake is told before any work."""

import dataclasses
import re

import pytest
import yaml
from training_utils import tiny_recipe

from hfclip.errors import UsageError
from training.command import CONFIG_FOLDER, Command, load_yaml, parse_arguments
from training.config import PATHS, SECTIONS, Config
from training.defaults import fill_numbers, keep_numbers
from training.removed import REMOVED, translate


def write(folder, values):
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(values) if isinstance(values, dict) else values)
    return str(path)


@pytest.mark.parametrize("recipe", sorted(path.stem for path in CONFIG_FOLDER.glob("*.yaml")))
def test_every_shipped_recipe_is_valid(recipe):
    assert isinstance(Config.from_dict(load_yaml(recipe)), Config)


def test_no_arguments_mean_the_quickstart():
    config, command = parse_arguments([])
    assert config == Config.from_dict(load_yaml("quickstart"))
    assert config.data.train == "scenes"
    assert command == Command(resume=None, stop_after=None, profile=0)


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
    config, (resume, *_) = parse_arguments(["--config", path, "--resume", "auto", *arguments])
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
    named = [name for name in PATHS if name not in ("model.checkpoint", "distill.teacher")]
    arguments = [word for name in named for word in (f"--{name}", f"~/{name}")]
    (tmp_path / "recipe.yaml").write_text("run: {seed: 3}")
    config, (resume, *_) = parse_arguments(["--config", "~/recipe.yaml", "--resume", "~/checkpoint-1", *arguments])
    assert resume == f"{tmp_path}/checkpoint-1" and config.run.seed == 3
    assert [config.value(name) for name in named] == [f"{tmp_path}/{name}" for name in named]
    model, data = {"checkpoint": "~/c"}, {"train": {"~/a": 1, "b": 2}}
    config = Config.from_dict({"model": model, "distill": {"teacher": "~/x"}, "data": data})
    assert (config.model.checkpoint, config.distill.teacher) == (f"{tmp_path}/c", f"{tmp_path}/x")
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
        (["--model.vision_checkpoint", "x"], ["model.vision_checkpoint", "from_vision_text_pretrained"]),
        (["--run.stop_after", "3"], ["flag of the command", "--stop-after"]),
        (["--stop-after", "-1"], ["--stop-after", "-1.0", "minutes above 0"]),
        (["--optim.bfloat16", "moments,weights"], ["optim.bfloat16[1]", "'weights'", "'moments', 'text_weights'"]),
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
        ({"run": {"trackers": [1]}}, ["run.trackers[0]", "1", "text"]),
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
    assert sum(len(dataclasses.fields(section)) for section in SECTIONS.values()) <= 50


# ---------------------------------------------------------------------------------------------------------------------
# Settings of earlier versions
# ---------------------------------------------------------------------------------------------------------------------


def old_file(folder, **values):
    """A file that has all settings of earlier versions, with their defaults but for `values`."""
    recipe = tiny_recipe(folder)
    for name, (default, _) in {**REMOVED, "run.stop_after": (None, ""), "run.profile": (0, "")}.items():
        section, key = name.split(".")
        recipe.setdefault(section, {})[key] = values.get(key, default)
    return write(folder, recipe)


def test_removed_settings_with_their_defaults_change_nothing(tmp_path):
    config, command = parse_arguments(["--config", old_file(tmp_path)])
    assert config == Config.from_dict(tiny_recipe(tmp_path)) and command == Command()


def test_removed_settings_are_put_in_their_heirs(tmp_path):
    path = old_file(tmp_path, moments="bfloat16", text_weights="bfloat16", stop_after=90.0, profile=3)
    config, command = parse_arguments(["--config", path])
    assert config.optim.bfloat16 == ["moments", "text_weights"] and command == Command(None, 90.0, 3)
    assert parse_arguments(["--config", path, "--stop-after", "5"])[1].stop_after == 5
    assert parse_arguments(["--config", old_file(tmp_path, moments="bfloat16")])[0].optim.bfloat16 == ["moments"]


@pytest.mark.parametrize("name", REMOVED)
def test_other_values_of_removed_settings_are_told_and_refused_where_weights_depend_on_them(name, tmp_path, capsys):
    section, key = name.split(".")
    path = old_file(tmp_path, **{key: 9})
    told = rf"^(left out: )?{name}: found 9, but it is (always|no setting now).*[a-z]\.$"
    if section in ("model", "optim"):
        with pytest.raises(UsageError, match=told):
            parse_arguments(["--config", path])
    else:
        config, _ = parse_arguments(["--config", path])
        assert config == Config.from_dict(tiny_recipe(tmp_path)) and re.match(told, capsys.readouterr().err.strip())
    assert key not in translate({section: {key: 9}}, strict=False)[section]  # a record of what was


# ---------------------------------------------------------------------------------------------------------------------
# What the settings leave open
# ---------------------------------------------------------------------------------------------------------------------


def filled(pairs, model=None, largest_batch=None, **sections):
    config = Config.from_dict({"model": model or {"checkpoint": "clip"}, **sections})
    said = fill_numbers(config, pairs, largest_batch)
    return config, said


@pytest.mark.parametrize(
    ("pairs", "batch_size", "epochs", "steps", "save_every"),
    [
        (2, 2, 100, 100, 0),
        (30, 30, 100, 100, 0),
        (120, 120, 100, 100, 0),
        (1000, 256, 34, 102, 0),
        (16000, 256, 5, 310, 124),
    ],
)
def test_open_numbers_follow_the_data(pairs, batch_size, epochs, steps, save_every):
    config, said = filled(pairs)
    optim, run = config.optim, config.run
    assert (optim.batch_size, optim.epochs, optim.lr, run.save_every) == (batch_size, epochs, 1e-5, save_every)
    assert optim.epochs * (pairs // batch_size) == steps and optim.warmup_steps == steps // 10
    assert steps / run.log_every >= 20
    assert said[0] == f"optim.batch_size {batch_size} (auto: {'all' if pairs <= 256 else 'of'} {pairs:,} pairs)"
    assert len(said) == 7 and filled(pairs)[0] == config
    assert fill_numbers(config, 10**6) == []  # nothing is open any more


def test_a_large_run_from_scratch_has_the_papers_numbers():
    config, _ = filled(400_000_000, {"preset": "ViT-B/32", "tokenizer": "train"}, optim={"batch_size": 32768})
    optim, per_epoch = config.optim, 400_000_000 // 32768
    assert (optim.epochs, optim.lr, optim.warmup_steps) == (32, 5e-4, 2000)
    assert (config.run.log_every, config.run.save_every, config.eval.every) == (20, per_epoch, per_epoch)


def test_given_numbers_stay_and_lead_the_others():
    config, said = filled(30, optim={"batch_size": 10, "steps": 60, "lr": 1e-3}, run={"save_every": 5})
    assert (config.optim.batch_size, config.optim.epochs, config.optim.lr) == (10, None, 1e-3)
    assert (config.optim.warmup_steps, config.run.log_every, config.run.save_every) == (6, 3, 5)
    assert not any("optim.lr" in line or "batch_size" in line for line in said)
    assert filled(1000, largest_batch=40)[0].optim.batch_size == 40  # a small source of a mixture


def test_a_run_that_goes_on_keeps_its_numbers():
    before, _ = filled(30)
    config = Config.from_dict({"model": {"checkpoint": "clip"}, "optim": {"lr": 1e-4}})
    keep_numbers(config, before)
    assert fill_numbers(config, 10**6) == []
    assert (config.optim.batch_size, config.optim.lr) == (30, 1e-4)
