"""The weights in training: Adam, its learning rate, and the moving average.

Keras's Adam does not fit. It cannot leave out a step with a non-finite gradient without making the host wait for the
devices. Its slots have no stable names, so a checkpoint cannot be checked against them.
"""

from __future__ import annotations

import math

import numpy as np
import tensorflow as tf

from hyperprior import config
from hyperprior.storage import Arrays, check_arrays

BETA_1, BETA_2, EPSILON = 0.9, 0.999, 1e-8
# Adam's moments move towards g and g² by (1 − beta) of the way: with beta 1 they add 0 · (g − m). For a g far below
# zero this is −0, which leaves even a moment of −0 as it is. g² must not overflow.
UNCHANGING = -1e18
LOSS_SCALE_START, LOSS_SCALE_GROWTH_STEPS = 2.0**15, 2000


class Optimizer(tf.Module):
    """Adam (Kingma and Ba, ICLR 2015) over all weights as one vector. Build it inside the strategy's scope.

    `weights` is what training changes; the model's own variables, by their names in `model_variables`, get a copy of it
    from `publish`. So one operation sums all gradients over replicas, one clips them, and one updates all weights.

    With `loss_scaling` (float16) the caller multiplies the loss by `loss_scale`. A step with a non-finite gradient
    halves the scale; 2,000 good steps double it.
    """

    def __init__(self, model_variables: dict[str, tf.Variable], settings: config.Train, total_steps: int):
        super().__init__()
        self.model_variables, self.settings, self.total_steps = model_variables, settings, total_steps
        self.shapes = {name: tuple(variable.shape) for name, variable in model_variables.items()}
        start = np.concatenate([variable.numpy().ravel() for variable in model_variables.values()])
        self.weights = tf.Variable(start, trainable=False)
        self.mean, self.variance = (tf.Variable(np.zeros_like(start), trainable=False) for _ in range(2))
        self.average = tf.Variable(start, trainable=False) if settings.ema else None
        self.updates = tf.Variable(0, trainable=False, dtype=tf.int64)
        self.decays = tf.Variable(0.0, trainable=False)  # times that schedule `plateau` applied its factor
        self.loss_scaling = settings.precision == "mixed_float16"
        self.loss_scale = tf.Variable(LOSS_SCALE_START if self.loss_scaling else 1.0, trainable=False)
        self.good_steps = tf.Variable(0, trainable=False, dtype=tf.int64)

    def split(self, vector: tf.Tensor) -> dict[str, tf.Tensor]:
        """The arrays of a vector of all weights, by name."""
        parts = tf.split(vector, [math.prod(shape) for shape in self.shapes.values()])
        return {
            name: part if len(shape) == 1 else tf.reshape(part, shape)
            for (name, shape), part in zip(self.shapes.items(), parts)
        }

    def join(self, arrays: list[tf.Tensor]) -> tf.Tensor:
        """The vector of arrays in the order of `split`."""
        flat = tf.constant([-1])
        return tf.concat([array if len(array.shape) == 1 else tf.reshape(array, flat) for array in arrays], axis=0)

    def learning_rate(self, step: tf.Tensor) -> tf.Tensor:
        """The learning rate of the update from `step` to step + 1: float32 scalar."""
        s = self.settings
        step = tf.cast(step, tf.float32)
        rate = tf.constant(s.learning_rate, tf.float32)
        if s.schedule == "cosine":
            share = tf.clip_by_value((step - s.warmup_steps) / max(self.total_steps - s.warmup_steps, 1), 0.0, 1.0)
            low = s.final_learning_rate
            rate = low + (s.learning_rate - low) * 0.5 * (1.0 + tf.cos(math.pi * share))
        for boundary in s.decay_steps if s.schedule == "steps" else ():
            rate = tf.where(step >= boundary, rate * s.decay_factor, rate)
        if s.schedule == "plateau":
            rate *= tf.pow(s.decay_factor, self.decays)
        if s.warmup_steps:
            rate *= tf.minimum((step + 1.0) / s.warmup_steps, 1.0)
        return rate

    def apply(self, gradient: tf.Tensor, finite: tf.Tensor, dropped: tf.Tensor, step: tf.Tensor) -> None:
        """Applies one update inside a replica, if `finite`. The gradient is that of `weights`, summed over replicas.

        A `dropped` step changes nothing at all.

        The host never waits for these conditions: they select values, and every operation runs. Adam then gets
        `UNCHANGING`. Its fused kernel updates each replica's own copy; equal gradients keep the copies equal.
        """
        is_applied = finite & ~dropped
        count = tf.cast(self.updates + 1, tf.float32)
        adam = tf.raw_ops.ResourceApplyAdam(
            var=self.weights.handle,
            m=self.mean.handle,
            v=self.variance.handle,
            beta1_power=tf.pow(BETA_1, count),
            beta2_power=tf.pow(BETA_2, count),
            lr=tf.where(is_applied, self.learning_rate(step), 0.0),
            beta1=tf.where(is_applied, BETA_1, 1.0),
            beta2=tf.where(is_applied, BETA_2, 1.0),
            epsilon=EPSILON,
            grad=tf.where(is_applied, gradient, UNCHANGING),
        )
        if self.average is not None:
            with tf.control_dependencies([adam]):
                old = tf.raw_ops.ReadVariableOp(resource=self.average.handle, dtype=tf.float32)
                new = tf.raw_ops.ReadVariableOp(resource=self.weights.handle, dtype=tf.float32)
            # The decay starts small: a fixed one would keep the initial weights for too long.
            decay = tf.minimum(self.settings.ema, count / (count + 9.0))
            assign_locally(self.average, tf.where(is_applied, new + decay * (old - new), old))
        tf.raw_ops.AssignAddVariableOp(resource=self.updates.handle, value=tf.cast(is_applied, tf.int64))
        if self.loss_scaling:
            self._adapt_loss_scale(is_applied, ~finite & ~dropped)

    def _adapt_loss_scale(self, is_applied: tf.Tensor, overflows: tf.Tensor) -> None:
        scale, good_steps = tf.identity(self.loss_scale), tf.identity(self.good_steps)
        grown = (good_steps + 1) % LOSS_SCALE_GROWTH_STEPS
        doubled = tf.where(grown == 0, tf.minimum(scale * 2.0, 2.0**24), scale)
        no_steps = tf.constant(0, tf.int64)
        assign_locally(self.good_steps, tf.where(is_applied, grown, tf.where(overflows, no_steps, good_steps)))
        assign_locally(self.loss_scale, tf.where(is_applied, doubled, tf.where(overflows, scale / 2.0, scale)))

    def publish(self) -> None:
        """Copies the averaged weights, or the weights if there is no average, to the model's variables."""
        vector = self.weights if self.average is None else self.average
        for name, array in self._cut(vector).items():
            self.model_variables[name].assign(array)

    def arrays(self) -> Arrays:
        """All state, under stable names such as `model/g_a/0/kernel` and `optimizer/adam_m/g_a/0/kernel`."""
        scalars = {f"optimizer/{name}": variable.numpy() for name, variable in self._scalars().items()}
        vectors = {prefix: self._cut(vector) for prefix, vector in self._vectors().items()}
        model = {f"model/{name}": array for name, array in vectors.pop("model").items()}
        slots = {f"{prefix}/{name}": array for prefix, arrays in vectors.items() for name, array in arrays.items()}
        return {**model, **scalars, **slots}

    def assign(self, arrays: Arrays, origin: str) -> None:
        """Sets all state, and the model's variables. Raises ConfigError, before it assigns anything, unless the arrays
        have the names and shapes of `arrays()`."""
        check_arrays({name: array.shape for name, array in self.arrays().items()}, arrays, origin)
        for name, variable in self._scalars().items():
            variable.assign(arrays[f"optimizer/{name}"])
        for prefix, vector in self._vectors().items():
            vector.assign(self.join([arrays[f"{prefix}/{name}"] for name in self.shapes]))
        self.publish()

    def _scalars(self) -> dict[str, tf.Variable]:
        return {"updates": self.updates, "loss_scale": self.loss_scale, "good_steps": self.good_steps}

    def _vectors(self) -> dict[str, tf.Variable]:
        vectors = {"model": self.weights, "optimizer/adam_m": self.mean, "optimizer/adam_v": self.variance}
        return vectors if self.average is None else {**vectors, "optimizer/average": self.average}

    def _cut(self, vector: tf.Variable) -> Arrays:
        return {name: part.numpy() for name, part in self.split(vector.numpy()).items()}


def assign_locally(variable: tf.Variable, value: tf.Tensor) -> None:
    """Assigns in this replica only. The variable's own `assign` would ask how to combine the replicas' values."""
    tf.raw_ops.AssignVariableOp(resource=variable.handle, value=value)
