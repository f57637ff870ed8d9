"""Each recipe as a user runs it, and the promises that every recipe keeps."""

import ast
import collections
import dataclasses
import itertools
import json
import os
import re
import shlex
import shutil
import sys

from common.batches import Split, steps_per_epoch
from common.data import Data
from common.records import weights_sha256
from common.tables import build_encoder, encoded, fit_features, target_scale

import keras
import numpy as np
import pandas as pd
import pytest
import tensorflow as tf
from conftest import load_recipe, run_smoke, short_set, small_flags, smoke_config, smoke_data
from programs import ROOT, run_program
from worker import COMPARED_IN_FLOAT64, SMALL, STEPS, STEPS_OF_OTHERS, in_float64

PARAMETERS = {
    "linear_regression": 3,
    "dense_classifier": 11_274,
    "dense_regression": 550_701,
    "mnist_cnn": 225_034,
    "cifar10_cnn": 122_570,
}
BIN = os.path.dirname(sys.executable)
RESULT_FIELDS = {
    *("recipe", "data", "metrics", "parameters", "seed", "epochs", "steps", "seconds", "examples_per_second"),
    *("peak_memory_bytes", "weights_sha256", "hardware", "versions", "commit", "command"),
}


def test_smoke_run_from_a_foreign_directory(recipe, finished_run):
    printed, directory = finished_run(recipe.__name__)
    assert printed.returncode == 0, printed.stderr
    assert printed.stderr == ""
    lines = printed.stdout.splitlines()
    assert lines[0].startswith("hardware: ")
    assert lines[-3:-1] == ["run directory: run", "watch it:"]
    program, *words = shlex.split(lines[-1])
    assert words == ["--logdir", "run"]
    assert os.path.samefile(os.path.join(directory.parent, program), shutil.which("tensorboard", path=BIN))
    for name in ("config.json", "result.json", "model.keras", "tensorboard", "plots/learning_curves.png"):
        assert (directory / name).exists(), name
    assert not list(directory.glob("*part*"))


@pytest.mark.long
def test_compiled_by_xla_it_learns_the_same(finished_run, tmp_path):
    """XLA, which --deterministic excludes, may round in another way, and no more."""
    name = "dense_classifier"
    _, directory = finished_run(name)
    recipe = ROOT / "recipes" / f"{name}.py"
    printed = run_program(recipe, "--smoke", "--run-dir", "xla", cwd=tmp_path)
    assert (printed.returncode, printed.stderr) == (0, "")
    deterministic, compiled = (
        json.loads((folder / "result.json").read_text()) for folder in (directory, tmp_path / "xla")
    )
    assert compiled["metrics"] == pytest.approx(deterministic["metrics"], rel=1e-4)
    assert compiled["weights_sha256"] != deterministic["weights_sha256"], "XLA was not at work"


def test_result_says_what_was_run(recipe, finished_run):
    printed, directory = finished_run(recipe.__name__)
    result = json.loads((directory / "result.json").read_text())
    assert set(result) >= RESULT_FIELDS
    data = smoke_data(recipe.__name__)
    assert result["recipe"] == recipe.__name__
    assert result["data"] == {
        "source": data.source,
        "name": data.name,
        "digest": data.digest(),
        "train": len(data.train),
        "validation": len(data.validation),
        "test": len(data.test),
    }
    assert data.name in printed.stdout
    assert result["parameters"] == PARAMETERS.get(recipe.__name__, result["parameters"])
    steps = steps_per_epoch(data.train, recipe.Config().batch_size)
    assert tuple(result["class_names"]) == data.class_names
    assert (result["seed"], result["epochs"], result["steps"]) == (0, 2, 2 * steps)
    assert "--smoke --data sample --deterministic " in result["command"]
    assert result["command"].endswith(" --run-dir run")
    assert result["command"] == shlex.join(["python", *printed.args])
    seconds = result["seconds"]
    parts = sum(seconds[part] for part in ("data", "compile", "train", "evaluate"))
    assert 0 < parts < seconds["total"]
    for name, value in result["metrics"].items():
        assert np.isfinite(value), name
        assert f"{value:.4f}" in printed.stdout
    config = json.loads((directory / "config.json").read_text())
    assert config["recipe"] == recipe.__name__
    assert config["config"]["batch_size"] == recipe.Config().batch_size


def test_the_saved_model_takes_what_a_user_has(recipe, finished_run):
    """Bytes of pixels, raw strings, raw columns: and gives the metric that the result states."""
    _, directory = finished_run(recipe.__name__)
    result = json.loads((directory / "result.json").read_text())
    model = keras.models.load_model(directory / "model.keras")
    assert weights_sha256(model) == result["weights_sha256"]
    test = smoke_data(recipe.__name__).test
    outputs, targets = model(test.inputs), test.targets.numpy()
    if "accuracy" in result["metrics"]:
        names, outputs = outputs["class"].numpy().astype(str), outputs["probabilities"].numpy()
        assert names.tolist() == [result["class_names"][label] for label in outputs.argmax(axis=1)]
        np.testing.assert_allclose(outputs.sum(axis=1), 1, rtol=1e-5)
        accuracy = np.mean(outputs.argmax(axis=1) == targets.argmax(axis=1))
        assert accuracy == pytest.approx(result["metrics"]["accuracy"], abs=0.011)
    else:
        assert np.mean((outputs - targets) ** 2) == pytest.approx(result["metrics"]["mse"], rel=1e-3)


@pytest.mark.parametrize("recipe", ["mnist_cnn", "text_classifier"], indirect=True)
def test_the_same_command_gives_the_same_weights(recipe, finished_run, tmp_path):
    """tests/test_torture.py shows it for the others, which end like their shared run."""
    _, directory = finished_run(recipe.__name__)
    again = run_smoke(recipe.__name__, tmp_path, "--run-dir", "run", "--quiet", "--no-baseline")
    assert (again.returncode, again.stdout, again.stderr) == (0, "", "")
    runs = [json.loads((run / "result.json").read_text()) for run in (directory, tmp_path / "run")]
    assert runs[0]["weights_sha256"] == runs[1]["weights_sha256"]


@short_set("linear_regression", "text_classifier", slow=["quantization"])
def test_mirrored_computes_what_one_device_computes(recipe, tmp_path, monkeypatch):
    """The first 20 steps, or a few more, of a training as long as that on the real set.

    As long, because the schedules stretch with it: in a training of 20 steps in all, the learning rate
    would be so high that a single unit of max pooling or relu that rounding tips over shows in 1e-5.
    """
    fit = keras.Model.fit
    monkeypatch.setattr(keras.Model, "fit", lambda model, *given, **named: fit(model, *given, **{**named, "epochs": 2}))
    if recipe.__name__ == "distillation":  # A teacher as small as the student: it trains in the same way.
        build = recipe.build_model
        monkeypatch.setattr(recipe, "build_model", lambda config, data, width=1: build(config, data))
    if recipe.__name__ in COMPARED_IN_FLOAT64:
        monkeypatch.setattr(recipe, "build_model", in_float64(recipe.build_model))
    if recipe.__name__ == "quantization":  # LiteRT takes no float64.
        monkeypatch.setattr(recipe, "once", lambda run, make: {})
    config = smoke_config(recipe, tmp_path / "data", validation_size=0.09)
    data = recipe.load_data(config)
    if len(data.validation) % 2 == 0:
        odd = dataclasses.replace(data.validation, rows=data.validation.rows[1:])
        data = dataclasses.replace(data, validation=odd)
    batch_size = len(data.train) // 20 * 2
    steps = steps_per_epoch(data.train, batch_size)
    outcomes = []
    for strategy, devices in (("none", 0), ("mirrored", 2)):
        directory = tmp_path / strategy
        settings = {"batch_size": batch_size, "epochs": STEPS.get(recipe.__name__, STEPS_OF_OTHERS) // steps}
        config = smoke_config(recipe, directory, strategy=strategy, devices=devices, **settings)
        metrics = recipe.train(config, data)
        result = json.loads((directory / "result.json").read_text())
        assert (result["steps"], result["hardware"]["strategy"]) == (2 * steps, strategy)
        weights = keras.models.load_model(directory / "model.keras").get_weights()
        outcomes.append((weights, metrics, result["history"]))
    (weights, metrics, history), (mirrored_weights, mirrored_metrics, mirrored_history) = outcomes
    for one, other in zip(weights, mirrored_weights, strict=True):
        np.testing.assert_allclose(other, one, rtol=0, atol=1e-5)
    for logs, mirrored_logs in zip(history, mirrored_history, strict=True):
        assert logs.keys() == mirrored_logs.keys()
        for name in logs.keys() - {"seconds", "examples_per_second"}:
            assert mirrored_logs[name] == pytest.approx(logs[name], rel=1e-4), name
    for name, value in metrics.items():
        assert mirrored_metrics[name] == pytest.approx(value, rel=1e-4), name


@short_set("mnist_cnn", "text_classifier", slow=["quantization"])
def test_half_precision_without_validation_and_a_copied_recipe(recipe, tmp_path):
    """bfloat16 as an Ampere GPU would choose it; all examples for training; a copy, which goes by its own name."""
    copy = tmp_path / "my_task.py"
    copy.write_text((ROOT / "recipes" / f"{recipe.__name__}.py").read_text())
    flags = ["--smoke", "--data", "sample", "--precision", "mixed_bfloat16", "--epochs", "1"]
    flags += ["--validation-size", "0"]
    # A processor without instructions for it takes minutes for what others do in seconds.
    run = run_program(str(copy), *flags, *small_flags(recipe.__name__), cwd=tmp_path)
    assert (run.returncode, run.stderr) == (0, "")
    (path,) = tmp_path.glob("runs/my_task/*/result.json")
    result = json.loads(path.read_text())
    assert (result["recipe"], result["hardware"]["precision"]) == ("my_task", "mixed_bfloat16")
    assert result["data"]["validation"] == 0
    assert not [name for name in result["history"][0] if name.startswith("val_")]
    assert all(np.isfinite(value) for value in result["metrics"].values())


def test_a_loss_that_is_not_finite_ends_the_run_with_3(tmp_path):
    flags = ("--learning-rate", "1e30", "--quiet", "--run-dir", str(tmp_path / "run"))
    run = run_program(str(ROOT / "recipes" / "linear_regression.py"), *flags)
    assert (run.returncode, run.stdout) == (3, "")
    assert run.stderr.startswith("training failed: the loss is ")
    assert run.stderr.count("\n") == 1
    assert not (tmp_path / "run" / "result.json").exists()


def test_linear_regression_finds_the_least_squares_weights(tmp_path):
    recipe = load_recipe("linear_regression")
    config = recipe.Config(threads=2, quiet=True, run_dir=str(tmp_path))
    metrics = recipe.train(config)
    for name in ("weight_x0", "weight_x1"):
        assert metrics[name] == pytest.approx(metrics[f"lstsq_{name}"], abs=0.02)
    assert metrics["mse"] == pytest.approx(metrics["noise_floor_mse"], rel=0.1)


@pytest.mark.parametrize(("spread", "offset"), [(1e-4, 0.0), (1.0, 40.0), (1e5, 3e6)])
@pytest.mark.parametrize("name", ["linear_regression", "dense_regression"])
@pytest.mark.long
def test_any_unit_of_columns_and_target_will_do(tmp_path, name, spread, offset):
    random = np.random.default_rng(0)
    columns = random.normal((1000, 0.003), (100, 0.001), (2000, 2))
    target = spread * (columns @ (0.01, 1000) + random.normal(0, 0.1, 2000)) + offset
    table = pd.DataFrame({"a": columns[:, 0], "b": columns[:, 1], "y": target})
    table.to_csv(tmp_path / "table.csv", index=False)
    recipe = load_recipe(name)
    config = recipe.Config(
        data=str(tmp_path / "table.csv"),
        target="y",
        quiet=True,
        threads=2,
        deterministic=True,
        run_dir=str(tmp_path / "run"),
    )
    metrics = recipe.train(config)
    assert metrics["r2"] > 0.98
    if name == "linear_regression":
        assert metrics["mse"] == pytest.approx(metrics["lstsq_mse"], rel=0.05)
        for part in ("weight_a", "weight_b"):
            assert metrics[part] == pytest.approx(metrics[f"lstsq_{part}"], rel=0.02)


@pytest.mark.long
def test_short_and_empty_texts_are_no_trouble(tmp_path):
    """A user may ask about a text of nothing that is known, or of nothing at all."""
    recipe = load_recipe("text_classifier")
    texts = np.array([b"fine", b"poor"] * 50, dtype=object)
    targets = np.eye(2, dtype=np.float32)[[0, 1] * 50]
    split = Split.from_arrays(texts, targets)
    data = Data("short texts", "files", {"input": "text", "output": "class"}, split, split, split, ("good", "bad"))
    metrics = recipe.train(smoke_config(recipe, tmp_path, epochs=20, batch_size=10), data)
    assert metrics["accuracy"] == 1
    model = keras.models.load_model(tmp_path / "model.keras")
    answers = model(tf.constant(["", "unheard of"]))
    np.testing.assert_allclose(answers["probabilities"].numpy().sum(axis=1), 1, rtol=1e-5)


def test_words_pairs_and_triples_are_told_apart_and_counted_once():
    """Against n-grams as words, counted in Python."""
    recipe = load_recipe("text_classifier")
    texts = ["not good, not good", "Not a good film!", "good good film", "a good film", "alone\x85here"]
    split = Split.from_arrays(
        np.array([text.encode() for text in texts], dtype=object), np.eye(2, dtype=np.float32)[[0] * 5]
    )
    data = Data("a few texts", "files", {"input": "text", "output": "class"}, split, split, split, ("good", "bad"))
    tokenizer, train_tokens = recipe.build_tokenizer(recipe.Config(length=7), data)

    def ngrams(text):
        words = re.findall(r"\w+", text.lower())
        return {tuple(words[first : first + size]) for size in (1, 2, 3) for first in range(len(words) - size + 1)}

    texts_with = collections.Counter(ngram for text in texts for ngram in ngrams(text))
    numbers = recipe.tokenized(split, tokenizer).inputs.numpy()
    assert numbers.shape == (5, 7)
    np.testing.assert_array_equal(numbers, train_tokens.inputs)
    named = {}
    for text, row in zip(texts, numbers, strict=True):
        known = {ngram for ngram in ngrams(text) if texts_with[ngram] > 1}
        found = [number for number in row if number > 0]
        assert len(found) == len(set(found)) == len(known)
        named[text] = (set(found), known)
    # An n-gram is the same number wherever it stands: those of two texts overlap as their n-grams do.
    for one, other in itertools.combinations(texts, 2):
        assert len(named[one][0] & named[other][0]) == len(named[one][1] & named[other][1])
    # Only the rarest where there is no room for all: the number of a frequent one is small.
    assert {*tokenizer(tf.constant(["a good film"])).numpy()[0]} == named["a good film"][0] | {0}


def test_log_count_ratios_are_those_of_naive_bayes():
    tokens = Split.from_arrays(np.array([[3, 1], [1, 0], [2, 0]], np.int32), np.eye(3, dtype=np.float32))
    ratios = load_recipe("text_classifier").log_count_ratios(tokens)
    counts = np.array([[1, 0, 1], [1, 0, 0], [0, 1, 0]]).T + 1  # Of tokens 1, 2, 3 in each class, and one more.
    for label in range(3):
        inside, outside = counts[:, label], counts[:, [other for other in range(3) if other != label]].sum(axis=1)
        expected = np.log((inside / inside.sum()) / (outside / outside.sum()))
        np.testing.assert_allclose(ratios[1:, label], expected)
    np.testing.assert_array_equal(ratios[0], 0)


@pytest.mark.parametrize("name", ["dense_classifier", "dense_regression"])
@pytest.mark.long
def test_dense_recipes_beat_their_linear_baseline(tmp_path, name):
    recipe = load_recipe(name)
    config = recipe.Config(threads=2, deterministic=True, quiet=True, epochs=12, run_dir=str(tmp_path))
    metrics = recipe.train(config)
    if name == "dense_classifier":
        assert metrics["accuracy"] > metrics["logistic_regression_accuracy"] + 0.05
    else:
        assert metrics["noise_floor_mse"] < metrics["mse"] < metrics["ridge_mse"] / 3


def test_the_files_keep_the_common_order(recipe):
    """The same sections, in the same order, under the same names; nothing runs at import."""
    tree = ast.parse((ROOT / "recipes" / f"{recipe.__name__}.py").read_text())
    parts = ast.get_docstring(tree).split("\n")
    assert ": " in parts[0]
    labels = [line.split()[0] for line in parts[2:] if line and not line.startswith(" ")][:4]
    assert labels == ["Teaches", "Data", "Result", "Run"]
    assert f"python recipes/{recipe.__name__}.py" in ast.get_docstring(tree)
    names = [node.name for node in tree.body if isinstance(node, ast.ClassDef | ast.FunctionDef)]
    expected = ["Config", "load_data", "build_model", "train", "main"]
    assert [name for name in names if name in expected] == expected
    allowed = (ast.Expr, ast.Import, ast.ImportFrom, ast.Assign, ast.ClassDef, ast.FunctionDef, ast.If)
    assert all(isinstance(node, allowed) for node in tree.body)
    assert isinstance(tree.body[-1], ast.If)
    own = set(recipe.Config.__annotations__)
    assert 4 <= len(own) <= 12
    assert len((ROOT / "recipes" / f"{recipe.__name__}.py").read_text().splitlines()) <= 200


def test_whitening_makes_patches_uncorrelated_and_of_variance_1():
    recipe, data = load_recipe("cifar10_fast"), smoke_data("cifar10_fast")
    images = data.train.inputs.numpy()
    outputs = recipe.whitening(images)(images.astype(np.float32) / 127.5 - 1).numpy()
    np.testing.assert_allclose(outputs[..., 12:], -outputs[..., :12], atol=1e-5)
    # Patches at even places are those that it was made from; the smallest variances are kept from being blown up.
    covariance = np.cov(outputs[:, ::2, ::2, :12].reshape(-1, 12), rowvar=False)
    np.testing.assert_allclose(covariance - np.diag(np.diag(covariance)), 0, atol=1e-2)
    assert np.diag(covariance)[-1] == pytest.approx(1, rel=1e-2)


def test_views_are_moved_by_a_pixel_and_mirrored():
    recipe = load_recipe("cifar10_fast")
    image = keras.Input((32, 32, 3), dtype="uint8")
    corner = keras.Model(image, keras.ops.cast(image[:, 0, 0, :1], "float32"))  # Says the red of one pixel.
    images = np.random.default_rng(0).integers(0, 256, (4, 32, 32, 3), np.uint8)
    padded = np.pad(images, ((0, 0), (1, 1), (1, 1), (0, 0)), mode="reflect")[..., 0].astype(float)
    expected = sum(padded[:, place, place] + padded[:, place, place + 31] for place in range(3)) / 6
    views = recipe.with_views(corner)
    np.testing.assert_allclose(views(images)[:, 0], expected, rtol=1e-6)


def test_answers_are_of_full_precision(recipe):
    """Whatever the training is in: of probabilities of eight binary digits, many would be equal."""
    data = smoke_data(recipe.__name__)
    policy = keras.config.dtype_policy()
    keras.config.set_dtype_policy("mixed_bfloat16")
    try:
        more = [np.zeros([9, 2])] if recipe.__name__ == "text_classifier" else [4] * (data.task["input"] == "table")
        model = recipe.build_model(recipe.Config(**SMALL.get(recipe.__name__, {})), data, *more)
        models = [model, recipe.with_views(model)] if hasattr(recipe, "with_views") else [model]
        assert {each.output.dtype for each in models} == {"float32"}
    finally:
        keras.config.set_dtype_policy(policy)


def test_the_ridge_baseline_is_ridge_regression():
    """Against the closed form: standardized columns, penalty 1."""
    recipe, data = load_recipe("dense_regression"), smoke_data("dense_regression")
    (x, y), (test_x, test_y) = (
        (np.stack([*inputs.values()], axis=1), targets[:, 0])
        for inputs, targets in (data.train.arrays(), data.test.arrays())
    )
    x, test_x = ((each - x.mean(0)) / x.std(0) for each in (x, test_x))
    weights = np.linalg.solve(x.T @ x + np.eye(x.shape[1]), x.T @ (y - y.mean()))
    expected = np.mean((test_x @ weights + y.mean() - test_y) ** 2)
    encoder, scale = build_encoder(fit_features(data)), target_scale(data)
    errors = recipe.baseline_errors(
        encoded(data.train, encoder, *scale), encoded(data.test, encoder), *scale, own_data=False
    )
    assert errors == {"ridge_mse": pytest.approx(expected, rel=1e-2)}
