"""A bundled recipe stands alone: no file of this project is in its reach."""

import ast
import dataclasses
import functools
import importlib.metadata
import importlib.util
import json
import os
import pathlib
import shlex
import subprocess
import sys
import typing

from common import plain, user_files
from common.batches import BatchRandom
from common.cli import field_comments, run_script
from common.records import read_run

import nbclient
import nbformat
import numpy as np
import pytest
from conftest import NO_NETWORK, ROOT, load_recipe, run_program
from packaging.requirements import Requirement
from PIL import Image
from test_readme import load_script

bundle_script = load_script("bundle")
SMOKE = ("--smoke", "--data", "sample", "--deterministic", "--no-baseline", "--quiet", "--threads", "2")
# Called by Keras, argparse or TensorFlow, or read by name: vulture can't see that.
CALLED_FROM_OUTSIDE = {
    *("on_train_begin", "on_train_batch_end", "on_epoch_begin", "on_epoch_end", "epoch", "error", "_initial_epoch"),
    *("apply_default_optimizations", "enabled"),
    *BatchRandom._fields,  # Which of them matter, the augmentation decides.
}


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """Gives for a recipe a Python that has what the first lines of its bundle name, and not this project."""

    @functools.cache
    def with_packages(pip_line):
        folder = tmp_path_factory.mktemp("alone")
        subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder / "venv"], check=True)
        (site,) = (folder / "venv").glob("lib/python*/site-packages")
        wanted, found = [Requirement(word) for word in shlex.split(pip_line)[3:]], {}
        while wanted:  # And what those need.
            requirement = wanted.pop()
            if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
                installed = importlib.metadata.distribution(requirement.name)
                if found.setdefault(installed.name, installed) is installed:
                    wanted += map(Requirement, installed.requires or [])
        for installed in found.values():
            for name in {file.parts[0] for file in installed.files} - {"..", "__pycache__"}:
                if not (site / name).exists():
                    (site / name).symlink_to(installed.locate_file(name))
        python = folder / "venv" / "bin" / "python"
        project = subprocess.run([python, "-I", "-c", "import common"], capture_output=True, cwd=folder, check=False)
        assert project.returncode, "this project must be out of reach"
        return python

    return lambda recipe: with_packages(bundled_source(recipe.__name__).splitlines()[1])


@functools.cache
def bundled_source(name):
    return bundle_script.as_file(ROOT / "recipes" / f"{name}.py", "my_train.py")


def bundle(recipe, target):
    target.write_text(bundled_source(recipe.__name__))
    return target


def test_a_bundle_alone_gives_the_weights_of_the_recipe(recipe, alone, tmp_path):
    path = bundle(recipe, tmp_path / "my_train.py")
    environment = {**os.environ, **NO_NETWORK}
    command = [alone(recipe), "-I", str(path), *SMOKE, "--run-dir", "run"]
    run = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert (run.returncode, run.stdout) == (0, ""), run.stderr
    flags = ("--run-dir", str(tmp_path / "original"))
    assert run_program(f"recipes/{recipe.__name__}.py", *SMOKE, *flags).returncode == 0
    results = [json.loads((tmp_path / name / "result.json").read_text()) for name in ("run", "original")]
    assert results[0]["weights_sha256"] == results[1]["weights_sha256"]
    assert (results[0]["recipe"], results[1]["recipe"]) == ("my_train", recipe.__name__)


CUT_IN_THE_SECOND_EPOCH = """
import my_train

begin = my_train.Run.on_epoch_begin

def interrupted(self, epoch, logs=None):
    if epoch == 1:
        raise KeyboardInterrupt
    begin(self, epoch, logs)

my_train.Run.on_epoch_begin = interrupted
my_train.main()
"""


def test_a_bundle_resumes_exactly_and_what_it_trained_can_be_used(alone, tmp_path):
    recipe = load_recipe("mnist_cnn")
    bundle(recipe, tmp_path / "my_train.py")
    (tmp_path / "cut.py").write_text(CUT_IN_THE_SECOND_EPOCH)

    def run(*words):
        command = [alone(recipe), *words, *SMOKE]
        return subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)

    assert run("my_train.py", "--run-dir", "whole").returncode == 0
    cut = run("cut.py", "--run-dir", "cut")
    assert (cut.returncode, cut.stderr.splitlines()[-1].split(":")[0]) == (75, "interrupted"), cut.stderr
    assert not (tmp_path / "cut" / "result.json").exists()
    other = run("my_train.py", "--run-dir", "cut", "--resume", "--learning-rate", "0.5")
    assert (other.returncode, "Traceback" in other.stderr) == (2, False), other.stderr
    assert "error: --resume: learning_rate was 0.0" in other.stderr
    (tmp_path / "cut" / "checkpoints" / "step-99_temp").mkdir()  # As TensorFlow leaves it, killed while it writes.
    resumed = run("my_train.py", "--run-dir", "cut", "--resume")
    assert resumed.returncode == 0, resumed.stderr
    again = run("my_train.py", "--run-dir", "cut", "--resume")  # As a scheduler does that repeats until it gets a 0.
    assert (again.returncode, again.stdout.split(";")[0]) == (0, "cut: finished already"), again.stderr
    whole, cut = (read_run(tmp_path / name) for name in ("whole", "cut"))
    for key in ("weights_sha256", "metrics", "history"):
        assert whole[key] == cut[key], key
    Image.new("L", (28, 28)).save(tmp_path / "black.png")
    (answer,) = load_script("predict").predict(tmp_path / "cut", [str(tmp_path / "black.png")])
    assert answer["class"] in whole["class_names"]


def test_a_bundle_trains_on_several_devices(alone, tmp_path):
    recipe = load_recipe("cifar10_cnn")
    bundle(recipe, tmp_path / "my_train.py")
    losses = []
    for devices in ("1", "2"):
        # Batches of 67 and 68 pictures: the halves of some are not of one size.
        flags = ("--batch-size", "78", "--devices", devices, "--run-dir", devices)
        command = [alone(recipe), "my_train.py", *SMOKE, *flags]
        run = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
        assert run.returncode == 0, run.stderr
        losses.append(read_run(tmp_path / devices)["metrics"]["loss"])
    assert losses[0] == pytest.approx(losses[1], rel=1e-2)


def test_a_bundle_is_clean_and_complete(recipe, tmp_path):
    path = bundle(recipe, tmp_path / "my_train.py")
    for command in (
        ["check", "--isolated", "--line-length", "130"],
        ["format", "--check", "--config", "pyproject.toml"],
    ):
        run = run_program("-m", "ruff", *command, str(path))
        assert run.returncode == 0, run.stdout + run.stderr
    unused = run_program("-m", "vulture", str(path)).stdout.splitlines()
    seen = CALLED_FROM_OUTSIDE | {field.name for field in dataclasses.fields(recipe.Config)}
    assert not [line for line in unused if line.split("'")[1] not in seen], unused
    text = path.read_text()
    assert text.startswith(f"# Origin: recipes/{recipe.__name__}.py of ")
    assert "# pip install " in text.split('"""')[0]
    tree = ast.parse(text)
    docstring = recipe.__doc__.strip().replace(f"python recipes/{recipe.__name__}.py", "python my_train.py")
    assert ast.get_docstring(tree) == docstring
    modules = {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert not [module for module in modules if module.startswith("common")]
    names = [node.name for node in tree.body if isinstance(node, ast.FunctionDef | ast.ClassDef)]
    own = [node.name for node in ast.parse(pathlib.Path(recipe.__file__).read_text()).body if hasattr(node, "name")]
    assert names[: len(own)] == own, "the recipe's own part comes first, in its order"
    assert text.count("\n") <= 900, "nobody wants to read more"


def test_a_bundle_has_the_flags_of_the_recipe(recipe, tmp_path, monkeypatch):
    specification = importlib.util.spec_from_file_location("my_train", bundle(recipe, tmp_path / "my_train.py"))
    bundled = importlib.util.module_from_spec(specification)
    monkeypatch.setitem(sys.modules, "my_train", bundled)
    specification.loader.exec_module(bundled)
    flags = [
        {field.name: (field.default, types[field.name], comments[field.name]) for field in dataclasses.fields(config)}
        for config, types, comments in (
            (each.Config, typing.get_type_hints(each.Config, include_extras=True), field_comments(each.Config))
            for each in (bundled, recipe)
        )
    ]
    for name in bundle_script.LEFT_OUT:
        del flags[1][name]
    choices = [typing.get_args(each["strategy"][1]) for each in flags]
    assert set(choices[1]) - set(choices[0]) == {"multi-worker", "tpu", "parameter-server"}
    flags = [{**each, "strategy": None} for each in flags]
    assert flags[0] == flags[1]
    assert bundled.parse_config(bundled.Config, ["--seed", "7"]).seed == 7
    with pytest.raises(bundled.UserError, match="--batch-size: 0 must be at least 1"):
        bundled.parse_config(bundled.Config, ["--batch-size", "0"])


@pytest.mark.parametrize("name", ["linear_regression", "mnist_cnn"])
def test_a_notebook_runs_from_top_to_bottom(name, tmp_path, monkeypatch):
    path = tmp_path / "my_train.ipynb"
    written = run_program("scripts/bundle.py", f"recipes/{name}.py", "-o", str(path), "--notebook")
    assert (written.returncode, written.stderr) == (0, "")
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    last = notebook.cells[-1]
    assert last.source == "metrics = train(Config())\nmetrics"
    last.source = last.source.replace("Config()", 'Config(data="sample", smoke=True, epochs=1)')
    monkeypatch.setenv("JUPYTER_PLATFORM_DIRS", "1")
    nbclient.NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(tmp_path)}}).execute()
    (shown,) = [output for output in last.outputs if output.output_type == "execute_result"]
    assert "'mse'" in shown.data["text/plain"] or "'accuracy'" in shown.data["text/plain"]
    assert list(tmp_path.glob("runs/notebook/*/result.json"))
    headings = [cell.source for cell in notebook.cells if cell.cell_type == "markdown"]
    assert headings[0].startswith("# " + load_recipe(name).__doc__.splitlines()[0])


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("mode", ["L", "LA", "P", "RGB", "RGBA", "I;16"])
def test_a_bundle_sees_pictures_as_the_recipe_does(mode, channels, tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (9, 7, 4), np.uint8)
    image = Image.fromarray(pixels)
    if mode == "I;16":
        image = Image.fromarray(pixels[..., 0].astype(np.uint16) * 250)
    elif mode != "RGBA":
        image = image.convert(mode)
    image.save(tmp_path / "image.png", **({"transparency": 3} if mode == "P" else {}))
    seen = [module.read_image(tmp_path / "image.png", (8, 8, channels)) for module in (plain, user_files)]
    np.testing.assert_array_equal(*seen)


def picture_folder(folder):
    for name in ("data/one", "data/two", "data/none"):
        (folder / name).mkdir(parents=True)
    for number in range(20):
        Image.new("L", (28, 28), number).save(folder / "data" / ("one", "two")[number % 2] / f"{number}.png")
    return "mnist_cnn", "data"


def folder_beside_train(folder):
    for name in ("train/one", "train/two", "val/one", "val/two"):
        (folder / "data" / name).mkdir(parents=True)
        for number in range(20):
            Image.new("L", (28, 28), number).save(folder / "data" / name / f"{number}.png")
    return "mnist_cnn", "data"


def run_directory_that_is_a_file(folder):
    (folder / "run").write_text("something")
    return "linear_regression", "sample"


def damaged_state(folder):
    (folder / "run").mkdir()
    (folder / "run" / "state.json").write_text("{")
    return "linear_regression", "sample"


def two_columns_of_one_name(folder):
    (folder / "table.csv").write_text("y,a,a\n" + "1,2,3\n4,5,6\n" * 20)
    return "linear_regression", "table.csv"


@pytest.mark.parametrize(
    ("trouble", "line"),
    [
        (picture_folder, "--data data: needs a folder with images"),
        (folder_beside_train, "--data data: needs 'train', beside it only 'validation' and 'test'"),
        (run_directory_that_is_a_file, "--run-dir run: is not empty"),
        (damaged_state, "--resume: run/state.json is damaged; start a new run"),
        (two_columns_of_one_name, "table.csv: needs rows, and a name of its own for each column"),
    ],
)
def test_a_bundle_refuses_what_the_recipe_refuses(trouble, line, alone, tmp_path):
    name, data = trouble(tmp_path)
    recipe = load_recipe(name)
    before = sorted(tmp_path.rglob("*"))
    path = bundle(recipe, tmp_path / "my_train.py")
    command = [alone(recipe), str(path), "--data", data, "--quiet", "--run-dir", "run"]
    command += ["--resume"] * (trouble is damaged_state)
    run = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    path.unlink()
    assert run.returncode == 2, run.stderr
    assert run.stderr.splitlines()[-1].startswith(f"error: {line}")
    assert "Traceback" not in run.stderr
    assert sorted(tmp_path.rglob("*")) == before


def test_a_bundle_is_no_worker(alone, tmp_path):
    """Two of them would write to one folder."""
    recipe = load_recipe("linear_regression")
    path = bundle(recipe, tmp_path / "my_train.py")
    cluster = '{"cluster": {"worker": ["127.0.0.1:1", "127.0.0.1:2"]}, "task": {"type": "worker", "index": 0}}'
    command, environment = [alone(recipe), str(path)], {**os.environ, "TF_CONFIG": cluster}
    run = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 2
    assert run.stderr.splitlines()[-1].startswith("error: several workers: this file trains on one machine")
    assert list(tmp_path.iterdir()) == [path]


def test_a_bundle_is_no_recipe_to_bundle(tmp_path):
    path = bundle(load_recipe("linear_regression"), tmp_path / "my_train.py")
    with pytest.raises(bundle_script.UserError, match="no recipe"):
        bundle_script.as_file(path, "other.py")


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (("recipes/nowhere.py", "-o", "{}/x.py"), "recipes/nowhere.py: can't be read as Python"),
        (("recipes/mnist_cnn.py", "-o", "scripts/bundle.py"), "scripts/bundle.py: exists already"),
        (("recipes/mnist_cnn.py", "-o", "{}/no/x.py"), "can't be written"),
        (("recipes/mnist_cnn.py", "-o", "-"), "-o -: give a name that ends in .py"),
        (("recipes/mnist_cnn.py", "-o", "{}/x.py", "--notebook"), "or in .ipynb with --notebook"),
        (("scripts/predict.py", "-o", "{}/x.py"), "scripts/predict.py: no recipe"),
        (("recipes/mnist_cnn.py", "-o", "{}/keras.py"), "would hide Python's own keras"),
        (("recipes/mnist_cnn.py", "-o", "{}/a\\N.py"), "choose a name of letters"),
        (("recipes/mnist_cnn.py", "-o", "{}/" + 300 * "a" + ".py"), "200 at most"),
    ],
)
def test_what_cannot_be_bundled_is_named(words, named, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "argv", ["bundle.py", *(word.format(tmp_path) for word in words)])
    with pytest.raises(SystemExit) as left:
        run_script(bundle_script.main)
    printed = capsys.readouterr()
    assert (left.value.code, printed.out, printed.err.count("\n")) == (2, "", 1)
    assert named in printed.err
    assert not list(tmp_path.iterdir())
