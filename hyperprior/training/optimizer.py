"""Adam, its learning rate, and the moving average of the weights, under the names of the model's variables.

Keras's Adam does not fit. It cannot leave out a step with a non-finite gradient without making the host wait for the
devices. Its slots have no stable names, so a checkpoint cannot be checked against them.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator

import tensorflow as tf

from hyperprior import config

BETA_1, BETA_2, EPSILON = 0.9, 0.999, 1e-8
# Adam's moments move towards g and g² by (1 − beta) of the way: with beta 1 they stay. This g is below any moment, so a
# moment of −0 stays too, and g² is still a number.
UNCHANGING = -1e18
LOSS_SCALE_START, LOSS_SCALE_GROWTH_STEPS = 2.0**15, 2000


class Optimizer(tf.Module):
    """Adam (Kingma and Ba, ICLR 2015) over named variables. Build it inside the strategy's scope.

    With `loss_scaling` (float16) the caller multiplies the loss by `loss_scale`. A step with a non-finite gradient
    halves the scale; 2,000 good steps double it.
    """

    def __init__(self, variables: dict[str, tf.Variable], settings: config.Train, total_steps: int):
        super().__init__()
        self.variables_by_name, self.settings, self.total_steps = variables, settings, total_steps

        def make_slots(initial: bool = False) -> dict[str, tf.Variable]:
            return {
                name: tf.Variable(v if initial else tf.zeros_like(v), trainable=False) for name, v in variables.items()
            }

        self.mean, self.variance = make_slots(), make_slots()
        self.average = make_slots(initial=True) if settings.ema else {}
        self.updates = tf.Variable(0, trainable=False, dtype=tf.int64)
        self.loss_scaling = settings.precision == "mixed_float16"
        self.loss_scale = tf.Variable(LOSS_SCALE_START if self.loss_scaling else 1.0, trainable=False)
        self.good_steps = tf.Variable(0, trainable=False, dtype=tf.int64)

    def named_variables(self) -> dict[str, tf.Variable]:
        """All state, under stable names such as `adam_m/g_a/0/kernel`."""
        named = {"updates": self.updates, "loss_scale": self.loss_scale, "good_steps": self.good_steps}
        for kind, slots in (("adam_m", self.mean), ("adam_v", self.variance), ("average", self.average)):
            named.update({f"{kind}/{name}": slot for name, slot in slots.items()})
        return named

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
        if s.warmup_steps:
            rate *= tf.minimum((step + 1.0) / s.warmup_steps, 1.0)
        return rate

    def apply(self, gradients: list[tf.Tensor], finite: tf.Tensor, dropped: tf.Tensor, step: tf.Tensor) -> None:
        """Applies one update inside a replica, if `finite`. The gradients are already summed over replicas.

        A `dropped` step changes nothing at all.

        The host never waits for these conditions: they select values, and every operation runs. Adam then gets
        `UNCHANGING`. Its fused kernel updates each replica's own copy; equal gradients keep the copies equal.
        """
        is_applied = finite & ~dropped
        count = tf.cast(self.updates + 1, tf.float32)
        rate = tf.where(is_applied, self.learning_rate(step), 0.0)
        beta_1, beta_2 = tf.where(is_applied, BETA_1, 1.0), tf.where(is_applied, BETA_2, 1.0)
        power_1, power_2, epsilon = tf.pow(BETA_1, count), tf.pow(BETA_2, count), tf.constant(EPSILON)
        no_gradient = tf.constant(UNCHANGING)
        if self.average:
            # The decay starts small: a fixed one would keep the initial weights for too long.
            decay = tf.minimum(self.settings.ema, count / (count + 9.0))
        for (name, variable), gradient in zip(self.variables_by_name.items(), gradients):
            adam = tf.raw_ops.ResourceApplyAdam(
                var=variable.handle,
                m=self.mean[name].handle,
                v=self.variance[name].handle,
                beta1_power=power_1,
                beta2_power=power_2,
                lr=rate,
                beta1=beta_1,
                beta2=beta_2,
                epsilon=epsilon,
                grad=tf.where(is_applied, gradient, no_gradient),
            )
            if self.average:
                with tf.control_dependencies([adam]):
                    average = self.average[name].handle
                    old = tf.raw_ops.ReadVariableOp(resource=average, dtype=tf.float32)
                    new = tf.raw_ops.ReadVariableOp(resource=variable.handle, dtype=tf.float32)
                    assign_locally(self.average[name], tf.where(is_applied, new + decay * (old - new), old))
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

    @contextlib.contextmanager
    def averaged_weights(self) -> Iterator[None]:
        """Inside this context the model has its averaged weights, if any. Then its own come back, bit for bit."""
        own = {name: self.variables_by_name[name].numpy() for name in self.average}
        for name, average in self.average.items():
            self.variables_by_name[name].assign(average.numpy())
        try:
            yield
        finally:
            for name, value in own.items():
                self.variables_by_name[name].assign(value)


def assign_locally(variable: tf.Variable, value: tf.Tensor) -> None:
    """Assigns in this replica only. The variable's own `assign` would ask how to combine the replicas' values."""
    tf.raw_ops.AssignVariableOp(resource=variable.handle, value=value)
