"""Signs of life between the processes of a run: when one of them is gone, all of them end, and say why.

A collective waits for hours for a process whose machine or network link is gone. So a thread of every rank keeps one
TCP connection with rank 0 and sends a line over it every few seconds, both ways, whatever its main thread waits for.
Silence, or a connection that closes without a goodbye, is passed on by rank 0 to all ranks; each of them prints what
happened and ends its process. A rank that fails tells its exception first, so that the others name the cause.

    Heartbeat(...) -> port of rank 0 to all ranks -> thread: beat, listen, judge -> close(): goodbye
                                                                                 -> fail(error): "rank 2 failed: ..."

A thread can beat while the main thread waits or computes outside of Python's lock, as in collectives, kernels and
reads of files. An extension that held the lock for longer than `max_silence` would be taken for dead.
"""

import json
import os
import secrets
import selectors
import signal
import socket
import sys
import textwrap
import threading
import time
from types import TracebackType

import torch.distributed

from ..config import UsageError
from ..redaction import redacted


BEATS = 8  # in the time of `max_silence`, at least
LONGEST_PAUSE = 5.0  # seconds from beat to beat
GATHERING = 1.0  # seconds in which other ranks that are gone are found, to be named together
GRACE = 5.0  # seconds in which a rank that failed prints its traceback, and others may end by themselves
SHOWN = 4  # ranks, at most, that a message names
LONGEST_CAUSE = 600  # characters


class Heartbeat:
    """Ends this process within `max_silence` seconds of the end of any other, status 1. Does nothing for one process.

    After a `UsageError` of another, it ends as the other does, with status 2 and without advice to resume. Collective to create, after the process group. A context manager; what comes after it is not watched.

    Args:
        rank, world: of the process group.
        max_silence: seconds, 5 or more. A process that is stopped for less (but for the pause between two beats, an
            eighth of it or 5 seconds) is waited for.

    Raises:
        UsageError: on a rank that cannot reach rank 0.
    """

    def __init__(self, rank: int, world: int, max_silence: float):
        self.rank, self.max_silence = rank, max_silence
        self._pause = min(LONGEST_PAUSE, max_silence / BEATS)
        self._parted = threading.Event()  # nothing is watched any more
        self._failing = threading.Event()  # the main thread has an exception, which may follow from another's end
        self._arrived = threading.Event()  # all ranks have said hello to rank 0
        self._causes: dict[int, dict] = {}  # what was told of ranks that are gone, in the order of notice
        self._end_at = float("inf")
        self._lines: list[_Line] = []
        if world == 1:
            self._parted.set()
            return
        self._names = {other: f"rank {other} (never heard of)" for other in range(world)}
        self._names[rank] = f"rank {rank} ({socket.gethostname()}, process {os.getpid()})"
        self._listener, there = None, [None]
        if rank == 0:
            self._listener = _listen()
            # The token tells the ranks of this run from whatever else connects.
            there = [(self._names[0], socket.gethostname(), self._listener.getsockname()[1], secrets.token_hex(16))]
        torch.distributed.broadcast_object_list(there, src=0)
        self._names[0], host, port, self._token = there[0]
        if rank != 0:
            self._connect(os.environ.get("MASTER_ADDR", host), port)
        # When each rank that is watched was last heard.
        self._heard = dict.fromkeys(range(1, world) if rank == 0 else [0], time.monotonic())
        os.register_at_fork(after_in_child=self._leave_to_parent)
        self._thread = threading.Thread(target=self._watch, name="heartbeat", daemon=True)
        self._thread.start()
        if rank == 0:  # it could not tell its end to one that it has not met; the thread ends a wait that is too long
            self._arrived.wait()

    def __enter__(self) -> "Heartbeat":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if error is None:
            self.close()
        else:
            self.fail(error)

    def close(self) -> None:
        """Says goodbye to the others, and watches them no more."""
        self._part({"kind": "bye"})

    def fail(self, error: BaseException) -> None:
        """Tells the others why this rank is about to end.

        Ends the process itself, with the cause for a message, where another rank was gone before: a collective that
        breaks for want of a partner would only bury the cause under its traceback.
        """
        if self._parted.is_set():
            return
        if isinstance(error, Exception) and not isinstance(error, UsageError):
            self._failing.set()
            self._thread.join(GATHERING)
            if self._causes:
                self._thread.join()  # which ends the process
            # Whatever is done on the way out, such as leaving the process group, may wait for others in its turn.
            signal.alarm(int(self.max_silence) + 1)
        if isinstance(error, UsageError):
            cause, status = f"{self._names[self.rank]} found an error: {error}", 2
        else:
            cause, status = f"{self._names[self.rank]} failed: {type(error).__name__}: {error}", 1
        # The first rank of a machine shows its error there itself.
        host = socket.gethostname() if status == 2 and os.environ.get("LOCAL_RANK", "0") == "0" else None
        cause = textwrap.shorten(redacted(cause), LONGEST_CAUSE).rstrip(" .:")
        self._part({**_gone(self.rank, cause, GRACE), "status": status, "shown_on": host})

    def _part(self, last_words: dict) -> None:
        if not self._parted.is_set():
            self._send_all(last_words)
            self._parted.set()
            self._thread.join()
            for line in self._lines:
                line.end()

    def _leave_to_parent(self) -> None:
        """In a forked child, a worker that loads data: its copies would keep connections open when we are dead."""
        if not self._parted.is_set():
            self._parted.set()
            for file in [self._listener, *(line.socket for line in self._lines)]:
                if file is not None:
                    file.close()

    def _connect(self, host: str, port: int) -> None:
        try:
            connection = socket.create_connection((host, port), timeout=self.max_silence)
        except OSError as error:
            raise UsageError(
                f"Rank {self.rank} on {socket.gethostname()} cannot connect to rank 0 at {host}:{port}: {error}. "
                "Processes watch each other over TCP: allow connections between the machines of the run on any port."
            ) from error
        self._lines.append(_Line(connection, rank=0))
        self._send_all({"kind": "hello", "rank": self.rank, "name": self._names[self.rank], "token": self._token})

    # ---- The thread

    def _watch(self) -> None:
        next_beat = 0.0
        with selectors.PollSelector() as selector:
            for file in [self._listener, *self._lines]:
                if file is not None:
                    selector.register(file, selectors.EVENT_READ)
            while not self._parted.is_set():
                # Taken before listening: when this process was stopped for a while, others have been heard since.
                now = time.monotonic()
                if now >= next_beat:
                    self._send_all({"kind": "beat"})
                    next_beat = now + self._pause
                for key, _ in selector.select(timeout=0.1):
                    self._attend(key.fileobj, selector)
                self._judge(now)

    def _attend(self, file: "socket.socket | _Line", selector: selectors.BaseSelector) -> None:
        """Takes in a new connection, or what has come over one."""
        if file is self._listener:
            try:
                line = _Line(self._listener.accept()[0])
            except OSError:  # it is gone again
                return
            self._lines.append(line)
            selector.register(line, selectors.EVENT_READ)
            return
        for message in file.receive():
            self._take(message, file)
        if file.closed:
            selector.unregister(file)
            self._lines.remove(file)
            file.socket.close()
            if file.rank in self._heard:
                how = f"its connection closed without a goodbye at {_clock()}: killed, or its machine went down"
                self._note(_gone(file.rank, f"{self._names[file.rank]} is gone: {how}", GATHERING))

    def _take(self, message: dict, line: "_Line") -> None:
        kind = message.get("kind")
        if line.rank is None:
            if kind != "hello" or message.get("token") != self._token:
                line.closed = True
                return
            line.rank = message["rank"]
            self._names[line.rank] = message["name"]
            if self._heard.keys() <= {other.rank for other in self._lines}:
                self._arrived.set()
        if line.rank in self._heard:
            self._heard[line.rank] = time.monotonic()
        if kind == "bye":
            self._heard.pop(line.rank, None)
        elif kind == "gone":
            self._note(message)

    def _judge(self, now: float) -> None:
        """Finds who was silent for too long, and ends this process once all that is known of others has come."""
        limit = self.max_silence - GATHERING
        if any(now - heard > limit for heard in self._heard.values()):
            # One machine has many ranks, which fell silent within a pause of each other.
            for rank in [rank for rank, heard in self._heard.items() if now - heard > limit / 2]:
                silence = now - self._heard[rank]
                how = (
                    f"no sign of life since {_clock(-silence)}: its machine or the network is down, or it was stopped"
                )
                self._note(_gone(rank, f"{self._names[rank]} is gone: {how}", 0.0))
        if self._causes:
            if self._failing.is_set():
                self._end_at = min(self._end_at, self._noticed_at + GATHERING)
            if now >= self._end_at:
                self._end()

    def _note(self, gone: dict) -> None:
        """Keeps that a rank is gone and why; rank 0 tells the others."""
        self._heard.pop(gone["rank"], None)
        if gone["rank"] in self._causes or gone["follows"] and self._causes:
            return
        now = time.monotonic()
        if not self._causes:
            self._noticed_at = now
        self._causes[gone["rank"]] = gone
        self._end_at = min(self._end_at, now + gone["patience"])
        if self.rank == 0:
            self._send_all({**gone, "patience": max(gone["patience"], GATHERING)})

    def _end(self) -> None:
        gone, here = list(self._causes.values()), socket.gethostname()
        causes = [
            f"rank {one['rank']} found the error above" if one["shown_on"] == here else one["cause"] for one in gone
        ]
        told = "; ".join(causes[:SHOWN]) + (f"; and {len(causes) - SHOWN} more" if len(causes) > SHOWN else "")
        status = min(one["status"] for one in gone)  # 2 if nothing but mistakes of the user's ended the run
        last_words = _gone(self.rank, f"{self._names[self.rank]} ended, because {told}", GATHERING)
        self._send_all({**last_words, "status": status, "follows": True})
        advice = "" if status == 2 else " Start the run again with --resume auto."
        threading.Timer(GATHERING, os._exit, [status]).start()  # should one of the streams be stuck
        message = f"\nRank {self.rank} ends, because {told}.{advice}\n"
        os.write(2, message.encode())  # not through sys.stderr, which the main thread may hold
        sys.stdout.flush()
        os._exit(status)

    def _send_all(self, message: dict) -> None:
        for line in list(self._lines):
            line.send(message)


class _Line:
    """A TCP connection over which JSON objects go, one a line."""

    def __init__(self, connection: socket.socket, rank: int | None = None):
        self.socket, self.rank = connection, rank  # None: not said yet
        self.closed, self._unread = False, b""
        connection.setblocking(False)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def fileno(self) -> int:
        return self.socket.fileno()

    def send(self, message: dict) -> None:
        try:
            self.socket.send(json.dumps(message).encode() + b"\n")
        except OSError:
            pass  # a connection that is dead is found when it is read, one that takes no more by its silence

    def receive(self) -> list[dict]:
        """What has come; `closed` is set after the last of it."""
        try:
            data = self.socket.recv(1 << 16)
        except BlockingIOError:
            return []
        except OSError:
            data = b""
        *lines, self._unread = (self._unread + data).split(b"\n")
        try:
            messages = [json.loads(line) for line in lines]
        except ValueError:
            messages, data = [], b""
        self.closed = not data or len(self._unread) > 1 << 20
        return [message for message in messages if isinstance(message, dict)]

    def end(self) -> None:
        """After the last words. Closing would reset a connection with unread bytes, and the words could be lost."""
        try:
            self.socket.shutdown(socket.SHUT_WR)
        except OSError:
            pass


def _gone(rank: int, cause: str, patience: float) -> dict:
    """A message: that a rank is no more, and in how many seconds to draw the consequence. `follows`: the rank ended
    for the sake of another, which whoever knows of that one need not hear. `status`: what the others end with.
    `shown_on`: the machine on whose screen the cause stands already."""
    fate = {"follows": False, "status": 1, "shown_on": None}
    return {"kind": "gone", "rank": rank, "cause": cause, "patience": patience, **fate}


def _listen() -> socket.socket:
    """On any free port of all interfaces."""
    try:
        listener = socket.create_server(("", 0), family=socket.AF_INET6, dualstack_ipv6=True, backlog=1024)
    except (OSError, ValueError):  # a machine without IPv6
        listener = socket.create_server(("", 0), backlog=1024)
    listener.setblocking(False)
    return listener


def _clock(offset: float = 0.0) -> str:
    return time.strftime("%H:%M:%S", time.localtime(time.time() + offset))
