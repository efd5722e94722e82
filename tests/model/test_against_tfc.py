"""The densities, bounds and GDN give the values and gradients of tensorflow-compression, where that is installed."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import tensorflow as tf

from hyperprior.codec import making
from hyperprior.model import bounds, densities, layers, priors
from hyperprior.model.architecture import Normalisation
from hyperprior.model.bounds import NonNegative

tfc = pytest.importorskip("tensorflow_compression", reason="tensorflow-compression is not installed")


@pytest.mark.parametrize("inverse", [False, True])
def test_gdn_equals_its_closed_form_and_tfcs(inverse: bool) -> None:
    x = tf.random.stateless_normal((2, 5, 7, 4), [1, 2])
    gdn = layers.GDN(Normalisation(4, inverse))
    gamma = np.abs(np.random.RandomState(0).normal(size=(4, 4))).astype(np.float32)
    beta = np.array([0.5, 1.0, 2.0, 3.0], np.float32)
    gdn.beta, gdn.gamma = NonNegative(beta, minimum=1e-6), NonNegative(gamma)
    norm = np.sqrt(beta + np.square(x) @ gamma)
    np.testing.assert_allclose(gdn(x), x * norm if inverse else x / norm, rtol=1e-5)
    theirs = tfc.GDN(
        inverse=inverse, alpha_parameter=2, epsilon_parameter=0.5, beta_parameter=gdn.beta, gamma_parameter=gdn.gamma
    )
    np.testing.assert_allclose(gdn(x), theirs(x), rtol=1e-5)


@pytest.mark.parametrize("density", ["gaussian", "logistic"])
def test_bits_of_y_and_their_gradient_equal_tfcs(density: str) -> None:
    values, scales = np.meshgrid([0.0, 0.3, -1.2, 4.4, -9.5, 30.0, -300.0], np.geomspace(0.11, 256, 30))
    y = tf.Variable(values.reshape(1, 7, 30, 1), dtype=tf.float32)
    scale = tf.Variable(scales.reshape(1, 7, 30, 1), dtype=tf.float32)
    with tf.GradientTape(persistent=True) as tape:
        ours = priors.BITS[density](y, scale)
        if density == "gaussian":
            distribution = tfc.NoisyNormal(loc=0.0, scale=scale)
        else:
            distribution = tfc.NoisyLogistic(loc=0.0, scale=scale * math.sqrt(3) / math.pi)
        each = distribution.log_prob(y) / -math.log(2)
    np.testing.assert_allclose(ours, np.minimum(each, priors.MAX_BITS), rtol=3e-5, atol=1e-8)
    np.testing.assert_allclose(np.sum(ours), np.minimum(each, priors.MAX_BITS).sum(), rtol=1e-5)
    for variable in (y, scale):
        mine, other = (tape.gradient(bits, variable).numpy() for bits in (ours, each))
        near = each.numpy() < 90  # beyond this, the mass underflows
        np.testing.assert_allclose(mine[near], other[near], rtol=2e-3, atol=2e-4)
        np.testing.assert_allclose(mine[~near], other[~near], rtol=1e-2)


def make_priors(seed: int) -> tuple[priors.FactorizedPrior, Any]:
    """Ours and theirs with the same trained-looking parameters."""
    ours, theirs = priors.FactorizedPrior(8), tfc.NoisyDeepFactorized(batch_shape=(8,), init_scale=1.0)
    rng = np.random.RandomState(seed)
    for variable in theirs.base.trainable_variables:
        name = variable.name.split("/")[-1].split(":")[0]
        assert ours.parameters[name].shape == variable.shape
        variable.assign(variable + rng.normal(size=variable.shape) * 0.3)
        ours.parameters[name].assign(variable)
    return ours, theirs


def test_the_prior_of_z_starts_with_their_parameters() -> None:
    tf.random.set_seed(3)
    ours = priors.FactorizedPrior(8)
    tf.random.set_seed(3)
    theirs = tfc.NoisyDeepFactorized(batch_shape=(8,), init_scale=1.0)
    for variable in theirs.base.trainable_variables:
        np.testing.assert_allclose(ours.parameters[variable.name.split("/")[-1].split(":")[0]], variable, rtol=1e-6)


@pytest.mark.parametrize("seed", range(3))
def test_the_prior_of_z_has_their_bits_and_gradients(seed: int) -> None:
    ours, theirs = make_priors(seed)
    z = tf.constant(np.random.RandomState(seed).normal(size=(2, 5, 6, 8)) * 4, tf.float32)
    with tf.GradientTape(persistent=True) as tape:
        tape.watch(z)
        mine = ours.bits(z)
        each = tfc.upper_bound(theirs.log_prob(z) / -math.log(2), priors.MAX_BITS, gradient="identity")
        other = tf.reduce_sum(each, axis=(1, 2, 3))
    np.testing.assert_allclose(mine, other, rtol=1e-6)
    np.testing.assert_allclose(tape.gradient(mine, z), tape.gradient(other, z), rtol=1e-4, atol=1e-5)
    for variable in theirs.base.trainable_variables:
        name = variable.name.split("/")[-1].split(":")[0]
        gradient = tape.gradient(other, variable).numpy()
        # The sums of a gradient are taken in another order.
        tolerance = 1e-5 * np.abs(gradient).max()
        np.testing.assert_allclose(tape.gradient(mine, ours.parameters[name]), gradient, rtol=1e-4, atol=tolerance)


def test_cumulative_densities_and_medians_are_theirs_in_float64() -> None:
    ours, theirs = make_priors(5)
    base = tfc.DeepFactorized(batch_shape=(8,), dtype=tf.float64)
    for variable, trained in zip(base.trainable_variables, theirs.base.trainable_variables):
        variable.assign(tf.cast(trained, tf.float64))
    x = np.random.RandomState(0).normal(size=(50, 8)) * 6
    logits = densities.cumulative_logits(ours.arrays(), x)
    np.testing.assert_allclose(1 / (1 + np.exp(-logits)), base.cdf(x), rtol=1e-12)
    medians = densities.find_medians(ours.arrays())
    np.testing.assert_allclose(base.cdf(medians[None])[0], 0.5, atol=1e-14)
    # They search by Adam, until the logit is within 1e-8 or a hundred steps have passed.
    np.testing.assert_allclose(medians - np.rint(medians), tfc.quantization_offset(base), atol=5e-3)


def test_bounds_pass_the_gradients_that_theirs_pass() -> None:
    x, d = np.array([-2.0, -1.0, 0.0, 1.0, 2.0] * 2, np.float32), np.repeat([1.0, -1.0], 5).astype(np.float32)
    for ours, theirs in ((bounds.lower_bound, tfc.lower_bound), (bounds.upper_bound, tfc.upper_bound)):
        results = []
        for function in (ours, theirs):
            variable = tf.Variable(x)
            with tf.GradientTape() as tape:
                y = function(variable, 0.5)
            results.append((y.numpy(), tape.gradient(y, variable, output_gradients=d).numpy()))
        assert np.array_equal(results[0], results[1])
    ours, theirs = NonNegative(tf.constant([0.0, 1e-7, 0.5]), 1e-6), tfc.GDNParameter([0.0, 1e-7, 0.5], minimum=1e-6)
    assert np.array_equal(ours.variable, theirs.variable) and np.array_equal(ours(), theirs())


def test_quantised_tables_are_theirs_but_for_ties() -> None:
    rng = np.random.RandomState(0)
    for _ in range(200):
        pmf = rng.random_sample(rng.randint(2, 300)) ** rng.uniform(1, 9)
        pmf = (pmf / pmf.sum()).astype(np.float32)
        assert np.array_equal(np.diff(tfc.pmf_to_quantized_cdf(pmf, precision=16)), making.quantise(pmf))
    bell = np.exp(-0.5 * (np.arange(-20, 21) / 4.0) ** 2).astype(np.float32)  # each value has an equal one
    bell /= bell.sum()
    assert np.abs(np.diff(tfc.pmf_to_quantized_cdf(bell, precision=16)) - making.quantise(bell)).max() <= 1
