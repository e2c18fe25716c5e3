"""The cores that a process may keep busy, as the system and its container say, and how many of them read data."""

import math
import os
from pathlib import Path


def usual_workers(on_cpu: bool) -> int:
    """Processes that read and decode for this one, at least one.

    Args:
        on_cpu: whether the model computes there. It needs its cores for that, and much longer for an image than it
            takes to decode it: a quarter of them read. Beside a GPU all do but the one that feeds it.
    """
    cores = cores_of_this_process()
    return max(cores // 4 if on_cpu else cores - 1, 1)


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
