"""What this machine is to a training run: devices and why not, memory, disk, sources, and what will bind.

Each finding is a line; what needs attention begins with "!" and says what to do.
"""

from __future__ import annotations

import collections
import contextlib
import ctypes
import itertools
import os
import platform
import shutil
import time
from pathlib import Path
from typing import Any, NamedTuple, Optional

import tensorflow as tf

from hyperprior import bench, stream
from hyperprior.config import Config
from hyperprior.errors import HyperpriorError
from hyperprior.lanes import Cursor
from hyperprior.model import ScaleHyperprior
from hyperprior.transforms import cpu_flags

CUDA_LIBRARIES = ("libcudart.so.11.0", "libcublas.so.11", "libcudnn.so.8")  # what TensorFlow 2.14.1 was built with
READ_SECONDS = 3.0
# Peak memory on a CPU over the activations of a step, and what TensorFlow takes before: N=128, eight 256 x 256 patches
# take 1.8 GiB.
PER_ACTIVATION, BASE = 4.0, 0.5 * 2**30
FREE_DISK = 2 * 2**30


class Finding(NamedTuple):
    name: str
    text: str
    remedy: Optional[str] = None

    def line(self) -> str:
        return f"{'!' if self.remedy else ' '} {self.name:<12} {self.text}" + (
            f"; {self.remedy}" if self.remedy else ""
        )


def examine(settings: Optional[Config], run: Path) -> list[Finding]:
    """Looks at the machine, and with a config at its sources, memory and speed for some seconds."""
    found = [software(), *gpus(), cpu(), *precision(settings), memory(settings), disk(run)]
    if settings and settings.data.train:
        found += sources(settings)
    return found


def software() -> Finding:
    build = tf.sysconfig.get_build_info()
    cuda = f"CUDA {build.get('cuda_version')}" if tf.test.is_built_with_cuda() else "no CUDA"
    return Finding("software", f"Python {platform.python_version()}, TensorFlow {tf.__version__} built with {cuda}")


def gpus() -> list[Finding]:
    """The GPUs that TensorFlow sees; where it sees none, the first reason that can be found."""
    devices = tf.config.list_physical_devices("GPU")
    if devices:
        names = [tf.config.experimental.get_device_details(device).get("device_name", "?") for device in devices]
        reduce = "NCCL comes with TensorFlow; NCCL_DEBUG=INFO shows what it chooses"
        return [Finding("GPU", f"{len(devices)}: {', '.join(names)}"), Finding("NCCL", reduce)]
    driver = Path("/proc/driver/nvidia/version")
    if os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1"):
        return [Finding("GPU", "none, as CUDA_VISIBLE_DEVICES hides them")]
    if not driver.exists() and not list(Path("/dev").glob("nvidia[0-9]*")):
        return [Finding("GPU", "none in this machine, or no driver: training uses the CPU")]
    if not driver.exists():
        return [Finding("GPU", "there is a device but no driver answers", "install NVIDIA's driver, 450.80 or later")]
    missing = [name for name in CUDA_LIBRARIES if not loads(name)]
    version = driver.read_text().splitlines()[0]
    if missing:
        return [Finding("GPU", f"driver found ({version}), but not {', '.join(missing)}", "pip install '.[cuda]'")]
    return [Finding("GPU", f"driver and libraries are found ({version})", "TF_CPP_MIN_LOG_LEVEL=0 shows why not used")]


def loads(library: str) -> bool:
    try:
        ctypes.CDLL(library)
    except OSError:
        return False
    return True


def cpu() -> Finding:
    known = [name for name in ("avx2", "avx512f", "avx512_bf16", "amx_bf16") if name in cpu_flags()]
    setting = os.environ.get("TF_ENABLE_ONEDNN_OPTS")
    onednn = f"TF_ENABLE_ONEDNN_OPTS={setting}" if setting else "oneDNN on for float32"
    return Finding("CPU", f"{len(os.sched_getaffinity(0))} cores, {', '.join(known) or 'no AVX2'}, {onednn}")


def precision(settings: Optional[Config]) -> list[Finding]:
    """Whether training on this CPU gains from bfloat16."""
    if settings is None or tf.config.list_physical_devices("GPU"):
        return []
    able, chosen = bool({"avx512_bf16", "amx_bf16"} & cpu_flags()), settings.train.precision
    if able and chosen == "float32":
        text = "this CPU multiplies bfloat16: steps take 0.6 to 0.7 of the time with train.precision=mixed_bfloat16"
        return [Finding("precision", text)]
    if chosen == "mixed_float16" or (not able and chosen != "float32"):
        return [Finding("precision", f"{chosen} is slower than float32 on this CPU", "train.precision=float32")]
    return []


def memory(settings: Optional[Config]) -> Finding:
    available = free_memory()
    text = f"{available / 2**30:.1f} GiB free"
    if settings is None or tf.config.list_physical_devices("GPU"):
        return Finding("memory", text)
    need = step_memory(settings)
    text += f", a step of this config takes about {need / 2**30:.1f} GiB"
    return Finding("memory", text, "lower train.batch_size or data.patch_size" if need > available else None)


def free_memory() -> int:
    rows = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
    free = int(rows["MemAvailable"].split()[0]) * 1024
    with contextlib.suppress(OSError, ValueError):  # a container's limit
        limit = int(Path("/sys/fs/cgroup/memory.max").read_text())
        free = min(free, limit - int(Path("/sys/fs/cgroup/memory.current").read_text()))
    return free


def step_memory(settings: Config) -> float:
    model = ScaleHyperprior(settings.model)
    layers = bench.layers(model, settings.data.patch_size)
    elements = sum(height * width * channels for height, width, channels in (layer.shape for layer in layers))
    weights = sum(int(v.shape.num_elements()) for v in model.named_variables().values())
    return BASE + PER_ACTIVATION * 4.0 * elements * settings.train.batch_size + 16.0 * weights


def disk(run: Path) -> Finding:
    place = next(folder for folder in [run, *run.absolute().parents] if folder.exists())
    free = shutil.disk_usage(place).free
    text = f"{free / 2**30:.1f} GiB free at {place}"
    if not os.access(place, os.W_OK):
        return Finding("disk", text, "it cannot be written; choose another --run")
    return Finding("disk", text, "a run of N=192 needs 1 GiB; choose another --run" if free < FREE_DISK else None)


def sources(settings: Config) -> list[Finding]:
    """Whether they can be read, how fast patches come out of them, and whether they or the step will bind."""
    try:
        source = stream.open_splits(settings.data, settings.train.batch_size, count=False).train
        side, batch = settings.data.patch_size, settings.train.batch_size
        batches = stream.batches(source, settings.data, 0, range(batch), batch, [Cursor()] * batch)
        with contextlib.closing(batches):
            next(batches)
            began, count, skipped = time.perf_counter(), 0, collections.Counter[str]()
            for found in itertools.takewhile(lambda _: time.perf_counter() - began < READ_SECONDS, batches):
                count += len(found.images)
                skipped.update(skip.kind for skip in found.skipped)
            rate = count / (time.perf_counter() - began)
    except HyperpriorError as error:
        return [Finding("sources", str(error).rstrip("."), "`hyperprior inspect` tells what they hold")]
    text = f"{len(source.shards)} shards can be read: {rate:.0f} patches of {side} a second"
    if skipped["small"]:
        text += f", {skipped['small'] / (count + sum(skipped.values())):.0%} of the images are smaller than that"
    bad = skipped["bad"] + skipped["lost"]
    share = bad / max(count + sum(skipped.values()), 1)
    remedy = f"{share:.1%} of what was read is unusable: `hyperprior inspect` names it" if bad else None
    if share > settings.data.max_bad_fraction:
        remedy = f"{remedy}; training stops beyond data.max_bad_fraction={settings.data.max_bad_fraction}"
    read = Finding("sources", text, remedy)
    if tf.config.list_physical_devices("GPU"):
        return [read, Finding("bottleneck", "`hyperprior bench CONFIG step input` measures step and input on the GPU")]
    model = ScaleHyperprior(settings.model)
    flop = sum(layer.flop * layer.passes for layer in bench.layers(model, side))
    matrix = tf.random.normal((1024, 1024))
    product = bench.timed(tf.function(lambda: tf.linalg.matmul(matrix, matrix)), 20).median
    most = 2 * 1024**3 / product / flop
    binds = "the model's arithmetic" if rate > most else "the input"
    text = f"{binds}: at most {most:.0f} patches a second by the CPU's arithmetic, {rate:.0f} by the input"
    more = None if rate > most else "more cores, or `hyperprior pack --max-side` for smaller images"
    return [read, Finding("bottleneck", text, more)]


def to_dict(found: list[Finding]) -> list[dict[str, Any]]:
    return [finding._asdict() for finding in found]
