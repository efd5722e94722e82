"""How a run is asked to stop, and how every step hears of it."""

from __future__ import annotations

import signal
import socket
import threading
from types import FrameType
from typing import Optional

import tensorflow as tf

from hyperprior.errors import HyperpriorError, Stopped


class StopRequest:
    """SIGTERM and Ctrl-C ask the run to stop after the current step; a second Ctrl-C stops at once.

    Before the loop begins there is nothing to save, and the first one stops at once. Python runs a handler only
    between two calls into TensorFlow, so a thread hears of the signal too and sets `flag`, which every step reads.
    """

    def __init__(self) -> None:
        self.requested = self.in_loop = self.interrupted = False
        self.flag: Optional[tf.Variable] = None
        self.error: Optional[HyperpriorError] = None  # of this worker, if that is why
        self.before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}

    def install(self) -> None:
        # MultiWorkerMirroredStrategy replaces the SIGTERM handler: install again after it is made.
        for number in self.before:
            signal.signal(number, self._handle)

    def __enter__(self) -> StopRequest:
        self.install()
        ear, self.mouth = socket.socketpair()
        self.mouth.setblocking(False)
        signal.set_wakeup_fd(self.mouth.fileno(), warn_on_full_buffer=False)
        threading.Thread(target=self._listen, args=(ear,), name="signals", daemon=True).start()
        return self

    def __exit__(self, *error: object) -> None:
        signal.set_wakeup_fd(-1)
        self.mouth.close()
        for number, handler in self.before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)

    def ask(self, error: Optional[HyperpriorError] = None) -> None:
        self.requested, self.error = True, self.error or error
        if self.flag is not None:
            self.flag.assign(1.0)

    def _listen(self, ear: socket.socket) -> None:
        with ear:
            while ear.recv(1):
                if self.in_loop:
                    self.ask()

    def _handle(self, number: int, frame: Optional[FrameType]) -> None:
        if not self.in_loop:
            raise Stopped("stopped before training began; start the same command again")
        if self.interrupted and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.interrupted = True
        self.ask()
