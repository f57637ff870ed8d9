"""The layers of this project compute what Keras' own do, and are saved as these."""

import functools
import platform
import timeit

from common import layers
from common.hardware import describe_machine
from common.optimizers import FusedAdam

import keras
import numpy as np
import pytest
import scipy.special
import tensorflow as tf


@pytest.mark.parametrize("dtype", ["bfloat16", "float32", "float64"])
def test_gradient_of_silu_in_one_pass_equals_the_formula(dtype):
    inputs = tf.cast(np.linspace(-100, 100, 40_001), dtype)
    upstream = tf.cast(np.random.default_rng(0).normal(0, 1, inputs.shape), dtype)
    gradients, passes = [], []
    for layer in (layers.Activation("silu", dtype=dtype), keras.layers.Activation("silu", dtype=dtype)):

        @tf.function
        def gradient(layer=layer):
            with tf.GradientTape() as tape:
                tape.watch(inputs)
                outputs = layer(inputs)
            return tape.gradient(outputs, inputs, upstream)

        gradients.append(gradient())
        operations = gradient.get_concrete_function().graph.get_operations()
        passes.append([each for each in operations if each.type not in ("Const", "Identity", "IdentityN")])
    x, outer = np.asarray(inputs, np.float64), np.asarray(upstream, np.float64)
    sigmoid = scipy.special.expit(x)
    expected = outer * (sigmoid + x * sigmoid * (1 - sigmoid))
    precision = {"bfloat16": 2**-8, "float32": 1e-6, "float64": 1e-14}[dtype]
    np.testing.assert_allclose(np.asarray(gradients[0], np.float64), expected, rtol=precision, atol=precision / 10)
    assert gradients[0].dtype == inputs.dtype
    assert passes[0][-1].get_attr("_XlaMustCompile"), "not in one pass"
    assert len(passes[1]) > len(passes[0]), "no longer needed: use keras.layers.Activation"


def test_other_activations_are_left_to_keras():
    np.testing.assert_array_equal(layers.Activation("relu")(tf.constant([-1.0, 2.0])), [0, 2])


@pytest.mark.parametrize(("scale", "center"), [(True, True), (True, False), (False, True)])
@pytest.mark.parametrize("policy", ["float32", "mixed_bfloat16"])
def test_fused_batch_normalization_equals_keras(scale, center, policy):
    images = tf.constant(np.random.default_rng(0).normal(3, 2, (6, 5, 4, 7)), keras.DTypePolicy(policy).compute_dtype)
    outcomes, operations = [], []
    for kind in (layers.BatchNormalization, keras.layers.BatchNormalization):
        layer = kind(
            dtype=policy, momentum=0.6, scale=scale, center=center, gamma_initializer=keras.initializers.Constant(1.7)
        )
        layer.build(images.shape)
        with tf.GradientTape() as tape:
            tape.watch(images)
            outputs = layer(images, training=True)
            loss = tf.reduce_sum(tf.cast(outputs, tf.float32) ** 3)
        gradients = tape.gradient(loss, [images, *(each.value for each in layer.trainable_variables)])
        outcomes.append([outputs, *gradients, *layer.variables, layer(images, training=False)])
        step = tf.function(functools.partial(layer, training=True)).get_concrete_function(images)
        operations.append({operation.type for operation in step.graph.get_operations()})
    tolerance = 1e-4 if policy == "float32" else 0.05
    for ours, theirs in zip(*outcomes, strict=True):
        ours, theirs = (np.asarray(each, np.float32) for each in (ours, theirs))
        np.testing.assert_allclose(ours, theirs, rtol=tolerance, atol=tolerance * max(1, np.abs(theirs).max()))
    assert "FusedBatchNormV3" in operations[0]
    assert "FusedBatchNormV3" not in operations[1], "no longer needed: use keras.layers.BatchNormalization"


@pytest.mark.parametrize(("shape", "dtype"), [((8, 3), "float32"), ((4, 3, 3, 2), "bfloat16")])
def test_what_can_not_be_fused_is_left_to_keras(shape, dtype):
    inputs = tf.constant(np.random.default_rng(0).normal(size=shape), dtype)
    ours, theirs = (
        kind(dtype=dtype)(inputs, training=True)
        for kind in (layers.BatchNormalization, keras.layers.BatchNormalization)
    )
    np.testing.assert_array_equal(np.asarray(ours, np.float32), np.asarray(theirs, np.float32))


@pytest.mark.parametrize(
    ("shape", "kernel", "settings", "replaced"),
    [
        ((5, 7, 8, 6), (3, 3), {"padding": "same"}, True),
        ((2, 3, 3, 6), (2, 4), {"padding": "same"}, True),
        ((5, 8, 8, 6), (5, 2), {"padding": "valid"}, True),
        ((5, 7, 9, 6), (3, 3), {"padding": "same"}, False),
        ((5, 7, 8, 6), (3, 3), {"padding": "same", "strides": 2}, False),
    ],
)
@pytest.mark.parametrize("eager", [True, False])
def test_filter_gradient_by_products_equals_the_one_in_float32(shape, kernel, settings, replaced, eager):
    draw = np.random.default_rng(0)
    images = tf.constant(draw.integers(-3, 4, shape), tf.float32)
    weights = draw.integers(-3, 4, (*kernel, shape[-1], 4))
    outcomes = []
    for policy in ("float32", "bfloat16"):
        layer = layers.Conv2D(4, kernel, dtype=policy, use_bias=False, **settings)
        layer.build(shape)
        layer.set_weights([weights])

        def gradients(images, layer=layer):
            kernel = layer.kernel.value
            with tf.GradientTape() as tape:
                tape.watch([images, kernel])
                outputs = layer(images)
            return tape.gradient(outputs, [images, kernel], tf.sign(outputs))

        given = tf.cast(images, policy)
        graph = tf.function(gradients).get_concrete_function(given).graph
        operations = {operation.type for operation in graph.get_operations()}
        outcomes.append([tf.cast(each, tf.float32) for each in (gradients if eager else tf.function(gradients))(given)])
    assert ("Conv2DBackpropFilter" not in operations) == replaced
    for one, other in zip(*outcomes, strict=True):
        np.testing.assert_allclose(other, one, rtol=2**-8)  # Whole numbers: exact but for the last rounding.


@pytest.mark.slow
@pytest.mark.skipif(
    platform.machine() != "x86_64" or not describe_machine().bfloat16,
    reason="this is no x86 processor with instructions for bfloat16",
)
def test_filter_gradient_of_tensorflow_is_slower_than_products():
    given = tf.ones([300, 3, 3, 256], tf.bfloat16), tf.ones([3, 3, 256, 256], tf.bfloat16)

    def gradient(convolve):
        def compute(images, kernel):
            with tf.GradientTape() as tape:
                tape.watch(kernel)
                outputs = convolve(images, kernel)
            return tape.gradient(outputs, kernel, images)

        return tf.function(compute)

    ours = gradient(lambda images, kernel: layers._convolution(images, kernel, "SAME"))
    theirs = gradient(lambda images, kernel: tf.nn.conv2d(images, kernel, 1, "SAME"))
    np.testing.assert_allclose(ours(*given), theirs(*given), rtol=2**-7)
    pairs = [[timeit.timeit(functools.partial(each, *given), number=2) for each in (theirs, ours)] for _ in range(7)]
    assert np.median([slow / fast for slow, fast in pairs]) > 1, "no longer needed: use keras.layers.Conv2D"


def test_a_model_is_saved_with_the_layers_of_keras():
    images = keras.Input([8, 8, 3])
    x = layers.Conv2D(4, 3, padding="same", dtype="mixed_bfloat16")(images)
    inner = keras.Model(images, layers.Activation("silu")(layers.BatchNormalization(momentum=0.5)(x)))
    outer = keras.Input([8, 8, 3])
    model = keras.Model(outer, keras.layers.Average()([inner(outer), inner(outer[:, ::-1])]))
    for each in (inner, model):
        each.compile(FusedAdam(), "mse")
    stock = layers.with_stock_layers(model)
    assert "common" in model.to_json()
    assert "common" not in stock.to_json()
    pictures = np.random.default_rng(0).normal(size=(2, 8, 8, 3)).astype(np.float32)
    np.testing.assert_array_equal(stock(pictures), model(pictures))
    plain = keras.Model(outer, keras.layers.Flatten()(outer))
    assert layers.with_stock_layers(plain).layers == plain.layers  # Nothing to copy.
