"""One call of the graph, and the effect of the optimizer on weights, moments and averages."""

from __future__ import annotations

import math

import numpy as np
import pytest
import tensorflow as tf

from hyperprior import config
from hyperprior.data.stream import Counts
from hyperprior.model.hyperprior import ScaleHyperprior
from hyperprior.training import steps
from hyperprior.training.distribute import World
from hyperprior.training.optimizer import Optimizer


def test_a_call_runs_all_its_steps_in_the_graph() -> None:
    settings = config.validate(
        {"model": {"num_filters": 8, "latent_channels": 12, "hyper_channels": 8}, "data": {"patch_size": 64}}, "test"
    )
    world = World(settings.distribute, 2)
    model = ScaleHyperprior(settings.model)
    optimizer = Optimizer(model.named_variables(), settings.train, 10)
    train_steps = steps.make_train_steps(world, model, optimizer, tf.Variable(0.0), settings)
    inputs = tf.zeros((3, 2, 64, 64, 3), tf.uint8), tf.zeros((3, len(Counts._fields)))
    graph = train_steps.get_concrete_function(*inputs, tf.constant(0, tf.int64), tf.constant(0)).graph.as_graph_def()
    top_ops = [node.op for node in graph.node]
    all_ops = {node.op for function in graph.library.function for node in function.node_def} | set(top_ops)
    assert top_ops.count("While") == 1 and "ResourceApplyAdam" in all_ops and "ResourceApplyAdam" not in top_ops
    assert not [op for op in all_ops if "PyFunc" in op or op in ("Print", "PrintV2", "Assert", "HostConst")]


NO = tf.constant(False)


def make(total: int = 100, **options: object) -> tuple[tf.Variable, Optimizer]:
    tree = {"train": {"steps": total, "learning_rate": 0.1, **options}}
    variable = tf.Variable([1.0, -2.0, 3.0])
    return variable, Optimizer({"w": variable}, config.validate(tree, "test").train, total)


def test_adam_matches_keras_adam() -> None:
    variable, optimizer = make()
    keras_variable = tf.Variable([1.0, -2.0, 3.0])
    keras = tf.keras.optimizers.Adam(0.1, epsilon=1e-8)
    for step in range(20):
        gradient = tf.constant(np.random.RandomState(step).normal(size=3), tf.float32)
        optimizer.apply([gradient], tf.constant(True), NO, tf.constant(step))
        keras.apply_gradients([(gradient, keras_variable)])
    # 1 − 0.999 has a relative error of 6e-5 in float32, and the two sides compute powers differently.
    np.testing.assert_allclose(variable, keras_variable, rtol=1e-4)


def test_a_non_finite_gradient_changes_nothing() -> None:
    variable, optimizer = make(ema=0.9)
    optimizer.apply([tf.ones(3)], tf.constant(True), NO, tf.constant(0))
    before = {name: v.numpy() for name, v in optimizer.named_variables().items()}
    weights = variable.numpy()
    optimizer.apply([tf.constant([1.0, math.nan, 1.0])], tf.constant(False), NO, tf.constant(1))
    assert np.array_equal(weights, variable)
    assert all(np.array_equal(before[name], v) for name, v in optimizer.named_variables().items())


def test_learning_rates_follow_their_schedules() -> None:
    def rates(**options: object) -> list[float]:
        optimizer = make(**options)[1]
        return [float(optimizer.learning_rate(tf.constant(s))) for s in (0, 9, 50, 99, 100)]

    assert rates() == pytest.approx([0.1] * 5)
    assert rates(warmup_steps=10)[:3] == pytest.approx([0.01, 0.1, 0.1])
    cosine = rates(schedule="cosine", final_learning_rate=0.01)
    assert (cosine[0], cosine[2], cosine[4]) == pytest.approx((0.1, 0.055, 0.01))
    assert rates(schedule="steps", decay_steps=[50, 99], decay_factor=0.5)[1:] == pytest.approx(
        [0.1, 0.05, 0.025, 0.025]
    )


def test_the_average_follows_the_weights_and_applies_only_in_its_context() -> None:
    variable, optimizer = make(ema=0.5)
    expected = variable.numpy()
    for step in range(12):
        optimizer.apply([tf.ones(3)], tf.constant(True), NO, tf.constant(step))
        decay = min(0.5, (step + 1) / (step + 10))
        expected = variable.numpy() + decay * (expected - variable.numpy())
    own = variable.numpy()
    with optimizer.averaged_weights():
        np.testing.assert_allclose(variable, expected, rtol=1e-6)
        assert not np.array_equal(variable, own)
    assert np.array_equal(variable, own)


def test_the_loss_scale_halves_on_overflow_and_grows_back() -> None:
    variable, optimizer = make(precision="mixed_float16")
    start = float(optimizer.loss_scale)
    optimizer.apply([tf.ones(3)], tf.constant(False), NO, tf.constant(0))
    assert float(optimizer.loss_scale) == start / 2 and int(optimizer.updates) == 0
    optimizer.good_steps.assign(1999)
    optimizer.apply([tf.ones(3)], tf.constant(True), NO, tf.constant(0))
    assert float(optimizer.loss_scale) == start
