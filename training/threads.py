"""The threads of a process: whether the user has chosen their number, and how they wait. Imports no torch."""

import os

import psutil


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
