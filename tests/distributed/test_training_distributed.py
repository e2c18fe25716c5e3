"""Any number of processes is one process: losses, the gradient of every parameter, weights, evaluation."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file
from training_utils import image_bytes, model_with_tokenizer, pairs, pretrain, train, write_recipe, write_tar


STEPS, BATCH = 3, 16


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Run folders by number of processes; the batch of 16 does not divide by 3."""
    found, model = {}, model_with_tokenizer(tmp_path_factory.mktemp("model"))
    for processes in (1, 2, 3):
        folder = tmp_path_factory.mktemp(f"processes-{processes}")
        (folder / "shards").mkdir()
        # Captions repeat, so that pairs of different processes are positives of each other.
        repeated = [
            (f"d{i}.{kind}", data) for i in range(8) for kind, data in (("jpg", image_bytes(i)), ("txt", b"cat"))
        ]
        members = pairs(range(40)) + repeated
        members += [("bad.jpg", b"no picture"), ("bad.txt", b"a dog")]
        write_tar(folder / "shards" / "0.tar", members)
        for label in ("cat", "dog"):
            (folder / "classes" / label).mkdir(parents=True)
            for seed in range(5):
                (folder / "classes" / label / f"{seed}.jpg").write_bytes(image_bytes(seed))
        recipe = write_recipe(
            folder,
            model=model,
            data={"group_captions": True},
            optim={"steps": STEPS, "batch_size": BATCH, "max_grad_norm": 1.0},
            run={"save_every": 1},
            eval={"zero_shot": str(folder / "classes"), "retrieval": str(folder / "shards"), "batch_size": 4},
        )
        process = pretrain("--config", recipe, processes=processes)
        assert process.returncode == 0, process.stdout + process.stderr
        assert f"{processes} x cpu" in process.stdout
        found[processes] = folder / "run"
    return found


def metrics(run):
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def first_gradients(run):
    """The clipped gradient of each parameter in the first step: Adam's first moment is then 0.1 times it."""
    state = torch.load(run / "checkpoint-1" / "trainer_state" / "optimizer.pt")
    return [entry["exp_avg"] / 0.1 for entry in state.values()]


@pytest.mark.parametrize("processes", [2, 3])
def test_losses_and_gradient_norms_are_those_of_one_process(processes, runs):
    expected, found = metrics(runs[1]), metrics(runs[processes])
    assert len(expected) == len(found)
    steps = [(a, b) for a, b in zip(expected, found, strict=True) if "loss" in a]
    assert len(steps) == STEPS
    for a, b in steps:
        # float32 sums in another order: relative 1e-6 in a step, a few of them after three
        assert b["loss"] == pytest.approx(a["loss"], rel=1e-5)
        assert b["grad_norm"] == pytest.approx(a["grad_norm"], rel=1e-4)
        assert b["logit_scale"] == pytest.approx(a["logit_scale"], rel=1e-5)
        assert {k: v for k, v in a.items() if "skipped" in k} == {k: v for k, v in b.items() if "skipped" in k}


@pytest.mark.parametrize("processes", [2, 3])
def test_gradient_of_every_parameter_is_that_of_one_process(processes, runs):
    expected, found = first_gradients(runs[1]), first_gradients(runs[processes])
    num_parameters = len(load_file(runs[1] / "model" / "model.safetensors"))
    assert len(expected) == len(found) == num_parameters  # logit_scale among them
    total = torch.stack([gradient.norm() for gradient in expected]).norm()
    assert total == pytest.approx(1, rel=1e-3)  # clipped
    for a, b in zip(expected, found, strict=True):
        # Against the norm of the tensor: single entries may cancel to rounding noise. The bias of the keys has no
        # gradient but rounding noise, since softmax ignores it; some 1e-9 of the whole.
        assert (a - b).norm() <= 1e-4 * a.norm() + 2e-8 * total


@pytest.mark.parametrize("processes", [2, 3])
def test_evaluation_is_that_of_one_process(processes, runs):
    expected, found = metrics(runs[1])[-1], metrics(runs[processes])[-1]
    assert "zero_shot/top1" in expected and "retrieval/text_retrieval_recall@5" in expected
    # Weights differ by rounding: at most one of ten pictures, or of 48 pairs, may change sides.
    assert found.pop("headlines") == expected.pop("headlines")
    assert all(abs(found[name] - value) <= 0.1 for name, value in expected.items())


@pytest.mark.parametrize(("before", "after"), [(1, 2), (2, 1), (1, 3)])
def test_run_goes_on_with_another_number_of_processes(before, after, runs, tmp_path):
    shutil.copytree(runs[before] / "checkpoint-1", tmp_path / "run" / "checkpoint-1")
    config = runs[before] / "config.yaml"
    process = train("--config", config, "--run.output_dir", tmp_path / "run", "--resume", "auto", processes=after)
    assert process.returncode == 0, process.stdout + process.stderr
    assert "step 1" in process.stdout and f"{after} x cpu" in process.stdout and "WARNING" not in process.stdout
    expected = [line["loss"] for line in metrics(runs[1]) if "loss" in line][1:]
    assert [line["loss"] for line in metrics(tmp_path / "run") if "loss" in line] == pytest.approx(expected, rel=1e-5)
