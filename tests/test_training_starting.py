"""Where a run starts and goes on: its folder, its paths, its launcher; and what a start that fails leaves behind."""

import functools
import http.server
import importlib.util
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import yaml
from accelerate.state import AcceleratorState
from training_utils import (
    ROOT,
    command,
    environment,
    model_with_tokenizer,
    pairs,
    tiny_recipe,
    wait_for_steps,
    write_recipe,
    write_tar,
)

from training import pretrain as program
from training.config import Config
from training.state.checkpoint import list_checkpoints
from training.step import TrainingStep


pytestmark = pytest.mark.slow


def write_shards(folder: Path) -> None:
    (folder / "shards").mkdir()
    write_tar(folder / "shards" / "0.tar", pairs(range(64)))


@pytest.fixture
def start(capsys, monkeypatch):
    """Runs the program in this process: its exit status and all that it said."""

    def run(*arguments) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["pretrain.py", *map(str, arguments)])
        AcceleratorState._reset_state(reset_partial_state=True)  # one run's settings outlive it in a process
        status = 0
        try:
            program.main()
        except SystemExit as end:
            status = end.code
        said = capsys.readouterr()
        return status, said.out + said.err

    return run


# ---------------------------------------------------------------------------------------------------------------------
# Going on
# ---------------------------------------------------------------------------------------------------------------------


def test_moved_run_goes_on_where_it_lies_from_any_folder(start, tmp_path, monkeypatch):
    """All its paths were relative to the folder where it was started, or to the home folder."""
    write_shards(tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    paths = {"data": {"train": "shards"}, "run": {"output_dir": "~/runs/a"}}
    recipe = write_recipe(tmp_path, optim={"steps": 3}, eval={"retrieval": "~/shards/{0..0}.tar"}, **paths)
    assert start("--config", recipe.relative_to(tmp_path))[0] == 0
    assert (tmp_path / "runs/a/model").is_dir() and not (tmp_path / "~").exists()

    shutil.move("runs/a", "elsewhere")
    (tmp_path / "other").mkdir()
    monkeypatch.chdir(tmp_path / "other")
    status, said = start("--config", "~/elsewhere/config.yaml", "--resume", "auto", "--optim.steps", "5")
    assert status == 0 and "elsewhere/checkpoint-3, step 3" in said, said
    assert [path.name for path in list_checkpoints(tmp_path / "elsewhere")] == ["checkpoint-3", "checkpoint-5"]
    # A copied config names the run that it was copied from, and no second one begins.
    shutil.move(tmp_path / "elsewhere", tmp_path / "runs/a")
    shutil.copy(tmp_path / "runs/a/config.yaml", tmp_path / "other/config.yaml")
    status, said = start("--config", "config.yaml", "--resume", "~/runs/a/checkpoint-5", "--optim.steps", "6")
    assert status == 0 and "runs/a/checkpoint-5, step 5" in said, said
    # Data that was moved is the same data if it has as many samples.
    shutil.move(tmp_path / "shards", tmp_path / "other/shards")
    new = ("--data.train", "shards", "--eval.retrieval", "null", "--optim.steps", "7")
    status, said = start("--config", "~/runs/a/config.yaml", "--resume", "auto", *new)
    assert status == 0 and "not as before: data.train is" in said, said
    assert not (tmp_path / "other/runs").exists()


def test_resume_says_what_it_found(start, tmp_path):
    write_shards(tmp_path)
    recipe, run = write_recipe(tmp_path, optim={"steps": 3}), tmp_path / "run"
    status, said = start("--config", recipe, "--resume", "auto")
    assert status == 0 and f"--resume auto: no checkpoint in {run}, starting anew" in said
    status, said = start("--config", recipe, "--resume", run)
    assert (
        status == 2 and "not a checkpoint" in said and f"The newest in that folder is {run / 'checkpoint-3'}" in said
    )
    shutil.rmtree(run / "checkpoint-3")
    status, said = start("--config", recipe, "--resume", "auto")
    assert status == 2 and f"{run} holds a trained model and no checkpoint" in said


def test_resume_command_can_be_pasted(tmp_path):
    """In a folder whose name the shell would take apart, with the launcher's own settings."""
    folder = tmp_path / "my runs; $(x)"
    folder.mkdir()
    write_shards(folder)
    line = command("--config", write_recipe(folder), "--stop-after", "0.001", processes=1)
    process = subprocess.run(line, env=environment(), capture_output=True, text=True, timeout=300)
    assert process.returncode == 0 and "Stopped after step" in process.stdout, process.stderr
    pasted = shlex.split(process.stdout[process.stdout.index("Go on with:") :].splitlines()[1])
    expected = [*line[: line.index("--config")], "--config", str(folder / "run/config.yaml"), "--resume", "auto"]
    assert pasted[1:] == expected[1:] and shutil.which(pasted[0]) == shutil.which(expected[0])


# ---------------------------------------------------------------------------------------------------------------------
# Not starting
# ---------------------------------------------------------------------------------------------------------------------


def test_failed_start_is_in_nobodys_way(start, tmp_path):
    """Whether it fails before the first step or in it; and what was in the folder before, stays."""
    (tmp_path / "shards").mkdir()
    write_tar(
        tmp_path / "shards/0.tar", [(name.replace("jpg", "jpeg"), data[:200]) for name, data in pairs(range(64))]
    )
    recipe, run = write_recipe(tmp_path), tmp_path / "run"
    status, said = start("--config", recipe)
    assert status == 2 and "can be used" in said and not run.exists(), said
    run.mkdir()
    (run / ".lock").touch()  # of one that was killed
    assert start("--config", recipe)[0] == 2 and [path.name for path in run.iterdir()] == [".lock"]
    write_tar(tmp_path / "shards/0.tar", pairs(range(64)))
    status, said = start("--config", recipe)
    assert status == 0 and (run / "model").is_dir(), said
    (run / "config.yaml").rename(tmp_path / "kept.yaml")
    status, said = start("--config", recipe, "--resume", "auto", "--optim.batch_size", "17")
    assert status == 2 and (run / "checkpoint-6").is_dir() and (run / "model").is_dir()


def test_failure_between_two_steps_saves_what_was_done(start, tmp_path, monkeypatch):
    write_shards(tmp_path)
    one_step = TrainingStep.__call__

    def with_a_full_disk(self, batch, step):
        if step == 3:
            (tmp_path / "run/metrics.jsonl").unlink()
            (tmp_path / "run/metrics.jsonl").mkdir()
        if step == 4:
            raise ArithmeticError("in the middle of a step")
        return one_step(self, batch, step)

    monkeypatch.setattr(TrainingStep, "__call__", with_a_full_disk)
    recipe = write_recipe(tmp_path, optim={"steps": 50})
    status, said = start("--config", recipe)
    assert status == 2 and "metrics.jsonl cannot be written" in said and "Saved after step 4" in said
    assert [path.name for path in list_checkpoints(tmp_path / "run")] == ["checkpoint-4"]
    (tmp_path / "run/metrics.jsonl").rmdir()
    status, said = start("--config", recipe, "--resume", "auto")
    assert status == 1 and "ArithmeticError: in the middle of a step" in said
    assert [path.name for path in list_checkpoints(tmp_path / "run")] == ["checkpoint-4"]


def test_second_start_is_refused_before_anything_heavy_is_imported(tmp_path):
    recipe = write_recipe(tmp_path)
    (tmp_path / "run").mkdir()
    (tmp_path / "run/metrics.jsonl").touch()
    (tmp_path / "without").mkdir()
    (tmp_path / "without/torch.py").write_text("raise SystemExit('torch was imported')")
    variables = {**environment(), "PYTHONPATH": f"{tmp_path / 'without'}:{environment()['PYTHONPATH']}"}
    for arguments, words in (
        (["--config", recipe], "holds a run already"),
        (["--config", recipe, "--optim.lr", "fast"], "optim.lr: found 'fast'"),
    ):
        process = subprocess.run(command(*arguments), env=variables, capture_output=True, text=True, timeout=60)
        assert process.returncode == 2 and process.stdout == "" and words in process.stderr
        assert len(process.stderr.strip().splitlines()) == 1


@pytest.mark.parametrize(
    ("variable", "value", "words"),
    [
        ("ACCELERATE_USE_DEEPSPEED", "true", ["DeepSpeed", "run.shard_weights"]),
        ("ACCELERATE_USE_MEGATRON_LM", "true", ["Megatron-LM", "run.shard_weights"]),
        ("ACCELERATE_USE_PARALLELISM_CONFIG", "true", ["parallelism_config", "run.shard_weights"]),
        ("ACCELERATE_USE_FSDP", "true", ["fsdp", "run.shard_weights"]),
        ("ACCELERATE_DYNAMO_BACKEND", "INDUCTOR", ["dynamo_backend inductor", "model.compile"]),
        ("ACCELERATE_MIXED_PRECISION", "fp8", ["mixed_precision fp8", "run.precision"]),
        ("ACCELERATE_MIXED_PRECISION", "bf16", ["mixed_precision bf16", "run.precision, which decides, is fp32"]),
    ],
)
def test_launcher_settings_are_honoured_or_refused(variable, value, words, start, tmp_path, monkeypatch):
    monkeypatch.setenv(variable, value)
    status, said = start("--config", write_recipe(tmp_path))
    assert status == 2 and all(word in said for word in words), said
    assert not (tmp_path / "run").exists() and "Traceback" not in said


def test_launcher_that_starts_one_process_of_three_is_refused(tmp_path):
    line = command("--config", write_recipe(tmp_path))
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", "3", *line[1:]]
    process = subprocess.run(launch, env=environment(), capture_output=True, text=True, timeout=300)
    assert process.returncode != 0 and "several processes and started one" in process.stderr, process.stderr
    assert "accelerate launch --quiet" in process.stderr  # for who wants but the message


# ---------------------------------------------------------------------------------------------------------------------
# Credentials
# ---------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def server(tmp_path):
    """The address of an HTTP server of `tmp_path/shards`."""

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_):
            pass

    handler = functools.partial(Quiet, directory=tmp_path / "shards")
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"127.0.0.1:{server.server_port}"
        server.shutdown()


def test_credentials_of_urls_stay_out_of_all_that_is_written(server, start, tmp_path, monkeypatch):
    """Those of trackers among it, wandb's record of the command line too, where it is installed."""
    pytest.importorskip("tensorboard")
    trackers = ["tensorboard", *(["wandb"] if importlib.util.find_spec("wandb") else [])]
    monkeypatch.setenv("WANDB_MODE", "offline")
    write_shards(tmp_path)
    secrets = ("hunter2", "c0ffee")
    url = f"http://me:hunter2@{server}/{{0..0}}.tar"
    recipe = write_recipe(tmp_path, run={"trackers": trackers}, optim={"steps": 3})
    status, said = start("--config", recipe, "--data.train", url, "--stop-after", "0.0001")
    assert status == 0 and "--data.train" in said and "***@127.0.0.1" in said
    told = [said]
    status, said = start("--config", recipe, "--data.train", url, "--resume", "auto")
    assert status == 0, said
    told.append(said)
    status, said = start("--config", tmp_path / "run/config.yaml", "--resume", "auto")
    assert status == 2 and "data.train" in said and "lost its credentials" in said and "command line" in said
    told.append(said)
    presigned = f"http://{server}/x.tar?X-Amz-Signature=c0ffee"
    for wrong in (url.replace("0..0", "0..1"), presigned, f"{{{presigned}: 0}}", f"{{{url}: {{key: c0ffee}}}}"):
        status, said = start("--config", recipe, "--data.train", wrong, "--run.output_dir", tmp_path / "other")
        assert status != 0
        told.append(said)
    written = [path for path in (tmp_path / "run").rglob("*") if path.is_file()]
    assert {"config.yaml", "state.json", "metrics.jsonl", "README.md", "hparams.yml"} <= {
        path.name for path in written
    }
    for secret in secrets:
        assert not [path for path in written if secret.encode() in path.read_bytes()]
        assert not [text for text in told if secret in text]
    saved = yaml.safe_load((tmp_path / "run/config.yaml").read_text())
    assert saved["data"]["train"] == f"http://***@{server}/{{0..0}}.tar"


def test_record_of_a_mixture_has_its_paths_from_the_root_and_no_credentials(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "shards").mkdir()
    mixture = {"shards/{0..9}.tar": 1.0, "https://s3.host/a.tar?sig=abc&download=1": 2.0, "scenes": 1, "me/set": 3}
    config = Config.from_dict(tiny_recipe(tmp_path, data={"train": mixture}))
    expected = [f"{tmp_path}/shards/{{0..9}}.tar", "https://s3.host/a.tar?sig=***&download=1", "scenes", "me/set"]
    assert list(config.record()["data"]["train"]) == expected and list(config.data.train) == list(mixture)
    assert "abc" not in json.dumps(config.record()) and "abc" not in config.masked()["data.train"]


def test_end_of_a_run_shows_labels_of_its_data_and_leaves_a_card(start, tmp_path):
    write_shards(tmp_path)
    status, said = start("--config", write_recipe(tmp_path, optim={"steps": 3}))
    assert status == 0 and 'candidate_labels=["a ' in said and "a red circle" not in said
    assert (tmp_path / "run/model/model.safetensors").stat().st_mode & 0o777 == (
        tmp_path / "run/model/config.json"
    ).stat().st_mode & 0o777
    card = (tmp_path / "run/model/README.md").read_text()
    assert "pipeline_tag: zero-shot-image-classification" in card and "Pairs a step | 16" in card


# ---------------------------------------------------------------------------------------------------------------------
# The command `hfclip train`
# ---------------------------------------------------------------------------------------------------------------------


def hfclip_train(folder: Path, *words: object) -> list[str]:
    """Its command line, as the installed script has it."""
    (folder / "hfclip").write_text("import hfclip_cli\nhfclip_cli.main()\n")
    return [sys.executable, str(folder / "hfclip"), "train", *map(str, words)]


TWO = ("--config_file", ROOT / "training/launch/cpu_processes.yaml", "--main_process_port", "0", "--")


@pytest.mark.parametrize("launcher", [(), TWO], ids=["alone", "two processes"])
def test_interrupted_command_has_the_last_word(launcher, tmp_path):
    """Ctrl-C reaches all processes of the terminal, launchers among them."""
    write_shards(tmp_path)
    recipe = write_recipe(tmp_path, model=model_with_tokenizer(tmp_path), optim={"steps": 100_000})
    line = hfclip_train(tmp_path, *launcher, "--config", recipe)
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    process = subprocess.Popen(line, env=environment(), start_new_session=True, **pipes)
    wait_for_steps(tmp_path / "run", process, 3)
    os.killpg(process.pid, signal.SIGINT)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 130 and "Traceback" not in output, output
    *_, stopped, go_on = output.splitlines()
    done = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[-1])["step"]
    assert stopped == f"Stopped after step {done} of 100000. Go on with:"
    words = [str(tmp_path / "hfclip"), "train", *map(str, launcher)]
    assert shlex.split(go_on) == [*words, "--config", str(tmp_path / "run" / "config.yaml"), "--resume", "auto"]
    assert (tmp_path / "run" / f"checkpoint-{done}").is_dir()


def test_command_ends_as_the_run_does(tmp_path):
    done = subprocess.run(
        hfclip_train(tmp_path, "--optim.lr", "much"), env=environment(), capture_output=True, text=True
    )
    assert done.returncode == 2 and done.stderr.strip().startswith("error: optim.lr"), done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


def test_help_has_the_name_of_the_command_that_was_started(tmp_path):
    done = subprocess.run(
        hfclip_train(tmp_path, "--help"), env=environment(), capture_output=True, text=True, check=True
    )
    assert (
        done.stdout.startswith(f"usage: {tmp_path}/hfclip train [--config FILE]") and "pretrain.py" not in done.stdout
    )
