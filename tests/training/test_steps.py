"""The graph of a training call: what would make a GPU wait, fail or compute on the CPU, read without a GPU."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import pytest
import tensorflow as tf
from tensorflow.python.framework import kernels
from workers import ROOT

from hyperprior import config
from hyperprior.data.stream import Counts
from hyperprior.terminal import Terminal
from hyperprior.training import steps
from hyperprior.training.calls import Outcome
from hyperprior.training.distribute import World
from hyperprior.training.optimizer import Optimizer
from hyperprior.training.progress import Progress
from hyperprior.training.resume import State

PLACED_WITH_OTHERS = {"Const", "NoOp", "Placeholder", "While", "PartitionedCall", "StatefulPartitionedCall"}
# They raise an error on a GPU after enable_op_determinism(): TensorFlow's release notes of 2.7 to 2.9, and its kernels.
NOT_DETERMINISTIC = {
    *("AdjustContrast", "AdjustContrastv2", "CropAndResizeGradBoxes", "CropAndResizeGradImage"),
    *("DebugNumericSummaryV2", "DepthwiseConv2dNativeBackpropFilter", "Dilation2DBackpropFilter"),
    *("Dilation2DBackpropInput", "FakeQuantWithMinMaxVarsGradient", "FakeQuantWithMinMaxVarsPerChannelGradient"),
    *("FusedBatchNormGradV3", "MaxPoolGradWithArgmax", "ResizeNearestNeighborGrad", "SparseTensorDenseMatMul"),
    *("Bincount", "RandomStandardNormal", "RandomUniform", "ScatterNd", "Timestamp", "UnsortedSegmentProd"),
}


class Call(NamedTuple):
    """A call of three steps of a tiny model."""

    run: Any  # the function
    inputs: tuple
    optimizer: Optimizer
    stop: tf.Variable


def make_call(device_kind: str, *words: str) -> Call:
    """Makes the call for this kind of device; it runs on a CPU all the same."""
    tiny = ["model.num_filters=8", "model.latent_channels=12", "model.hyper_channels=8", "data.patch_size=64"]
    settings = config.load_config(ROOT / "configs" / "imagenet_mse.yaml", [*tiny, "train.batch_size=2", *words])
    world = World(settings.distribute, 2)
    world.device_kind = device_kind
    model, optimizer = steps.build_model(world, settings, 10)
    stop = tf.Variable(0.0, trainable=False)
    run = steps.make_train_steps(world, model, optimizer, stop, settings)
    side = settings.data.patch_size
    inputs = tf.zeros((3, 2, side, side, 3), tf.uint8), tf.zeros((3, len(Counts._fields)))
    return Call(run, (*inputs, tf.constant(0, tf.int64), tf.constant(False), tf.constant(0.0)), optimizer, stop)


def every_node(graph: tf.compat.v1.GraphDef) -> Iterator[Any]:
    """The nodes of the graph and its functions. TensorFlow drops those that no output and no effect needs."""
    yield from graph.node
    for function in graph.library.function:
        needed = ancestors(function, [*function.ret.values(), *function.control_ret.values()])
        yield from (node for node in function.node_def if node.name in needed)


GPU_FORMS = [
    *(["train.precision=" + precision] for precision in ("float32", "mixed_float16", "mixed_bfloat16")),
    ["loss.metric=ms-ssim", "loss.lambda=100", "data.patch_size=192", "train.ema=0.99", "train.proxy=rounded"],
]


@pytest.fixture(scope="module", params=GPU_FORMS, ids=["float32", "float16", "bfloat16", "ms-ssim"])
def gpu_graph(request: pytest.FixtureRequest) -> tf.compat.v1.GraphDef:
    call = make_call("GPU", *request.param)
    return call.run.get_concrete_function(*call.inputs).graph.as_graph_def()


def test_on_a_gpu_nothing_that_a_device_computes_decides_what_runs(gpu_graph: tf.compat.v1.GraphDef) -> None:
    functions = {function.signature.name: function for function in gpu_graph.library.function}
    branches = [node for node in every_node(gpu_graph) if node.op.removeprefix("Stateless") in ("If", "Case", "While")]
    assert [node.op for node in branches] == ["While"]
    condition, body = (functions[branches[0].attr[key].func.name] for key in ("cond", "body"))
    steering = ancestors(condition, condition.ret.values()) & names_of_arguments(condition)
    while True:  # until no more loop variables are found that decide about the next step
        places = [names_of_arguments(condition, ordered=True).index(name) for name in steering]
        outputs = [body.ret[body.signature.output_arg[place].name] for place in places]
        needed = ancestors(body, outputs)
        arguments = {names_of_arguments(body, ordered=True).index(n) for n in needed & names_of_arguments(body)}
        if arguments <= set(places):
            break
        steering |= {names_of_arguments(condition, ordered=True)[place] for place in arguments}
    operations = {node.op for node in body.node_def if node.name in needed}
    assert operations <= {"AddV2", "Const", "Identity", "NoOp"}
    assert {node.op for node in condition.node_def} <= {"Less", "LogicalAnd", "Const", "Identity", "NoOp"}
    # The seeds of the noise, which a GPU takes from the host's memory, follow from the step and the lanes alone.
    (forward,) = [node for node in body.node_def if "forward_backward" in node.attr["f"].func.name]
    inside = functions[forward.attr["f"].func.name]
    seeds = [node.input[0] for node in inside.node_def if node.op == "StatelessRandomGetKeyCounter"]
    assert len(seeds) == 2 * 2
    taken = [
        names_of_arguments(inside, ordered=True).index(n) for n in ancestors(inside, seeds) & names_of_arguments(inside)
    ]
    origins = ancestors(body, [forward.input[place] for place in taken])
    assert {node.op for node in body.node_def if node.name in origins} <= {
        *("AddV2", "Cast", "Const", "Identity", "Mul", "Range")
    }


def names_of_arguments(function: Any, ordered: bool = False) -> Any:
    names = [argument.name for argument in function.signature.input_arg]
    return names if ordered else set(names)


def ancestors(function: Any, outputs: Any) -> set[str]:
    """The names of the nodes and arguments of a function whose values these outputs depend on."""
    nodes = {node.name: node for node in function.node_def}
    found, queue = set(), list(outputs)
    while queue:
        name = queue.pop().split(":")[0]
        if name not in found:
            found.add(name)
            queue += [value for value in (nodes[name].input if name in nodes else []) if not value.startswith("^")]
    return found


def test_a_call_is_one_graph_that_python_does_not_enter(gpu_graph: tf.compat.v1.GraphDef) -> None:
    operations = {node.op for node in every_node(gpu_graph)}
    assert "ResourceApplyAdam" in operations and "ResourceApplyAdam" not in {node.op for node in gpu_graph.node}
    assert not [op for op in operations if "PyFunc" in op or op in ("Print", "PrintV2", "Assert", "HostConst")]


def test_every_operation_of_a_step_has_a_gpu_kernel(gpu_graph: tf.compat.v1.GraphDef) -> None:
    if not any(kernel.device_type == "GPU" for kernel in kernels.get_registered_kernels_for_op("Conv2D").kernel):
        pytest.skip("this TensorFlow was built without GPU kernels")
    missing = set()
    for node in every_node(gpu_graph):
        if node.op in PLACED_WITH_OTHERS or "CPU" in node.device:
            continue
        fitting = [
            kernel
            for kernel in kernels.get_registered_kernels_for_op(node.op).kernel
            if kernel.device_type in ("GPU", "DEFAULT")
            and all(node.attr[c.name].type in c.allowed_values.list.type for c in kernel.constraint)
        ]
        if not fitting:
            missing.add((node.op, tf.dtypes.as_dtype(node.attr["T"].type).name if node.attr["T"].type else ""))
    assert not missing


def test_every_operation_of_a_step_is_deterministic_on_a_gpu(gpu_graph: tf.compat.v1.GraphDef) -> None:
    assert not {node.op for node in every_node(gpu_graph)} & NOT_DETERMINISTIC


def test_a_call_runs_with_deterministic_operations() -> None:
    """They are the default on a GPU. TensorFlow then refuses tf.timestamp, and random numbers without a seed."""
    program = (
        "import tensorflow as tf\ntf.config.experimental.enable_op_determinism()\n"
        "from test_steps import make_call\ncall = make_call('GPU')\n"
        "assert int(call.run(*call.inputs).done) == 3 and int(call.optimizer.updates) == 3"
    )
    folders = [str(ROOT / "tests" / "training"), str(ROOT / "tests"), str(ROOT)]
    command = [sys.executable, "-c", f"import sys\nsys.path[:0] = {folders}\n{program}"]
    subprocess.run(command, check=True, timeout=120)


def test_the_mean_norm_is_over_the_steps_that_have_one(tmp_path: Path) -> None:
    """In float16 a step at too high a loss scale has no gradient norm, but its loss counts."""
    call = make_call("CPU", "train.precision=mixed_float16")
    state = State([])
    world: Any = SimpleNamespace(is_chief=True, device_kind="CPU", batch_size=2)
    progress = Progress(world, config.load_config(None, []), tmp_path, state, Any, Terminal(quiet=True))  # type: ignore[arg-type]
    sums = []
    for loss_scale in (1.0, 2.0**100):
        call.optimizer.loss_scale.assign(loss_scale)
        result = call.run(*call.inputs)
        assert int(result.done) == 3
        sums.append(result.metrics.numpy())
    norm, norms = (steps.SUMMED.index(name) for name in ("gradient_norm", "norms"))
    assert [(each[norms], each[-1]) for each in sums] == [(3, 3), (0, 3)] and sums[0][norm] > 0
    for number, group in enumerate((sums, sums[1:]), 1):
        for each in group:
            progress.add_sums(Outcome(3, False, 0, each, Counts(), 0.0, time.perf_counter()))
        state.step = number
        progress.log_means(call.optimizer, SimpleNamespace(line=lambda *words, **label: None))  # type: ignore[arg-type]
    progress.close()
    first, second = map(json.loads, (tmp_path / "metrics.jsonl").read_text().splitlines())
    assert first["gradient_norm"] == pytest.approx(sums[0][norm] / 3) and "gradient_norm" not in second
    assert first["loss"] == pytest.approx((sums[0][0] + sums[1][0]) / 6) and np.isfinite(second["loss"])


@pytest.mark.parametrize("device_kind", ["CPU", "GPU"])
@pytest.mark.parametrize("precision", ["float32", "mixed_float16"])
@pytest.mark.parametrize("cause", ["a stop", "a failure"])
def test_a_step_that_is_not_done_leaves_every_bit(device_kind: str, precision: str, cause: str) -> None:
    run, inputs, optimizer, stop = make_call(device_kind, f"train.precision={precision}", "train.ema=0.9")
    assert int(run(*inputs).done) == 3
    if cause == "a stop":
        stop.assign(1.0)
    else:
        optimizer.weights.assign(tf.fill(optimizer.weights.shape, np.nan))
    optimizer.mean.assign(-tf.zeros_like(optimizer.mean))  # a moment of −0 must not become 0
    before = optimizer.arrays()
    result = run(*inputs)
    assert (int(result.done), bool(result.stopped), int(result.failed)) == (0, cause == "a stop", cause != "a stop")
    assert not result.metrics.numpy().any() and not result.counts.numpy().any()
    after = optimizer.arrays()
    assert [name for name, array in before.items() if array.tobytes() != after[name].tobytes()] == []
