"""What a run makes of its machine: the precision it has in hardware, the cores it may use, threads and workers."""

import os
import platform
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from training_utils import ROOT, pairs, pretrain, train, write_recipe, write_tar

from hfclip.cores import cores_of_this_process, cpu_quota, usable_cores
from hfclip.errors import UsageError
from hfclip.precision import computes_bfloat16, settled_precision
from training.config import Config
from training.machine import (
    build_accelerator,
    num_workers,
    tune_cpu,
)
from training.threads import threads_are_given


CPU = torch.device("cpu")
# A processor of x86 as if it were one without AVX-512, for torch's own kernels and for those of oneDNN.
WITHOUT_BFLOAT16 = {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2"}
x86 = pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="pretends to be an older x86")


def python(code: str, *, launcher: tuple[str, ...] = (), script: Path | None = None, **variables: str | None) -> str:
    """What a fresh interpreter prints; a variable that is None is not set."""
    if script is not None:
        script.write_text(code)
    line = [sys.executable, *launcher, *([str(script)] if script else ["-c", code])]
    variables = {"PYTHONPATH": f"{ROOT / 'src'}{os.pathsep}{ROOT}", **variables}
    env = {name: value for name, value in {**os.environ, **variables}.items() if value is not None}
    return subprocess.run(line, env=env, capture_output=True, text=True, check=True, timeout=120).stdout


# ---------------------------------------------------------------------------------------------------------------------
# Precision
# ---------------------------------------------------------------------------------------------------------------------


@x86
def test_auto_is_float32_on_a_cpu_that_emulates_bfloat16_and_asking_for_it_is_warned_of():
    code = "import torch; from hfclip.precision import settled_precision as s; cpu = torch.device('cpu'); "
    auto, asked = python(f"{code} print(s('auto', cpu)); print(s('bf16', cpu))", **WITHOUT_BFLOAT16).splitlines()
    assert auto == "('fp32', 'auto: this cpu device does not have bfloat16 in hardware')"
    assert re.fullmatch(r"\('bf16', 'WARNING: slow.*only emulates bfloat16.*", asked)


@pytest.mark.skipif(
    not (torch.cpu.get_capabilities().get("avx512_bf16") or torch.cpu.get_capabilities().get("amx_bf16"))
    or torch.backends.cpu.get_cpu_capability() == "AVX2",  # what it was told to use, by ATEN_CPU_CAPABILITY
    reason="a CPU with bfloat16 in hardware",
)
def test_auto_is_bfloat16_on_a_cpu_that_has_it():
    assert settled_precision("auto", CPU) == ("bf16", "auto: this cpu device has bfloat16 in hardware")


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_what_is_asked_for_is_taken_without_a_word(precision):
    assert settled_precision(precision, CPU) == (precision, "")


def test_mps_computes_in_float32():
    assert settled_precision("auto", torch.device("mps"))[0] == "fp32"


@pytest.mark.slow
@x86
def test_a_resumed_run_keeps_its_precision_on_a_machine_that_would_choose_another(tmp_path, monkeypatch):
    (tmp_path / "shards").mkdir()
    write_tar(tmp_path / "shards" / "0.tar", pairs(range(32)))
    recipe = write_recipe(tmp_path, run={"precision": "auto"}, optim={"steps": 4})
    first = train("--config", recipe, "--run.precision", "bf16", "--optim.steps", "3")
    assert first.returncode == 0, first.stderr
    for name, value in WITHOUT_BFLOAT16.items():
        monkeypatch.setenv(name, value)
    second = pretrain("--config", recipe, "--resume", "auto")
    assert second.returncode == 0, second.stderr
    assert "precision bf16 (as the run began, WARNING: slow" in second.stdout
    assert "run.precision is" not in second.stdout + second.stderr  # no change to be warned of
    assert yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())["run"]["precision"] == "bf16"


def test_settings_that_need_bfloat16_say_what_to_do(tmp_path):
    text_weights = {"bfloat16": ["text_weights"]}
    config = Config.from_dict({"model": {"preset": "ViT-B/32", "tokenizer": "train"}, "optim": text_weights})
    if computes_bfloat16(CPU):
        config.run.precision = "fp32"
        expected = "text_weights need run.precision bf16"
    else:
        expected = "take text_weights out of optim.bfloat16"
    with pytest.raises(UsageError, match=expected):
        build_accelerator(config)


# ---------------------------------------------------------------------------------------------------------------------
# Cores, threads, workers
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("groups", "files", "expected"),
    [
        ("0::/", {"cpu.max": "200000 100000"}, 2),  # docker --cpus 2
        ("0::/", {"cpu.max": "max 100000"}, float("inf")),
        ("0::/", {}, float("inf")),
        ("0::/kubepods/pod/box", {"kubepods/pod/cpu.max": "150000 100000", "cpu.max": "max 100000"}, 1.5),
        ("0::/a/b", {"a/b/cpu.max": "400000 100000", "a/cpu.max": "100000 100000"}, 1),  # the parent's limit is lower
        ("0::/docker/1234", {"cpu.max": "300000 100000"}, 3),  # a container without a name space of groups
        (
            "4:cpu,cpuacct:/docker/1234\n3:cpuset:/\n0::/",
            {"cpu/cpu.cfs_quota_us": "250000", "cpu/cpu.cfs_period_us": "100000"},
            2.5,
        ),
        ("2:cpu:/job", {"cpu/job/cpu.cfs_quota_us": "50000", "cpu/job/cpu.cfs_period_us": "50000"}, 1),
        ("2:cpu:/", {"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"}, float("inf")),
        ("3:cpuset:/x\n2:cpuacct:/x", {"cpu/x/cpu.cfs_quota_us": "1", "cpu/x/cpu.cfs_period_us": "1"}, float("inf")),
    ],
)
def test_quota_of_a_container_is_seen(groups, files, expected, tmp_path):
    (tmp_path / "groups").write_text(groups + "\n")
    for name, text in files.items():
        (tmp_path / "root" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "root" / name).write_text(text + "\n")
    assert cpu_quota(tmp_path / "groups", tmp_path / "root") == expected


def test_system_without_control_groups_has_no_quota(tmp_path):
    assert cpu_quota(tmp_path / "none", tmp_path) == float("inf")


@pytest.mark.slow
def test_process_in_a_group_with_a_quota_of_one_core_uses_one():
    """In a real group, where this user may make one."""
    group = Path("/sys/fs/cgroup/cpu") / f"hfclip-test-{os.getpid()}"
    try:
        group.mkdir()
        (group / "cpu.cfs_period_us").write_text("100000")
        (group / "cpu.cfs_quota_us").write_text("60000")
    except OSError as error:
        pytest.skip(f"no group can be made: {error}")
    code = f"open('{group}/cgroup.procs', 'w').write('0'); from hfclip.cores import usable_cores as u; print(u())"
    try:
        assert python(code) == "1\n"
    finally:
        group.rmdir()


def test_usable_cores_are_those_of_the_affinity():
    if not hasattr(os, "sched_setaffinity"):
        pytest.skip("a system that knows affinity")
    core = min(os.sched_getaffinity(0))
    assert (
        python(
            f"import os; os.sched_setaffinity(0, {{{core}}}); from hfclip.cores import *; "
            "print(usable_cores(), cores_of_this_process())"
        )
        == "1 1\n"
    )


def test_processes_of_a_machine_share_its_cores(monkeypatch):
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert cores_of_this_process() == max(usable_cores() // 2, 1)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "10000")
    assert cores_of_this_process() == num_workers(None) == 1


def test_number_of_workers_is_the_users_or_follows_the_machine(monkeypatch):
    assert num_workers(0) == 0 and num_workers(7) == 7
    monkeypatch.setattr("hfclip.cores.usable_cores", lambda: 16)
    for on_cpu, expected in ((True, 4), (False, 15)):
        monkeypatch.setattr("training.machine.computes_on_cpu", lambda on_cpu=on_cpu: on_cpu)
        assert num_workers(None) == expected


LAUNCH = ("-m", "accelerate.commands.launch", "--config_file", str(ROOT / "training" / "launch" / "one_gpu.yaml"))
TWO = ("-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", "0")


@pytest.mark.parametrize(
    ("launcher", "told", "given"),
    [
        (LAUNCH, None, False),
        (LAUNCH, "1", True),
        ((*LAUNCH, "--num_cpu_threads_per_process", "1"), None, True),
        (TWO, None, False),
    ],
    ids=["launched", "launched with OMP_NUM_THREADS", "launched with a flag", "two by torchrun"],
)
def test_threads_that_only_the_launcher_chose_are_not_the_users(launcher, told, given, tmp_path):
    code = "import os; from training.threads import threads_are_given as t; print(os.environ['OMP_NUM_THREADS'], t())"
    said = python(code, launcher=launcher, script=tmp_path / "probe.py", OMP_NUM_THREADS=told)
    assert set(said.splitlines()) == {f"1 {given}"}


@x86
def test_threads_that_wait_leave_their_core_to_others(tmp_path, monkeypatch):
    monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)
    monkeypatch.setenv("OMP_DISPLAY_ENV", "true")
    run = pretrain(
        "--data.train", tmp_path / "nowhere", "--run.output_dir", tmp_path / "run", "--config", "quickstart"
    )
    assert "nowhere" in run.stderr and re.search("OMP_WAIT_POLICY *= *'PASSIVE'", run.stderr), run.stderr


def test_threads_without_a_launcher_are_what_the_environment_says(monkeypatch):
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    monkeypatch.delenv("ACCELERATE_MIXED_PRECISION", raising=False)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    assert threads_are_given()
    monkeypatch.delenv("OMP_NUM_THREADS")
    assert not threads_are_given()
    threads = torch.get_num_threads()
    tune_cpu()
    assert torch.get_num_threads() == usable_cores()
    torch.set_num_threads(threads)
