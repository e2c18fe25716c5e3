"""When a run is to end early: a signal (Ctrl-C, SIGTERM, or one of those that job queues send), or the deadline of
`run.stop_after`."""

import ctypes
import os
import signal
import time
from contextlib import suppress


PR_SET_PDEATHSIG = 1  # prctl.h
# Requests to stop: of the terminal, of whoever ends processes, and of queues before they take a machine away.
SIGNALS = tuple(
    getattr(signal, name)
    for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1", "SIGUSR2", "SIGXCPU")
    if hasattr(signal, name)
)


class Stopping:
    """Becomes `requested` by a signal or when the minutes are over; the step that is under way ends first.

    Ctrl-C again, after a moment, does not wait. Launchers pass on a signal that the terminal has sent us too: a second
    one that comes at once is no second wish to stop.
    """

    def __init__(self, minutes: float | None):
        self.deadline = None if minutes is None else time.monotonic() + 60 * minutes
        self.signalled_at: float | None = None
        self.owner = os.getpid()

    def catch_signals(self) -> None:
        """From now on signals are wishes to stop; and so is the end of the launcher, which takes SIGTERM for itself."""
        for number in SIGNALS:
            if number != getattr(signal, "SIGHUP", None) or signal.getsignal(number) is not signal.SIG_IGN:  # nohup
                signal.signal(number, self._handle)
        if "ACCELERATE_MIXED_PRECISION" in os.environ or "LOCAL_WORLD_SIZE" in os.environ:  # launched
            with suppress(AttributeError, OSError, TypeError):  # Linux has it
                ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)

    @property
    def requested(self) -> bool:
        return self.signalled_at is not None or (self.deadline is not None and time.monotonic() >= self.deadline)

    def _handle(self, number, frame) -> None:
        if os.getpid() != self.owner:  # forked workers inherit the handler
            return
        now = time.monotonic()
        if self.signalled_at is not None and now - self.signalled_at > 3 and number == signal.SIGINT:
            signal.signal(number, signal.SIG_IGN)  # launchers send it once more
            raise KeyboardInterrupt
        self.signalled_at = self.signalled_at or now
