"""The cores that a process may keep busy, as the system, its container and the user say. Imports no torch."""

import math
import os
from pathlib import Path

import psutil


def cores_of_this_process() -> int:
    """This process's share of `usable_cores`, where a launcher has started several on this machine."""
    return max(usable_cores() // int(os.environ.get("LOCAL_WORLD_SIZE", "1")), 1)


def usable_cores() -> int:
    """Cores that may be kept busy: those that this process may run on, within the quota of its container or job."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(math.ceil(min(cores, cpu_quota())), 1)


def cpu_quota(groups: Path = Path("/proc/self/cgroup"), root: Path = Path("/sys/fs/cgroup")) -> float:
    """Cores' worth of time that this process's control groups (Linux, version 1 or 2) allow it; infinity if they set no limit.

    Args:
        groups: lists the groups, as `hierarchy:controllers:path`.
        root: where they are mounted.
    """
    quota = math.inf
    for line in groups.read_text().splitlines() if groups.is_file() else ():
        _, controllers, path = line.split(":", 2)
        if controllers and "cpu" not in controllers.split(","):
            continue
        mount = root / "cpu" if controllers else root
        # A container may see its own group as the mount itself, whatever the path says: what is not there is no limit.
        for folder in (mount / path.strip("/"), *(mount / path.strip("/")).parents):
            quota = min(quota, _quota_of(folder))
            if folder == mount:
                break
    return quota


def _quota_of(group: Path) -> float:
    try:
        if (group / "cpu.max").is_file():
            limit, period = (group / "cpu.max").read_text().split()
        else:
            limit, period = ((group / f"cpu.cfs_{name}_us").read_text().strip() for name in ("quota", "period"))
    except OSError:
        return math.inf
    return math.inf if limit in ("max", "-1") else int(limit) / int(period)


def threads_are_given() -> bool:
    """Whether the user has chosen the number of threads.

    Launchers set OMP_NUM_THREADS to 1 where nobody does. What they were told stands in their own environment and
    command line.
    """
    launched = "ACCELERATE_MIXED_PRECISION" in os.environ or "LOCAL_WORLD_SIZE" in os.environ
    if "OMP_NUM_THREADS" not in os.environ or not launched:
        return "OMP_NUM_THREADS" in os.environ
    try:
        launcher = psutil.Process(os.getppid())
        flag = any(
            word.startswith(("--num_cpu_threads_per_process", "--num-cpu-threads-per-process"))
            for word in launcher.cmdline()
        )
        return flag or "OMP_NUM_THREADS" in launcher.environ()
    except (psutil.Error, OSError):  # gone, or another user's
        return True


def let_waiting_threads_sleep() -> None:
    """Has threads that wait for each other sleep, unless the user says otherwise by OMP_WAIT_POLICY.

    They would spin, and keep from its core the process that paints or decodes the next batch, or another program's, on
    which the slowest thread of each layer then waits. To be called before torch is imported.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
