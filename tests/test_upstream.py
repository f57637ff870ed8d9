"""Each test here fails when a bug is fixed upstream: then delete the patch or workaround, and the test with it.

.github/workflows/newest.yml runs the tests with the newest Keras and TensorFlow, and applies the patches to these too.
"""

import subprocess
import sys
import warnings

from common import upstream
from common.cli import UserError
from common.hardware import apply, choose, describe_machine

import export
import keras
import numpy as np
import pytest
import tensorflow as tf
from conftest import TWO_DEVICES
from keras.src.backend.tensorflow.trainer import TensorFlowTrainer
from programs import run_program
from test_readme import load_script

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
    ("rows", "steps_per_execution", "message", "remedy"),
    [
        (3, 1, "must have the same size and shape", "delete the patch 'symbolic build'"),
        (4, 2, "You must feed a value for placeholder tensor", "allow several replicas in steps_per_execution"),
        (4, 1, None, None),
    ],
)
@pytest.mark.slow
def test_plain_keras_under_mirrored_strategy(rows, steps_per_execution, message, remedy):
    run = subprocess.run(
        [sys.executable, "-c", MIRRORED_FIT, str(rows), str(steps_per_execution)],
        capture_output=True,
        text=True,
        check=False,
    )
    if message is None:
        assert run.returncode == 0, run.stderr
    else:
        assert run.returncode != 0, f"fixed upstream: {remedy}"
        assert message in run.stderr


SEVERAL_WORKERS = """
import json, os, sys
os.environ["KERAS_BACKEND"] = "tensorflow"
index, *ports, patches = sys.argv[1:]
cluster = {"worker": [f"127.0.0.1:{port}" for port in ports]}
os.environ["TF_CONFIG"] = json.dumps({"cluster": cluster, "task": {"type": "worker", "index": int(index)}})
import keras, numpy as np, tensorflow as tf
from common import upstream
strategy = tf.distribute.MultiWorkerMirroredStrategy()
strategy.flags = tf.Variable([0.0, 0.0]), tf.Variable([0.0, 0.0])  # As common/multiworker.py does.
for name in patches.split(","):
    upstream.apply_patch(name)
with strategy.scope():
    model = keras.Sequential([keras.Input([3]), keras.layers.Dense(1)])
    model.compile("sgd", "mse")
x = np.ones((8, 3), "float32")
data = tf.data.Dataset.from_tensor_slices((x, x[:, :1])).batch(4).repeat()
try:
    model.fit(data, steps_per_epoch=4, verbose=0, shuffle=False)
except Exception as error:
    print(error, file=sys.stderr, flush=True)
    os._exit(1)
"""


@pytest.mark.parametrize(
    ("patches", "message"),
    [
        (["logs of several workers"], "Attempt to convert a value (PerReplica"),
        (["symbolic build"], "Invalid reduction dimension 0 for input with 0 dimensions"),
        (["logs of several workers", "symbolic build"], None),
    ],
)
@pytest.mark.slow
def test_plain_keras_under_multi_worker_strategy(patches, message):
    """https://github.com/keras-team/keras/issues/20585: each patch alone is not enough."""
    ports = list(map(str, load_script("launch").free_ports(2)))
    workers = [
        subprocess.Popen(
            [sys.executable, "-c", SEVERAL_WORKERS, str(index), *ports, ",".join(patches)],
            stderr=subprocess.PIPE,
            text=True,
        )
        for index in (0, 1)
    ]
    errors = [worker.communicate()[1] for worker in workers]
    codes = [worker.returncode for worker in workers]
    if message is None:
        assert codes == [0, 0], errors
    else:
        assert 0 not in codes, f"fixed upstream: delete the patch {upstream.PATCHES.keys() - set(patches)}"
        assert any(message in each for each in errors), errors


@pytest.mark.slow
def test_tensorflow_still_prints_a_banner():
    """common/startup.py: quiet_native_stderr."""
    run = subprocess.run(
        [sys.executable, "-c", "import tensorflow"],
        env={"TF_CPP_MIN_LOG_LEVEL": "3"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert "absl::InitializeLog" in run.stderr, "fixed upstream: set TF_CPP_MIN_LOG_LEVEL alone"


def test_tensorflow_variables_still_lack_the_copy_keyword():
    """pyproject.toml: the filter for "__array__ implementation doesn't accept a copy keyword"."""
    with pytest.warns(DeprecationWarning, match="__array__ implementation"):
        np.array(tf.Variable([0.0]))


OWN_PIPELINES = """
import tensorflow as tf
options = tf.distribute.InputOptions(
    experimental_fetch_to_device=False, experimental_replication_mode=tf.distribute.InputReplicationMode.PER_REPLICA
)
strategy = tf.distribute.MultiWorkerMirroredStrategy()
strategy.distribute_datasets_from_function(lambda context: tf.data.Dataset.range(3), options)
"""


@pytest.mark.slow
def test_several_workers_still_refuse_pipelines_of_their_own():
    """common/upstream.py: replica_datasets. The crash itself comes too rarely to wait for it."""
    run = run_program("-c", OWN_PIPELINES)
    assert "NotImplementedError: InputReplicationMode.PER_REPLICA" in run.stderr, "fixed upstream: pass the options"


TRACES = """
import sys
from common import upstream
import keras, numpy as np
if "patched" in sys.argv:
    upstream.apply_patch("symbolic build")

class Counted(keras.Model):
    traces = 0
    def train_step(self, data):
        Counted.traces += 1
        return super().train_step(data)

keras.utils.set_random_seed(0)
inputs = keras.Input([3])
hidden = keras.layers.Dropout(0.5)(keras.layers.Dense(4, activation="relu")(inputs))
model = Counted(inputs, keras.layers.Dense(1)(hidden))
model.compile("adam", "mse", metrics=["mae"])
x = np.random.default_rng(0).normal(0, 1, (8, 3))
model.fit(x, x[:, :1], batch_size=4, epochs=2, validation_data=(x, x[:, 1:2]), verbose=0)
print(Counted.traces, *model.predict(x, verbose=0)[:, 0], *model.evaluate(x, x[:, :1], verbose=0))
"""


@pytest.mark.slow
def test_keras_still_traces_the_first_step_twice():
    """common/upstream.py: symbolic build."""
    plain, patched = (run_program("-c", TRACES, name) for name in ("plain", "patched"))
    assert plain.returncode == patched.returncode == 0, plain.stderr + patched.stderr
    (before, *expected), (after, *found) = plain.stdout.split(), patched.stdout.split()
    assert after == "1"
    assert found == expected
    assert before == "2", "fixed upstream: delete the patch 'symbolic build' on one device"


def test_a_patch_is_applied_once():
    upstream.apply_patch("symbolic build")
    patched = TensorFlowTrainer._maybe_symbolic_build
    upstream.apply_patch("symbolic build")
    assert TensorFlowTrainer._maybe_symbolic_build is patched
    assert upstream.applied.count("symbolic build") == 1


def test_a_patch_for_other_versions_is_refused_or_skipped(monkeypatch, capsys):
    def fail():
        raise AssertionError("applied to a version that it is not made for")

    patch = upstream.Patch("keras", "==3.14.*", "fit fails", fail)
    monkeypatch.setitem(upstream.PATCHES, "example", patch)
    with pytest.raises(UserError, match=r"^keras 3\..*: the patch 'example' .*; install keras==3\.14\.\*$"):
        upstream.apply_patch("example", required=True)
    assert capsys.readouterr().err == ""
    upstream.apply_patch("example")
    assert capsys.readouterr().err.endswith("the patch 'example' is made for ==3.14.*: fit fails; skipped\n")
    assert "example" not in upstream.applied


def test_loss_scaling_still_asks_the_first_replica_only():
    """common/hardware.py refuses mixed_float16 on several devices."""
    strategy = apply(choose(describe_machine(), TWO_DEVICES), TWO_DEVICES)
    with strategy.scope():
        variable = keras.Variable([1.0])
        optimizer = keras.optimizers.LossScaleOptimizer(keras.optimizers.SGD(0.1))
        optimizer.build([variable])

    @tf.function
    def step():
        def replica_step():
            number = tf.distribute.get_replica_context().replica_id_in_sync_group
            optimizer.apply([tf.where(number == 1, [np.inf], [1.0])], [variable])

        strategy.run(replica_step)

    step()
    assert not np.isfinite(variable.numpy()).all(), "fixed upstream: allow mixed_float16 on several devices"


def test_tf2onnx_takes_the_constants_of_normalization_for_inputs(tmp_path):
    onnx = pytest.importorskip("onnx", reason="the extra `export` is not installed")
    pytest.importorskip("tf2onnx", reason="the extra `export` is not installed")
    columns = keras.Input([3])
    normalized = keras.layers.Normalization(mean=[1.0, 2.0, 3.0], variance=[1.0, 4.0, 9.0])(columns)
    model = keras.Model(columns, keras.layers.Dense(2)(normalized))
    counts = []
    for name in ("as_it_comes.onnx", "without_tensors.onnx"):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # tf2onnx 1.17 asks NumPy for names that went.
            signature = [tf.TensorSpec([None, 3], tf.float32, "columns")]
            model.export(tmp_path / name, format="onnx", verbose=False, input_signature=signature)
        counts.append(len(onnx.load(tmp_path / name).graph.input))
        export._free_of_tensors(model)
    assert counts[1] == 1
    assert counts[0] > 1, "fixed upstream: delete _free_of_tensors"


def test_distillation_by_name_takes_the_loss_of_logits():
    """recipes/distillation.py gives the loss as an object: an object alone is given probabilities."""
    teacher, student = (tf.constant(logits) for logits in ([[2.0, 0.0, -1.0]], [[0.0, 1.0, 0.5]]))
    right = float(keras.losses.kl_divergence(*(tf.nn.softmax(logits / 3) for logits in (teacher, student)))[0]) * 9
    by_object = keras.distillation.LogitsDistillation(3.0, keras.losses.KLDivergence())
    assert float(by_object.compute_loss(teacher, student)) == pytest.approx(right, rel=1e-5)
    by_name = keras.distillation.LogitsDistillation(3.0)
    assert float(by_name.compute_loss(teacher, student)) != pytest.approx(right, rel=0.1), (
        "fixed upstream: leave the loss out"
    )
