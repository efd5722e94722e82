"""The effect of the optimizer on weights, moments and averages."""

from __future__ import annotations

import math

import numpy as np
import pytest
import tensorflow as tf

from hyperprior import config
from hyperprior.errors import ConfigError
from hyperprior.training.optimizer import Optimizer

NO = tf.constant(False)
KINDS = ("model", "optimizer/adam_m", "optimizer/adam_v", "optimizer/average")


def make(total: int = 100, **options: object) -> Optimizer:
    tree = {"train": {"steps": total, "learning_rate": 0.1, **options}}
    variables = {"v": tf.Variable([1.0, -2.0]), "w": tf.Variable([[3.0]])}
    return Optimizer(variables, config.validate(tree, "test").train, total)


def test_adam_matches_keras_adam() -> None:
    optimizer = make()
    keras_variable = tf.Variable([1.0, -2.0, 3.0])
    keras = tf.keras.optimizers.Adam(0.1, epsilon=1e-8)
    for step in range(20):
        gradient = tf.constant(np.random.RandomState(step).normal(size=3), tf.float32)
        optimizer.apply(gradient, tf.constant(True), NO, tf.constant(step))
        keras.apply_gradients([(gradient, keras_variable)])
    # 1 − 0.999 has a relative error of 6e-5 in float32, and the two sides compute powers differently.
    np.testing.assert_allclose(optimizer.weights, keras_variable, rtol=1e-4)


def test_a_non_finite_gradient_changes_nothing() -> None:
    optimizer = make(ema=0.9)
    optimizer.apply(tf.ones(3), tf.constant(True), NO, tf.constant(0))
    before = optimizer.arrays()
    optimizer.apply(tf.constant([1.0, math.nan, 1.0]), tf.constant(False), NO, tf.constant(1))
    assert all(np.array_equal(before[name], array) for name, array in optimizer.arrays().items())


def test_learning_rates_follow_their_schedules() -> None:
    def rates(**options: object) -> list[float]:
        optimizer = make(**options)
        return [float(optimizer.learning_rate(tf.constant(s))) for s in (0, 9, 50, 99, 100)]

    assert rates() == pytest.approx([0.1] * 5)
    assert rates(warmup_steps=10)[:3] == pytest.approx([0.01, 0.1, 0.1])
    cosine = rates(schedule="cosine", final_learning_rate=0.01)
    assert (cosine[0], cosine[2], cosine[4]) == pytest.approx((0.1, 0.055, 0.01))
    assert rates(schedule="steps", decay_steps=[50, 99], decay_factor=0.5)[1:] == pytest.approx(
        [0.1, 0.05, 0.025, 0.025]
    )


def test_the_average_follows_the_weights_and_is_published() -> None:
    optimizer = make(ema=0.5)
    expected = optimizer.weights.numpy()
    for step in range(12):
        optimizer.apply(tf.ones(3), tf.constant(True), NO, tf.constant(step))
        decay = min(0.5, (step + 1) / (step + 10))
        expected = optimizer.weights.numpy() + decay * (expected - optimizer.weights.numpy())
    own = optimizer.weights.numpy()
    optimizer.publish()
    np.testing.assert_allclose(optimizer.model_variables["v"], expected[:2], rtol=1e-6)
    np.testing.assert_allclose(optimizer.model_variables["w"], [[expected[2]]], rtol=1e-6)
    assert np.array_equal(optimizer.weights, own) and not np.array_equal(own, expected)


def test_the_state_has_an_array_for_each_name_and_comes_back() -> None:
    optimizer, other = make(ema=0.5), make(ema=0.5)
    optimizer.apply(tf.constant([1.0, 2.0, 3.0]), tf.constant(True), NO, tf.constant(0))
    arrays = optimizer.arrays()
    shapes = {name: array.shape for name, array in arrays.items()}
    slots = {f"{kind}/{name}": shape for kind in KINDS for name, shape in (("v", (2,)), ("w", (1, 1)))}
    scalars = {f"optimizer/{name}": () for name in ("updates", "loss_scale", "good_steps")}
    assert shapes == {**slots, **scalars}
    other.assign(arrays, "test")
    assert all(np.array_equal(array, other.arrays()[name]) for name, array in arrays.items())
    assert np.array_equal(other.model_variables["w"], arrays["optimizer/average/w"])
    for wrong in ({**arrays, "model/v": np.zeros(3, np.float32)}, {**arrays, "model/x": np.zeros(1)}):
        with pytest.raises(ConfigError, match="^test:? .*`model/[vx]`"):
            make(ema=0.5).assign(wrong, "test")


def test_the_loss_scale_halves_on_overflow_and_grows_back() -> None:
    optimizer = make(precision="mixed_float16")
    start = float(optimizer.loss_scale)
    optimizer.apply(tf.ones(3), tf.constant(False), NO, tf.constant(0))
    assert float(optimizer.loss_scale) == start / 2 and int(optimizer.updates) == 0
    optimizer.good_steps.assign(1999)
    optimizer.apply(tf.ones(3), tf.constant(True), NO, tf.constant(0))
    assert float(optimizer.loss_scale) == start
