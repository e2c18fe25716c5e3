"""What becomes of a run when one of its processes, machines or network links is gone: the others end, and say why."""

import json
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from training_utils import ROOT, environment, free_port, model_with_tokenizer, pairs, write_recipe, write_tar


SILENCE = 5.0
# One process of a group that has a Heartbeat; what it does then is the argument.
PROCESS = """
import os, sys, time, torch, torch.distributed as dist
from hfclip.errors import UsageError
from training.state.heartbeat import Heartbeat
dist.init_process_group("gloo")
rank, world = dist.get_rank(), dist.get_world_size()
exec(os.environ.get("BEFORE", ""))
with Heartbeat(rank, world, float(sys.argv[1])) as heartbeat:
    print("ready", flush=True)
    exec(sys.argv[2])
"""
WAIT_FOR_RANK_1 = "time.sleep(60) if rank == 1 else dist.all_reduce(torch.ones(1))"


class Group:
    """Processes of one group, and how they end."""

    def __init__(self, folder: Path, world: int, action: str, **variables: str):
        address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": str(world)}
        self.errors = [folder / f"errors-{rank}" for rank in range(world)]
        self.processes = [
            subprocess.Popen(
                [sys.executable, "-c", PROCESS, str(SILENCE), action],
                env={
                    **environment(),
                    **variables,
                    **address,
                    "PYTHONPATH": f"{ROOT}:{ROOT / 'src'}",
                    "RANK": str(rank),
                },
                stdout=subprocess.PIPE,
                stderr=open(self.errors[rank], "w"),
            )
            for rank in range(world)
        ]

    def __enter__(self):
        for rank, process in enumerate(self.processes):
            assert process.stdout.readline() == b"ready\n", self.errors[rank].read_text()
        return self

    def __exit__(self, *_):
        for process in self.processes:
            process.kill()
            process.wait()
            process.stdout.close()

    def ended(self, rank: int, within: float) -> tuple[int, str]:
        """Status and error output of a rank that has to end by itself in so many seconds."""
        status = self.processes[rank].wait(within)
        return status, self.errors[rank].read_text()


@pytest.mark.parametrize("killed", [0, 1])
def test_killed_process_ends_the_others_at_once(killed, tmp_path):
    """Though they wait in a collective, and a child of the killed one lives on."""
    action = f"if rank == {killed} and os.fork() == 0: time.sleep(8); os._exit(0)\n{WAIT_FOR_RANK_1}"
    with Group(tmp_path, 3, action) as group:
        time.sleep(0.5)
        group.processes[killed].kill()
        name = f"rank {killed} ({socket.gethostname()}, process {group.processes[killed].pid})"
        for rank in {0, 1, 2} - {killed}:
            status, errors = group.ended(rank, within=4)
            assert status == 1 and f"Rank {rank} ends, because {name} is gone: its connection closed" in errors
            assert errors.count("is gone") == 1 and "--resume auto" in errors and "Traceback" not in errors


@pytest.mark.parametrize("stopped", [0, 1])
def test_silent_process_ends_the_others_in_time(stopped, tmp_path):
    """A stopped process is a machine that hangs: its connections stay, and nothing comes over them."""
    with Group(tmp_path, 3, "time.sleep(60)") as group:
        group.processes[stopped].send_signal(signal.SIGSTOP)
        since = time.monotonic()
        for rank in {0, 1, 2} - {stopped}:
            status, errors = group.ended(rank, within=SILENCE + 1)
            assert status == 1 and f"because rank {stopped} " in errors and "no sign of life since" in errors
        assert SILENCE / 2 < time.monotonic() - since < SILENCE + 1
        group.processes[stopped].send_signal(signal.SIGCONT)
        status, errors = group.ended(stopped, within=3)
        assert status == 1 and f"Rank {stopped} ends" in errors


# Strangers who connect with rank 0 before the others do: one sends what no rank would, one nothing.
STRANGERS = """
import psutil, socket, threading
def ports():
    return {c.laddr.port for c in psutil.Process().net_connections() if c.status == psutil.CONN_LISTEN}
known, strangers = ports(), []
def visit():
    while not (new := ports() - known):
        time.sleep(0.05)
    strangers.extend(socket.create_connection(("127.0.0.1", min(new))) for _ in range(2))
    strangers[0].send(b"[1]\\n{")
threading.Thread(target=visit).start() if rank == 0 else time.sleep(1)
"""


def test_short_stops_and_strangers_and_early_goodbyes_end_nobody(tmp_path):
    action = "assert rank or len(strangers) == 2\ntime.sleep(8 - 2 * rank)"
    with Group(tmp_path, 3, action, BEFORE=STRANGERS) as group:
        for process in group.processes:
            process.send_signal(signal.SIGSTOP)
        for process in group.processes[1:]:
            process.send_signal(signal.SIGCONT)
        time.sleep(SILENCE / 2)
        group.processes[0].send_signal(signal.SIGCONT)
        assert [group.ended(rank, within=20) for rank in range(3)] == [(0, "")] * 3


def test_exception_of_one_process_is_told_by_all(tmp_path):
    """Its traceback is its own; the collective that breaks in the others shows none."""
    action = "if rank == 2: raise ValueError('no such\\nword')\ndist.all_reduce(torch.ones(1))"
    with Group(tmp_path, 3, action) as group:
        status, errors = group.ended(2, within=5)
        assert status == 1 and "Traceback" in errors and "Rank" not in errors
        for rank in (0, 1):
            status, errors = group.ended(rank, within=8)
            assert status == 1 and "Traceback" not in errors
            assert f"Rank {rank} ends, because rank 2 (" in errors and "failed: ValueError: no such word." in errors


@pytest.mark.parametrize("failing", [0, 1])
def test_mistake_that_one_process_finds_ends_all_with_its_status(failing, tmp_path):
    """Found at once, as `--resume` of a folder that is none; nothing is there to resume."""
    action = (
        f"if rank == {failing}: raise UsageError('no such\\n' + 'word ' * 200 + '.')\ndist.all_reduce(torch.ones(1))"
    )
    with Group(tmp_path, 3, action, LOCAL_RANK="0") as group:
        for rank in {0, 1, 2} - {failing}:
            said = f"\nRank {rank} ends, because rank {failing} found the error above.\n"
            assert group.ended(rank, within=8) == (2, said)
    with Group(tmp_path, 2, action, LOCAL_RANK="1") as group:  # a rank that leaves it to others to show its error
        status, errors = group.ended(1 - failing, within=8)
        assert status == 2 and f"because rank {failing} (" in errors and "found an error: no such word word" in errors
        assert errors.endswith(" word [...].\n") and "--resume" not in errors


def test_exceptions_of_all_processes_keep_their_tracebacks(tmp_path):
    with Group(tmp_path, 2, "raise ValueError(f'bad {rank}')") as group:
        shown = [group.ended(rank, within=8)[1] for rank in range(2)]
        assert any("Traceback" in errors for errors in shown)
        for rank, errors in enumerate(shown):
            assert f"bad {rank}" in errors or f"bad {1 - rank}" in errors


# ---------------------------------------------------------------------------------------------------------------------
# Two machines
# ---------------------------------------------------------------------------------------------------------------------


def recipe_of(folder: Path, steps: int) -> Path:
    (folder / "shards").mkdir()
    write_tar(folder / "shards" / "0.tar", pairs(range(64)))
    model = model_with_tokenizer(folder)
    return write_recipe(folder, model=model, optim={"steps": steps}, run={"save_every": 5})


def steps_done(run: Path) -> list[int]:
    file = run / "metrics.jsonl"
    lines = file.read_text().splitlines(keepends=True) if file.is_file() else []
    return [json.loads(line)["step"] for line in lines if line.endswith("\n")]


class Machines:
    """Two launches of one training, each with the files of its output; `within` is how to get into a machine."""

    def __init__(self, folder: Path, recipe: Path, within=((), ()), variables=({}, {}), address="127.0.0.1"):
        self.run, self.port = folder / "run", free_port()
        self.outputs = [folder / f"output-{rank}" for rank in range(2)]
        self.launches = []
        for rank in range(2):
            line = [*within[rank], sys.executable, "-m", "accelerate.commands.launch"]
            line += ["--config_file", str(ROOT / "training/launch/nodes.yaml"), "--num_machines", "2"]
            line += ["--num_processes", "2", "--machine_rank", str(rank), "--main_process_ip", address]
            line += ["--main_process_port", str(self.port), str(ROOT / "training/pretrain.py")]
            line += ["--config", str(recipe), "--resume", "auto"]
            output = open(self.outputs[rank], "w")
            variables_here = {**environment(), **variables[rank]}
            self.launches.append(subprocess.Popen(line, env=variables_here, stdout=output, stderr=output))

    def __enter__(self):
        return self

    def __exit__(self, *_):
        for rank in range(2):
            self.kill(rank)

    def wait_for_step(self, step: int) -> None:
        end = time.monotonic() + 200
        while max(steps_done(self.run), default=0) < step:
            assert time.monotonic() < end and all(launch.poll() is None for launch in self.launches), self.told()
            time.sleep(0.02)

    def kill(self, rank: int) -> None:
        """The launcher and all that it started, at once, as if the machine lost its power."""
        launch = self.launches[rank]
        if launch.poll() is None:
            for process in [*psutil.Process(launch.pid).children(recursive=True), launch]:
                try:
                    process.kill()
                except psutil.NoSuchProcess:
                    pass
            launch.wait()

    def told(self) -> list[str]:
        return [output.read_text() for output in self.outputs]


def test_killed_machine_ends_the_other_and_the_run_goes_on(tmp_path):
    """The first machine is killed, on which the others rely to know of each other."""
    recipe = recipe_of(tmp_path, steps=24)
    with Machines(tmp_path, recipe) as machines:
        machines.wait_for_step(7)
        machines.kill(0)
        assert machines.launches[1].wait(60) != 0
        told = machines.told()[1]
        assert "Rank 1 ends, because rank 0 (" in told and "is gone" in told and "--resume auto" in told
    assert not (tmp_path / "run" / "model").exists()
    with Machines(tmp_path, recipe) as machines:
        assert [launch.wait(200) for launch in machines.launches] == [0, 0], machines.told()
        assert "Going on from" in machines.told()[0]
    assert steps_done(tmp_path / "run") == list(range(1, 25)) and (tmp_path / "run" / "model").is_dir()


@pytest.fixture
def linked_machines():
    """Two network namespaces with a cable between them: how to get into each, and how to pull the plug."""
    if not all(map(shutil.which, ("unshare", "nsenter", "ip"))):
        pytest.skip("needs unshare, nsenter and ip")
    first = subprocess.Popen(["unshare", "-rn", "sleep", "600"])
    enter_first = ["nsenter", "--preserve-credentials", "-U", "-n", "-t", str(first.pid)]
    second = subprocess.Popen([*enter_first, "unshare", "-n", "sleep", "600"])
    time.sleep(0.5)
    enter_second = [*enter_first[:-1], str(second.pid)]
    lines = [
        [*enter_first, *f"ip link add cable0 type veth peer name cable1 netns {second.pid}".split()],
        *(
            [*enter, *f"ip addr add 10.9.0.{i + 1}/24 dev cable{i}".split()]
            for i, enter in enumerate((enter_first, enter_second))
        ),
        *(
            [*enter, *f"ip link set {name} up".split()]
            for i, enter in enumerate((enter_first, enter_second))
            for name in ("lo", f"cable{i}")
        ),
    ]
    try:
        for line in lines:
            process = subprocess.run(line, capture_output=True, text=True)
            if process.returncode != 0:
                pytest.skip(f"needs network namespaces; {' '.join(line[7:])}: {process.stderr.strip()}")
        yield (enter_first, enter_second), [*enter_first, "ip", "link", "set", "cable0", "down"]
    finally:
        for process in (second, first):
            process.kill()
            process.wait()


def test_cut_network_link_ends_both_machines(linked_machines, tmp_path):
    within, cut = linked_machines
    recipe = recipe_of(tmp_path, steps=400)
    variables = [{"GLOO_SOCKET_IFNAME": f"cable{i}"} for i in range(2)]
    with Machines(tmp_path, recipe, within, variables, address="10.9.0.1") as machines:
        machines.wait_for_step(6)
        subprocess.run(cut, check=True)
        end = time.monotonic() + 90
        for rank in range(2):
            assert machines.launches[rank].wait(end - time.monotonic()) != 0
            told = machines.told()[rank]
            assert f"Rank {rank} ends, because rank {1 - rank} (" in told and "no sign of life" in told
    done = max(steps_done(tmp_path / "run"))
    assert done < 400
