"""The trainer as a program: from files to a usable model, stopped and resumed, wrong input told in one message."""

import json
import multiprocessing
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
import torch
import yaml
from accelerate.state import AcceleratorState
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers, is_tensorboard_available
from safetensors.torch import load_file
from training_utils import (
    ROOT,
    command,
    environment,
    image_bytes,
    model_with_tokenizer,
    pairs,
    pretrain,
    tiny_recipe,
    train,
    wait_for_steps,
    write_recipe,
    write_tar,
)
from transformers import pipeline

from hfclip import HFCLIPConfig, HFCLIPImageProcessor, HFCLIPModel, HFCLIPProcessor, HFCLIPTokenizer
from training import pretrain as program
from training.config import Config
from training.data.batches import Collate
from training.machine import build_accelerator
from training.state.resuming import lock_run_folder
from training.state.stopping import Stopping
from training.step import TrainingStep


pytestmark = pytest.mark.slow


TENSORBOARD = ["tensorboard"] if is_tensorboard_available() else []
MISSING_TRACKER = next(str(name) for name in LOGGER_TYPE_TO_CLASS if name not in map(str, get_available_trackers()))


def write_shards(folder: Path, num_pairs: int) -> None:
    (folder / "shards").mkdir()
    write_tar(folder / "shards" / "0.tar", pairs(range(num_pairs)))


def write_classes(folder: Path) -> Path:
    """A labelled folder: four pictures in each of three classes."""
    for label in ("cat", "dog", "red house"):
        (folder / "classes" / label).mkdir(parents=True)
        for seed in range(4):
            (folder / "classes" / label / f"{seed}.jpg").write_bytes(image_bytes(seed))
    return folder / "classes"


def metrics(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run to its end on data with some damage, and what it printed."""
    folder = tmp_path_factory.mktemp("finished")
    write_shards(folder, 60)
    damaged = [
        ("x.jpg", image_bytes(0)[:300]),
        ("x.txt", b"a cat"),
        ("y.jpg", image_bytes(0)),
        ("y.json", b'{"text": " "}'),
    ]
    write_tar(folder / "shards" / "1.tar", [*damaged, ("z.txt", b"no picture")])
    held_out = {"zero_shot": str(write_classes(folder)), "retrieval": str(folder / "shards" / "0.tar"), "every": 4}
    run = {"save_every": 4, "keep_checkpoints": 2, "precision": "auto", "trackers": TENSORBOARD}
    recipe = write_recipe(folder, eval=held_out, run=run, optim={"steps": 12}, data={"num_workers": 2})
    return folder / "run", pretrain("--config", recipe, "--optim.lr", "2e-3", processes=1)


def test_run_reports_what_it_did(finished):
    run, process = finished
    assert process.returncode == 0, process.stderr
    lines = metrics(run)
    steps = [line for line in lines if "loss" in line]
    assert [line["step"] for line in steps] == list(range(1, 13))
    expected = {"loss", "grad_norm", "lr", "logit_scale", "epoch", "samples_per_second", "data_time", "step_time"}
    assert all(expected | {"skipped_steps"} <= set(line) for line in steps)
    assert steps[1]["lr"] == 2e-3  # the end of the warm-up; of the command line
    assert steps[-1]["loss"] < steps[0]["loss"]
    assert steps[-1]["skipped: unreadable image"] >= 1 and steps[-1]["skipped: empty caption"] >= 1
    assert [line["step"] for line in lines if "zero_shot/top1" in line] == [4, 8, 12]
    assert all(0 <= line["retrieval/text_retrieval_recall@1"] <= 1 for line in lines if "zero_shot/top1" in line)
    assert "1 with missing image" in process.stdout and "skipped: unreadable image" in process.stdout
    assert any(run.rglob("events.out.tfevents*")) == bool(TENSORBOARD)


def test_run_leaves_checkpoints_and_a_model_for_pipelines(finished):
    run, process = finished
    assert sorted(path.name for path in run.glob("checkpoint-*")) == ["checkpoint-12", "checkpoint-8"]
    assert not list(run.glob(".tmp-*"))
    final, last = (load_file(folder / "model.safetensors") for folder in (run / "model", run / "checkpoint-12"))
    assert all(torch.equal(final[name], last[name]) for name in last) and final.keys() == last.keys()
    assert {tensor.dtype for tensor in final.values()} == {torch.float32}
    assert str(run / "model") in process.stdout and (run / "predictions.png").stat().st_size > 1000
    classify = pipeline("zero-shot-image-classification", str(run / "model"))
    scores = classify(str(run.parent / "classes" / "dog" / "0.jpg"), candidate_labels=["cat", "dog"])
    assert {score["label"] for score in scores} == {"cat", "dog"}


def test_finished_run_resumes_to_nothing_and_is_not_overwritten(finished, tmp_path):
    run, _ = finished
    before = metrics(run)
    refused = train("--config", run / "config.yaml")
    assert refused.returncode == 2 and "holds a run already" in refused.stderr
    assert "Traceback" not in refused.stderr + refused.stdout
    assert metrics(run) == before


def stopped(recipe: Path, run: Path, at_step: int, stop_with: signal.Signals, *arguments: str) -> subprocess.Popen:
    """The program, sent a signal when `at_step` lines are written; it has ended, and its `output` is read."""
    line = command("--config", recipe, "--run.output_dir", run, *arguments)
    process = subprocess.Popen(line, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    wait_for_steps(run, process, at_step)
    process.send_signal(stop_with)
    process.output, process.errors = process.communicate(timeout=120)
    return process


def test_interrupted_run_goes_on_bit_for_bit(tmp_path):
    """Killed, resumed, stopped by Ctrl-C and resumed again, a run has the weights and losses of one in one piece."""
    write_shards(tmp_path, 64)
    # Dropout is on: its random numbers must come back, too.
    dropout = {"attention_dropout": 0.1}
    model = model_with_tokenizer(tmp_path, text=dropout, vision={**dropout, "patch_dropout": 0.25})
    sections = {"model": model, "optim": {"steps": 90}, "run": {"save_every": 20, "keep_checkpoints": 9}}
    recipe = write_recipe(tmp_path, data={"num_workers": 1}, **sections)
    whole, again = tmp_path / "run", tmp_path / "again"
    process = pretrain("--config", recipe)
    assert process.returncode == 0, process.stderr

    killed = stopped(recipe, again, 25, signal.SIGKILL)
    assert killed.returncode == -signal.SIGKILL and not (again / "model").exists()
    interrupted = stopped(recipe, again, 45, signal.SIGINT, "--resume", "auto")
    assert interrupted.returncode == 0, interrupted.errors
    assert f"--config {again / 'config.yaml'} --resume auto" in interrupted.output
    done = metrics(again)[-1]["step"]
    assert 45 <= done < 90 and (again / f"checkpoint-{done}").is_dir() and not (again / "model").exists()
    resumed = pretrain("--config", again / "config.yaml", "--resume", "auto")
    assert resumed.returncode == 0, resumed.stderr
    assert f"Going on from {again / f'checkpoint-{done}'}, step {done}" in resumed.stdout

    expected, found = (load_file(run / "model" / "model.safetensors") for run in (whole, again))
    assert all(torch.equal(expected[name], found[name]) for name in expected)
    expected, found = (metrics(run) for run in (whole, again))
    assert [(line["step"], line["loss"]) for line in expected] == [(line["step"], line["loss"]) for line in found]
    states = [torch.load(run / "checkpoint-90/trainer_state/optimizer.pt") for run in (whole, again)]
    assert len(states[0]) > 20 and states[0].keys() == states[1].keys()
    assert all(torch.equal(v, states[1][i][name]) for i, state in states[0].items() for name, v in state.items())


def test_deadline_saves_and_ends_well(tmp_path):
    """In the middle of a run, with the moving average on and half of the run in a cheaper phase."""
    write_shards(tmp_path, 64)
    phases = [{"epochs": 50, "image_size": 16, "text_length": 8, "patch_dropout": 0.5}]
    optim = {"steps": 100_000, "ema_decay": 0.9, "layer_decay": 0.7, "bfloat16": ["moments"]}
    recipe = write_recipe(tmp_path, data={"phases": phases}, optim=optim)
    process = pretrain("--config", recipe, "--stop-after", "0.15")
    assert process.returncode == 0, process.stderr
    assert "--resume auto" in process.stdout
    done = int(re.search(r"Stopped after step (\d+) of 100000", process.stdout)[1])
    # A machine that is busy with other things may come to the deadline before it comes to the first step.
    assert done == 0 or (tmp_path / "run" / f"checkpoint-{done}").is_dir()
    assert not (tmp_path / "run" / "model").exists()


def test_data_that_changed_is_noticed_on_resume(tmp_path, capsys, monkeypatch):
    """In another order, samples of the epoch under way would be seen twice, and others not at all."""
    write_shards(tmp_path, 64)
    recipe = write_recipe(tmp_path, optim={"steps": 3})
    assert train("--config", recipe).returncode == 0
    write_tar(tmp_path / "shards" / "1.tar", pairs([64]))
    resume = ("--config", recipe, "--optim.steps", "5", "--resume", "auto")
    code, message = run_here(capsys, monkeypatch, *resume)
    assert code == 2 and "[65]" in message and "[64]" in message and "seen twice" in message


def test_two_runs_do_not_share_a_folder(tmp_path, capsys, monkeypatch):
    write_shards(tmp_path, 64)
    recipe = write_recipe(tmp_path, optim={"steps": 3})
    lock = lock_run_folder(tmp_path / "run")
    code, message = run_here(capsys, monkeypatch, "--config", recipe, "--resume", "auto")
    assert code == 2 and "another process trains there" in message
    lock.release()
    assert train("--config", recipe).returncode == 0


def test_signal_of_a_queue_saves_and_ends_well(tmp_path):
    """It reaches the whole process group: the workers that read the data as well as the run."""
    write_shards(tmp_path, 64)
    recipe = write_recipe(tmp_path, data={"num_workers": 1}, optim={"steps": 100_000})
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    process = subprocess.Popen(command("--config", recipe), env=environment(), start_new_session=True, **pipes)
    wait_for_steps(tmp_path / "run", process, 3)
    os.killpg(process.pid, signal.SIGUSR1)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 0 and "Stopped after step" in output, output
    assert (tmp_path / "run" / f"checkpoint-{metrics(tmp_path / 'run')[-1]['step']}").is_dir()


@pytest.mark.parametrize(
    ("name", "stops"),
    [*((name, True) for name in "SIGINT SIGTERM SIGHUP SIGUSR1 SIGUSR2 SIGXCPU".split()), ("nohup", False)],
)
def test_signals_request_a_stop(name, stops):
    """But for the end of a terminal, where `nohup` says to go on without it."""
    action = "from training.state.stopping import Stopping; stopping = Stopping(None); stopping.catch_signals()"
    line = [sys.executable, "-c", f"{action}; print(flush=True); input(); print(stopping.requested)"]
    line = ["nohup", *line] if name == "nohup" else line
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL, "text": True}
    with subprocess.Popen(line, cwd=ROOT, **pipes) as process:
        process.stdout.readline()
        process.send_signal(signal.SIGHUP if name == "nohup" else signal.Signals[name])
        assert process.communicate("\n", timeout=60)[0] == f"{stops}\n"


def data_workers(run: psutil.Process) -> list[psutil.Process]:
    """Forked from the run, they have its command line."""
    return [child for child in run.children() if child.cmdline() == run.cmdline()]


@pytest.mark.skipif(multiprocessing.get_start_method() != "fork", reason="knows workers by what they are forked from")
@pytest.mark.parametrize("processes", [None, 2])
def test_run_saves_and_names_the_reader_that_was_killed(processes, tmp_path):
    """As the system does it where memory runs out, in one of two processes."""
    write_shards(tmp_path, 64)
    model = model_with_tokenizer(tmp_path)
    recipe = write_recipe(tmp_path, model=model, data={"num_workers": 2}, optim={"steps": 100_000})
    line = command("--config", recipe, processes=processes)
    process = subprocess.Popen(line, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    wait_for_steps(tmp_path / "run", process, 3)
    run = psutil.Process(process.pid)
    run = run if processes is None else run.children()[-1]
    victim = data_workers(run)[0]
    victim.kill()
    _, errors = process.communicate(timeout=120)
    assert process.returncode != 0
    assert (
        f"Process {victim.pid}, one of 2 that read data, was killed by SIGKILL" in errors and "num_workers" in errors
    )
    assert "DataLoader worker" not in errors
    done = metrics(tmp_path / "run")[-1]["step"]
    assert [path.name for path in (tmp_path / "run").glob("checkpoint-*")] == [f"checkpoint-{done}"]


def test_run_needs_no_shared_memory_for_its_batches(tmp_path):
    """A container has 64 MB of it, and a batch may be larger; here it has 256 kB, and a batch three times as much, and
    one of the evaluation twice."""
    small = ["unshare", "-rm", "sh", "-c", 'mount -t tmpfs -o size=256k tmpfs /dev/shm && exec "$@"', "sh"]
    if shutil.which("unshare") is None or subprocess.run([*small, "true"], capture_output=True).returncode != 0:
        pytest.skip("needs unshare and the right to mount")
    write_shards(tmp_path, 260)
    classes = write_classes(tmp_path)
    for seed in range(40):
        (classes / "cat" / f"more{seed}.jpg").write_bytes(image_bytes(seed))
    sections = {"model": model_with_tokenizer(tmp_path), "data": {"num_workers": 2}}
    sections["eval"] = {"zero_shot": str(classes)}
    recipe = write_recipe(tmp_path, optim={"batch_size": 256, "steps": 3}, **sections)
    line = [*small, *command("--config", recipe)]
    done = subprocess.run(line, env=environment(), capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert [line["step"] for line in metrics(tmp_path / "run")] == [1, 2, 3, 3]


@pytest.mark.skipif(sys.platform != "linux", reason="other systems do not tell a process that its parent is gone")
@pytest.mark.parametrize("stop_with", [signal.SIGTERM, signal.SIGKILL])
def test_run_saves_when_its_launcher_is_stopped(stop_with, tmp_path):
    """The launcher takes signals for itself, and leaves the run behind."""
    write_shards(tmp_path, 64)
    recipe = write_recipe(tmp_path, optim={"steps": 100_000})
    process = subprocess.Popen(
        command("--config", recipe, processes=1), env=environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    wait_for_steps(tmp_path / "run", process, 3)
    process.send_signal(stop_with)
    process.communicate(timeout=120)  # until the run, too, has closed its output
    done = metrics(tmp_path / "run")[-1]["step"]
    assert [path.name for path in (tmp_path / "run").glob("checkpoint-*")] == [f"checkpoint-{done}"]


def run_here(capsys, monkeypatch, *arguments) -> tuple[int, str]:
    """Exit status and messages of the program in this process."""
    monkeypatch.setattr(sys, "argv", ["pretrain.py", *map(str, arguments)])
    AcceleratorState._reset_state(reset_partial_state=True)  # one run's settings outlive it in a process
    with pytest.raises(SystemExit) as end:
        program.main()
    return end.value.code, capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--optim.bach_size", "4"], ["optim.bach_size", "optim.batch_size"]),
        (["--data.train", "/no/such/data"], ["/no/such/data"]),
        (["--run.trackers", "tensorbord"], ["tensorbord", "tensorboard"]),
        (["--run.trackers", MISSING_TRACKER], [MISSING_TRACKER, "not installed"]),
        (["--run.precision", "fp16"], ["fp16 needs a GPU", "bf16 or fp32"]),
        (["--eval.zero_shot", "/no/such/folder"], ["eval.zero_shot", "/no/such/folder"]),
        (["--eval.retrieval", "/no/such/data"], ["/no/such/data"]),
        (["--optim.warmup_steps", "6"], ["warmup_steps", "6 steps of the run"]),
        (["--optim.batch_size", "65"], ["64 usable pairs", "batch of 65"]),
        (["--resume", "/no/such/checkpoint"], ["/no/such/checkpoint", "not a checkpoint"]),
    ],
)
def test_rejects_wrong_input_before_any_work(arguments, words, tmp_path, capsys, monkeypatch):
    if torch.cuda.is_available() and "fp16" in arguments:
        pytest.skip("fp16 is right on this machine")
    write_shards(tmp_path, 64)
    code, message = run_here(capsys, monkeypatch, "--config", write_recipe(tmp_path), *arguments)
    assert code == 2 and all(word in message for word in words), message
    assert not (tmp_path / "run").exists()


def test_diverging_run_ends_with_a_remedy_and_its_weights(tmp_path, capsys, monkeypatch):
    write_shards(tmp_path, 64)
    recipe = write_recipe(tmp_path, optim={"lr": 1e30, "steps": 50})
    code, message = run_here(capsys, monkeypatch, "--config", recipe)
    assert code == 2 and "not finite in 20 steps in a row" in message and "optim.lr" in message
    lines = metrics(tmp_path / "run")
    assert [line["skipped_steps"] for line in lines][-3:] == [1, 1, 1] and len(lines) < 50
    assert (tmp_path / "run" / f"checkpoint-{lines[-1]['step']}").is_dir()


def test_skipped_step_changes_nothing(tmp_path):
    """Neither weights nor what BatchNorm remembers, which one bad batch would spoil for good."""
    write_shards(tmp_path, 64)
    resnet = {"model_type": "hfclip_resnet", "depths": [1, 1, 1, 1], "stem_width": 8, "image_size": 32}
    model = model_with_tokenizer(tmp_path)
    model["config"]["vision_config"] = {**resnet, "projection_dim": 16}
    config = Config.from_dict(tiny_recipe(tmp_path, model=model, optim={"max_logit_scale": 14.0}))
    AcceleratorState._reset_state(reset_partial_state=True)
    run = program.build(config, None, build_accelerator(config), Stopping(None))
    batch = next(iter(run.loader))
    batch.pop("counts")

    def changed(step):
        before = {name: value.clone() for name, value in run.core.state_dict().items()}
        skipped = run.step(batch, step)["skipped"]
        after = run.core.state_dict()
        return skipped, [name for name in before if not torch.equal(before[name], after[name])]

    skipped, names = changed(0)
    assert not skipped and any("running_mean" in name for name in names) and "logit_scale" in names
    assert run.core.logit_scale.exp().item() == pytest.approx(14)  # it started at 14.28
    run.step.pixel_std.zero_()
    assert changed(1) == (True, [])


def test_run_without_usable_data_saves_before_it_ends(tmp_path, capsys, monkeypatch):
    """Samples that can be read at first and not later: the disk went away, say."""
    write_shards(tmp_path, 64)
    recipe = write_recipe(tmp_path, optim={"steps": 50})
    one_step = TrainingStep.__call__

    def lose_the_data_after_three_steps(self, batch, step):
        if step == 3:
            shutil.rmtree(tmp_path / "shards")
            (tmp_path / "shards").mkdir()
            write_tar(tmp_path / "shards" / "0.tar", [])
        return one_step(self, batch, step)

    monkeypatch.setattr(TrainingStep, "__call__", lose_the_data_after_three_steps)
    code, message = run_here(capsys, monkeypatch, "--config", recipe)
    assert code == 2 and "truncated shard" in message and "Fix the data" in message
    assert [path.name for path in (tmp_path / "run").glob("checkpoint-*")] == ["checkpoint-4"]


@pytest.mark.parametrize("processes", [None, 2])
def test_run_names_the_shards_that_it_lost(processes, tmp_path):
    """One is removed, one cut, while it trains; another process than the first may be the one that reads them."""
    write_shards(tmp_path, 64)
    for name in ("gone", "cut"):
        write_tar(tmp_path / "shards" / f"{name}.tar", pairs(range(64, 72)))
    recipe = write_recipe(tmp_path, model=model_with_tokenizer(tmp_path), optim={"steps": 100_000})
    line = command("--config", recipe, processes=processes)
    process = subprocess.Popen(line, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    wait_for_steps(tmp_path / "run", process, 2)
    (tmp_path / "shards" / "gone.tar").unlink()
    os.truncate(tmp_path / "shards" / "cut.tar", 5000)
    wait_for_steps(tmp_path / "run", process, len(metrics(tmp_path / "run")) + 15)  # three epochs
    process.send_signal(signal.SIGTERM)
    output, errors = process.communicate(timeout=120)
    assert processes or process.returncode == 0, errors
    for what in ("gone.tar cannot be read any more (No such file or directory)", "cut.tar is shorter than it was"):
        assert output.count(f"WARNING: {tmp_path / 'shards'}/{what}: other pairs stand in") == 1
        assert output.count(f"WARNING: not all pairs were used: {tmp_path / 'shards'}/{what}") == 1
    line = metrics(tmp_path / "run")[-1]
    assert line["skipped: unreadable shard"] >= 16 and line["skipped: truncated shard"] >= 8


def test_compiled_model_gets_captions_of_one_length(tmp_path):
    """What torch.compile needs; compiling itself is torch's business, and slow."""
    tokenizer = HFCLIPTokenizer(model_max_length=16)
    example = {"image": torch.zeros(3, 8, 8).numpy(), "caption": "a", "problems": []}
    assert Collate(tokenizer, pad_to_max=True, group=False)([example])["input_ids"].shape == (1, 16)


def test_thirty_images_of_two_class_folders_are_tuned_by_default(tmp_path):
    model = model_with_tokenizer(tmp_path)
    tokenizer = HFCLIPTokenizer.from_pretrained(model["tokenizer"])
    HFCLIPModel(HFCLIPConfig(**model["config"])).save_pretrained(tmp_path / "clip")
    HFCLIPProcessor(HFCLIPImageProcessor(size=32), tokenizer).save_pretrained(tmp_path / "clip")
    for seed in range(30):
        path = tmp_path / "photos" / ("red_cat", "blue_dog")[seed % 2] / f"{seed}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(image_bytes(seed))
    arguments = ["--model.checkpoint", tmp_path / "clip", "--data.train", tmp_path / "photos"]
    done = train(*arguments, "--run.output_dir", tmp_path / "run", "--data.num_workers", "0")
    assert done.returncode == 0, done.stderr
    said = done.stdout + done.stderr
    assert "the names of 2 class folders are the captions" in said and "red cat" in said
    assert "optim.batch_size 30 (auto: all 30 pairs)" in said and "optim.lr 1e-05 (auto: from a checkpoint)" in said
    lines = metrics(tmp_path / "run")
    assert [line["step"] for line in lines] == list(range(5, 101, 5))
    kept = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())["optim"]
    assert (kept["batch_size"], kept["epochs"], kept["warmup_steps"]) == (30, 100, 10)
    assert (tmp_path / "run" / "checkpoint-100").is_dir() and (tmp_path / "run" / "model").is_dir()
