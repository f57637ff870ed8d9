"""Each test here fails when a bug is mended upstream: then delete the cure, and the test with it."""

import functools
import gc
import inspect
import json
import platform
import subprocess
import sys
import timeit
import warnings
import weakref

from common import upstream
from common.cli import UserError
from common.hardware import apply, choose, describe_machine

import keras
import numpy as np
import pytest
import scipy.special
import tensorflow as tf
from conftest import TWO_DEVICES, run_program
from keras.src.backend.tensorflow.trainer import TensorFlowTrainer
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


SEVERAL_WORKERS = """
import json, os, sys
os.environ["KERAS_BACKEND"] = "tensorflow"
index, *ports, cures = sys.argv[1:]
cluster = {"worker": [f"127.0.0.1:{port}" for port in ports]}
os.environ["TF_CONFIG"] = json.dumps({"cluster": cluster, "task": {"type": "worker", "index": int(index)}})
import keras, numpy as np, tensorflow as tf
from common import upstream
strategy = tf.distribute.MultiWorkerMirroredStrategy()
for cure in cures.split():
    getattr(upstream, cure)()
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
    ("cures", "message"),
    [
        (["cure_several_workers"], "Attempt to convert a value (PerReplica"),
        (["cure_symbolic_build"], "Invalid reduction dimension 0 for input with 0 dimensions"),
        (["cure_several_workers", "cure_symbolic_build"], None),
    ],
)
def test_plain_keras_under_multi_worker_strategy(cures, message):
    """https://github.com/keras-team/keras/issues/20585: each cure alone is not enough."""
    ports = list(map(str, load_script("launch").free_ports(2)))
    workers = [
        subprocess.Popen(
            [sys.executable, "-c", SEVERAL_WORKERS, str(index), *ports, " ".join(cures)],
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
        assert 0 not in codes, "mended upstream: delete the cure"
        assert any(message in each for each in errors), errors


REPLICAS = """
import json, os, sys
os.environ["KERAS_BACKEND"] = "tensorflow"
import keras, numpy as np, tensorflow as tf
from common import upstream
cpu = tf.config.list_physical_devices("CPU")[0]
tf.config.set_logical_device_configuration(cpu, [tf.config.LogicalDeviceConfiguration()] * 2)
strategy = tf.distribute.MirroredStrategy(["/CPU:0", "/CPU:1"])
upstream.cure_symbolic_build()
if "cured" in sys.argv:
    upstream.cure_replicas()

# Three examples: two for the first replica, one for the second, with the weights that make the gradient right.
x = np.array([[1.0], [2.0], [4.0]], "float32")
rows, weights = [[0, 2], [1]], [4 / 3, 2 / 3]

def slices(context):
    def of_replica(replica):
        mine = tf.gather(x, tf.ragged.constant(rows)[replica])
        return mine, mine * 0, tf.fill([tf.shape(mine)[0]], tf.gather(weights, replica))
    return tf.data.Dataset.range(2).repeat().map(of_replica)

with strategy.scope():
    model = keras.Sequential([keras.Input([1]), keras.layers.Dense(1, kernel_initializer="ones")])
    model.compile(keras.optimizers.SGD(0.0), "mse")
    dropout = keras.layers.Dropout(0.5, seed=0)
history = model.fit(
    strategy.distribute_datasets_from_function(slices), steps_per_epoch=1, verbose=0, shuffle=False
).history
masks = strategy.run(lambda: dropout(tf.ones([1, 64]), training=True)).values
print(json.dumps({
    "loss": history["loss"][0],
    "same_mask": bool(tf.reduce_all(masks[0] == masks[1])),
    "synchronized": keras.layers.BatchNormalization().synchronized,
}))
"""


@pytest.mark.parametrize("cured", [False, True])
def test_plain_keras_under_several_replicas(cured):
    """common/upstream.py: cure_loss_average, cure_dropout, cure_batch_normalization."""
    words = [sys.executable, "-c", REPLICAS, *(["cured"] if cured else [])]
    run = subprocess.run(words, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    found, mean = json.loads(run.stdout.splitlines()[-1]), (1 + 4 + 16) / 3
    hint = "" if cured else "mended upstream: delete the cure"
    assert (abs(found["loss"] - mean) < 1e-5) == cured, hint
    assert found["same_mask"] != cured, hint
    assert found["synchronized"] == cured, hint


def test_dropout_of_a_replica_is_its_part_of_the_whole(monkeypatch):
    """On two replicas, each example loses the units that it would lose on one; also where their slices are unequal."""
    upstream.cure_dropout()
    strategy = apply(choose(describe_machine(), TWO_DEVICES), TWO_DEVICES)
    images = tf.reshape(tf.range(1.0, 5 * 4 * 3 + 1), [5, 4, 3])
    for shape in (None, (None, 1, 3), (None, 4, 1), (1, 4, 3)):
        whole = keras.layers.Dropout(0.5, noise_shape=shape, seed=1)(images, training=True)
        with strategy.scope():
            dropout = keras.layers.Dropout(0.5, noise_shape=shape, seed=1)

        def of_replica(dropout=dropout):
            replica = tf.distribute.get_replica_context().replica_id_in_sync_group
            return dropout(images[replica::2], training=True)

        for replica, part in enumerate(strategy.run(of_replica).values):
            np.testing.assert_array_equal(part, whole[replica::2])


def test_another_version_of_keras_is_refused_for_several_workers(monkeypatch):
    monkeypatch.setattr(keras, "__version__", "3.16.0")
    with pytest.raises(UserError, match=r"keras 3\.16\.0: several workers need"):
        upstream.cure_several_workers.__wrapped__()


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


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_adam_in_one_operation_equals_keras(weight_decay):
    """common/upstream.py: cure_adam."""
    upstream.cure_adam()
    cured = keras.optimizers.Adam.update_step
    original = inspect.getclosurevars(cured).nonlocals["original"]
    inputs = np.random.default_rng(0).normal(size=(64, 5)).astype(np.float32)
    outcomes, operations = [], []
    for update_step in (cured, original):
        keras.utils.set_random_seed(1)
        model = keras.Sequential([keras.Input((5,)), keras.layers.Dense(7, activation="tanh"), keras.layers.Dense(1)])
        optimizer = keras.optimizers.AdamW(0.01, weight_decay=weight_decay)
        optimizer.update_step = functools.partial(update_step, optimizer)
        model.compile(optimizer, "mse")
        model.fit(inputs, inputs[:, :1], epochs=20, verbose=0)
        outcomes.append([variable.numpy() for variable in (*model.variables, *optimizer.variables)])
        gradients = [tf.ones(each.shape) for each in model.trainable_variables]
        step = tf.function(functools.partial(optimizer.apply, gradients)).get_concrete_function()
        operations.append({operation.type for operation in step.graph.get_operations()})
    for one, other in zip(*outcomes, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-6)
    assert "ResourceApplyAdam" in operations[0]
    assert "ResourceApplyAdam" not in operations[1], "mended upstream: delete the cure"


@pytest.mark.parametrize("amsgrad", [False, True])
def test_adam_squares_the_sum_of_what_a_repeated_word_asks_for(amsgrad):
    """common/upstream.py: cure_adam."""
    upstream.cure_adam()
    cured = keras.optimizers.Adam.update_step
    original = inspect.getclosurevars(cured).nonlocals["original"]
    places, asked = np.array([1, 1, 1, 2]), np.array([[0.3], [-0.1], [0.4], [0.2]], np.float32)
    outcomes = []
    for update_step in (cured, original):
        embeddings = keras.Variable(np.zeros((3, 1)))
        optimizer = keras.optimizers.Adam(0.01, amsgrad=amsgrad)
        optimizer.update_step = functools.partial(update_step, optimizer)
        optimizer.apply([tf.IndexedSlices(asked, places, [3, 1])], [embeddings])
        outcomes.append(embeddings.numpy()[:, 0])
    # The first step of Adam is as long as its learning rate, whatever the gradient.
    np.testing.assert_allclose(outcomes[0], [0, -0.01, -0.01], rtol=1e-4)
    assert abs(outcomes[1][1] + 0.01) > 0.001, "mended upstream: convert no slices in the cure"


@pytest.mark.parametrize("dtype", ["bfloat16", "float32", "float64"])
def test_gradient_of_silu_in_one_pass_equals_the_formula(dtype):
    """common/upstream.py: cure_silu."""
    original = tf.nn.silu
    upstream.cure_silu()
    inputs = tf.cast(np.linspace(-100, 100, 40_001), dtype)
    of_outputs = tf.cast(np.random.default_rng(0).normal(0, 1, inputs.shape), dtype)
    gradients, passes = [], []
    for silu in (keras.activations.silu, original):

        @tf.function
        def gradient(silu=silu):
            with tf.GradientTape() as tape:
                tape.watch(inputs)
                outputs = silu(inputs)
            return tape.gradient(outputs, inputs, of_outputs)

        gradients.append(gradient())
        operations = gradient.get_concrete_function().graph.get_operations()
        passes.append([each for each in operations if each.type not in ("Const", "Identity", "IdentityN")])
    x, outer = np.asarray(inputs, np.float64), np.asarray(of_outputs, np.float64)
    sigmoid = scipy.special.expit(x)
    expected = outer * (sigmoid + x * sigmoid * (1 - sigmoid))
    precision = {"bfloat16": 2**-8, "float32": 1e-6, "float64": 1e-14}[dtype]
    np.testing.assert_allclose(np.asarray(gradients[0], np.float64), expected, rtol=precision, atol=precision / 10)
    assert gradients[0].dtype == inputs.dtype
    assert passes[0][-1].get_attr("_XlaMustCompile"), "not in one pass"
    assert len(passes[1]) > len(passes[0]), "mended upstream: delete the cure"


@pytest.mark.parametrize(("scale", "center"), [(True, True), (True, False), (False, True)])
def test_fused_batch_normalization_equals_keras(scale, center):
    """common/upstream.py: cure_fusion."""
    upstream.cure_fusion()
    cured = keras.layers.BatchNormalization.call
    original = inspect.getclosurevars(cured).nonlocals["original"]
    images = tf.constant(np.random.default_rng(0).normal(3, 2, (6, 5, 4, 7)), tf.float32)
    outcomes, operations = [], []
    for call in (cured, original):
        layer = keras.layers.BatchNormalization(
            momentum=0.6, scale=scale, center=center, gamma_initializer=keras.initializers.Constant(1.7)
        )
        layer.build(images.shape)
        with tf.GradientTape() as tape:
            tape.watch(images)
            outputs = call(layer, images, training=True)
            loss = tf.reduce_sum(outputs**3)
        gradients = tape.gradient(loss, [images, *layer.trainable_variables])
        outcomes.append([outputs, *gradients, *layer.variables, call(layer, images, training=False)])
        step = tf.function(functools.partial(call, layer, training=True)).get_concrete_function(images)
        operations.append({operation.type for operation in step.graph.get_operations()})
    for one, other in zip(*outcomes, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-4)
    assert "FusedBatchNormV3" in operations[0]
    assert "FusedBatchNormV3" not in operations[1], "mended upstream: delete the cure"


@pytest.mark.parametrize(
    ("shape", "kernel", "padding", "strides", "replaced"),
    [
        ((5, 7, 8, 6), (3, 3, 6, 4), "SAME", 1, True),
        ((2, 3, 3, 6), (2, 4, 6, 5), "SAME", 1, True),
        ((5, 9, 8, 6), (5, 2, 6, 4), "VALID", 1, True),
        ((5, 7, 9, 6), (3, 3, 6, 4), "SAME", 1, False),
        ((5, 7, 8, 6), (3, 3, 6, 4), "SAME", 2, False),
        ((5, 7, 8, 6), (3, 3, 6, 4), [[0, 0], [1, 1], [0, 2], [0, 0]], 1, False),
    ],
)
@pytest.mark.parametrize("eager", [True, False])
def test_filter_gradient_by_products_equals_the_one_in_float32(shape, kernel, padding, strides, replaced, eager):
    """common/upstream.py: cure_filter_gradient."""
    upstream.cure_filter_gradient()
    draw = np.random.default_rng(0)
    images, filters = (tf.constant(draw.integers(-3, 4, size), tf.float32) for size in (shape, kernel))
    outcomes = []

    def gradients(images, filters):
        with tf.GradientTape() as tape:
            tape.watch([images, filters])
            outputs = tf.nn.conv2d(images, filters, strides, padding)
        return tape.gradient(outputs, [images, filters], tf.sign(outputs))

    for dtype in (tf.float32, tf.bfloat16):
        given = tf.cast(images, dtype), tf.cast(filters, dtype)
        graph = tf.function(gradients).get_concrete_function(*given).graph
        operations = {operation.type for operation in graph.get_operations()}
        outcomes.append([tf.cast(one, tf.float32) for one in (gradients if eager else tf.function(gradients))(*given)])
    assert ("Conv2DBackpropFilter" not in operations) == replaced
    for one, other in zip(*outcomes, strict=True):
        np.testing.assert_allclose(other, one, rtol=2**-8)  # Whole numbers: exact but for the last rounding.


@pytest.mark.skipif(
    platform.machine() != "x86_64" or not describe_machine().bfloat16,
    reason="this is no x86 processor with instructions for bfloat16",
)
def test_filter_gradient_of_tensorflow_is_slower_than_products():
    """common/upstream.py: cure_filter_gradient."""
    upstream.cure_filter_gradient()
    given = [tf.ones([300, 3, 3, 256], tf.bfloat16), tf.ones([3, 3, 256, 256], tf.bfloat16)]

    @tf.function
    def cured(images, filters):
        with tf.GradientTape() as tape:
            tape.watch(filters)
            outputs = tf.nn.conv2d(images, filters, 1, "SAME")
        return tape.gradient(outputs, filters, images)

    @tf.function
    def original(images, filters):
        settings = {"filter_sizes": filters.shape, "strides": [1] * 4, "padding": "SAME"}
        return tf.raw_ops.Conv2DBackpropFilter(input=images, out_backprop=images, **settings)

    np.testing.assert_allclose(cured(*given), original(*given), rtol=2**-7)
    pairs = [[timeit.timeit(functools.partial(each, *given), number=2) for each in (original, cured)] for _ in range(7)]
    ratios = [slow / quick for slow, quick in pairs]
    assert np.median(ratios) > 1, "mended upstream: delete the cure"


OWN_PIPELINES = """
import tensorflow as tf
options = tf.distribute.InputOptions(
    experimental_fetch_to_device=False, experimental_replication_mode=tf.distribute.InputReplicationMode.PER_REPLICA
)
strategy = tf.distribute.MultiWorkerMirroredStrategy()
strategy.distribute_datasets_from_function(lambda context: tf.data.Dataset.range(3), options)
"""


def test_several_workers_still_refuse_pipelines_of_their_own():
    """common/upstream.py: distributed. The crash itself comes too rarely to wait for it."""
    run = run_program("-c", OWN_PIPELINES)
    assert "NotImplementedError: InputReplicationMode.PER_REPLICA" in run.stderr, "mended upstream: pass the options"


DELETED_ITERATORS = """
import sys, time
import tensorflow as tf
if "cured" in sys.argv:
    from common.upstream import cure_iterator_wait
    cure_iterator_wait()
waited = 0.0
for _ in range(20 if "cured" in sys.argv else 200):
    if waited > 0.2:
        break
    iterator = iter(tf.data.Dataset.range(1 << 40).map(abs, num_parallel_calls=tf.data.AUTOTUNE).prefetch(1))
    made = time.perf_counter()
    while time.perf_counter() < made + 0.35:  # Untouched, the tuner sleeps from 0.31 to 0.63 seconds.
        next(iterator)
    began = time.perf_counter()
    del iterator
    waited += time.perf_counter() - began
print(waited)
"""


@pytest.mark.parametrize("cured", ["cured", "as it comes"])
def test_tensorflow_still_waits_for_its_tuner_to_wake_up(cured):
    """One deletion in three takes the 0.28 s until then; fewer on a busy machine, none where nothing was read."""
    waited = float(run_program("-c", DELETED_ITERATORS, cured).stdout)
    assert (waited < 0.2) == (cured == "cured"), "mended upstream: delete the cure, and the options in common/plain.py"


TRACES = """
import sys
from common import upstream
import keras, numpy as np
if "cured" in sys.argv:
    upstream.cure_symbolic_build()

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


def test_keras_still_traces_the_first_step_twice():
    """common/upstream.py: cure_symbolic_build."""
    plain, cured = (run_program("-c", TRACES, name) for name in ("plain", "cured"))
    assert plain.returncode == cured.returncode == 0, plain.stderr + cured.stderr
    (before, *expected), (after, *found) = plain.stdout.split(), cured.stdout.split()
    assert after == "1"
    assert found == expected
    assert before == "2", "mended upstream: delete what the cure does on one device"


def test_the_cure_is_applied_once():
    upstream.cure_symbolic_build()
    cured = TensorFlowTrainer._maybe_symbolic_build
    upstream.cure_symbolic_build()
    assert TensorFlowTrainer._maybe_symbolic_build is cured


def test_a_vocabulary_that_was_learned_is_not_read_back_as_it_was_saved(tmp_path):
    words = keras.layers.TextVectorization()
    words.adapt(np.array(["one\x85two three"]))
    texts = keras.Input([], dtype="string")
    keras.Model(texts, words(texts)).save(tmp_path / "adapted.keras")
    kept = upstream.with_vocabulary_in_config(words)
    keras.Model(texts, kept(texts)).save(tmp_path / "kept.keras")
    text = tf.constant(["three one\x85two"])
    np.testing.assert_array_equal(keras.models.load_model(tmp_path / "kept.keras")(text), words(text))
    adapted = keras.models.load_model(tmp_path / "adapted.keras")
    assert not np.array_equal(adapted(text), words(text)), "mended upstream: delete the cure"


def test_tf2onnx_takes_the_constants_of_normalization_for_inputs(tmp_path):
    onnx = pytest.importorskip("onnx", reason="the extra `export` is not installed")
    pytest.importorskip("tf2onnx", reason="the extra `export` is not installed")
    columns = keras.Input([3])
    normalized = keras.layers.Normalization(mean=[1.0, 2.0, 3.0], variance=[1.0, 4.0, 9.0])(columns)
    model = keras.Model(columns, keras.layers.Dense(2)(normalized))
    counts = []
    for name in ("as_it_comes.onnx", "cured.onnx"):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # tf2onnx 1.17 asks NumPy for names that went.
            signature = [tf.TensorSpec([None, 3], tf.float32, "columns")]
            model.export(tmp_path / name, format="onnx", verbose=False, input_signature=signature)
        counts.append(len(onnx.load(tmp_path / name).graph.input))
        upstream.free_of_tensors(model)
    assert counts[1] == 1
    assert counts[0] > 1, "mended upstream: delete the cure"


def test_distillation_by_name_takes_the_loss_of_logits():
    """recipes/distillation.py gives the loss as an object: an object alone is given probabilities."""
    teacher, student = (tf.constant(logits) for logits in ([[2.0, 0.0, -1.0]], [[0.0, 1.0, 0.5]]))
    right = float(keras.losses.kl_divergence(*(tf.nn.softmax(logits / 3) for logits in (teacher, student)))[0]) * 9
    by_object = keras.distillation.LogitsDistillation(3.0, keras.losses.KLDivergence())
    assert float(by_object.compute_loss(teacher, student)) == pytest.approx(right, rel=1e-5)
    by_name = keras.distillation.LogitsDistillation(3.0)
    assert float(by_name.compute_loss(teacher, student)) != pytest.approx(right, rel=0.1), "mended: leave the loss out"


DISTILLER_LOSS = """
import sys
from common.upstream import cure_distiller
import keras, numpy as np
if "cured" in sys.argv:
    cure_distiller()
inputs = keras.Input([2])
teacher, student = (keras.Model(inputs, keras.layers.Dense(3)(inputs)) for _ in range(2))
distiller = keras.distillation.Distiller(
    teacher, student, keras.distillation.LogitsDistillation(2.0, keras.losses.KLDivergence())
)
distiller.compile("sgd", keras.losses.CategoricalCrossentropy(from_logits=True))
x, y = np.ones([4, 2], np.float32), np.eye(3, dtype=np.float32)[[0, 1, 2, 0]]
once, twice = (float(distiller.compute_loss(x, y, distiller(x), np.full(4, weight))) for weight in (1.0, 2.0))
print(twice / once)
"""


@pytest.mark.parametrize("cured", ["cured", "as it comes"])
def test_distiller_leaves_sample_weights_out(cured):
    ratio = float(run_program("-c", DISTILLER_LOSS, cured).stdout)
    assert ratio == pytest.approx(2 if cured == "cured" else 1, rel=1e-5), "mended upstream: delete the cure"
