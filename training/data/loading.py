"""Batches on their way from worker processes to the run, which never waits for them without looking round.

    worker: Collate -> HandedOver: a memory file -> Batches: a thread takes it -> `wait`: there, not yet, or a failure

Nothing goes through /dev/shm, which is 64 MB in a container whose user did not ask for more: torch would send tensors
through it, and where it is full the batch is lost in the worker and the run waits for ever.
"""

import mmap
import multiprocessing
import os
import pickle
import queue
import signal
import threading
import traceback
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from multiprocessing.reduction import DupFd

import numpy as np
import psutil
import torch
from torch.utils.data import DataLoader

from hfclip.errors import UsageError


ALIGNMENT = 64  # bytes, of arrays in a memory file
OUT_OF_MEMORY = (
    "SIGKILL is mostly the system's when memory runs out. Lower data.num_workers or optim.batch_size, or give the run "
    "more memory, and resume."
)


class HandingOver:
    """A collate function whose batches reach the process of the run in memory files."""

    def __init__(self, collate: Callable[[list], dict]):
        self.collate = collate

    def __call__(self, examples: list) -> "dict | HandedOver":
        batch = self.collate(examples)
        return HandedOver(batch) if hasattr(os, "memfd_create") else batch  # elsewhere shared memory has no such limit


class HandedOver:
    """A batch that is pickled as an open file in memory; unpickled it is the batch again, without a copy."""

    def __init__(self, batch: dict):
        arrays = {name: v.numpy() if isinstance(v, torch.Tensor) else v for name, v in batch.items()}
        buffers: list[pickle.PickleBuffer] = []
        self.frame, self.places = pickle.dumps(arrays, protocol=5, buffer_callback=buffers.append), []
        file = os.memfd_create("hfclip batch")
        try:
            with open(file, "wb", closefd=False) as memory:
                for buffer in buffers:
                    memory.seek(-(-memory.tell() // ALIGNMENT) * ALIGNMENT)
                    self.places.append((memory.tell(), memory.tell() + memory.write(buffer.raw())))
            self.file = DupFd(file)  # here and not when it is pickled: in the queue's thread an error would be lost
        finally:
            os.close(file)

    def __reduce__(self):
        return _received, (self.file, self.frame, self.places)


def _received(handle, frame: bytes, places: list[tuple[int, int]]) -> dict:
    file = handle.detach()
    try:
        memory = memoryview(mmap.mmap(file, 0)) if places else memoryview(b"")
    finally:
        os.close(file)
    arrays = pickle.loads(frame, buffers=[memory[start:stop] for start, stop in places])
    return {name: torch.from_numpy(v) if isinstance(v, np.ndarray) else v for name, v in arrays.items()}


class Batches:
    """The batches of a loader in their order, each fetched by a thread when it is asked for. A context manager.

    Raises:
        UsageError: if the loader's worker processes cannot be started.
    """

    def __init__(self, loader: DataLoader):
        others = multiprocessing.active_children()
        try:
            iterator = iter(loader)
        except OSError as error:  # no room for semaphores, no memory, too many processes
            _kill(set(multiprocessing.active_children()) - set(others))
            raise UsageError(
                f"data.num_workers: processes that read data cannot be started: {error}. They need a few kilobytes of "
                "/dev/shm (in Docker `--shm-size`) and memory. Make room, or set it to 0."
            ) from error
        self.workers = [process for process in multiprocessing.active_children() if process not in others]
        if hasattr(signal, "SIGCHLD"):
            # Torch's handler, set where a loader starts, raises when a worker dies: in the middle of a step, or of
            # saving. `wait` looks for itself.
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        self.is_asked, self.asked, self.fetched = False, queue.SimpleQueue(), queue.SimpleQueue()
        # A daemon, since a read of a store or disk that hangs cannot be ended, and must not keep the process.
        self.thread = threading.Thread(target=self._fetch, args=(iterator,), daemon=True)
        self.thread.start()

    def __enter__(self) -> "Batches":
        return self

    def __exit__(self, *exception) -> None:
        """Ends the workers, whatever they wait for."""
        self.asked.put(False)
        _kill(self.workers)
        self.thread.join(timeout=2)

    def wait(self, seconds: float) -> dict | None:
        """The next batch, or None if it has not come in this time. With a `failure`, a message, there will be none."""
        if not self.is_asked:
            self.asked.put(True)
            self.is_asked = True
        try:
            batch = self.fetched.get(timeout=seconds)
            self.is_asked = False
        except queue.Empty:
            batch = None
        if (batch is None or "failure" in batch) and (dead := self._dead_worker()):
            return {"failure": dead}
        return batch

    def _fetch(self, batches) -> None:
        while self.asked.get():
            try:
                self.fetched.put(next(batches))
            except Exception:  # of a worker, too: let the run save before it ends
                self.fetched.put({"failure": f"Reading data failed.\n{traceback.format_exc()}"})

    def _dead_worker(self) -> str | None:
        """What happened to a worker that is gone, if one is."""
        for worker in self.workers:
            if worker.exitcode:
                how = f"ended with status {worker.exitcode}"
                if worker.exitcode < 0:
                    how = f"was killed by {signal.Signals(-worker.exitcode).name}"
                return f"Process {worker.pid}, one of {len(self.workers)} that read data, {how}. {OUT_OF_MEMORY}"
        return None


@contextmanager
def raise_if_a_reader_is_killed() -> Iterator[None]:
    """Ends an evaluation whose reader is killed: it may have sent half a batch, and the rest is waited for for ever.

    Raises:
        UsageError: wherever the main thread is.
    """
    killed: list[str] = []

    def look(number, frame) -> None:
        for child in psutil.Process().children():
            ended = os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
            if ended and ended.si_code != os.CLD_EXITED and ended.si_status != signal.SIGTERM:  # loaders end theirs by
                name = signal.Signals(ended.si_status).name
                killed.append(
                    f"Process {child.pid}, which read data to evaluate, was killed by {name}. {OUT_OF_MEMORY}"
                )
                raise UsageError(killed[0])

    if not hasattr(os, "waitid"):  # macOS, before Python 3.13
        yield
        return
    before = signal.signal(signal.SIGCHLD, look)
    try:
        yield
    except RuntimeError as error:  # into which a loader turns what interrupts it
        if killed:
            raise UsageError(killed[0]) from error
        raise
    finally:
        signal.signal(signal.SIGCHLD, before)


def _kill(processes: Iterable[multiprocessing.Process]) -> None:
    for process in processes:
        process.kill()  # workers do not hear a gentler signal (`batches.start_worker`)
