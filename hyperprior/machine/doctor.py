"""Checks whether this machine is fit for a training run: devices, memory, disk, sources, and the bottleneck.

Each finding is one line. A line that begins with "!" needs attention and says what to do.
"""

from __future__ import annotations

import collections
import contextlib
import ctypes
import importlib.util
import itertools
import os
import platform
import shutil
import time
from pathlib import Path
from typing import NamedTuple, Optional

import numpy as np
import tensorflow as tf

from hyperprior import stack
from hyperprior.codec import native
from hyperprior.config import Config
from hyperprior.data import splits, stream
from hyperprior.data.lanes import Cursor
from hyperprior.errors import HyperpriorError
from hyperprior.machine.timing import time_call
from hyperprior.model.hyperprior import ScaleHyperprior
from hyperprior.model.kernels import cpu_flags
from hyperprior.model.work import work_of_layers

OLDEST_DRIVERS = {"11": "450.80", "12": "525.60"}  # for each major version of CUDA
READ_SECONDS = 3.0
GPU_STEPS = (0.005, 0.010, 0.020)  # seconds
GPU_PATCHES = 8  # of a GPU's step
# Peak memory of a step on a CPU: a multiple of the activations' memory, and TensorFlow's own memory. N=128 with eight
# 256 x 256 patches takes 1.8 GiB.
PER_ACTIVATION, BASE = 4.0, 0.5 * 2**30
FREE_DISK = 2 * 2**30


class Finding(NamedTuple):
    name: str
    text: str
    remedy: Optional[str] = None
    is_fatal: bool = False  # a run with this config would not start

    def line(self) -> str:
        mark, remedy = ("!", f"; {self.remedy}") if self.remedy else (" ", "")
        return f"{mark} {self.name:<12} {self.text}{remedy}"


def examine(settings: Optional[Config], run: Path) -> list[Finding]:
    """Checks the machine and, with a config, its sources, memory and speed, which takes some seconds."""
    findings = [
        check_software(),
        check_range_coder(),
        *check_gpus(),
        check_cpu(),
        *check_precision(settings),
        check_memory(settings),
        check_disk(run),
    ]
    if settings and settings.data.train:
        findings += check_sources(settings)
    return findings


def check_software() -> Finding:
    build = tf.sysconfig.get_build_info()
    cuda = f"CUDA {build.get('cuda_version')}" if tf.test.is_built_with_cuda() else "no CUDA"
    versions = f"Python {platform.python_version()}, NumPy {np.__version__}, TensorFlow {tf.__version__} with {cuda}"
    return Finding("software", versions)


def check_range_coder() -> Finding:
    """Which range coder is used and, for each package of C++ ones, why or why not."""
    operations = native.load_operations()
    return Finding("range coder", f"{'C++' if operations.module else 'Python, slower'}: {operations.report}")


def check_gpus() -> list[Finding]:
    """The GPUs that TensorFlow sees; if it sees none, the first reason found."""
    devices = tf.config.list_physical_devices("GPU")
    if devices:
        names = [tf.config.experimental.get_device_details(device).get("device_name", "?") for device in devices]
        nccl = "NCCL comes with TensorFlow; NCCL_DEBUG=INFO shows its choices"
        return [Finding("GPU", f"{len(devices)}: {', '.join(names)}"), Finding("NCCL", nccl)]
    driver = Path("/proc/driver/nvidia/version")
    if os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1"):
        return [Finding("GPU", "none, because CUDA_VISIBLE_DEVICES hides them")]
    if not driver.exists() and not list(Path("/dev").glob("nvidia[0-9]*")):
        return [Finding("GPU", "none in this machine, or no driver: training uses the CPU")]
    cuda, cudnn = (str(tf.sysconfig.get_build_info().get(name, "")) for name in ("cuda_version", "cudnn_version"))
    if not cuda:
        return [Finding("GPU", "there is one, but this TensorFlow was built without CUDA", "pip install '.[cuda]'")]
    cuda = cuda.split(".")[0]
    if not driver.exists():
        remedy = f"install NVIDIA's driver, {OLDEST_DRIVERS.get(cuda, 'a recent one')} or later"
        return [Finding("GPU", "there is a device, but no driver", remedy)]
    libraries = (f"libcudart.so.{'11.0' if cuda == '11' else cuda}", f"libcublas.so.{cuda}", f"libcudnn.so.{cudnn}")
    missing = [name for name in libraries if not can_load(name)]
    version = driver.read_text().splitlines()[0]
    if missing:
        return [Finding("GPU", f"driver found ({version}), but not {', '.join(missing)}", "pip install '.[cuda]'")]
    text = f"driver and libraries found ({version}), but TensorFlow uses no GPU"
    return [Finding("GPU", text, "TF_CPP_MIN_LOG_LEVEL=0 shows why")]


def can_load(library: str) -> bool:
    packages = importlib.util.find_spec("nvidia")  # NVIDIA's wheels; TensorFlow finds their libraries itself
    folders = packages.submodule_search_locations or [] if packages else []
    if any(path for folder in folders for path in Path(folder).glob(f"*/lib/{library}")):
        return True
    try:
        ctypes.CDLL(library)
    except OSError:
        return False
    return True


def check_cpu() -> Finding:
    known = [name for name in ("avx2", "avx512f", "avx512_bf16", "amx_bf16") if name in cpu_flags()]
    setting = os.environ.get("TF_ENABLE_ONEDNN_OPTS")
    onednn = f"TF_ENABLE_ONEDNN_OPTS={setting}" if setting else "oneDNN on for float32"
    return Finding("CPU", f"{stack.count_cores()} cores, {', '.join(known) or 'no AVX2'}, {onednn}")


def check_precision(settings: Optional[Config]) -> list[Finding]:
    """Says whether bfloat16 makes training on this CPU faster."""
    if settings is None or tf.config.list_physical_devices("GPU"):
        return []
    has_bfloat16, chosen = bool({"avx512_bf16", "amx_bf16"} & cpu_flags()), settings.train.precision
    if has_bfloat16 and chosen == "float32":
        text = "this CPU multiplies bfloat16: steps take 0.6 to 0.7 of the time with train.precision=mixed_bfloat16"
        return [Finding("precision", text)]
    if chosen == "mixed_float16" or (not has_bfloat16 and chosen != "float32"):
        return [Finding("precision", f"{chosen} is slower than float32 on this CPU", "train.precision=float32")]
    return []


def check_memory(settings: Optional[Config]) -> Finding:
    available = measure_free_memory()
    if available is None:
        return Finding("memory", "this system does not tell how much is free")
    text = f"{available / 2**30:.1f} GiB free"
    if settings is None or tf.config.list_physical_devices("GPU"):
        return Finding("memory", text)
    need = estimate_step_memory(settings)
    text += f", a step of this config takes about {need / 2**30:.1f} GiB"
    return Finding("memory", text, "lower train.batch_size or data.patch_size" if need > available else None)


def measure_free_memory() -> Optional[int]:
    """Bytes; None where there is no /proc."""
    if not Path("/proc/meminfo").exists():
        return None
    rows = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
    free = int(rows["MemAvailable"].split()[0]) * 1024
    with contextlib.suppress(OSError, ValueError):  # a container's limit
        limit = int(Path("/sys/fs/cgroup/memory.max").read_text())
        free = min(free, limit - int(Path("/sys/fs/cgroup/memory.current").read_text()))
    return free


def estimate_step_memory(settings: Config) -> float:
    model = ScaleHyperprior(settings.model)
    layers = work_of_layers(model, settings.data.patch_size)
    elements = sum(height * width * channels for height, width, channels in (layer.shape for layer in layers))
    weights = sum(int(v.shape.num_elements()) for v in model.named_variables().values())
    return BASE + PER_ACTIVATION * 4.0 * elements * settings.train.batch_size + 16.0 * weights


def check_disk(run: Path) -> Finding:
    place = next(folder for folder in [run, *run.absolute().parents] if folder.exists())
    free = shutil.disk_usage(place).free
    text = f"{free / 2**30:.1f} GiB free at {place}"
    if not os.access(place, os.W_OK):
        return Finding("disk", text, "this folder cannot be written; choose another --run", is_fatal=True)
    return Finding("disk", text, "a run of N=192 needs 1 GiB; choose another --run" if free < FREE_DISK else None)


def check_sources(settings: Config) -> list[Finding]:
    """Says whether the sources can be read, how fast they give patches, and whether they or the step are the limit."""
    try:
        split = splits.open_splits(settings.data, settings.train.batch_size, count=False).train
        side, batch = settings.data.patch_size, settings.train.batch_size
        batches = stream.batches(split, settings.data, 0, range(batch), batch, [Cursor()] * batch)
        with contextlib.closing(batches):
            next(batches)
            began, count, skipped = time.perf_counter(), 0, collections.Counter[str]()
            for one in itertools.takewhile(lambda _: time.perf_counter() - began < READ_SECONDS, batches):
                count += len(one.images)
                skipped.update(skip.kind for skip in one.skipped)
            rate = count / (time.perf_counter() - began)
    except HyperpriorError as error:
        return [Finding("sources", str(error).rstrip("."), "`hyperprior inspect` shows their content", is_fatal=True)]
    text = f"{len(split.shards)} shards can be read: {rate:.0f} patches of {side} a second"
    if skipped["small"]:
        text += f", {skipped['small'] / (count + sum(skipped.values())):.0%} of the images are smaller than a patch"
    bad = skipped["bad"] + skipped["lost"]
    share = bad / max(count + sum(skipped.values()), 1)
    remedy = f"{share:.1%} of the samples read are unusable: `hyperprior inspect` names them" if bad else None
    if share > settings.data.max_bad_fraction:
        remedy = f"{remedy}; training stops beyond data.max_bad_fraction={settings.data.max_bad_fraction}"
    read = Finding("sources", text, remedy)
    fed = ", ".join(f"{rate * step / GPU_PATCHES:.1f} at {1000 * step:.0f} ms" for step in GPU_STEPS)
    text = f"GPUs that one process on these cores can keep busy, by the time of {GPU_PATCHES} patches: {fed}"
    findings = [read, Finding("feeds", text)]
    if tf.config.list_physical_devices("GPU"):
        text = "`hyperprior bench CONFIG step input` measures step and input on the GPU"
        return [*findings, Finding("bottleneck", text)]
    model = ScaleHyperprior(settings.model)
    flop = sum(layer.flop * layer.passes for layer in work_of_layers(model, side))
    matrix = tf.random.normal((1024, 1024))
    product = time_call(tf.function(lambda: tf.linalg.matmul(matrix, matrix)), 20).median
    most = 2 * 1024**3 / product / flop
    limit = "the model's arithmetic" if rate > most else "the input"
    text = f"{limit}: the CPU's arithmetic allows at most {most:.0f} patches a second, the input {rate:.0f}"
    remedy = None if rate > most else "use more cores, or smaller images (`hyperprior pack --max-side`)"
    return [*findings, Finding("bottleneck", text, remedy)]
