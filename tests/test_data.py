"""Where the examples come from, and that the splits keep apart."""

import dataclasses
import functools
import os
import pathlib
import shutil
import struct
import threading
import tracemalloc
import types

from common import data as data_module
from common.batches import Split
from common.cli import SharedConfig, UserError
from common.data import CIFAR10, IMDB, MNIST, Data, load_images, load_texts, tfds_folder
from common.records import weights_sha256

import damage
import keras
import numpy as np
import pandas as pd
import pytest
import requests
import tensorflow as tf
from conftest import load_recipe, short_set, smoke_config, smoke_data

SPLITS = ("train", "validation", "test")
SIZE = (8, 8)


def rows(split: Split) -> list[bytes]:
    """Each input as bytes, to compare contents."""
    return contents_of(split.inputs)


def contents_of(inputs) -> list[bytes]:
    inputs = np.stack([*inputs.values()], axis=1) if isinstance(inputs, dict) else np.asarray(inputs)
    return list(inputs) if inputs.dtype == object else [each.tobytes() for each in inputs]


@functools.cache
def full_sample(recipe) -> Data:
    return recipe.load_data(recipe.Config(data="sample"))


# Section 6, for each recipe.


def test_no_example_is_in_two_splits(recipe):
    data = full_sample(recipe)
    contents = {split: set(rows(getattr(data, split))) for split in SPLITS}
    assert all(contents.values())
    assert not contents["train"] & contents["validation"]
    assert not contents["train"] & contents["test"]
    assert not contents["validation"] & contents["test"]


@short_set("linear_regression", "mnist_cnn", "text_classifier")
def test_validation_is_cut_from_train_by_the_seed(recipe):
    whole = recipe.load_data(recipe.Config(data="sample", validation_size=0.0))
    assert len(whole.validation) == 0
    for seed in (0, 1):
        data = recipe.load_data(recipe.Config(data="sample", seed=seed))
        assert abs(len(data.validation) - 0.1 * len(whole.train)) <= len(data.class_names) + 1
        assert sorted(rows(data.train) + rows(data.validation)) == sorted(rows(whole.train))
        assert rows(data.test) == rows(whole.test)
        assert data.class_names == whole.class_names
    assert rows(data.validation) != rows(full_sample(recipe).validation)
    assert full_sample(recipe).digest() == full_sample.__wrapped__(recipe).digest() != data.digest()


@short_set("linear_regression", "text_classifier")
def test_nothing_is_fitted_on_validation_or_test(recipe, tmp_path):
    """Other validation and test examples, the same model: so only train had a say in it."""
    data = smoke_data(recipe.__name__)
    other = dataclasses.replace(data, validation=data.test, test=data.validation)
    models = []
    for number, used in enumerate((data, other)):
        directory = tmp_path / str(number)
        recipe.train(smoke_config(recipe, directory, epochs=1), used)
        models.append(keras.models.load_model(directory / "model.keras"))
    assert weights_sha256(models[0]) == weights_sha256(models[1])
    # The vocabulary is no weight; it shows in what the models make of raw inputs.
    raw = tf.nest.map_structure(tf.constant, data.train.arrays(slice(20))[0])
    outputs = [model(raw)["probabilities"] if data.class_names else model(raw) for model in models]
    np.testing.assert_array_equal(*outputs)


def test_a_class_has_one_number_in_every_split(recipe, monkeypatch):
    """The label of each example, traced back through its content to how it was read."""
    data = full_sample(recipe)
    if not data.class_names:
        assert data.train.targets.shape[1] == 1
        return
    read = {}
    original = data_module._cut

    def remember(name, source, task, arrays, *others, **settings):
        for inputs, labels in arrays.values():
            read.update(zip(contents_of(inputs), labels, strict=True))
        return original(name, source, task, arrays, *others, **settings)

    monkeypatch.setattr(data_module, "_cut", remember)
    data = full_sample.__wrapped__(recipe)
    assert list(data.class_names) == sorted(set(read.values()))
    for split in (data.train, data.validation, data.test):
        targets = np.asarray(split.targets)
        assert targets.shape[1] == len(data.class_names)
        np.testing.assert_array_equal(targets.sum(axis=1), 1)
        found = [data.class_names[label] for label in targets.argmax(axis=1)]
        assert found == [read[content] for content in rows(split)]
        assert set(found) == set(data.class_names)


def test_examples_are_kept_small(recipe):
    data = smoke_data(recipe.__name__)
    dtypes = {part.dtype.name for part in tf.nest.flatten(data.train.stored_inputs)}
    assert dtypes <= {"uint8", "string"} or dtypes == {"float64"}
    assert data.train.targets.dtype.name == ("float32" if data.class_names else "float64")
    assert data.train.stored_inputs is data.validation.stored_inputs, "one copy for all splits"


def test_smoke_shrinks_both_splits(recipe):
    data, whole = smoke_data(recipe.__name__), full_sample(recipe)
    few = min(300, len(whole.train) + len(whole.validation))
    assert abs(len(data.train) + len(data.validation) - few) <= 10
    assert abs(len(data.test) - 100) <= 10
    assert set(rows(data.test)) < set(rows(whole.test))


# Sources.


@pytest.fixture
def no_network(monkeypatch, tmp_path):
    def refuse(*arguments, **settings):
        raise requests.ConnectionError

    monkeypatch.setattr(requests, "head", refuse)
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path / "empty"))


def test_auto_falls_back_to_the_sample_and_says_so(no_network, capsys):
    data = load_images(CIFAR10, SharedConfig(smoke=True), SIZE)
    assert (data.source, data.name) == ("sample", "drawn shapes")
    line, status = capsys.readouterr().out.strip().splitlines()
    assert status == "loading drawn shapes"
    assert line.startswith("Not CIFAR-10: training on the sample, drawn shapes.")
    assert "www.cs.toronto.edu can't be reached" in line
    assert "copy a prepared cifar10 folder there" in line


def test_tfds_without_network_is_refused(no_network, tmp_path):
    with pytest.raises(UserError, match=r"No MNIST in .*empty: storage.googleapis.com can't be reached"):
        load_images(MNIST, SharedConfig(data="tfds"), (28, 28))
    assert not (tmp_path / "empty").exists()


def test_a_silent_network_is_noticed_in_seconds(monkeypatch):
    """An answer that comes too late counts as none, and nobody waits for it."""
    monkeypatch.setattr(data_module, "NETWORK_TIMEOUT_SECONDS", 0.1)
    asked, released = [], threading.Event()

    def answer_late(address, **settings):
        asked.append(settings["timeout"])
        released.wait(60)
        raise requests.ConnectionError

    monkeypatch.setattr(requests, "head", answer_late)
    try:
        assert not data_module.reachable("https://example.invalid/set")
    finally:
        released.set()
    assert asked == [0.1]


def test_the_sample_never_asks_the_network(monkeypatch):
    monkeypatch.setattr(data_module, "reachable", lambda address: pytest.fail("asked the network"))
    assert load_texts(IMDB, SharedConfig(data="sample", smoke=True), "text", "label").source == "sample"


def test_data_dir_comes_before_the_environment(monkeypatch):
    monkeypatch.setenv("TFDS_DATA_DIR", "/from/environment")
    assert tfds_folder(SharedConfig(data_dir="/from/flag")) == pathlib.Path("/from/flag")
    assert tfds_folder(SharedConfig()) == pathlib.Path("/from/environment")
    monkeypatch.delenv("TFDS_DATA_DIR")
    assert tfds_folder(SharedConfig()) == pathlib.Path.home() / "tensorflow_datasets"


@pytest.fixture
def preparing(monkeypatch):
    """Lets the preparation of a set do something else, with a network that is there."""
    import tensorflow_datasets as tfds

    def prepare(act):
        monkeypatch.setattr(data_module, "reachable", lambda address: True)
        monkeypatch.setattr(tfds, "builder", lambda *_, **__: types.SimpleNamespace(download_and_prepare=act))

    return prepare


def raising(error):
    def act():
        raise error

    return act


@pytest.mark.parametrize("source", ["tfds", "auto"])
@pytest.mark.parametrize(
    "error",
    [OSError(28, "No space left on device\nmore lines"), tf.errors.ResourceExhaustedError(None, None, "No space left")],
)
def test_a_set_that_cannot_be_written_is_told_in_one_line(preparing, tmp_path, source, error):
    """With `auto` too: a full disk is no reason to train on something else."""
    preparing(raising(error))
    with pytest.raises(UserError, match=r"No space left.*; make room or name another") as told:
        load_images(MNIST, SharedConfig(data=source, data_dir=str(tmp_path)), (28, 28))
    assert str(tmp_path) in str(told.value)
    assert "more lines" not in str(told.value)


def test_a_failed_download_leads_to_the_sample(preparing, tmp_path, capsys):
    preparing(raising(requests.ConnectionError("refused")))
    config = SharedConfig(data_dir=str(tmp_path), smoke=True)
    assert load_images(MNIST, config, (28, 28)).source == "sample"
    assert "refused" in capsys.readouterr().out
    with pytest.raises(UserError, match=r"No MNIST in .*: refused"):
        load_images(MNIST, dataclasses.replace(config, data="tfds"), (28, 28))


def test_two_processes_that_prepare_the_same_set(preparing, tmp_path):
    """The slower one finds the folder taken, and uses what the faster one has prepared."""

    def too_late():
        damage.make_tfds(tmp_path)
        raise OSError("Directory not empty")

    preparing(too_late)
    data = load_images(MNIST, SharedConfig(data_dir=str(tmp_path)), (28, 28))
    assert (data.source, len(data.test)) == ("tfds", 40)


def test_a_half_prepared_folder_is_not_taken_for_a_set(preparing, tmp_path):
    shard = damage.make_tfds(tmp_path)
    whole = load_images(MNIST, SharedConfig(data_dir=str(tmp_path)), (28, 28)).digest()
    half = shard.parent.with_name("incomplete.A1B2C3_9.9.9")
    shutil.copytree(shard.parent, half)
    assert load_images(MNIST, SharedConfig(data_dir=str(tmp_path)), (28, 28)).digest() == whole
    shutil.rmtree(shard.parent)
    preparing(raising(requests.ConnectionError("refused")))
    with pytest.raises(UserError, match="No MNIST in "):
        load_images(MNIST, SharedConfig(data="tfds", data_dir=str(tmp_path)), (28, 28))


@pytest.mark.parametrize("way", ["missing", "flipped", "cut", "emptied", "cut between records"])
def test_a_set_with_a_damaged_shard_is_named(tmp_path, way):
    """Damage of single bytes, everywhere: tests/test_resume.py."""
    shard = damage.make_tfds(tmp_path)
    content = shard.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    if way == "missing":
        shard.unlink()
    else:
        flipped = content[:500] + bytes([content[500] ^ 4]) + content[501:]
        first = content[: length + 16]
        shard.write_bytes({"flipped": flipped, "cut": content[:999], "emptied": b""}.get(way, first))
    with pytest.raises(UserError) as told:
        load_images(MNIST, SharedConfig(data_dir=str(tmp_path)), (28, 28))
    assert str(told.value) == f"{shard.parent}: a file is missing or damaged; delete this folder to prepare it again"


# The user's own files.


def test_texts_from_a_csv_and_from_folders(tmp_path):
    reviews = [f"text {number}, with comma" for number in range(40)]
    labels = ["good", "bad", "mixed", "bad"] * 10
    pd.DataFrame({"review": reviews, "verdict": labels}).to_csv(tmp_path / "reviews.csv", index=False)
    for number, (review, label) in enumerate(zip(reviews, labels, strict=True)):
        (tmp_path / "folders" / label).mkdir(parents=True, exist_ok=True)
        (tmp_path / "folders" / label / f"{number}.txt").write_text(review)
    for path in (tmp_path / "reviews.csv", tmp_path / "folders"):
        data = load_texts(IMDB, SharedConfig(data=str(path)), "review", "verdict")
        assert data.class_names == ("bad", "good", "mixed")
        for split in SPLITS:
            pairs = zip(rows(getattr(data, split)), np.asarray(getattr(data, split).targets).argmax(1), strict=True)
            for text, label in pairs:
                assert data.class_names[label] == labels[reviews.index(text.decode())]


def test_memory_follows_the_size_of_the_data(tmp_path):
    """One long text among short ones takes its own room only, and so do targets of many classes: 4 bytes each."""
    short = [f"short {number}" for number in range(499)]
    texts = pd.DataFrame({"text": [*short, "long " * 40_000], "label": ["a", "b"] * 250})
    texts.to_csv(tmp_path / "texts.csv", index=False)
    labels = np.array([f"class {number % 500}" for number in range(4000)])
    arrays = {"train": (np.arange(4000.0)[:, None], labels), "test": (np.arange(500.0)[:, None], labels[:500])}
    task = {"input": "table", "output": "class"}
    tracemalloc.start()
    try:
        load_texts(IMDB, SharedConfig(data=str(tmp_path / "texts.csv")), "text", "label")
        assert tracemalloc.get_traced_memory()[1] < 20e6
        tracemalloc.reset_peak()
        data_module._cut("x", "files", task, arrays, SharedConfig(validation_size=0.0), 0.0)
        assert tracemalloc.get_traced_memory()[1] < 22e6
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("name", ["dense_classifier", "dense_regression", "linear_regression"])
def test_tables_from_a_csv(tmp_path, name):
    recipe = load_recipe(name)
    numbers = np.random.default_rng(0).normal(size=(60, 4))
    path = tmp_path / "table.csv"
    pd.DataFrame(numbers, columns=list("abcd")).assign(c=lambda table: (table.c > 0) * 1).to_csv(path, index=False)
    data = recipe.load_data(recipe.Config(data=str(path), target="c"))
    assert data.columns == {"a": "number", "b": "number", "d": "number"}
    assert len(data.train) == 49
    assert data.class_names == (("0", "1") if name == "dense_classifier" else ())
    by_row = {row[[0, 1, 3]].tobytes(): row[2] > 0 for row in numbers}
    truth = [by_row[content] for content in rows(data.train)]
    np.testing.assert_array_equal(np.asarray(data.train.targets)[:, -1], np.float32(truth))


# Real data, where it is at hand.

REAL = pytest.mark.skipif("TFDS_DATA_DIR" not in os.environ, reason="TFDS_DATA_DIR names no prepared data")


@pytest.mark.real_data
@REAL
@pytest.mark.parametrize(
    ("dataset", "counts", "class_names"),
    [
        (MNIST, (54_000, 6_000, 10_000), tuple("0123456789")),
        (
            CIFAR10,
            (45_000, 5_000, 10_000),
            ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"),
        ),
        (IMDB, (22_500, 2_500, 25_000), ("neg", "pos")),
    ],
)
def test_real_sets_without_touching_the_network(monkeypatch, dataset, counts, class_names):
    monkeypatch.setattr(data_module, "reachable", lambda address: pytest.fail("asked the network"))
    config = SharedConfig(data="tfds")
    data = load_texts(IMDB, config, "", "") if dataset == IMDB else load_images(dataset, config, SIZE)
    assert data.source == "tfds"
    assert tuple(len(getattr(data, split)) for split in SPLITS) == counts
    assert data.class_names == class_names
    shares = np.asarray(data.test.targets).mean(axis=0)
    np.testing.assert_allclose(shares, 1 / len(class_names), atol=0.02)


@pytest.mark.real_data
@REAL
@pytest.mark.parametrize("name", ["mnist_cnn", "cifar10_cnn", "text_classifier"])
def test_recipes_train_on_the_real_set(tmp_path, name):
    recipe = load_recipe(name)
    config = smoke_config(recipe, tmp_path, data="tfds", smoke=False, epochs=3)
    data = recipe.load_data(config)
    few = {
        split: Split.from_arrays(getattr(data, split).inputs[:4000], getattr(data, split).targets[:4000])
        for split in SPLITS
    }
    metrics = recipe.train(config, dataclasses.replace(data, **few))
    assert metrics["accuracy"] > {"mnist_cnn": 0.8, "cifar10_cnn": 0.25, "text_classifier": 0.6}[name]
