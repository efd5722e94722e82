"""TensorFlow: which versions work, how it starts fast on a CPU, and the places where its public interface ends."""

from __future__ import annotations

import contextlib
import ctypes
import importlib.util
import json
import os
import re
import sys
from collections.abc import Iterator
from typing import Any

from hyperprior.errors import ConfigError

OLDEST = (2, 14, 1)
ONEDNN = "TF_ENABLE_ONEDNN_OPTS"
# With these settings glibc keeps freed memory. It reads them only when a process starts.
ALLOCATOR = {"MALLOC_MMAP_THRESHOLD_": str(2**34), "MALLOC_TRIM_THRESHOLD_": str(2**34), "MALLOC_TOP_PAD_": str(2**28)}


# Whether this process was forked from one that had imported TensorFlow, and has not called `start_tensorflow` itself.
is_forked = False


def note_fork() -> None:
    global is_forked
    is_forked = "tensorflow" in sys.modules


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=note_fork)


def count_cores() -> int:
    """The cores that this process may use, as TensorFlow counts them."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1  # macOS has none


def is_installed() -> bool:
    return importlib.util.find_spec("tensorflow") is not None


def start_tensorflow(precision: str = "float32") -> None:
    """Imports TensorFlow. Raises ConfigError if there is none, or one that does not work.

    For float32 it uses oneDNN's kernels, unless it is imported already or the environment has the setting. Without
    AVX-512 they exist for float32 only. By default TensorFlow uses them only on a CPU with AVX512-VNNI or AMX. On a CPU
    with only AVX2 they halve the time of the codec's transforms. A training step takes 0.77 of the time with N=64, the
    same time with N=128.
    """
    global is_forked
    is_forked = False
    # TensorFlow's errors reach Python as exceptions. Its other messages at the start are noise.
    wanted = {"TF_CPP_MIN_LOG_LEVEL": "3", **({ONEDNN: "1"} if precision == "float32" else {})}
    added = set() if "tensorflow" in sys.modules else wanted.keys() - os.environ.keys()
    os.environ.update({name: wanted[name] for name in added})
    try:
        import tensorflow as tf  # it reads the settings only on import

        version = tf.__version__
        if ONEDNN in added:
            with contextlib.suppress(Exception):  # of a TensorFlow that does not work
                is_onednn_on()  # its library reads the setting at the first call
    except Exception as error:  # a version for another NumPy or Python fails in many ways
        if not is_installed():
            raise ConfigError(f"this needs TensorFlow, which is not installed; {describe_versions()}") from error
        reason = " ".join(str(error).split())[:200]
        raise ConfigError(f"TensorFlow cannot be imported ({reason}); {describe_versions()}") from error
    finally:
        for name in added:  # child processes must not inherit them
            del os.environ[name]
    numbers = re.match(r"(\d+)\.(\d+)\.(\d+)", version)
    if not numbers or tuple(map(int, numbers.groups())) < OLDEST:
        raise ConfigError(f"TensorFlow is {version}; {describe_versions()}")


def describe_versions() -> str:
    oldest = ".".join(map(str, OLDEST))
    return f"{oldest} and newer versions work: `pip install 'tensorflow>={oldest}'`"


def restart_with_allocator() -> None:
    """Restarts this process, unless that is done, with an allocator that keeps freed tensors.

    Call it before anything is read: a pipe could not be read again. On a CPU a training step takes 0.8 of the time with
    the allocator's settings, because memory that was freed causes no new page faults. Memory use does not change: the
    largest step determines it.
    """
    if sys.platform == "linux" and not ALLOCATOR.keys() & os.environ.keys():
        # Python 3.9 has no sys.orig_argv.
        command = getattr(sys, "orig_argv", ["python", "-m", "hyperprior", *sys.argv[1:]])
        os.execve(sys.executable, [sys.executable, *command[1:]], {**os.environ, **ALLOCATOR})


# TensorFlow's private modules: imported only here ----------------------------------------------------------


def is_onednn_on() -> bool:
    """Whether kernels of oneDNN are used: by setting, or by TensorFlow's choice for this CPU."""
    from tensorflow.python.util import _pywrap_util_port

    return bool(_pywrap_util_port.IsMklEnabled())


def run_in_this_thread() -> contextlib.AbstractContextManager[None]:
    """Within this context a graph runs in the calling thread, one operation after another, without a thread pool."""
    from tensorflow.python.eager import context

    return context.function_executor_type("SINGLE_THREADED_EXECUTOR")


def exchange(value: Any, worker: int, workers: int) -> list[Any]:
    """The `value` of every worker, in order; it is JSON data. Unlike a sum, this works with unequal devices.

    All workers call it once, when their strategy is made.
    """
    from tensorflow.python.eager import context

    store = context.context()
    store.set_config_key_value(f"value/{worker}", json.dumps(value))
    values = [json.loads(store.get_config_key_value(f"value/{i}")) for i in range(workers)]
    store.set_config_key_value(f"done/{worker}", "yes")
    if worker == 0:  # it keeps the store, so it must not end before the others have read
        for i in range(workers):
            store.get_config_key_value(f"done/{i}")
    return values


@contextlib.contextmanager
def use_cpu_devices(count: int) -> Iterator[None]:
    """Makes MultiWorkerMirroredStrategy use `count` logical CPU devices of each worker. Its default is one."""
    from tensorflow.python.distribute import collective_all_reduce_strategy

    extended = collective_all_reduce_strategy.CollectiveAllReduceExtended
    original = extended._initialize_local_devices

    def devices(self: Any, resolver: Any, worker_device: str) -> tuple[tuple[str, ...], str]:
        return tuple(f"{worker_device}/device:CPU:{i}" for i in range(count)), "CPU"

    if count > 1:
        extended._initialize_local_devices = devices
    try:
        yield
    finally:
        extended._initialize_local_devices = original


@contextlib.contextmanager
def join_without_lock() -> Iterator[None]:
    """Lets other Python threads run while MultiWorkerMirroredStrategy waits for its workers, up to an hour.

    TensorFlow's own wrapper of this call holds Python's lock: no thread could end the wait, nor hear a signal.
    """
    from tensorflow.python import _pywrap_tfe, pywrap_tfe
    from tensorflow.python.framework import errors_impl

    original = pywrap_tfe.TFE_EnableCollectiveOps
    library = ctypes.CDLL(_pywrap_tfe.__file__)  # it finds TensorFlow's C functions in the libraries behind it
    to_pointer = ctypes.pythonapi.PyCapsule_GetPointer
    to_pointer.restype, to_pointer.argtypes = ctypes.c_void_p, [ctypes.py_object, ctypes.c_char_p]
    library.TF_NewStatus.restype, library.TF_Message.restype = ctypes.c_void_p, ctypes.c_char_p

    def enable_collective_ops(context: Any, server: bytes) -> None:
        status = ctypes.c_void_p(library.TF_NewStatus())
        pointer = ctypes.c_void_p(to_pointer(context, None))
        library.TFE_EnableCollectiveOps(pointer, server, ctypes.c_size_t(len(server)), status)
        code, message = library.TF_GetCode(status), library.TF_Message(status).decode(errors="replace")
        library.TF_DeleteStatus(status)
        if code:
            raise errors_impl.exception_type_from_error_code(code)(None, None, message)

    pywrap_tfe.TFE_EnableCollectiveOps = enable_collective_ops
    try:
        yield
    finally:
        pywrap_tfe.TFE_EnableCollectiveOps = original
