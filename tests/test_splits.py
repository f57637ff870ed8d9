"""Splits are stratified, and keep equal inputs and groups together."""

from common.batches import MappedArray, Split, training_batches
from common.cli import SharedConfig, UserError
from common.data import _cut, class_weights, imbalance
from common.splits import held_out, input_digests

import numpy as np
import pytest

SPLITS = ("train", "validation", "test")
CLASSES = {"input": "table", "output": "class"}


def cut(inputs, labels, task=CLASSES, groups=None, given=None, **settings):
    arrays = {"train": (np.asarray(inputs), np.asarray(labels)), **(given or {})}
    return _cut("a table", "files", task, arrays, SharedConfig(**settings), 0.0, groups)


def labels_of(split, class_names):
    return np.asarray(class_names)[split.targets.numpy().argmax(axis=1)]


@pytest.mark.parametrize("seed", range(5))
def test_every_class_is_in_every_split(seed):
    """Rare classes too: 10 of 1,000, 100 classes of 10, and 60 classes of 4 examples."""
    for labels in (
        np.where(np.arange(1000) % 100 == 7, "fraud", "ok   "),
        np.repeat([f"breed {number}" for number in range(100)], 10),
        np.repeat([f"breed {number}" for number in range(60)], 4),
    ):
        data = cut(np.arange(len(labels)), labels, seed=seed)
        for split in (data.train, data.validation, data.test):
            assert set(labels_of(split, data.class_names)) == set(labels)
        assert sum(data.counts().values()) == len(labels)


def test_a_class_that_a_split_lacks_is_named(capsys):
    labels = ["common"] * 50 + ["solo"]
    data = cut(np.arange(51), labels)
    assert "solo" in labels_of(data.train, data.class_names)
    assert "validation has no example of class 'solo'" in (printed := capsys.readouterr().err)
    assert "test has no example of class 'solo'" in printed


def test_classes_that_train_lacks_are_named_all_at_once():
    given = {"test": (np.arange(13), np.array([f"new {number}" for number in range(12)] + ["a"]))}
    with pytest.raises(UserError, match=r"'new 0', .*'new 7' and 2 more is in test but not in train"):
        cut(np.arange(40), ["a", "b"] * 20, given=given)


@pytest.mark.parametrize("kind", ["numbers", "texts", "pictures", "columns"])
def test_equal_inputs_are_in_one_split(kind):
    """Each input five times, with random labels: from other splits, nothing can be known of them."""
    random = np.random.default_rng(0)
    inputs = {
        "numbers": random.normal(size=100),
        "texts": np.array([b"text %d" % number for number in range(100)], object),
        "pictures": random.integers(0, 255, (100, 2, 2, 3)).astype(np.uint8),
        "columns": random.normal(size=(100, 3)).astype(np.float32),
    }[kind]
    data = cut(np.repeat(inputs, 5, axis=0), random.choice(["a", "b"], 500))
    assert all(data.counts().values())
    assert sum(data.counts().values()) == 500
    found = [{np.asarray(each).tobytes() for each in getattr(data, split).arrays()[0]} for split in SPLITS]
    if kind == "texts":
        found = [set(getattr(data, split).arrays()[0]) for split in SPLITS]
    assert len(set.union(*found)) == 100 == sum(map(len, found))


def test_parts_of_an_input_count_together():
    first, second = np.arange(4) % 2, np.arange(4) // 2
    assert len(set(input_digests({"a": first, "b": second}).tolist())) == 4
    assert len(set(input_digests({"a": first, "b": first}).tolist())) == 2


def test_groups_are_in_one_split():
    patients = np.random.default_rng(0).integers(0, 40, 1000)
    data = cut(np.arange(1000), ["ill", "well"] * 500, groups=patients)
    found = [set(patients[getattr(data, split).arrays()[0]]) for split in SPLITS]
    assert len(set.union(*found)) == 40 == sum(map(len, found))
    assert 50 <= len(data.test) <= 150


def test_inputs_of_a_given_test_split_that_are_in_train_are_told(capsys):
    given = {"test": (np.arange(35, 45), np.array(["a", "b"] * 5))}
    cut(np.arange(40), ["a", "b"] * 20, given=given)
    assert "a table: 5 of 10 inputs of test are also in train" in capsys.readouterr().err


def test_a_large_group_does_not_take_a_split():
    groups = np.concatenate([np.zeros(900), np.arange(100)])
    for seed in range(5):
        assert held_out(groups, np.zeros(1000), 0.1, seed).sum() <= 100


def test_nothing_is_held_out_of_a_single_group():
    assert not held_out(np.zeros(10), np.zeros(10), 0.5, 0).any()
    with pytest.raises(UserError, match=r"too few different examples \(20 to train and validate, 0 to test\)"):
        cut(np.zeros(20), ["a", "b"] * 10)


def test_smoke_takes_some_of_each_class():
    labels = np.repeat([f"class {number}" for number in range(50)], 40)
    data = cut(np.arange(2000), labels, smoke=True)
    for split in (data.train, data.test):
        assert set(labels_of(split, data.class_names)) == set(labels)
    assert len(data.train) + len(data.validation) <= 350


def test_large_targets_keep_their_digits():
    values = 1e9 + np.arange(100.0) / 8
    data = cut(np.arange(100.0), values, task={"input": "table", "output": "number"})
    assert set(data.train.targets.numpy()[:, 0]) < set(values)


def test_imbalance_is_told_and_balanced_by_weights():
    labels = ["ok"] * 950 + ["fraud"] * 50
    data = cut(np.arange(1000), labels)
    assert imbalance(data).startswith("imbalanced: of the training examples, class 'ok' has 7")
    assert not imbalance(cut(np.arange(1000), ["ok", "fraud"] * 500))

    class Config:
        class_weights = "balanced"

    weights = class_weights(data, Config)
    targets = data.train.targets.numpy()
    np.testing.assert_allclose((targets * weights).sum(axis=0), len(data.train) / 2, rtol=1e-4)
    batches = training_batches(data.train, 100, 0, class_weights=weights)
    _, of_batch, of_examples = next(iter(batches))
    np.testing.assert_allclose(of_examples, of_batch.numpy() @ weights)


def test_a_file_gives_the_batches_of_memory(tmp_path):
    """Pictures that are read from a file: the same examples, and rows of other splits stay out."""
    pictures = np.random.default_rng(0).integers(0, 255, (50, 4, 4, 3)).astype(np.uint8)
    pictures.tofile(tmp_path / "pictures")
    mapped = MappedArray(tmp_path / "pictures", pictures.shape, np.uint8)
    rows, targets = np.arange(0, 50, 2), np.arange(50.0)[:, None]
    memory, file = (Split.from_arrays(inputs, targets, rows) for inputs in (pictures, mapped))
    assert memory.input_shape == file.input_shape == (4, 4, 3)
    for one, other in zip(*(training_batches(split, 10, 3).take(5) for split in (memory, file)), strict=True):
        np.testing.assert_array_equal(one[0], other[0])
        np.testing.assert_array_equal(one[1], other[1])
    np.testing.assert_array_equal(memory.inputs, file.inputs)
    np.testing.assert_array_equal(file.arrays(slice(3, 5))[0], pictures[[6, 8]])
    np.testing.assert_array_equal(input_digests(np.asarray(mapped)), input_digests(pictures))
