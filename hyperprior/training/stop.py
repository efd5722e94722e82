"""Stop requests: signals ask a run to stop, and every step reads the request."""

from __future__ import annotations

import signal
import socket
import threading
from types import FrameType
from typing import Optional

import tensorflow as tf

from hyperprior.errors import HyperpriorError, Stopped
from hyperprior.terminal import exit_soon


class StopRequest:
    """SIGTERM and Ctrl-C ask the run to stop after the current step. A second Ctrl-C stops it at once.

    Before the loop begins there is nothing to save, so the first signal stops the run at once. Python runs a signal
    handler only between two calls into TensorFlow. So a thread receives the signal too and sets `flag`, which every
    step reads.
    """

    def __init__(self) -> None:
        self.requested = self.in_loop = self.interrupted = False
        self.flag: Optional[tf.Variable] = None
        self.error: Optional[HyperpriorError] = None  # the error of this worker, if an error is the reason
        self.old_handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}

    def install(self) -> None:
        # MultiWorkerMirroredStrategy replaces the SIGTERM handler: install again after it is made.
        for number in self.old_handlers:
            signal.signal(number, self._handle)

    def __enter__(self) -> StopRequest:
        self.install()
        reader, self.writer = socket.socketpair()
        self.writer.setblocking(False)
        signal.set_wakeup_fd(self.writer.fileno(), warn_on_full_buffer=False)
        threading.Thread(target=self._listen, args=(reader,), name="signals", daemon=True).start()
        return self

    def __exit__(self, *error: object) -> None:
        signal.set_wakeup_fd(-1)
        self.writer.close()
        for number, handler in self.old_handlers.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)

    def request(self, error: Optional[HyperpriorError] = None) -> None:
        self.error = self.error or error
        if self.flag is not None:  # first: whoever sees `requested` relies on the steps to stop
            self.flag.assign(1.0)
        self.requested = True

    def _listen(self, reader: socket.socket) -> None:
        with reader:
            while reader.recv(1):
                if self.in_loop:
                    self.request()
                else:
                    exit_soon(Stopped.exit_code)

    def _handle(self, number: int, frame: Optional[FrameType]) -> None:
        if not self.in_loop:
            raise Stopped("stopped before training began; start the same command again")
        if self.interrupted and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.interrupted = True
        self.request()
