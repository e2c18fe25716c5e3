"""Checkpoints: usable models, written whole or not at all, found again, and refused when damaged."""

import copy
import shutil

import pytest
import torch
from training_utils import caption, tiny_recipe
from transformers import AutoModel, AutoProcessor

from hfclip import HFCLIPConfig, HFCLIPImageProcessor, HFCLIPModel, HFCLIPProcessor, HFCLIPTokenizer
from training import checkpoint
from training.config import Config, UsageError
from training.optim import build_optimizer


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    """A model that was trained a step, its processor, optimizer and settings."""
    tokenizer = HFCLIPTokenizer.train_new_from_iterator(map(caption, range(50)), 600, show_progress=False)
    config = Config.from_dict(tiny_recipe(tmp_path_factory.mktemp("parts")))
    architecture = HFCLIPConfig(**copy.deepcopy(config.model.config))
    architecture.text_config.vocab_size = len(tokenizer)
    architecture.text_config.eos_token_id = tokenizer.eos_token_id
    model = HFCLIPModel(architecture)
    optimizer = build_optimizer(model, config.optim)
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    optimizer.step()
    return model, HFCLIPProcessor(HFCLIPImageProcessor(size=32), tokenizer), optimizer, config


def save(parts, folder, step, keep=3):
    model, processor, optimizer, config = parts
    about = {"config": config.to_dict()}
    return checkpoint.save_checkpoint(folder, step, model, processor, optimizer, None, about, keep)


def test_checkpoint_is_a_usable_model(parts, tmp_path):
    model, processor, *_ = parts
    folder = save(parts, tmp_path, 7)
    loaded, loaded_processor = AutoModel.from_pretrained(folder), AutoProcessor.from_pretrained(folder)
    assert isinstance(loaded, HFCLIPModel) and isinstance(loaded_processor, HFCLIPProcessor)
    text = [caption(3), "a red cat"]
    inputs = processor(text=text, return_tensors="pt")
    assert torch.equal(inputs["input_ids"], loaded_processor(text=text, return_tensors="pt")["input_ids"])
    model.eval()
    assert torch.equal(model.encode_text(**inputs), loaded.encode_text(**inputs))


def test_optimizer_comes_back_bit_for_bit(parts, tmp_path):
    model, _, optimizer, config = parts
    folder = save(parts, tmp_path, 7)
    other = build_optimizer(model, config.optim)
    checkpoint.restore(folder, other, None)
    expected, found = optimizer.state_dict()["state"], other.state_dict()["state"]
    assert expected and expected.keys() == found.keys()
    for index, state in expected.items():
        assert all(torch.equal(value, found[index][name]) for name, value in state.items())
    assert checkpoint.read_state(folder) == {"step": 7, "config": config.to_dict()}


def test_only_the_newest_are_kept(parts, tmp_path):
    for step in (2, 10, 9, 100):
        save(parts, tmp_path, step, keep=2)
    assert [path.name for path in checkpoint.list_checkpoints(tmp_path)] == ["checkpoint-10", "checkpoint-100"]


def test_a_save_that_fails_leaves_the_old_one(parts, tmp_path):
    model, processor, *_ = parts
    folder = save(parts, tmp_path, 7)
    (tmp_path / ".tmp-checkpoint-7").mkdir()  # of a process that was killed while saving
    with pytest.raises(AttributeError):
        checkpoint.save_checkpoint(tmp_path, 7, model, processor, None, None, {}, 3)
    assert checkpoint.read_state(folder)["step"] == 7
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-7"]


@pytest.mark.parametrize("file", ["model.safetensors", "trainer_state/optimizer.pt", "tokenizer.json"])
@pytest.mark.parametrize("damage", ["truncated", "changed", "missing"])
def test_damaged_checkpoint_gives_way_to_the_one_before(file, damage, parts, tmp_path, capsys):
    save(parts, tmp_path, 5)
    path = save(parts, tmp_path, 10) / file
    data = path.read_bytes()
    damaged = {"truncated": data[:-1], "changed": data[:-1] + bytes([data[-1] ^ 1])}
    if damage == "missing":
        path.unlink()
    else:
        path.write_bytes(damaged[damage])
    with pytest.raises(UsageError, match=f"{path.name} is (damaged|missing)"):
        checkpoint.read_state(tmp_path / "checkpoint-10")
    found, state = checkpoint.find_resumed(tmp_path, "auto")
    assert found.name == "checkpoint-5" and state["step"] == 5
    message = capsys.readouterr().out
    assert "WARNING" in message and path.name in message and "damaged-checkpoint-10" in message
    assert {p.name for p in tmp_path.iterdir()} == {"checkpoint-5", "damaged-checkpoint-10"}


def test_nothing_to_resume_is_a_new_run(tmp_path):
    assert checkpoint.find_resumed(tmp_path / "nowhere", "auto") is None
    assert checkpoint.find_resumed(tmp_path / "nowhere", None) is None
    assert checkpoint.find_resumed(tmp_path, None) is None  # empty


def test_rejects_a_folder_that_holds_a_run(parts, tmp_path):
    save(parts, tmp_path, 5)
    with pytest.raises(UsageError, match="holds a run already.*--resume auto.*--run.output_dir"):
        checkpoint.find_resumed(tmp_path, None)


def test_rejects_resuming_from_what_is_no_newest_checkpoint(parts, tmp_path):
    run = tmp_path / "run"
    older = save(parts, run, 5)
    assert checkpoint.find_resumed(run, str(older))[0] == older
    save(parts, run, 10)
    with pytest.raises(UsageError, match="newer checkpoints"):
        checkpoint.find_resumed(run, str(older))
    assert checkpoint.find_resumed(tmp_path / "branch", str(older))[1]["step"] == 5
    with pytest.raises(UsageError, match="another run"):
        shutil.copytree(run, tmp_path / "other")
        checkpoint.find_resumed(tmp_path / "other", str(older))
    with pytest.raises(UsageError, match="not a checkpoint"):
        checkpoint.find_resumed(run, str(tmp_path))


def test_changed_settings_are_told_or_refused(parts):
    config = parts[-1]
    saved = config.to_dict()
    assert checkpoint.check_settings(saved, config) == []
    changed = Config.from_dict({**saved, "optim": {**saved["optim"], "lr": 0.5}})
    assert checkpoint.check_settings(saved, changed) == ["optim.lr is 0.5 and was 0.001"]
    changed = Config.from_dict({**saved, "data": {**saved["data"], "num_workers": 9}, "eval": {"batch_size": 9}})
    assert checkpoint.check_settings(saved, changed) == []
    changed = Config.from_dict({**saved, "optim": {**saved["optim"], "batch_size": 99}})
    with pytest.raises(UsageError, match="optim.batch_size: found 99.*with 16"):
        checkpoint.check_settings(saved, changed)


def test_every_fixed_setting_exists(parts):
    settings = parts[-1].to_dict()
    assert all(name.split(".")[1] in settings[name.split(".")[0]] for name in checkpoint.FIXED_ON_RESUME)
