"""Signs of life between the processes of a run: when one of them is gone, all of them end, and say why.

A collective waits for hours for a process whose machine or network link is gone. So a thread of every rank keeps one
TCP connection with rank 0 and sends a beat over it every few seconds, both ways, whatever its main thread waits for.
Silence, or a connection that closes without a goodbye, is passed on by rank 0 to all ranks; each of them prints what
happened and ends its process. A rank that fails tells its exception first, so that the others name the cause.

    Heartbeat(...) -> connections -> thread: beat, listen, judge -> close(): goodbye
                                                                 -> fail(error): "rank 2 failed: ..."

A thread can beat while the main thread waits or computes outside of Python's lock, as in collectives, kernels and
reads of files. An extension that held the lock for longer than `max_silence` would be taken for dead.

torch's TCPStore does not do it: nobody learns that a client's connection closed, and where the server's machine hangs
or the link is cut its calls block beyond their timeout.
"""

import os
import secrets
import selectors
import signal
import socket
import sys
import textwrap
import threading
import time
from contextlib import AbstractContextManager, suppress
from multiprocessing.connection import Connection
from types import TracebackType
from typing import NamedTuple

import torch.distributed

from hfclip.errors import UsageError, redact


BEATS = 8  # in the time of `max_silence`, at least
LONGEST_PAUSE = 5.0  # seconds from beat to beat
GATHERING = 1.0  # seconds in which other ranks that are gone are found, to be named together
GRACE = 5.0  # seconds in which a rank that failed prints its traceback, and others may end by themselves
SHOWN = 4  # ranks, at most, that a message names
LONGEST_CAUSE = 600  # characters
BEAT, GOODBYE = "beat", "goodbye"


class Gone(NamedTuple):
    """A message: that a rank is no more, and why."""

    rank: int
    cause: str
    patience: float = GATHERING  # seconds until the others draw the consequence
    status: int = 1  # with which they end
    follows: bool = False  # the rank ended for the sake of another, so who knows of that one need not hear of it
    shown_on: str | None = None  # the machine on whose screen the cause stands already


class Heartbeat(AbstractContextManager):
    """Ends this process within `max_silence` seconds of the end of any other, status 1. Does nothing for one process.

    After a `UsageError` of another, it ends as the other does, with status 2 and without advice to resume. Collective
    to create, after the process group. A context manager; what comes after it is not watched.

    Args:
        rank, world: of the process group.
        max_silence: seconds, 5 or more. A process that is stopped for less (but for the pause between two beats, an
            eighth of it or 5 seconds) is waited for.

    Raises:
        UsageError: if ranks cannot reach rank 0.
    """

    def __init__(self, rank: int, world: int, max_silence: float):
        self.rank, self.max_silence = rank, max_silence
        self._parted = threading.Event()  # nothing is watched any more
        self._causes: dict[int, Gone] = {}  # what was told of ranks that are gone, in the order of notice
        self._end_at = float("inf")
        if world == 1:
            self._parted.set()
            return
        self._connect(world)
        # When each rank that is watched was last heard.
        self._heard = dict.fromkeys(self._connections.values(), time.monotonic())
        os.register_at_fork(after_in_child=self._leave_to_parent)
        self._thread = threading.Thread(target=self._watch, name="heartbeat", daemon=True)
        self._thread.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if error is None:
            self.close()
        else:
            self.fail(error)

    def close(self) -> None:
        """Says goodbye to the others, and watches them no more."""
        self._part(GOODBYE)

    def fail(self, error: BaseException) -> None:
        """Tells the others why this rank is about to end.

        Ends the process itself, with the cause for a message, where another rank was gone before: a collective that
        breaks for want of a partner would only bury the cause under its traceback.
        """
        if self._parted.is_set():
            return
        if isinstance(error, Exception) and not isinstance(error, UsageError):
            self._thread.join(GATHERING)
            if self._causes:  # the error may follow from them
                self._end_at = 0.0
                self._thread.join()  # which ends the process
            # Whatever is done on the way out, such as leaving the process group, may wait for others in its turn.
            signal.alarm(int(self.max_silence) + 1)
        if isinstance(error, UsageError):
            cause, status = f"{self._names[self.rank]} found an error: {error}", 2
        else:
            cause, status = f"{self._names[self.rank]} failed: {type(error).__name__}: {error}", 1
        # The first rank of a machine shows its error there itself.
        host = socket.gethostname() if status == 2 and os.environ.get("LOCAL_RANK", "0") == "0" else None
        cause = textwrap.shorten(redact(cause), LONGEST_CAUSE).rstrip(" .:")
        self._part(Gone(self.rank, cause, GRACE, status, shown_on=host))

    def _part(self, last_words: "str | Gone") -> None:
        if not self._parted.is_set():
            self._parted.set()
            self._thread.join()
            self._send_all(last_words)

    def _leave_to_parent(self) -> None:
        """In a forked child, a worker that loads data: its copies would keep connections open when we are dead."""
        if not self._parted.is_set():
            self._parted.set()
            for connection in self._connections:
                connection.close()

    def _connect(self, world: int) -> None:
        """Connects each rank with rank 0. Collective."""
        name, host = f"rank {self.rank} ({socket.gethostname()}, process {os.getpid()})", socket.gethostname()
        listener = _listen() if self.rank == 0 else None
        # The token tells the ranks of this run from whatever else connects.
        place = (host, listener.getsockname()[1], secrets.token_hex(16)) if listener else None
        greetings = [None] * world
        torch.distributed.all_gather_object(greetings, (name, place))
        self._names, (host, port, token) = [name for name, _ in greetings], greetings[0][1]
        self._connections: dict[Connection, int] = {}  # and the rank at the other end
        try:
            if listener:
                with listener:
                    listener.settimeout(self.max_silence / 2)
                    while len(self._connections) < world - 1:
                        self._meet(listener.accept()[0], token)
            else:
                address = os.environ.get("MASTER_ADDR", host), port
                connection = _connection(socket.create_connection(address, timeout=self.max_silence))
                connection.send_bytes(f"{token} {self.rank}".encode())
                self._connections[connection] = 0
        except OSError as error:
            others = "all other ranks" if listener else "rank 0"
            raise UsageError(
                f"{name} cannot connect with {others} over {host}:{port}: {error}. Processes watch each other over TCP: "
                "allow connections between the machines of the run on any port."
            ) from error

    def _meet(self, accepted: socket.socket, token: str) -> None:
        """Takes in a connection from another rank; closes one from anybody else."""
        connection = _connection(accepted)
        try:
            said, rank = connection.recv_bytes(100).decode().split() if connection.poll(GATHERING) else ("", 0)
        except (OSError, EOFError, ValueError):
            said = ""
        if said == token:
            self._connections[connection] = int(rank)
        else:
            connection.close()

    # ---- The thread

    def _watch(self) -> None:
        pause, next_beat = min(LONGEST_PAUSE, self.max_silence / BEATS), 0.0
        selector = selectors.DefaultSelector()
        for connection in self._connections:
            selector.register(connection, selectors.EVENT_READ)
        while not self._parted.is_set():
            # Taken before listening: when this process was stopped for a while, others have been heard since.
            now = time.monotonic()
            if now >= next_beat:
                self._send_all(BEAT)
                next_beat = now + pause
            for key, _ in selector.select(timeout=0.1):
                if not self._receive(key.fileobj):
                    selector.unregister(key.fileobj)
            self._judge(now)

    def _receive(self, connection: Connection) -> bool:
        """Takes in a message. False if the connection is closed."""
        rank = self._connections[connection]
        try:
            message = connection.recv()
        except (EOFError, OSError):
            del self._connections[connection]
            if rank in self._heard:
                how = f"its connection closed without a goodbye at {_clock()}: killed, or its machine went down"
                self._note(Gone(rank, f"{self._names[rank]} is gone: {how}"))
            return False
        if rank in self._heard:
            self._heard[rank] = time.monotonic()
        if message == GOODBYE:
            self._heard.pop(rank, None)
        elif message != BEAT:
            self._note(message)
        return True

    def _judge(self, now: float) -> None:
        """Finds who was silent for too long, and ends this process once all that is known of others has come."""
        limit = self.max_silence - GATHERING
        if any(now - heard > limit for heard in self._heard.values()):
            # One machine has many ranks, which fell silent within a pause of each other.
            for rank in [rank for rank, heard in self._heard.items() if now - heard > limit / 2]:
                since = _clock(self._heard[rank] - now)
                how = f"no sign of life since {since}: its machine or the network is down, or it was stopped"
                self._note(Gone(rank, f"{self._names[rank]} is gone: {how}", patience=0.0))
        if now >= self._end_at:
            self._end()

    def _note(self, gone: Gone) -> None:
        """Keeps that a rank is gone and why; rank 0 tells the others."""
        self._heard.pop(gone.rank, None)
        if gone.rank in self._causes or gone.follows and self._causes:
            return
        self._causes[gone.rank] = gone
        self._end_at = min(self._end_at, time.monotonic() + gone.patience)
        if self.rank == 0:
            self._send_all(gone._replace(patience=max(gone.patience, GATHERING)))

    def _end(self) -> None:
        gone, here = list(self._causes.values()), socket.gethostname()
        causes = [f"rank {one.rank} found the error above" if one.shown_on == here else one.cause for one in gone]
        told = "; ".join(causes[:SHOWN]) + (f"; and {len(causes) - SHOWN} more" if len(causes) > SHOWN else "")
        status = min(one.status for one in gone)  # 2 if nothing but mistakes of the user's ended the run
        self._send_all(Gone(self.rank, f"{self._names[self.rank]} ended, because {told}", status=status, follows=True))
        advice = "" if status == 2 else " Start the run again with --resume auto."
        threading.Timer(GATHERING, os._exit, [status]).start()  # should one of the streams be stuck
        message = f"\nRank {self.rank} ends, because {told}.{advice}\n"
        os.write(2, message.encode())  # not through sys.stderr, which the main thread may hold
        sys.stdout.flush()
        os._exit(status)

    def _send_all(self, message: str | Gone) -> None:
        for connection in self._connections:
            with suppress(OSError):  # a connection that is dead is found when it is read
                connection.send(message)


def _listen() -> socket.socket:
    """Opens any free port of all interfaces."""
    try:
        return socket.create_server(("", 0), family=socket.AF_INET6, dualstack_ipv6=True, backlog=1024)
    except (OSError, ValueError):  # a machine without IPv6
        return socket.create_server(("", 0), backlog=1024)


def _connection(opened: socket.socket) -> Connection:
    """Turns a socket into a connection that sends and receives objects."""
    opened.settimeout(None)
    opened.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return Connection(opened.detach())


def _clock(offset: float = 0.0) -> str:
    return time.strftime("%H:%M:%S", time.localtime(time.time() + offset))
