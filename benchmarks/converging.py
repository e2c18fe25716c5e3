"""The loss curve of one run, computed in several ways: plain, by four processes, cached, split, killed and resumed.

    python benchmarks/converging.py                # prints how far the curves are apart
    python benchmarks/converging.py --write        # also stores docs/converging.png

A small CLIP learns the built-in scenes in float32, from the same seed each time. What is compared is the loss of every
step; float32 sums in another order are all that may differ, and training magnifies them slowly.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import yaml


if not __package__:  # the trainer's modules are named from the folder above
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from training.report.curves import draw_losses


ROOT = Path(__file__).resolve().parents[1]
TOWER = {"hidden_size": 64, "intermediate_size": 256, "num_attention_heads": 2, "num_hidden_layers": 2}
RECIPE = {
    "model": {
        "config": {
            "projection_dim": 32,
            "vision_config": {**TOWER, "model_type": "hfclip_vit", "image_size": 32, "patch_size": 8},
            "text_config": {**TOWER, "model_type": "hfclip_text", "max_position_embeddings": 24},
        },
        "tokenizer": "train",
        "vocab_size": 600,
    },
    "data": {"train": "scenes", "max_samples": 6400, "num_workers": 1},
    "optim": {"batch_size": 64, "lr": 1e-3, "warmup_steps": 20},
    "run": {"precision": "fp32", "log_every": 1, "save_every": 25},
    "eval": {"every": 0},
}
RUNS = {  # name: (processes, arguments)
    "one process": (1, []),
    "four processes": (4, []),
    "cached, micro-batches of 8": (1, ["--optim.micro_batch_size", "8"]),
    "ring exchange, two processes": (2, ["--optim.exchange", "ring"]),
    "split weights (FSDP2), two processes": (2, ["--run.shard_weights", "true"]),
    "killed and resumed": (1, []),
}


def command(recipe: Path, run: Path, processes: int, arguments: list[str]) -> list[str]:
    launch = ROOT / "training" / "launch" / ("one_gpu.yaml" if processes == 1 else "cpu_processes.yaml")
    accelerate = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(launch)]
    accelerate += ["--num_processes", str(processes), "--main_process_port", "0"]
    program = [str(ROOT / "training" / "pretrain.py"), "--config", str(recipe), "--run.output_dir", str(run)]
    return [*accelerate, *program, *arguments]


def train(line: list[str]) -> None:
    done = subprocess.run(line, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stdout + done.stderr)


def train_with_a_kill(line: list[str], run: Path) -> None:
    """Kills the run with SIGKILL past its first checkpoint, and resumes it."""
    process = subprocess.Popen(line, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)
    while not list(run.glob("checkpoint-5*")) and process.poll() is None:
        time.sleep(0.2)
    os.killpg(process.pid, 9)
    process.wait()
    train([*line, "--resume", "auto"])


def losses(run: Path) -> list[float]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line["loss"] for line in lines if "loss" in line]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--write", action="store_true", help="store the picture as docs/converging.png")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        RECIPE["optim"]["steps"] = arguments.steps
        os.environ["HFCLIP_CACHE"] = f"{folder}/cache"
        recipe = Path(folder, "recipe.yaml")
        recipe.write_text(yaml.safe_dump(RECIPE))
        curves = {}
        for name, (processes, options) in RUNS.items():
            run = Path(folder, name)
            line = command(recipe, run, processes, options)
            if name == "killed and resumed":
                train_with_a_kill(line, run)
            else:
                train(line)
            curves[name] = losses(run)
            plain = curves["one process"]
            assert len(curves[name]) == len(plain) == arguments.steps
            apart = [abs(a - b) / a for a, b in zip(plain, curves[name], strict=True)]
            print(
                f"| {name} | {curves[name][-1]:.6f} | {max(apart[: arguments.steps // 3]):.1e} | {max(apart):.1e} |",
                flush=True,
            )
        if arguments.write:
            draw_losses([Path(folder, name) for name in RUNS], ROOT / "docs" / "converging.png")


if __name__ == "__main__":
    main()
