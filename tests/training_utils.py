"""What the tests of the trainer share: small real files, a tiny recipe, and the trainer as a process."""

import contextlib
import copy
import io
import multiprocessing
import os
import random
import socket
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from unittest import mock

import numpy as np
import torch.multiprocessing
import yaml
from PIL import Image

from hfclip import HFCLIPConfig, HFCLIPImageProcessor, HFCLIPModel, HFCLIPProcessor, HFCLIPTokenizer


ROOT = Path(__file__).resolve().parents[1]
FORKED = multiprocessing.get_context("forkserver")
FORKED.set_forkserver_preload(["training.pretrain"])
WORDS = "red green blue small large round square cat dog bird tree house car boat fish star".split()


def image_bytes(seed: int, size: tuple[int, int] = (40, 32), kind: str = "JPEG") -> bytes:
    """An encoded picture of `size` (width, height) that only this seed gives."""
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, kind, quality=95)
    return file.getvalue()


def caption(seed: int) -> str:
    """A caption that no other seed below 4,096 has."""
    return f"a {WORDS[seed % 16]} {WORDS[seed // 16 % 16]} {WORDS[seed // 256]}"


def write_tar(path: Path, members: Iterable[tuple[str, bytes]]) -> Path:
    with tarfile.open(path, "w") as tar:
        for name, data in members:
            header = tarfile.TarInfo(name)
            header.size = len(data)
            tar.addfile(header, io.BytesIO(data))
    return path


def pairs(seeds: Iterable[int]) -> list[tuple[str, bytes]]:
    """Members of a shard: a picture and a caption for each seed."""
    return [
        member
        for seed in seeds
        for member in ((f"{seed:06d}.jpg", image_bytes(seed)), (f"{seed:06d}.txt", caption(seed).encode()))
    ]


def tiny_recipe(folder: Path, **sections: dict) -> dict:
    """Settings of a run that takes seconds, in `folder`; `sections` replace single settings."""
    tower = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2}
    recipe = {
        "model": {
            "config": {
                "projection_dim": 16,
                "vision_config": {**tower, "num_hidden_layers": 2, "image_size": 32, "patch_size": 8},
                "text_config": {**tower, "num_hidden_layers": 1, "max_position_embeddings": 16},
            },
            "tokenizer": "train",
            "vocab_size": 600,
        },
        "data": {"train": str(folder / "shards"), "num_workers": 0},
        "optim": {"batch_size": 16, "steps": 6, "lr": 1e-3, "warmup_steps": 2},
        "run": {"output_dir": str(folder / "run"), "precision": "fp32", "log_every": 1, "save_every": 0},
        "eval": {"every": 0},
    }
    return {name: {**settings, **sections.get(name, {})} for name, settings in recipe.items()}


def model_with_tokenizer(folder: Path, text: dict | None = None, vision: dict | None = None) -> dict:
    """The `model` section of a recipe whose tokenizer is in a folder; `text` and `vision` go to the towers."""
    tokenizer = HFCLIPTokenizer.train_new_from_iterator(map(caption, range(256)), 600, show_progress=False)
    tokenizer.save_pretrained(folder / "tokenizer")
    config = copy.deepcopy(tiny_recipe(folder)["model"]["config"])
    words = {"vocab_size": len(tokenizer), "bos_token_id": tokenizer.bos_token_id}
    config["text_config"] |= {**words, "eos_token_id": tokenizer.eos_token_id, **(text or {})}
    config["vision_config"] |= vision or {}
    return {"config": config, "tokenizer": str(folder / "tokenizer")}


def save_model(folder: Path) -> Path:
    """A folder with a tiny model of random weights and its processor."""
    config = HFCLIPConfig(**model_with_tokenizer(folder)["config"])
    torch.manual_seed(0)
    HFCLIPModel(config).save_pretrained(folder)
    tokenizer = HFCLIPTokenizer.from_pretrained(folder / "tokenizer", model_max_length=16)
    HFCLIPProcessor(HFCLIPImageProcessor(size=32), tokenizer).save_pretrained(folder)
    return folder


def write_recipe(folder: Path, **sections: dict) -> Path:
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(tiny_recipe(folder, **sections)))
    return path


def command(*arguments: str | Path, processes: int | None = None) -> list[str]:
    """The trainer's command line; `processes` through `accelerate launch`."""
    launcher = []
    if processes is not None:
        file = ROOT / "training" / "launch" / ("one_gpu.yaml" if processes == 1 else "cpu_processes.yaml")
        launcher = ["-m", "accelerate.commands.launch", "--config_file", str(file)]
        launcher += ["--num_processes", str(processes), "--main_process_port", "0"]
    return [sys.executable, *launcher, str(ROOT / "training" / "pretrain.py"), *map(str, arguments)]


def environment() -> dict[str, str]:
    """One thread a process: many small ones on few cores are faster alone, and sums have one order."""
    return {**os.environ, "PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}


def pretrain(
    *arguments: str | Path, processes: int | None = None, timeout: float = 300
) -> subprocess.CompletedProcess:
    """Runs the trainer to its end."""
    line = command(*arguments, processes=processes)
    return subprocess.run(line, env=environment(), capture_output=True, text=True, timeout=timeout)


def wait_for_steps(run: Path, process: subprocess.Popen, count: int) -> None:
    """Waits until a run has logged a number of steps."""
    for _ in range(2400):
        if (run / "metrics.jsonl").is_file() and len((run / "metrics.jsonl").read_text().splitlines()) >= count:
            return
        assert process.poll() is None, process.communicate()
        time.sleep(0.05)
    raise AssertionError("no step in two minutes")


# ---------------------------------------------------------------------------------------------------------------------
# Processes forked from one that has imported the trainer: importing it takes longer than what most of them do
# ---------------------------------------------------------------------------------------------------------------------


def free_port() -> int:
    """A port that is free, and below those that the system gives to connections, so that it stays free."""
    while True:
        port = random.SystemRandom().randrange(10_000, 32_000)
        with contextlib.suppress(OSError), socket.create_server(("127.0.0.1", port)):
            return port


def fork(function: Callable, *arguments, processes: int) -> None:
    """Runs `function(rank, *arguments)` in each of `processes`."""
    with mock.patch.dict(os.environ, environment()):  # of the process that they are forked from
        torch.multiprocessing.start_processes(function, arguments, processes, start_method="forkserver")


def train(*arguments: str | Path, processes: int = 1, timeout: float = 300) -> subprocess.CompletedProcess:
    """Runs the trainer to its end, as `pretrain` does, but without launcher and imports."""
    group = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": str(processes)}
    with tempfile.TemporaryDirectory() as folder, mock.patch.dict(os.environ, environment()):
        outputs, line = [Path(folder, name) for name in ("stdout", "stderr")], command(*arguments)[1:]
        ranks = []
        for rank in range(processes):
            place = {**group, "RANK": str(rank), "LOCAL_RANK": str(rank)} if processes > 1 else {}
            ranks.append(FORKED.Process(target=_train, args=(line, {**environment(), **place}, outputs)))
        for rank in ranks:
            rank.start()
        for rank in ranks:
            rank.join(timeout)
            rank.kill()
            rank.join()
        status = next((rank.exitcode for rank in ranks if rank.exitcode), 0)
        return subprocess.CompletedProcess(arguments, status, *(output.read_text() for output in outputs))


def _train(line: list[str], variables: dict[str, str], outputs: list[Path]) -> None:
    from training import pretrain as program

    os.environ.update(variables)
    for stream, path in enumerate(outputs, start=1):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND), stream)
    sys.argv = line
    program.main()
