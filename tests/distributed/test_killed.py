"""A run that is killed at random moments, `kill -9`, and resumed each time is the run that never was: every weight, all
states and every line of metrics.

HFCLIP_KILLS says how often it is killed (4).
"""

import json
import os
import random
import subprocess
import time
from pathlib import Path

import psutil
import pytest
import torch
from safetensors.torch import load_file
from training_utils import command, environment, model_with_tokenizer, pairs, pretrain, train, write_recipe, write_tar


KILLS = int(os.environ.get("HFCLIP_KILLS", "4"))
STEPS_PER_KILL = 3


def recipe_of(folder: Path, steps: int, run: str) -> Path:
    """Everything random is on, and a checkpoint is written after each step: kills hit the writing, too."""
    dropout = {"attention_dropout": 0.1}
    (folder / run).mkdir(parents=True)
    return write_recipe(
        folder / run,
        model=model_with_tokenizer(folder / run, text=dropout, vision={**dropout, "patch_dropout": 0.25}),
        data={"train": str(folder / "shards"), "num_workers": 2},
        optim={"steps": steps, "ema_decay": 0.9},
        run={"save_every": 1, "keep_checkpoints": 2},
    )


def lines_of(run: Path) -> list[dict]:
    file = run / "metrics.jsonl"
    lines = file.read_text().splitlines(keepends=True) if file.is_file() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


def kill(process: subprocess.Popen, with_children: bool) -> None:
    """The trainer or its launcher; `with_children`, also whatever it started."""
    others = psutil.Process(process.pid).children(recursive=True) if with_children else []
    for victim in [process, *others]:
        try:
            victim.kill()
        except psutil.NoSuchProcess:
            pass
    process.wait()


def identity(folder: Path) -> tuple[str, int]:
    return folder.name, folder.stat().st_ctime_ns


def killed_run(recipe: Path, run: Path, kills: int, steps: int, processes: int | None) -> int:
    """Starts the run and kills it, again and again. How many kills left a checkpoint that was being written."""
    rng, interrupted_saves = random.Random(0), 0
    for number in range(1, kills + 1):
        output = open(run.parent / f"output-{number}", "w")
        line = command("--config", recipe, "--resume", "auto", processes=processes)
        process = subprocess.Popen(line, env=environment(), stdout=output, stderr=output)
        # A random moment after a random step; the last kill comes when the run is about to end.
        done = max((line["step"] for line in lines_of(run)), default=0)
        goal = steps if number == kills else min(done + rng.randint(1, STEPS_PER_KILL), steps - 1)
        left = set(map(identity, run.glob(".tmp-checkpoint-*")))
        end = time.monotonic() + 200
        while not (lines_of(run) and lines_of(run)[-1]["step"] >= goal) and process.poll() is None:
            assert time.monotonic() < end, Path(output.name).read_text()
            time.sleep(0.005)
        time.sleep(10 ** rng.uniform(-3, -0.3))  # often while the checkpoint of that step is written
        assert process.poll() in (None, 0), Path(output.name).read_text()
        # A launcher that is killed alone leaves its processes behind: that is no end of the run.
        kill(process, with_children=processes is not None or rng.random() < 0.5)
        interrupted_saves += not left >= set(map(identity, run.glob(".tmp-checkpoint-*")))
    return interrupted_saves


@pytest.mark.parametrize(("processes", "kills"), [(None, KILLS), (2, max(KILLS // 4, 1))], ids=["one", "two"])
def test_killed_and_resumed_run_is_the_run_in_one_piece(processes, kills, tmp_path):
    (tmp_path / "shards").mkdir()
    write_tar(tmp_path / "shards" / "0.tar", pairs(range(48)))
    steps = STEPS_PER_KILL * kills + 2
    whole, again = (recipe_of(tmp_path, steps, run) for run in ("whole", "again"))
    process = train("--config", whole, processes=processes or 1, timeout=300 + 10 * kills)
    assert process.returncode == 0, process.stderr
    interrupted = killed_run(again, again.parent / "run", kills, steps, processes)
    process = pretrain("--config", again, "--resume", "auto", processes=processes)
    assert process.returncode == 0, process.stderr
    print(f"{kills} kills, {interrupted} of them while a checkpoint was written")

    whole, again = whole.parent / "run", again.parent / "run"
    assert not any(list(again.glob(pattern)) for pattern in ("damaged-*", ".tmp-*", ".old-*"))
    for file in ("model/model.safetensors", f"checkpoint-{steps}/model.safetensors"):
        expected, found = load_file(whole / file), load_file(again / file)
        assert expected.keys() == found.keys() and all(torch.equal(expected[name], found[name]) for name in expected)
    for file in sorted((whole / f"checkpoint-{steps}" / "trainer_state").glob("*.pt")):
        expected, found = torch.load(file), torch.load(again / file.relative_to(whole))
        torch.testing.assert_close(found, expected, rtol=0, atol=0)
    expected, found = lines_of(whole), lines_of(again)
    assert [line["step"] for line in found] == list(range(1, steps + 1))
    assert [line["loss"] for line in found] == [line["loss"] for line in expected]
    assert [line["grad_norm"] for line in found] == [line["grad_norm"] for line in expected]
