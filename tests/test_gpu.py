"""What a machine with a GPU must show: scripts/test.sh -m gpu. Each training is a program of its own."""

import json

import pytest
from conftest import RECIPES
from programs import run_program
from test_readme import load_script

PRECISIONS = ("float32", "mixed_bfloat16", "mixed_float16")
SMOKE = ("--smoke", "--data", "sample", "--no-baseline", "--devices", "1")


# The tests of this process see no GPU, see conftest.py: the driver is asked.
GPUS = load_script("launch").gpu_count()

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not GPUS, reason="there is no NVIDIA GPU on this machine")]


def trained(recipe, run_dir, *flags):
    run = run_program(f"recipes/{recipe}.py", *flags, "--run-dir", str(run_dir))
    assert run.returncode == 0, run.stderr
    return json.loads((run_dir / "result.json").read_text()), run.stdout


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("name", RECIPES)
def test_each_recipe_trains_in_each_precision(name, precision, tmp_path):
    result, printed = trained(name, tmp_path / "run", *SMOKE, "--precision", precision)
    assert result["hardware"]["gpus"], "TensorFlow sees no GPU: see scripts/doctor.py"
    assert result["hardware"]["precision"] == precision
    assert all(abs(value) < float("inf") for value in result["metrics"].values())
    assert "no GPU" not in printed


@pytest.mark.parametrize("name", RECIPES)
def test_the_same_command_gives_the_same_weights(name, tmp_path):
    runs = [trained(name, tmp_path / folder, *SMOKE, "--deterministic")[0] for folder in ("one", "two")]
    assert runs[0]["weights_sha256"] == runs[1]["weights_sha256"]


def test_a_gpu_is_faster_than_the_processor(tmp_path):
    flags = ("--data", "sample", "--epochs", "3", "--no-baseline", "--precision", "float32", "--devices", "1")
    on_gpu, _ = trained("cifar10_cnn", tmp_path / "gpu", *flags)
    hidden = run_program(
        "recipes/cifar10_cnn.py", *flags[:-2], "--run-dir", str(tmp_path / "cpu"), CUDA_VISIBLE_DEVICES=""
    )
    assert hidden.returncode == 0, hidden.stderr
    on_cpu = json.loads((tmp_path / "cpu" / "result.json").read_text())
    assert on_gpu["examples_per_second"] > on_cpu["examples_per_second"]
    assert abs(on_gpu["metrics"]["accuracy"] - on_cpu["metrics"]["accuracy"]) < 0.05


def test_memory_grows_with_what_is_used():
    """Data that is loaded before the training stays in main memory, and TensorFlow does not take the whole GPU."""
    program = (
        "import subprocess, tensorflow as tf\n"
        "from common.batches import Split\n"
        "split = Split.from_arrays(tf.zeros([1000, 100, 1000], tf.uint8).numpy(), tf.zeros([1000, 1]).numpy())\n"
        "split.arrays(slice(25))\n"
        "tf.linalg.matmul(tf.ones([100, 100]), tf.ones([100, 100])).numpy()\n"
        "print(tf.config.experimental.get_memory_info('GPU:0')['peak'])\n"
    )
    run = run_program("-c", program)
    assert run.returncode == 0, run.stderr
    assert int(run.stdout.split()[-1]) < 50e6


@pytest.mark.skipif(GPUS < 2, reason="there are not two GPUs")
def test_two_gpus_compute_what_one_does(tmp_path):
    flags = ("--smoke", "--data", "sample", "--no-baseline", "--deterministic", "--precision", "float32")
    one, two = (trained("mnist_cnn", tmp_path / number, *flags, "--devices", number)[0] for number in ("1", "2"))
    for name, value in one["metrics"].items():
        assert two["metrics"][name] == pytest.approx(value, abs=1e-3)
