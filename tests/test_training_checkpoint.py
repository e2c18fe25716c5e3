"""Checkpoints: usable models, written whole or not at all, found again, and refused when damaged."""

import copy
import json
import os
import pickle
import shutil
import subprocess
import sys
import time

import pytest
import torch
from training_utils import ROOT, caption, environment, tiny_recipe
from transformers import AutoModel, AutoProcessor

from hfclip import HFCLIPConfig, HFCLIPImageProcessor, HFCLIPModel, HFCLIPProcessor, HFCLIPTokenizer
from hfclip.errors import UsageError
from training.config import Config
from training.optim import build_optimizer
from training.state import checkpoint, resuming


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


def save(parts, folder, step, keep=3, **options):
    model, processor, optimizer, config = parts
    states, about = {"optimizer": optimizer.state_dict()}, {"config": config.to_dict()}
    return checkpoint.save_checkpoint(folder, step, model, processor, states, about, keep=keep, **options)


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


def test_states_come_back_bit_for_bit(parts, tmp_path):
    model, processor, optimizer, config = parts
    states = {"optimizer": optimizer.state_dict(), "average": {"weight": torch.randn(3, dtype=torch.bfloat16)}}
    about = {"config": config.to_dict(), "weights": {1: 0.5, "ü": [None, 1e-300]}}
    folder = checkpoint.save_checkpoint(tmp_path, 7, model, processor, states, about, keep=1)
    found = checkpoint.load_states(folder)
    assert found.keys() == states.keys() and torch.equal(found["average"]["weight"], states["average"]["weight"])
    other = build_optimizer(model, config.optim)
    other.load_state_dict(found["optimizer"])
    expected, found = optimizer.state_dict()["state"], other.state_dict()["state"]
    assert expected and expected.keys() == found.keys()
    for index, state in expected.items():
        assert all(torch.equal(value, found[index][name]) for name, value in state.items())
    state = checkpoint.read_state(folder)
    assert abs(state.pop("saved_at") - time.time()) < 60
    assert state == {"step": 7, "config": config.to_dict(), "weights": {"1": 0.5, "ü": [None, 1e-300]}}


def test_weights_can_come_from_elsewhere(parts, tmp_path):
    """As those of a model do of which each process holds a shard."""
    model, processor, *_ = parts
    weights = {name: torch.zeros_like(value) for name, value in model.state_dict().items()}
    folder = checkpoint.save_checkpoint(tmp_path, 7, model, processor, {}, {}, keep=1, state_dict=weights)
    loaded = HFCLIPModel.from_pretrained(folder).state_dict()
    assert loaded.keys() == weights.keys() and not any(value.any() for value in loaded.values())


def test_only_the_newest_are_kept(parts, tmp_path):
    for step in (2, 10, 9, 100):
        save(parts, tmp_path, step, keep=2)
    assert [path.name for path in checkpoint.list_checkpoints(tmp_path)] == ["checkpoint-10", "checkpoint-100"]


def test_a_save_that_fails_leaves_the_old_one(parts, tmp_path):
    model, processor, *_ = parts
    folder = save(parts, tmp_path, 7)
    (tmp_path / ".tmp-checkpoint-7").mkdir()  # of a process that was killed while saving
    with pytest.raises(AttributeError, match="pickle"):
        checkpoint.save_checkpoint(tmp_path, 7, model, processor, {"bad": lambda: 0}, {}, keep=3)
    assert checkpoint.read_state(folder)["step"] == 7
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-7"]


def killed_at(moment: int, function) -> bool:
    """Runs `function` in a copy of this process that ends, as by `kill -9`, before its `moment`-th operation on files.
    Whether there were so many."""
    child = os.fork()
    if child == 0:
        count = 0

        def hook(event, _):
            nonlocal count
            if event in ("open", "os.rename", "os.remove", "os.rmdir", "os.mkdir"):
                count += 1
                if count == moment:
                    os._exit(9)

        sys.addaudithook(hook)
        try:
            function()
        finally:
            os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9


@pytest.mark.slow
def test_kill_at_any_moment_leaves_the_old_or_the_new(parts, tmp_path, capfd):
    """A checkpoint that is replaced while an older one is removed: each has a name only while it is whole."""
    model, processor, *_ = parts
    torch.set_num_threads(1)  # threads do not survive a fork
    save(parts, tmp_path / "before", 1)
    checkpoint.save_checkpoint(tmp_path / "before", 2, model, processor, {"a": {"value": 1}}, {}, keep=9)
    found_values, moment = [], 0
    while True:
        run, moment = tmp_path / "run", moment + 1
        shutil.rmtree(run, ignore_errors=True)
        shutil.copytree(tmp_path / "before", run)

        def replace():
            checkpoint.save_checkpoint(run, 2, model, processor, {"a": {"value": 2}}, {}, keep=1)

        was_killed = killed_at(moment, replace)
        newest, _ = resuming.find_resumed(run, "auto")
        assert newest.name == "checkpoint-2"
        found_values.append(checkpoint.load_states(newest)["a"]["value"])
        for path in checkpoint.list_checkpoints(run):
            checkpoint.read_state(path)
        assert not list(run.glob("damaged-*")) and not list(run.glob(".*"))
        if not was_killed:
            break
    assert found_values == sorted(found_values) and set(found_values) == {1, 2}
    assert moment > 30 and [path.name for path in run.iterdir()] == ["checkpoint-2"]


# Saves in a folder where there is less and less room: of the disk, or of what a user may write to one file.
WITH_LITTLE_ROOM = """
import pickle, resource, shutil, sys
from pathlib import Path
from training.state import checkpoint, resuming
folder, kind = Path(sys.argv[1]) / "run", sys.argv[2]
model, processor, states = pickle.load(sys.stdin.buffer)
save = lambda step: checkpoint.save_checkpoint(folder, step, model, processor, states, {}, keep=9)
save(1)
filler = folder.parent / "filler"
for room in (450_000, 350_000, 220_000, 150_000, 50_000, 4096, 0):
    if kind == "disk":
        filler.write_bytes(bytes(max(shutil.disk_usage(folder).free - room, 0)))
    else:
        resource.setrlimit(resource.RLIMIT_FSIZE, (room, -1))
    try:
        save(2)
        done = True
    except checkpoint.UsageError as error:
        done = False
        message = str(error)
    filler.unlink(missing_ok=True)
    resource.setrlimit(resource.RLIMIT_FSIZE, (-1, -1))
    assert not done and [path.name for path in folder.iterdir()] == ["checkpoint-1"], room
    assert resuming.newest_checkpoint(folder)[1]["step"] == 1
    print(message)
save(2)
"""


@pytest.mark.parametrize(("kind", "reason"), [("disk", "No space left on device"), ("file", "File too large")])
def test_full_disk_is_told_and_harms_nothing(kind, reason, parts, tmp_path):
    model, processor, optimizer, _ = parts
    line = [sys.executable, "-c", WITH_LITTLE_ROOM, str(tmp_path), kind]
    if kind == "disk":
        small = ["unshare", "-rm", "bash", "-c", f'mount -t tmpfs -o size=4m none {tmp_path} && exec "$@"', "bash"]
        if shutil.which("unshare") is None or subprocess.run([*small, "true"], capture_output=True).returncode != 0:
            pytest.skip("needs a small disk, mounted in a namespace")
        line = [*small, *line]
    process = subprocess.run(
        line,
        input=pickle.dumps((model, processor, {"optimizer": optimizer.state_dict()})),
        env={**environment(), "PYTHONPATH": f"{ROOT}:{ROOT / 'src'}"},
        capture_output=True,
    )
    assert process.returncode == 0, process.stderr.decode()
    messages = process.stdout.decode().splitlines()
    assert len(messages) == 7
    for message in messages:
        assert "checkpoint-2 could not be written" in message and reason in message, message
        assert "MiB are free" in message and "--resume auto" in message


def test_offending_batch_can_be_looked_at(tmp_path):
    batch = {"pixel_values": torch.randint(0, 255, (2, 3, 4, 4), dtype=torch.uint8), "input_ids": torch.ones(2, 3)}
    for rank in range(2):
        path = checkpoint.save_offending_batch(tmp_path, 12, rank, batch)
        assert path == tmp_path / "offending" / f"step-12-rank-{rank}.pt"
        found = torch.load(path)
        assert found.keys() == batch.keys() and all(torch.equal(found[name], batch[name]) for name in batch)
    assert len(list((tmp_path / "offending").iterdir())) == 2
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match="step-1-rank-0.pt could not be written: .*Not a directory"):
        checkpoint.save_offending_batch(tmp_path / "file", 1, 0, batch)


@pytest.mark.parametrize(
    "file", ["model.safetensors", "trainer_state/optimizer.pt", "tokenizer.json", "trainer_state/state.json"]
)
@pytest.mark.parametrize("damage", ["truncated", "changed", "missing"])
def test_damaged_checkpoint_gives_way_to_the_one_before(file, damage, parts, tmp_path, capsys):
    save(parts, tmp_path, 5)
    path = save(parts, tmp_path, 10) / file
    data = path.read_bytes()
    # One bit of a digit, where the file is all text: "1" and "0" differ in their last bit.
    bit = data.index(b'"step": 1') + 8 if file.endswith("state.json") else len(data) // 2
    damaged = {"truncated": data[:-1], "changed": data[:bit] + bytes([data[bit] ^ 1]) + data[bit + 1 :]}
    if damage == "missing":
        path.unlink()
    else:
        path.write_bytes(damaged[damage])
    with pytest.raises(UsageError, match=f"{path.name} is (damaged|missing)|no readable .*{path.name}"):
        checkpoint.read_state(tmp_path / "checkpoint-10")
    found, state = resuming.find_resumed(tmp_path, "auto")
    assert found.name == "checkpoint-5" and state["step"] == 5
    message = capsys.readouterr().out
    assert "WARNING" in message and path.name in message and "damaged-checkpoint-10" in message
    assert {p.name for p in tmp_path.iterdir()} == {"checkpoint-5", "damaged-checkpoint-10"}


def with_checksum(state: dict) -> str:
    return json.dumps({**state, "checksum": checkpoint._checksum(state)})


@pytest.mark.parametrize(
    "text",
    [
        "[]",
        "null",
        "10",
        '"step"',
        "{}",
        "[" * 100_000,
        '{"checksum": 0, "files": {}}',
        '{"step": 10, "checksum": 0, "files": []}',
        with_checksum({"step": "10", "files": {}}),
        with_checksum({"step": True, "files": {}}),
        with_checksum({"step": 10, "files": {"/etc/passwd": [1, 1]}}),
        with_checksum({"step": 10, "files": {"../x": [1, 1]}}),
        with_checksum({"step": 10, "files": {}, "config": "text"}),
        with_checksum({"step": 10, "files": {}, "config": {"optim": 1}}),
        with_checksum({"step": 10, "files": {}, "counts": {"skipped": "many"}}),
        with_checksum({"step": 10, "files": {}, "num_processes": None}),
        with_checksum({"step": 10, "files": {}, "trackers": {"wandb": "id"}}),
    ],
)
def test_state_of_another_form_gives_way_to_the_checkpoint_before(text, parts, tmp_path, capsys):
    save(parts, tmp_path, 5)
    for step in (10, 15):
        (tmp_path / f"checkpoint-{step}" / "trainer_state").mkdir(parents=True)
        (tmp_path / f"checkpoint-{step}" / checkpoint.STATE_FILE).write_text(text)
    found, state = resuming.find_resumed(tmp_path, "auto")
    assert found.name == "checkpoint-5" and state["step"] == 5
    message = capsys.readouterr().out
    assert "checkpoint-10 has no readable" in message and "Setting it aside" in message


def test_refuses_to_begin_anew_where_all_checkpoints_are_damaged(parts, tmp_path):
    for step in (5, 10):
        (save(parts, tmp_path, step) / "model.safetensors").unlink()
    for _ in range(2):  # a job that is started again by a queue meets the same refusal
        with pytest.raises(UsageError, match="(?s)checkpoint-10.*checkpoint-5.*No checkpoint is left"):
            resuming.find_resumed(tmp_path, "auto")
    assert len(checkpoint.list_checkpoints(tmp_path)) == 2


def test_nothing_to_resume_is_a_new_run(tmp_path):
    assert resuming.find_resumed(tmp_path / "nowhere", "auto") is None
    assert resuming.find_resumed(tmp_path / "nowhere", None) is None
    assert resuming.find_resumed(tmp_path, None) is None  # empty


def test_rejects_a_folder_that_holds_a_run(parts, tmp_path):
    save(parts, tmp_path, 5)
    with pytest.raises(UsageError, match="holds a run already.*--resume auto.*--run.output_dir"):
        resuming.find_resumed(tmp_path, None)


def test_rejects_resuming_from_what_is_no_newest_checkpoint(parts, tmp_path):
    run = tmp_path / "run"
    older = save(parts, run, 5)
    assert resuming.find_resumed(run, str(older))[0] == older
    save(parts, run, 10)
    with pytest.raises(UsageError, match="newer checkpoints"):
        resuming.find_resumed(run, str(older))
    assert resuming.find_resumed(tmp_path / "branch", str(older))[1]["step"] == 5
    with pytest.raises(UsageError, match="another run"):
        shutil.copytree(run, tmp_path / "other")
        resuming.find_resumed(tmp_path / "other", str(older))
    with pytest.raises(UsageError, match="not a checkpoint"):
        resuming.find_resumed(run, str(tmp_path))


def test_changed_settings_are_told_or_refused(parts):
    saved = parts[-1]
    assert resuming.check_settings(saved, saved) == []

    def changed(**sections):
        values = saved.to_dict()
        return Config.from_dict({**values, **{name: values[name] | given for name, given in sections.items()}})

    assert resuming.check_settings(saved, changed(optim={"lr": 0.5})) == ["optim.lr is 0.5 and was 0.001"]
    assert resuming.check_settings(saved, changed(data={"num_workers": 9}, eval={"every": 9})) == []
    with pytest.raises(UsageError, match="optim.batch_size: found 99.*with 16"):
        resuming.check_settings(saved, changed(optim={"batch_size": 99}))


def test_every_fixed_setting_exists(parts):
    settings = parts[-1].to_dict()
    assert all(set(names) <= settings[section].keys() for section, names in resuming.FIXED_ON_RESUME.items())
