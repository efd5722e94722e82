"""Stop requests: signals ask a run to stop, and every step reads the request."""

from __future__ import annotations

import signal
import socket
import threading
from types import FrameType
from typing import Any, Optional

import tensorflow as tf

from hyperprior.errors import HyperpriorError, Stopped
from hyperprior.terminal import exit_soon

SIGNALS = (signal.SIGTERM, signal.SIGINT)


class StopRequest:
    """SIGTERM and Ctrl-C ask the run to stop after the current step. A second Ctrl-C stops it at once.

    Before the loop begins there is nothing to save. If the run owns the process, as in the command, the first signal
    then ends the process. Otherwise signals keep their earlier meaning until the loop begins. A run in another
    thread hears no signals: Python gives them to the main thread.

    Python runs a signal handler only between two calls into TensorFlow. So a thread receives the signal too and sets
    `flag`, which every step reads.
    """

    def __init__(self, owns_process: bool = False) -> None:
        self.owns_process = owns_process
        self.requested = self.in_loop = self.interrupted = False
        self.flag: Optional[tf.Variable] = None
        self.error: Optional[HyperpriorError] = None  # the error of this worker, if an error is the reason
        self.old_handlers: dict[int, Any] = {}

    def install(self) -> None:
        """Handles signals as this state needs it. MultiWorkerMirroredStrategy replaces the handler of SIGTERM: call
        this again after it is made."""
        for number, handler in self.old_handlers.items():
            signal.signal(number, self._handle if self.owns_process or self.in_loop else handler)

    def begin_loop(self) -> None:
        self.in_loop = True
        self.install()

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():
            handlers = {number: signal.getsignal(number) for number in SIGNALS}
            self.old_handlers = {n: signal.SIG_DFL if handler is None else handler for n, handler in handlers.items()}
            self.install()
            reader, self.writer = socket.socketpair()
            self.writer.setblocking(False)
            self.old_wakeup = signal.set_wakeup_fd(self.writer.fileno(), warn_on_full_buffer=False)
            threading.Thread(target=self._listen, args=(reader,), name="signals", daemon=True).start()
        return self

    def __exit__(self, *error: object) -> None:
        if self.old_handlers:
            signal.set_wakeup_fd(self.old_wakeup)
            self.writer.close()
        for number, handler in self.old_handlers.items():
            signal.signal(number, handler)

    def request(self, error: Optional[HyperpriorError] = None) -> None:
        self.error = self.error or error
        if self.flag is not None:  # first: whoever sees `requested` relies on the steps to stop
            self.flag.assign(1.0)
        self.requested = True

    def _listen(self, reader: socket.socket) -> None:
        with reader:
            while number := reader.recv(1):
                if number[0] not in SIGNALS:
                    continue  # the program around this run handles other signals
                if self.in_loop:
                    self.request()
                elif self.owns_process:
                    exit_soon(Stopped.exit_code)

    def _handle(self, number: int, frame: Optional[FrameType]) -> None:
        if not self.in_loop:
            raise Stopped("stopped before training began; start the same command again")
        if self.interrupted and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.interrupted = True
        self.request()
