"""The decisions are a pure function of a description of the machine, so they are tested without a GPU."""

import json
import platform
import textwrap

from common.cli import SharedConfig, UserError
from common.hardware import Machine, choose, describe_machine, free_memory

import pytest
from programs import run_program

LAPTOP = Machine("Laptop", 4, 8 << 30)
TPU = Machine("Server", 96, 64 << 30, tpus=8)
T4, A100 = ("T4", (7, 5)), ("A100", (8, 0))


def with_gpus(*gpus: tuple) -> Machine:
    return Machine("Server", 16, 64 << 30, gpus)


@pytest.mark.parametrize(
    ("machine", "flags", "expected"),
    [
        (LAPTOP, {}, ("none", 1, "float32", 4)),
        (LAPTOP, {"devices": 2}, ("mirrored", 2, "float32", 4)),
        (LAPTOP, {"threads": 1, "precision": "mixed_bfloat16"}, ("none", 1, "mixed_bfloat16", 1)),
        (with_gpus(T4), {}, ("none", 1, "mixed_float16", 16)),
        (with_gpus(A100), {}, ("none", 1, "mixed_bfloat16", 16)),
        (with_gpus(A100), {"precision": "float32"}, ("none", 1, "float32", 16)),
        (with_gpus(A100, A100), {}, ("mirrored", 2, "mixed_bfloat16", 16)),
        (with_gpus(A100, T4), {}, ("mirrored", 2, "float32", 16)),
        (with_gpus(T4, T4), {"devices": 1}, ("none", 1, "mixed_float16", 16)),
        (with_gpus(A100, A100), {"devices": 1}, ("none", 1, "mixed_bfloat16", 16)),
        (with_gpus(A100, A100), {"strategy": "none"}, ("none", 1, "mixed_bfloat16", 16)),
        (LAPTOP, {"strategy": "mirrored"}, ("mirrored", 1, "float32", 4)),
        (TPU, {}, ("tpu", 8, "mixed_bfloat16", 96)),
        (TPU, {"strategy": "none"}, ("none", 1, "float32", 96)),
    ],
)
def test_choices(machine, flags, expected):
    choices = choose(machine, SharedConfig(**flags))
    assert tuple(choices[name][0] for name in ("strategy", "devices", "precision", "threads")) == expected
    assert all(reason for _, reason in choices.values())


@pytest.mark.parametrize(
    ("machine", "flags", "workers", "expected"),
    [
        (LAPTOP, {"batch_size": 129}, 3, ("multi-worker", 3, "float32")),
        (LAPTOP, {}, 1, ("none", 1, "float32")),
        (LAPTOP, {"strategy": "multi-worker"}, 1, ("multi-worker", 1, "float32")),
        (LAPTOP, {"strategy": "mirrored", "devices": 2}, 3, ("mirrored", 2, "float32")),
        (with_gpus(A100, A100), {}, 2, ("multi-worker", 4, "mixed_bfloat16")),
        (with_gpus(A100, A100), {"devices": 1}, 2, ("multi-worker", 2, "mixed_bfloat16")),
    ],
)
def test_choices_in_a_cluster(machine, flags, workers, expected):
    choices = choose(machine, SharedConfig(**flags), workers)
    assert tuple(choices[name][0] for name in ("strategy", "devices", "precision")) == expected


@pytest.mark.parametrize(
    ("machine", "flags", "named"),
    [
        (LAPTOP, {"strategy": "multi-worker"}, "--strategy multi-worker: neither TF_CONFIG nor Slurm names workers"),
        (LAPTOP, {"strategy": "tpu"}, "--strategy tpu: TensorFlow finds no TPU"),
        (TPU, {"devices": 2}, "--devices 2: not supported with --strategy tpu"),
        (with_gpus(T4), {"devices": 2}, "--devices 2: this machine has 1 GPU"),
        (LAPTOP, {"strategy": "none", "devices": 2}, "--strategy none: uses one device, not --devices 2"),
        (LAPTOP, {"precision": "mixed_float16"}, "--precision mixed_float16: a CPU computes"),
        (LAPTOP, {"devices": 4, "batch_size": 3}, "--batch-size 3: not a multiple of the 4 devices; give 4"),
        (LAPTOP, {"devices": 3}, "--batch-size 128: not a multiple of the 3 devices; give 129"),
        (with_gpus(T4, T4), {"precision": "mixed_float16"}, "--precision mixed_float16: not on several devices"),
    ],
)
def test_what_the_machine_cannot_do_is_refused(machine, flags, named):
    with pytest.raises(UserError, match=named):
        choose(machine, SharedConfig(**flags))


@pytest.mark.parametrize(
    ("machine", "precision", "slow"),
    [
        (Machine("Old", 2, 8 << 30, bfloat16=False), "mixed_bfloat16", True),
        (Machine("Old", 2, 8 << 30, bfloat16=False), "auto", False),
        (Machine("Old", 2, 8 << 30, (A100,), bfloat16=False), "mixed_bfloat16", False),
        (LAPTOP, "mixed_bfloat16", False),
    ],
)
def test_who_asks_a_processor_for_what_it_lacks_is_told(machine, precision, slow):
    _, reason = choose(machine, SharedConfig(precision=precision))["precision"]
    assert ("SLOW: float32 is quicker" in reason) is slow


@pytest.mark.parametrize(
    ("flags", "bfloat16"), [("avx2 avx512_bf16", True), ("amx_bf16", True), ("asimd bf16", True), ("avx2 f16c", False)]
)
def test_what_a_processor_can_is_read_from_its_flags(flags, bfloat16, monkeypatch):
    lines = f"model name\t: Some CPU\nflags\t\t: fpu {flags} sse\n"
    monkeypatch.setattr("pathlib.Path.read_text", lambda path, encoding: lines)
    machine = describe_machine()
    assert (machine.processor, machine.bfloat16) == ("Some CPU", bfloat16)


def test_this_machine_is_described():
    machine = describe_machine()
    assert machine.processor
    assert machine.cores >= 1
    assert machine.memory_bytes > 1 << 28


PRETENDED_GPU = """
import sys
from tensorflow.python.eager import context
import tensorflow as tf

tf.config.list_physical_devices()
gpu = context.PhysicalDevice("/physical_device:GPU:0", "GPU")
context.context()._physical_devices.append(gpu)
context.context()._visible_device_list.append(gpu)
context.context()._pluggable_devices = []
tf.config.experimental.get_device_details = lambda gpu: {"device_name": "T4", "compute_capability": (7, 5)}

import keras
from common.cli import SharedConfig
from common.data import MNIST, load_images
from common.runs import start_run

config = SharedConfig(data="sample", smoke=True, run_dir=sys.argv[1], precision="float32")
data = load_images(MNIST, config, (28, 28))
data.train.arrays(slice(25))
run = start_run(config)
print("grows:", tf.config.experimental.get_memory_growth(gpu))
"""


@pytest.mark.long
def test_data_can_be_loaded_before_the_run_on_a_gpu(tmp_path):
    """A GPU that TensorFlow's context is told of: memory growth is set when TensorFlow is imported."""
    run = run_program("-c", PRETENDED_GPU, str(tmp_path / "run"))
    assert run.returncode == 0, run.stderr
    assert "T4: strategy none (one device)" in run.stdout
    assert run.stdout.endswith("grows: True\n")


@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="TensorFlow has oneDNN for such processors")
@pytest.mark.parametrize(("given", "used"), [({}, True), ({"TF_ENABLE_ONEDNN_OPTS": "0"}, False)])
@pytest.mark.long
def test_onednn_is_used_unless_the_user_says_otherwise(given, used, monkeypatch):
    """common/startup.py: TF_ENABLE_ONEDNN_OPTS."""
    monkeypatch.delenv("TF_ENABLE_ONEDNN_OPTS", raising=False)
    program = "import common; from tensorflow.python.util import _pywrap_util_port as port; print(port.IsMklEnabled())"
    run = run_program("-c", program, **given)
    assert (run.returncode, run.stdout.strip()) == (0, str(used)), run.stderr


@pytest.mark.long
def test_the_configuration_of_keras_is_not_that_of_the_user(tmp_path):
    """The recipes need Keras 3, images with channels last, and float32."""
    settings = {"image_data_format": "channels_first", "floatx": "float16", "epsilon": 0.1, "backend": "jax"}
    (tmp_path / "keras.json").write_text(json.dumps(settings))
    program = """
        import common.hardware as hardware
        from common.cli import SharedConfig
        import keras, tensorflow as tf
        hardware.apply(hardware.choose(hardware.describe_machine(), SharedConfig()), SharedConfig())
        config = keras.config
        print(tf.keras.__version__[0], config.image_data_format(), config.floatx(), config.epsilon(), config.backend())
    """
    run = run_program("-c", textwrap.dedent(program), KERAS_HOME=str(tmp_path), TF_USE_LEGACY_KERAS="1")
    assert run.stdout == "3 channels_last float32 1e-07 tensorflow\n", run.stderr


def test_the_limit_of_a_container_counts(tmp_path):
    """Cached files are no obstacle: the system drops them when memory is needed."""
    whole = free_memory(str(tmp_path))
    assert whole > 10**8
    for version, limit, usage in (("", "max", "current"), ("memory/", "limit_in_bytes", "usage_in_bytes")):
        for name, content in ((limit, "50000000"), (usage, "40000000"), ("stat", "anon 1\ninactive_file 15000000\n")):
            path = tmp_path / f"{version}memory.{name}"
            path.parent.mkdir(exist_ok=True)
            path.write_text(content)
        assert free_memory(str(tmp_path)) == 25_000_000
        (tmp_path / f"{version}memory.{limit}").write_text("max")
    assert free_memory(str(tmp_path)) > 10**8
