"""The optimizers of this project, against NumPy and against Keras' own."""

from common.optimizers import FusedAdam, Muon, orthogonal

import keras
import numpy as np
import pytest
import tensorflow as tf


@pytest.mark.parametrize("shape", [(216, 64), (64, 216), (27, 32)])
def test_orthogonal_keeps_the_directions_and_evens_out_the_lengths(shape):
    matrix = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    left, _, right = np.linalg.svd(matrix, full_matrices=False)
    lengths = left.T @ np.asarray(orthogonal(keras.ops.convert_to_tensor(matrix))) @ right.T
    assert np.abs(lengths - np.diag(np.diag(lengths))).max() < 1e-3
    before = np.linalg.svd(matrix / np.linalg.norm(matrix), compute_uv=False)
    after = np.diag(lengths)
    assert 0.6 < after[before > 0.07].min() <= after.max() < 1.3
    assert (after[before < 0.07] > 8 * before[before < 0.07]).all()


@pytest.mark.parametrize("smallest", [1e-1, 1e-6])
def test_orthogonal_is_the_iteration_that_it_says(smallest):
    """Against the same in float64; also where singular values are nearly nothing."""
    random = np.random.default_rng(3)
    left, right = (np.linalg.qr(random.normal(size=(rows, 32)))[0] for rows in (32, 288))
    matrix = (left * np.geomspace(1, smallest, 32)) @ right.T
    expected = matrix / np.linalg.norm(matrix)
    for _ in range(3):
        square = expected @ expected.T
        expected = 3.4445 * expected - 4.7750 * square @ expected + 2.0315 * square @ square @ expected
    found = orthogonal(keras.ops.convert_to_tensor(matrix, "float32"))
    np.testing.assert_allclose(found, expected, atol=1e-5 * np.abs(expected).max())


@pytest.mark.parametrize("unit_filters", [False, True])
def test_a_kernel_moves_by_an_orthogonal_matrix(unit_filters):
    random = np.random.default_rng(1)
    start, *gradients = random.normal(size=(3, 3, 3, 8, 16)).astype(np.float32)
    kernel = keras.Variable(start)
    optimizer = Muon(0.01, 4.0, kernel_momentum=0.5, unit_filters=unit_filters, weight_decay=0.5)
    expected, velocity = start.reshape(72, 16), 0.0
    for gradient in gradients:
        optimizer.apply([gradient], [kernel])
        velocity = 0.5 * velocity + gradient.reshape(72, 16)
        if unit_filters:
            expected = expected / np.sqrt(np.mean(np.sum(expected**2, axis=0)))
        else:
            expected = (1 - 0.01 * 0.5) * expected
        step = orthogonal(keras.ops.convert_to_tensor(gradient.reshape(72, 16) + 0.5 * velocity))
        expected = expected - 0.04 * np.asarray(step)
    np.testing.assert_allclose(kernel.numpy().reshape(72, 16), expected, atol=1e-5)


def test_all_but_kernels_is_left_to_adamw():
    settings = {"learning_rate": 0.1, "weight_decay": 0.3, "epsilon": 1e-3, "beta_2": 0.9}
    random, ends = np.random.default_rng(2), []
    starts, gradients = ([random.normal(size=shape) for shape in ((5, 4), (4,))] for _ in range(2))
    for optimizer in (Muon(**settings), FusedAdam(**settings)):
        variables = [keras.Variable(start) for start in starts]
        for _ in range(3):
            optimizer.apply([keras.ops.convert_to_tensor(each, "float32") for each in gradients], variables)
        ends.append([variable.numpy() for variable in variables])
    for ours, theirs in zip(*ends, strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_it_can_be_made_again_from_its_configuration():
    again = Muon.from_config(Muon(0.02, 7.0, kernel_momentum=0.8, unit_filters=True, weight_decay=0.2).get_config())
    values = again.kernel_speed, again.kernel_momentum, again.unit_filters, again.weight_decay
    assert values == (7.0, 0.8, True, 0.2)
    assert float(again.learning_rate) == pytest.approx(0.02)


@pytest.mark.parametrize("weight_decay", [pytest.param(None, marks=pytest.mark.long), 0.1])
def test_adam_in_one_operation_equals_keras(weight_decay):
    inputs = np.random.default_rng(0).normal(size=(64, 5)).astype(np.float32)
    outcomes, operations = [], []
    for kind in (FusedAdam, keras.optimizers.Adam):
        keras.utils.set_random_seed(1)
        model = keras.Sequential([keras.Input((5,)), keras.layers.Dense(7, activation="tanh"), keras.layers.Dense(1)])
        optimizer = kind(0.01, weight_decay=weight_decay)
        model.compile(optimizer, "mse")
        model.fit(inputs, inputs[:, :1], epochs=20, verbose=0)
        outcomes.append([variable.numpy() for variable in (*model.variables, *optimizer.variables)])
        gradients = [tf.ones(each.shape) for each in model.trainable_variables]
        step = tf.function(lambda: optimizer.apply(gradients)).get_concrete_function()  # noqa: B023
        operations.append({operation.type for operation in step.graph.get_operations()})
    for ours, theirs in zip(*outcomes, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-6)
    assert "ResourceApplyAdam" in operations[0]
    assert "ResourceApplyAdam" not in operations[1], "fixed upstream: use keras.optimizers.Adam"


@pytest.mark.parametrize("amsgrad", [False, True])
def test_adam_squares_the_sum_of_the_rows_of_a_repeated_word(amsgrad):
    places, rows = np.array([1, 1, 1, 2]), np.array([[0.3], [-0.1], [0.4], [0.2]], np.float32)
    outcomes = []
    for kind in (FusedAdam, keras.optimizers.Adam):
        embeddings = keras.Variable(np.zeros((3, 1)))
        kind(0.01, amsgrad=amsgrad).apply([tf.IndexedSlices(rows, places, [3, 1])], [embeddings])
        outcomes.append(embeddings.numpy()[:, 0])
    # The first step of Adam is as long as its learning rate, whatever the gradient.
    np.testing.assert_allclose(outcomes[0], [0, -0.01, -0.01], rtol=1e-4)
    assert abs(outcomes[1][1] + 0.01) > 0.001, "fixed upstream: convert no slices"
