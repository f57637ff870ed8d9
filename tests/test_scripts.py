"""The scripts that set up, publish and compare."""

import json
import os
import pathlib
import shutil
import subprocess

import pytest
from conftest import ROOT, run_program
from test_readme import load_script

reproduce, benchmark = load_script("reproduce"), load_script("benchmark")


def fake_run(accuracy: float, seed: int) -> dict:
    return {
        "recipe": "mnist_cnn",
        "seed": seed,
        "metrics": {"accuracy": accuracy, "logistic_regression_accuracy": 0.92},
        "seconds": {"compile": 2.0, "train": 100.0 + seed},
        "data": {"name": "MNIST", "source": "tfds", "train": 54_000, "validation": 6_000, "test": 10_000},
        "hardware": {"cores": 2, "processor": "Some CPU", "gpus": []},
        "versions": {"tensorflow": "2.21.0", "keras": "3.15.1"},
        "history": [{"val_accuracy": 0.9, "val_loss": 1.0}, {"val_accuracy": 0.95, "val_loss": 0.9}],
    }


@pytest.fixture
def project(tmp_path, monkeypatch):
    """A copy of the project that `reproduce` may write to."""
    shutil.copytree(ROOT / "recipes", tmp_path / "recipes", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "README.md", tmp_path)
    (tmp_path / "results").mkdir()
    monkeypatch.setattr(reproduce, "ROOT", tmp_path)
    monkeypatch.setattr(reproduce, "RESULTS", tmp_path / "results")
    return tmp_path


def test_publishing_writes_mean_and_deviation(project):
    runs = [fake_run(accuracy, seed) for seed, accuracy in enumerate((0.991, 0.993, 0.995))]
    (project / "results" / "mnist_cnn.json").write_text(json.dumps({"runs": runs}))
    reproduce.publish()
    readme = (project / "README.md").read_text()
    (row,) = [line for line in readme.splitlines() if line.startswith("| [`mnist_cnn`]")]
    assert "accuracy 99.30 ± 0.20 %" in row
    assert "logistic regression: 92.00 ± 0.00 % (7.30 points below)" in row
    assert "MNIST (tfds): 54,000 train, 6,000 validation, 10,000 test" in row
    assert "| 1.7 min | 0, 1, 2 |" in row
    assert "2 cores of Some CPU, TensorFlow 2.21.0, Keras 3.15.1" in readme
    source = (project / "recipes" / "mnist_cnn.py").read_text()
    line = "Result    test accuracy 99.30 ± 0.20 % over 3 seeds, 1.7 min, 2 cores of Some CPU\n"
    assert source.count(line) == 1
    assert (project / "results" / "curves.png").read_bytes().startswith(b"\x89PNG")
    before = readme, source
    reproduce.publish()
    assert ((project / "README.md").read_text(), (project / "recipes" / "mnist_cnn.py").read_text()) == before


def test_reproducing_trains_once_per_seed(project):
    flags = ["--smoke", "--quiet", "--no-baseline", "--data-dir", "/some/place"]
    reproduce.reproduce("linear_regression", [3, 5], flags)
    record = json.loads((project / "results" / "linear_regression.json").read_text())
    assert [run["seed"] for run in record["runs"]] == [3, 5]
    assert record["runs"][1]["command"] == (
        "python recipes/linear_regression.py --smoke --quiet --no-baseline --seed 5"
    )
    assert record["runs"][0]["weights_sha256"] != record["runs"][1]["weights_sha256"]
    assert record["runs"][0]["metrics"]["mse"] > 0


def test_a_recipe_that_fails_publishes_nothing(project):
    with pytest.raises(reproduce.UserError, match="exit code 2 at seed 0"):
        reproduce.reproduce("linear_regression", [0], ["--no-such-flag"])
    assert not list((project / "results").iterdir())


def test_an_unknown_recipe_is_named():
    run = run_program(str(ROOT / "scripts" / "reproduce.py"), "no_such_recipe")
    assert (run.returncode, run.stdout) == (2, "")
    assert run.stderr.startswith("error: no recipe 'no_such_recipe'; choose one of cifar10_cnn, ")
    assert run.stderr.count("\n") == 1


@pytest.mark.parametrize(("recipe", "parameters"), [("cifar10_cnn", 122_570), ("mnist_cnn", 225_034)])
def test_the_naive_network_is_the_recipes(recipe, parameters):
    subject = benchmark.SUBJECTS[recipe]
    shape = (*subject.size, 1 if recipe == "mnist_cnn" else 3)
    assert benchmark.naive_network(subject, shape).count_params() == parameters


def test_benchmark_runs_pairs_in_fresh_processes():
    flags = ("--data", "sample", "--smoke", "--pairs", "1", "--naive-epochs", "2", "--recipe-epochs", "2")
    before = set((ROOT / "results").glob("*"))
    run = run_program(str(ROOT / "scripts" / "benchmark.py"), "mnist_cnn", *flags)
    assert run.returncode == 0, run.stderr
    lines = run.stdout.splitlines()
    assert lines[-3].startswith("pair 1: naive ")
    assert float(lines[-2].removeprefix("images per second, recipe / naive: ")) > 0
    assert lines[-1].startswith("seconds to 99% validation accuracy, recipe / naive: ")
    assert set((ROOT / "results").glob("*")) == before


def test_the_clock_stops_at_the_target():
    class Model:
        stop_training = False

    clock = benchmark.Clock(0.7)
    clock.set_model(Model())
    clock.on_train_begin()
    for epoch, accuracy in enumerate((0.5, 0.71)):
        assert not clock.reached
        clock.on_epoch_begin(epoch)
        clock.on_test_begin()
        clock.on_epoch_end(epoch, {"val_accuracy": accuracy})
    assert clock.reached
    assert clock.model.stop_training
    reached_after = clock.seconds
    clock.on_train_end()
    assert clock.seconds == reached_after > 0
    assert len(clock.training_seconds) == 2


def test_run_sh_names_the_recipes():
    run = subprocess.run([ROOT / "scripts" / "run.sh", "nothing"], capture_output=True, text=True, check=False)
    assert run.returncode == 2
    assert run.stderr.startswith("error: no recipe 'nothing'; choose one of: cifar10_cnn dense_classifier ")


@pytest.fixture
def fake_python(tmp_path):
    """A Python that makes virtual environments whose pip only writes down what it was asked for."""
    log = tmp_path / "pip.log"
    inner = f"""#!/bin/sh
case "$*" in
    "-m pip"*) echo "$*" >>{log}; exit "${{PIP_EXIT:-0}}" ;;
    *recipes*|*pytest*) echo "started $*" ;;
esac
"""
    outer = f"""#!/bin/sh
case "$*" in
    *venv*) for last; do :; done; mkdir -p "$last/bin"; cp {tmp_path}/inner "$last/bin/python" ;;
    --version) echo "Python 3.11.0" ;;
esac
"""
    for name, text in (("inner", inner), ("python", outer)):
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    return tmp_path / "python", log


def test_set_up_installs_once_and_again_when_requirements_change(tmp_path, fake_python):
    python, log = fake_python
    checkout = tmp_path / "checkout"
    checkout.mkdir()
    shutil.copytree(ROOT / "scripts", checkout / "scripts")
    shutil.copytree(ROOT / "recipes", checkout / "recipes")
    for path in (*ROOT.glob("*.txt"), ROOT / "pyproject.toml"):
        shutil.copy(path, checkout)

    def start(script: str, *words: str, **environment: str) -> subprocess.CompletedProcess:
        return subprocess.run(
            [checkout / "scripts" / script, *words],
            cwd="/",
            env={"PATH": os.environ["PATH"], "PYTHON": str(python), **environment},
            capture_output=True,
            text=True,
            check=False,
        )

    failed = start("run.sh", "mnist_cnn", PIP_EXIT="1")
    assert failed.returncode == 2
    assert failed.stderr.splitlines()[-1].startswith("error: pip could not install requirements.txt")
    assert installs(log) == ["requirements.txt"]

    first = start("run.sh", "mnist_cnn", "--epochs", "3")
    assert first.stdout == f"started {checkout}/recipes/mnist_cnn.py --epochs 3\n"
    assert start("run.sh", "mnist_cnn.py").returncode == 0
    assert installs(log) == ["requirements.txt"] * 2

    assert start("test.sh", "-x").stdout == "started -m pytest -x\n"
    assert installs(log) == ["requirements.txt"] * 2 + ["requirements-dev.txt"]

    with open(checkout / "requirements.txt", "a") as requirements:
        requirements.write("another-package\n")
    assert start("run.sh", "mnist_cnn").returncode == 0
    assert installs(log)[3:] == ["requirements.txt"]


def installs(log: pathlib.Path) -> list[str]:
    lines = log.read_text().splitlines()
    assert all("--constraint constraints.txt" in line for line in lines)
    return [line.split("--requirement ")[1].split()[0] for line in lines]


def test_constraints_fit_the_requirements():
    """Every package that is asked for has its tested version written down."""
    pinned = {line.split("==")[0].lower().replace("_", "-") for line in lines_of("constraints.txt")}
    for line in [*lines_of("requirements.txt"), *lines_of("requirements-dev.txt")]:
        if not line.startswith("-"):
            name = line.split(">")[0].lower().replace("_", "-")
            assert name in pinned
            assert "<" in line, f"{line}: no upper bound"


def lines_of(name: str) -> list[str]:
    return [line for line in (ROOT / name).read_text().splitlines() if line and not line.startswith("#")]
