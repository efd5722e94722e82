"""Rate, distortion, layers and noise, compared with closed forms and independent implementations."""

from __future__ import annotations

import math

import numpy as np
import pytest
import tensorflow as tf

from hyperprior import config, load, storage
from hyperprior.codec.tables import apply_dead_zone
from hyperprior.model import initial, kernels, layers, metrics, priors, quality
from hyperprior.model.architecture import Convolution, Normalisation
from hyperprior.model.bounds import NonNegative
from hyperprior.model.densities import BITS_PER_SQUARE
from hyperprior.model.hyperprior import ScaleHyperprior, pad

SETTINGS = config.Model(num_filters=8, latent_channels=12, hyper_channels=6)


def images(seed: int, *shape: int) -> tf.Tensor:
    rough = tf.random.stateless_uniform((shape[0], 8, 8, 3), [seed, 1])
    return tf.clip_by_value(tf.image.resize(rough, shape[1:3], "bicubic"), 0.0, 1.0)


# measure --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(161, 161), (256, 256), (177, 230)])
@pytest.mark.parametrize("noise", [0.0, 0.02, 0.2])
def test_ms_ssim_equals_tensorflows(size: tuple[int, int], noise: float) -> None:
    x = images(1, 2, *size)
    y = tf.clip_by_value(x + noise * tf.random.stateless_normal(x.shape, [2, 3]), 0.0, 1.0)
    # The filters are summed in another order; variances lose three digits to cancellation.
    np.testing.assert_allclose(metrics.ms_ssim(x, y), tf.image.ssim_multiscale(x, y, 1.0), atol=2e-5)


def test_ms_ssim_with_negative_terms_equals_tensorflows_and_has_a_finite_gradient() -> None:
    x = images(1, 2, 176, 176)
    y = tf.Variable(1.0 - x)
    theirs = tf.image.ssim_multiscale(x, y, 1.0)
    with tf.GradientTape() as tape:
        ours = metrics.ms_ssim(x, y)
        loss = 1.0 - tf.reduce_mean(ours)
    gradient = tape.gradient(loss, y)
    np.testing.assert_allclose(ours, theirs, atol=2e-5)
    assert np.isfinite(gradient).all() and np.abs(gradient).max() > 0


def test_psnr_and_lagrangian_equal_their_closed_forms() -> None:
    x = tf.zeros((2, 64, 64, 3))
    y = tf.constant([0.1, 0.5])[:, None, None, None] + x
    np.testing.assert_allclose(metrics.mse(x, y), [0.01, 0.25], rtol=1e-6)
    np.testing.assert_allclose(metrics.psnr_db(metrics.mse(x, y)), [20.0, -10 * math.log10(0.25)], rtol=1e-6)
    np.testing.assert_allclose(metrics.psnr_db(tf.constant(0.0)), 100.0, rtol=1e-6)
    bits = tf.constant([4096.0, 8192.0])
    values = metrics.measure(x, y, bits, 2.0 * bits, config.Loss())
    np.testing.assert_allclose((values["bpp_y"], values["bpp_z"]), [[1.0, 2.0], [2.0, 4.0]])
    bpp = values["bpp_y"]
    np.testing.assert_allclose(
        quality.lagrangian(bpp, tf.constant([0.01, 0.01]), 0.013, "mse"), 65025 * 0.00013 + bpp, rtol=1e-6
    )
    np.testing.assert_allclose(
        quality.lagrangian(bpp, tf.constant([0.01, 0.01]), 8.73, "ms-ssim"), 0.0873 + bpp, rtol=1e-6
    )


# transforms -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("inverse", [False, True])
@pytest.mark.parametrize("known", [True, False])
@pytest.mark.parametrize(("shape", "count"), [((2, 64, 64, 32), 4), ((1, 41, 61, 32), 1), ((1, 3, 5, 32), 1)])
def test_gdn_in_pieces_has_the_values_and_gradients_of_the_plain_form(
    inverse: bool, known: bool, shape: tuple[int, ...], count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kernels, "PIECE_BYTES", 2**18)
    gdn = layers.GDN(Normalisation(32, inverse))
    rng = np.random.RandomState(0)
    gdn.beta = NonNegative(rng.uniform(0.5, 2, 32).astype(np.float32), minimum=1e-6)
    gdn.gamma = NonNegative(rng.uniform(0, 0.1, (32, 32)).astype(np.float32))
    x, dy = (tf.constant(rng.normal(size=shape), tf.float32) for _ in range(2))
    pieces = []

    def plain(x: tf.Tensor) -> tf.Tensor:
        norm = gdn.beta() + tf.einsum("bhwc,cd->bhwd", tf.square(x), gdn.gamma())
        return x * tf.sqrt(norm) if inverse else x / tf.sqrt(norm)

    def ours(x: tf.Tensor) -> tf.Tensor:
        pieces.append(kernels.number_of_pieces(x.shape))
        return gdn(x)

    def with_gradient(form: layers.Layer) -> list[tf.Tensor]:
        @tf.function(input_signature=[tf.TensorSpec(shape if known else (None, None, None, 32))] * 2)
        def both(x: tf.Tensor, dy: tf.Tensor) -> list[tf.Tensor]:
            with tf.GradientTape() as tape:
                tape.watch(x)
                y = form(x)
            return [y, *tape.gradient(y, [x, gdn.beta.variable, gdn.gamma.variable], output_gradients=dy)]

        return list(both(x, dy))

    for mine, theirs in zip(with_gradient(ours), with_gradient(plain)):
        np.testing.assert_allclose(mine, theirs, rtol=2e-5, atol=2e-5 * np.abs(theirs).max())
    assert pieces == [count if known else 1]  # pieces are equal: 2501 pixels have no divisor near 2048


@pytest.mark.parametrize("transpose", [False, True])
@pytest.mark.parametrize(("size", "sides"), [(5, (32, 16)), (5, (2, 4)), (3, (8, 6))])
def test_convolutions_by_products_have_the_gradients_of_the_plain_form(
    transpose: bool, size: int, sides: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    layer = layers.Conv(Convolution(4, 6, size, 2, transpose=transpose))
    rng = np.random.RandomState(0)
    x = tf.Variable(rng.normal(size=(3, *sides, 4)), dtype=tf.float32)
    outputs = [side * 2 if transpose else side // 2 for side in sides]
    dy, results = tf.constant(rng.normal(size=(3, *outputs, 6)), tf.float32), []
    for pays in (True, False):
        monkeypatch.setattr(kernels, "products_are_faster", lambda *_, pays=pays: pays)
        with tf.GradientTape() as tape:
            y = layer(x)
        results.append([y, *tape.gradient(y, [x, layer.kernel, layer.bias], output_gradients=dy)])
    for ours, theirs in zip(*results):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-5 * np.abs(theirs).max())


def test_the_transforms_have_the_papers_shapes() -> None:
    m = ScaleHyperprior(SETTINGS)
    x = images(1, 2, 128, 192)
    y = m.g_a(x)
    z = m.h_a(tf.abs(y))
    assert ((8, 12, 12), (2, 3, 6)) == m.latent_shapes(128, 192) == (tuple(y.shape[1:]), tuple(z.shape[1:]))
    assert m.h_s(z).shape == y.shape and m.g_s(y).shape == x.shape


def test_the_wavelet_start_is_orthonormal_and_the_synthesis_is_its_inverse(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"SPARE": 0.0, "BESIDE": 0.0, "GAMMA": 1e-12}.items():
        monkeypatch.setattr(initial, name, value)
    # There are as many channels as values in a block of 16 x 16 pixels, so nothing is lost.
    whole = ScaleHyperprior(config.Model(num_filters=192, latent_channels=768, hyper_channels=8))
    loss = config.Loss.model_validate({"lambda": 0.05})
    initial.start_as_wavelets(whole, loss)
    x = tf.random.stateless_uniform((1, 64, 64, 3), (1, 2))
    y = whole.g_a(x)
    energy = initial.latent_gain(loss) ** 2 * float(tf.reduce_sum(tf.square(x - 0.5)))
    assert float(tf.reduce_sum(tf.square(y))) == pytest.approx(energy, rel=1e-4)
    assert float(tf.reduce_max(tf.abs(whole.g_s(y) - x))) < 1e-4
    # Each channel's picture has the colour of its band, and the number of its half periods down and across.
    bands = [initial.Band(colour) for colour in range(3)]
    for _ in range(4):
        bands = [child.band for child in initial.split_bands(bands, 768)]
    for channel in (0, 1, 2, 5, 9, 17, 40, 100, 767):
        picture = (whole.g_s(tf.one_hot([[[channel]]], 768)) - whole.g_s(tf.zeros((1, 1, 1, 768))))[0].numpy()
        plane = picture @ initial.COLOURS[bands[channel].colour]
        assert np.count_nonzero(np.diff(np.sign(plane[:, 0]))) == bands[channel].down
        assert np.count_nonzero(np.diff(np.sign(plane[0]))) == bands[channel].across
        assert np.sum(np.square(plane)) == pytest.approx(np.sum(np.square(picture)), rel=1e-3)


def test_the_wavelet_start_codes_photographs_before_it_is_trained() -> None:
    x, psnr = images(3, 2, 128, 128), {}
    for start in ("random", "wavelet"):
        tf.random.set_seed(0)
        small = ScaleHyperprior(SETTINGS)
        if start == "wavelet":
            initial.start_as_wavelets(small, config.Loss.model_validate({}))
        psnr[start] = float(tf.reduce_mean(metrics.psnr_db(metrics.mse(x, small.round(x, small.z_offset()).x_hat))))
    assert psnr["wavelet"] > max(psnr["random"], 12.0) + 8.0, psnr


def test_rescaled_weights_quantise_finer_and_are_otherwise_the_same_model() -> None:
    tf.random.set_seed(0)
    small, finer = ScaleHyperprior(SETTINGS), ScaleHyperprior(SETTINGS)
    arrays = {name: v.numpy() for name, v in small.named_variables().items()}
    before, now = (config.Loss.model_validate({"lambda": value}) for value in (0.01, 0.04))
    storage.assign_arrays(finer.named_variables(), initial.rescale(arrays, before, now), "test")
    x = images(3, 1, 64, 64)
    y = small.g_a(x)
    np.testing.assert_allclose(finer.g_a(x), 2.0 * y, rtol=1e-4, atol=1e-5)  # the square root of 0.04 / 0.01
    np.testing.assert_allclose(finer.g_s(2.0 * y), small.g_s(y), rtol=1e-4, atol=1e-5)
    z = small.h_a(tf.abs(y))
    np.testing.assert_allclose(finer.h_a(tf.abs(2.0 * y)), z, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(finer.h_s(z), small.h_s(z) + math.log(2.0), rtol=1e-4, atol=1e-5)


def test_a_wider_model_starts_as_the_narrow_one_it_is_made_from() -> None:
    narrow, wide = ScaleHyperprior(SETTINGS), ScaleHyperprior(SETTINGS.model_copy(update={"num_filters": 20}))
    rng = np.random.default_rng(0)
    weights = {  # trained gammas have no zeros, so a wrong axis shows
        name: v.numpy() + np.float32(0.01) * rng.random(v.shape, np.float32)
        for name, v in narrow.named_variables().items()
    }
    storage.assign_arrays(narrow.named_variables(), weights, "test")
    widened = initial.widen(weights, {name: v.numpy() for name, v in wide.named_variables().items()})
    storage.assign_arrays(wide.named_variables(), widened, "test")
    x = images(3, 2, 128, 128)
    noise = [tf.zeros((2, *shape)) for shape in narrow.latent_shapes(128, 128)]
    before, after = narrow.train(x, *noise), wide.train(x, *noise)
    for name in ("x_hat", "bits_y", "bits_z"):
        np.testing.assert_allclose(getattr(after, name), getattr(before, name), rtol=1e-4, atol=1e-5)
    # The new channels differ from each other, and nothing but the old channels reaches the output yet.
    assert not np.array_equal(widened["g_a/0/kernel"][..., 8], widened["g_a/0/kernel"][..., 9])


def test_low_precision_stays_inside_the_transforms() -> None:
    m = ScaleHyperprior(SETTINGS, "bfloat16")
    x = images(1, 1, 64, 64)
    shape_y, shape_z = m.latent_shapes(64, 64)
    out = m.train(x, tf.fill((1, *shape_y), 0.25), tf.fill((1, *shape_z), 0.25))
    assert {t.dtype for t in out} == {tf.float32}
    # In bfloat16 every number between 128 and 256 is an integer, so latents are computed in float32.
    for latents in (m.g_a(x), m.h_a(out.y), m.h_s(m.h_a(out.y))):
        assert not np.array_equal(latents, tf.cast(tf.cast(latents, tf.bfloat16), tf.float32))
    # `round` is computed in float32 in both models, so validation measures the result of the codec.
    wide = ScaleHyperprior(SETTINGS)
    storage.assign_arrays(wide.named_variables(), {k: v.numpy() for k, v in m.named_variables().items()}, "test")
    offset = wide.z_offset()
    for mine, codecs in zip(m.round(x, offset), wide.round(x, offset)):
        assert np.array_equal(mine, codecs)
    assert not np.array_equal(m.g_a(x), wide.g_a(x))


@pytest.mark.parametrize("inverse", [False, True])
def test_gdn_in_bfloat16_has_the_value_and_the_gradients_of_float32(inverse: bool) -> None:
    gdn = layers.GDN(Normalisation(16, inverse))
    gdn.gamma.variable.assign(tf.abs(tf.random.stateless_normal((16, 16), (1, 2))))
    x = tf.cast(tf.random.stateless_normal((2, 8, 8, 16), (3, 4)), tf.bfloat16)  # so that float32 gets the same input

    def both(x: tf.Tensor) -> list[np.ndarray]:
        with tf.GradientTape() as tape:
            tape.watch(x)
            y = gdn(x)
        assert y.dtype == x.dtype
        values = [y, *tape.gradient(y, [x, gdn.beta.variable, gdn.gamma.variable], output_gradients=x)]
        return [tf.cast(value, tf.float32).numpy() for value in values]

    for wide, low in zip(both(tf.cast(x, tf.float32)), both(x)):
        assert np.linalg.norm(low - wide) < 0.01 * np.linalg.norm(wide)


def test_names_of_variables_are_stable_and_complete() -> None:
    m = ScaleHyperprior(SETTINGS)
    names = m.named_variables()
    assert len(names) == len({id(v) for v in names.values()}) == len(m.trainable_variables)
    assert {"g_a/0/kernel", "g_s/1/gamma", "h_s/2/bias", "prior/matrix_0"} <= set(names)


# priors ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("density", ["gaussian", "logistic"])
def test_bits_of_y_are_those_of_the_mass_in_each_bin(density: str) -> None:
    m = ScaleHyperprior(SETTINGS.model_copy(update={"density": density}))
    y = np.array([0.0, 1.0, -3.0, 7.0])
    scale = np.array([0.11, 1.0, 2.0, 256.0])

    def cdf(v: float) -> float:
        return 0.5 * math.erfc(-v / math.sqrt(2)) if density == "gaussian" else 1.0 / (1.0 + math.exp(-v * slope))

    slope = math.pi / math.sqrt(3.0)
    expected = sum(-math.log2(cdf((v + 0.5) / s) - cdf((v - 0.5) / s)) for v, s in zip(y, scale))
    scales = m.scales(tf.constant(np.log(scale), tf.float32))
    bits = m.bits_of_y(tf.reshape(tf.constant(y, tf.float32), (1, 1, 1, 4)), scales)
    np.testing.assert_allclose(bits, [expected], rtol=1e-4)


@pytest.mark.parametrize(("density", "slope"), [("gaussian", 1e7 / 256**2), ("logistic", math.pi / 3**0.5 / 256)])
def test_a_value_far_outside_has_the_gradient_of_the_tail(density: str, slope: float) -> None:
    y = tf.constant([1e7])
    with tf.GradientTape() as tape:
        tape.watch(y)
        bits = priors.BITS[density](y, tf.constant([256.0]))
    assert bits == [priors.MAX_BITS]
    np.testing.assert_allclose(tape.gradient(bits, y), [slope / math.log(2)], rtol=1e-5)


@pytest.mark.parametrize("density", ["gaussian", "logistic"])
def test_training_with_rounded_latents_has_the_pixels_and_bits_of_the_codec(density: str) -> None:
    m, x = ScaleHyperprior(SETTINGS.model_copy(update={"density": density})), images(2, 1, 64, 64)
    kernel = m.named_variables()["g_a/6/kernel"]
    kernel.assign(4.0 * kernel)
    noise = [tf.random.stateless_uniform((1, *shape), (1, 2), -0.5, 0.5) for shape in m.latent_shapes(64, 64)]
    results = {}
    for proxy in ("noise", "rounded"):
        with tf.GradientTape(persistent=True) as tape:
            out = m.train(x, *noise, proxy)
            error = tf.reduce_sum(tf.square(out.x_hat - x))
        scales = tape.gradient(out.bits_y, out.log_scales)
        results[proxy] = out, tape.gradient(error, kernel), tape.gradient(out.bits_y, kernel), scales
    noisy, rounded = results["noise"][0], results["rounded"][0]
    np.testing.assert_array_equal(noisy.bits_z, rounded.bits_z)
    y, scales = m.g_a(x), m.scales(rounded.log_scales)
    integers = priors.round_latents(y, scales, m.bits_of_each_y)
    assert np.any(integers != tf.round(y)) and np.all(np.abs(integers) <= np.abs(tf.round(y)))
    np.testing.assert_allclose(rounded.x_hat, m.g_s(integers), atol=1e-6)
    np.testing.assert_allclose(rounded.bits_y, m.bits_of_y(integers, scales), rtol=1e-6)
    # The gradient is the same as if the rounding error were an added constant.
    with tf.GradientTape() as tape:
        y = m.g_a(x)
        error = tf.reduce_sum(tf.square(m.g_s(y + tf.constant((integers - y).numpy())) - x))
    np.testing.assert_allclose(results["rounded"][1], tape.gradient(error, kernel), rtol=1e-4, atol=1e-5)
    # The rate has the gradient of the integers by the scales, and that of y with noise by y.
    with tf.GradientTape() as tape:
        tape.watch(rounded.log_scales)
        bits = m.bits_of_y(integers, m.scales(rounded.log_scales))
    np.testing.assert_allclose(results["rounded"][3], tape.gradient(bits, rounded.log_scales), rtol=1e-4, atol=1e-6)
    assert not np.allclose(results["rounded"][3], results["noise"][3], rtol=1e-2)
    with tf.GradientTape() as tape:
        y = m.g_a(x)
        z = m.h_a(tf.abs(y)) + noise[1]
        scales = m.scales(m.h_s(z))
        bits = m.bits_of_y(y + noise[0], tf.stop_gradient(scales)) + m.bits_of_y(integers, scales)
    np.testing.assert_allclose(results["rounded"][2], tape.gradient(bits, kernel), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", ["q3", "q3-ms-ssim"])
def test_training_rounds_as_the_encoder_does(name: str) -> None:
    codec = load(name)
    settings = codec.config.model
    scales = np.geomspace(settings.scale_min, settings.scale_max, settings.num_scales).astype(np.float32)
    y = np.linspace(-4.0, 4.0, 20_001, dtype=np.float32)[:, None] * scales
    trained = priors.round_latents(tf.constant(y), tf.constant(scales[None]), priors.BITS[settings.density])
    coded = y.copy()
    # The encoder of a model for MSE counts errors by their scale; with the weights of training it rounds as that does.
    dead_zone = codec.tables.dead_zone(codec.counts, np.full(settings.num_scales, BITS_PER_SQUARE))
    assert name == "q3" or np.array_equal(dead_zone, codec.dead_zone)
    apply_dead_zone(coded, np.arange(settings.num_scales), dead_zone)
    assert np.mean(trained != np.rint(coded)) < 2e-3  # the tables' probabilities are rounded
    assert np.mean(np.rint(y) != np.rint(coded)) > 0.02


def test_an_unlikely_value_counts_its_cost_in_a_file_and_has_the_gradient_of_the_density() -> None:
    m = ScaleHyperprior(SETTINGS)
    for value, capped in ((1.0, False), (900.0, True)):
        z = tf.Variable(tf.fill((1, 1, 1, SETTINGS.hyper_channels), value))
        with tf.GradientTape(persistent=True) as tape:
            bits = m.prior.bits(z)
            # Far above the median, −log2 of the mass falls as the logit of the cumulative density at its lower end.
            logits = m.prior._logits(tf.transpose(tf.reshape(z, (1, -1)))[:, None] - 0.5)
            tail = tf.reduce_sum(logits) / math.log(2)
        most = priors.MAX_BITS * SETTINGS.hyper_channels
        assert (float(bits[0]) == most) == capped
        if capped:
            np.testing.assert_allclose(tape.gradient(bits, z), tape.gradient(tail, z), rtol=1e-5)
            assert float(tail) > most


def test_scales_stay_in_the_table_and_gradients_lead_back_into_it() -> None:
    m = ScaleHyperprior(SETTINGS)
    log_scales = tf.Variable([-10.0, 0.0, 10.0])
    with tf.GradientTape() as tape:
        scales = m.scales(log_scales)
        loss = -tf.reduce_sum(scales * [1.0, 0.0, -1.0])  # pulls the first up, the last down
    np.testing.assert_allclose(scales, [0.11, 1.0, 256.0], rtol=1e-5)
    gradient = tape.gradient(loss, log_scales)
    assert gradient[0] < 0 < gradient[2]


def test_noise_is_uniform_and_depends_on_seed_step_and_lane_only() -> None:
    def noise(seed: int, step: int, lanes: list[int]) -> np.ndarray:
        return priors.uniform_noise((4, 4, 12), seed, tf.constant(step, tf.int64), tf.constant(lanes, tf.int64)).numpy()

    whole = noise(5, 100, [0, 1, 2, 3])
    assert np.array_equal(whole[2:], noise(5, 100, [2, 3]))
    others = [noise(6, 100, [0])[0], noise(5, 101, [0])[0], whole[1]]
    assert all(not np.array_equal(whole[0], other) for other in others)
    many = noise(1, 1, list(range(200)))
    # 38,400 draws: the mean's standard deviation is 0.0015, the variance's 0.0004.
    assert abs(many.mean()) < 0.006 and abs(many.var() - 1 / 12) < 0.002 and many.min() >= -0.5 and many.max() < 0.5


def test_training_bits_estimate_rounded_bits_on_average() -> None:
    m = ScaleHyperprior(SETTINGS)
    m.g_a.layers[-1].kernel.assign(m.g_a.layers[-1].kernel * 30.0)  # latents that span several integers
    x = images(3, 4, 128, 128)
    shape_y, shape_z = m.latent_shapes(128, 128)
    noisy = [
        m.train(
            x,
            priors.uniform_noise(shape_y, 1, tf.constant(s, tf.int64), tf.range(4, dtype=tf.int64)),
            priors.uniform_noise(shape_z, 2, tf.constant(s, tf.int64), tf.range(4, dtype=tf.int64)),
        )
        for s in range(5)
    ]
    mean = np.mean([tf.reduce_sum(o.bits_y + o.bits_z) for o in noisy])
    rounded = m.round(x, m.z_offset())
    # On average, noise has the effect of rounding, so both estimate the same rate.
    assert float(tf.reduce_sum(rounded.bits_y + rounded.bits_z)) == pytest.approx(mean, rel=0.1)


def test_any_size_is_padded_and_cropped_back() -> None:
    m = ScaleHyperprior(SETTINGS)
    for height, width in ((1, 1), (64, 65), (100, 30)):
        x_hat, _ = m.reconstruct(images(1, 1, height, width), m.z_offset())
        assert x_hat.shape == (1, height, width, 3)
        assert np.array_equal(np.round(x_hat * 255), (x_hat * 255).numpy().round(3))
    padded = pad(images(2, 1, 70, 64))
    assert padded.shape == (1, 128, 64, 3) and np.array_equal(padded[0, 69], padded[0, 127])
