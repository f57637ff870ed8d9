"""Each test here fails when a bug is mended upstream: then delete the cure, and the test with it."""

import gc
import subprocess
import sys
import weakref

from common import upstream

import numpy as np
import pytest
import tensorflow as tf
from keras.src.backend.tensorflow.trainer import TensorFlowTrainer

MIRRORED_FIT = """
import os, sys
os.environ["KERAS_BACKEND"] = "tensorflow"
import keras, numpy as np, tensorflow as tf
cpu = tf.config.list_physical_devices("CPU")[0]
tf.config.set_logical_device_configuration(cpu, [tf.config.LogicalDeviceConfiguration()] * 2)
strategy = tf.distribute.MirroredStrategy(["/CPU:0", "/CPU:1"])
rows, steps_per_execution = int(sys.argv[1]), int(sys.argv[2])
with strategy.scope():
    model = keras.Sequential([keras.Input([3]), keras.layers.Dense(1)])
    model.compile("sgd", "mse", steps_per_execution=steps_per_execution)
x = np.ones((rows * 4, 3), "float32")
data = tf.data.Dataset.from_tensor_slices((x, x[:, :1])).batch(rows).repeat()
model.fit(data, steps_per_epoch=4, verbose=0, shuffle=False)
"""


@pytest.mark.parametrize(
    ("rows", "steps_per_execution", "message"),
    [
        (3, 1, "must have the same size and shape"),  # common/upstream.py: cure_symbolic_build
        (4, 2, "You must feed a value for placeholder tensor"),  # common/batches.py: steps_per_execution
        (4, 1, None),
    ],
)
def test_plain_keras_under_mirrored_strategy(rows, steps_per_execution, message):
    run = subprocess.run(
        [sys.executable, "-c", MIRRORED_FIT, str(rows), str(steps_per_execution)],
        capture_output=True,
        text=True,
        check=False,
    )
    if message is None:
        assert run.returncode == 0, run.stderr
    else:
        assert run.returncode != 0, "mended upstream: delete the cure"
        assert message in run.stderr


def test_tensorflow_still_prints_a_banner():
    """common/startup.py: quiet_native_stderr."""
    run = subprocess.run(
        [sys.executable, "-c", "import tensorflow"],
        env={"TF_CPP_MIN_LOG_LEVEL": "3"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert "absl::InitializeLog" in run.stderr, "mended upstream: set TF_CPP_MIN_LOG_LEVEL alone"


def test_tensorflow_variables_still_lack_the_copy_keyword():
    """pyproject.toml: the filter for "__array__ implementation doesn't accept a copy keyword"."""
    with pytest.warns(DeprecationWarning, match="__array__ implementation"):
        np.array(tf.Variable([0.0]))


def test_tensorflow_still_keeps_graphs_with_a_custom_gradient():
    """common/upstream.py: cure_gradient_leak."""

    @tf.custom_gradient
    def same(x):
        return tf.identity(x), lambda upstream: upstream

    traced = tf.function(same).get_concrete_function(tf.TensorSpec([], tf.float32))
    graph = weakref.ref(traced.graph)
    del traced
    gc.collect()
    assert graph() is not None, "mended upstream: delete the cure"


def test_the_cure_is_applied_once():
    upstream.cure_symbolic_build()
    cured = TensorFlowTrainer._maybe_symbolic_build
    upstream.cure_symbolic_build()
    assert TensorFlowTrainer._maybe_symbolic_build is cured
