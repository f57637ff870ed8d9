"""Section by section: batch t from (seed, t) alone."""

import functools
import itertools
import tempfile
import time

from common.batches import (
    BatchRandom,
    Split,
    evaluation_batches,
    evaluation_steps,
    random_shift,
    steps_per_epoch,
    steps_per_execution,
    training_batches,
)
from common.cli import UserError

import keras
import numpy as np
import pytest
import tensorflow as tf
from conftest import smoke_config, smoke_data
from programs import run_program


class Workers:
    """Stands for a strategy of several workers: hands out each worker's own data set."""

    def __init__(self, pipelines: int, replicas: int):
        self.pipelines, self.num_replicas_in_sync = pipelines, replicas

    def distribute_datasets_from_function(self, of_worker):
        return [
            of_worker(tf.distribute.InputContext(self.pipelines, number, self.num_replicas_in_sync))
            for number in range(self.pipelines)
        ]


@functools.cache
def handed_by(recipe):
    """What a recipe hands to `training_batches`: split, batch size, seed and augmentation."""
    handed = {}

    class EnoughError(Exception):
        pass

    def record(split, batch_size, seed, augment=None, strategy=None, start_step=0, class_weights=None):
        handed.update(split=split, batch_size=37, seed=seed, augment=augment)
        raise EnoughError

    with pytest.MonkeyPatch.context() as patch, tempfile.TemporaryDirectory() as folder:
        patch.setattr(recipe, "training_batches", record)
        with pytest.raises(EnoughError):
            recipe.train(smoke_config(recipe, folder), smoke_data(recipe.__name__))
    return handed


@pytest.fixture
def stream(recipe):
    return dict(handed_by(recipe))


def first(dataset, count):
    return [tuple(np.asarray(part) for part in batch) for batch in dataset.take(count)]


def assert_equal_batches(some, others):
    assert len(some) == len(others)
    for one, other in zip(some, others, strict=True):
        for part, twin in zip(one, other, strict=True):
            np.testing.assert_array_equal(part, twin)


def test_a_batch_does_not_depend_on_where_the_stream_was_started(stream):
    from_start = first(training_batches(**stream), 40)
    for start in (1, 17, 39):
        assert_equal_batches(from_start[start:], first(training_batches(**stream, start_step=start), 40 - start))


def test_an_epoch_has_each_example_once_at_most_and_the_next_epoch_others(stream):
    numbered = Split.from_arrays(np.arange(len(stream["split"])), np.asarray(stream["split"].targets))
    steps, size = steps_per_epoch(numbered, 37), min(37, len(numbered))
    seen = [numbers for numbers, _ in first(training_batches(numbered, 37, stream["seed"]), 2 * steps)]
    assert {len(batch) for batch in seen} == {size}
    epochs = np.concatenate(seen[:steps]), np.concatenate(seen[steps:])
    for epoch in epochs:
        assert len(np.unique(epoch)) == len(epoch) == steps * size
    assert not np.array_equal(*epochs)
    assert not np.array_equal(np.sort(epochs[0]), np.sort(epochs[1]))  # Those left out are others too.
    assert not np.array_equal(epochs[0], np.arange(len(epochs[0])))


def test_all_batches_have_one_static_shape(stream):
    inputs, targets = training_batches(**stream).element_spec
    size = min(37, len(stream["split"]))
    assert {spec.shape[0] for spec in (*tf.nest.flatten(inputs), targets)} == {size}


def test_targets_stay_with_their_inputs():
    numbered = Split.from_arrays(np.arange(100), np.arange(100)[:, None])
    for inputs, targets in first(training_batches(numbered, 9, seed=3), 24):
        np.testing.assert_array_equal(inputs, targets[:, 0])


def test_another_seed_gives_another_order(stream):
    some = first(training_batches(**stream), 1)
    other = first(training_batches(**{**stream, "seed": stream["seed"] + 1}), 1)
    assert not np.array_equal(some[0][0], other[0][0])


@pytest.mark.parametrize(
    ("workers", "replicas"),
    [
        pytest.param(1, 2, marks=pytest.mark.long),
        pytest.param(2, 2, marks=pytest.mark.long),
        pytest.param(3, 3, marks=pytest.mark.long),
        (2, 4),
    ],
)
def test_the_slices_of_workers_join_to_the_global_batch(stream, workers, replicas):
    stream["batch_size"] = 36
    whole = first(training_batches(**stream), 20)
    local = replicas // workers
    parts = [first(each, 20 * local) for each in training_batches(**stream, strategy=Workers(workers, replicas))]
    for step, (inputs, targets) in enumerate(whole):
        slices = [part[step * local + number] for part in parts for number in range(local)]
        for replica, piece in enumerate(slices):
            np.testing.assert_array_equal(piece[0], inputs[replica::replicas])
            np.testing.assert_array_equal(piece[1], targets[replica::replicas])
        assert {len(piece[0]) for piece in slices} == {len(inputs) // replicas}


@pytest.mark.parametrize("size", [1, 36, 37, 38, 100])
def test_evaluation_sees_every_example_once_in_order(size):
    numbered = Split.from_arrays(np.arange(size), np.zeros((size, 1), np.float32))
    seen = np.concatenate([inputs for inputs, _ in first(evaluation_batches(numbered, 37), -1)])
    np.testing.assert_array_equal(seen, np.arange(size))


def test_evaluation_on_two_workers_sees_every_example_once():
    numbered = Split.from_arrays(np.arange(100), np.zeros((100, 1), np.float32))
    steps = evaluation_steps(numbered, 33)
    parts = [first(each, steps) for each in evaluation_batches(numbered, 33, Workers(2, 2))]
    seen = [part[step][0] for step in range(steps) for part in parts]
    np.testing.assert_array_equal(np.concatenate(seen), np.arange(100))


def test_a_validation_makes_one_iterator(monkeypatch):
    """Keras makes a second one where it knows the length; each takes as long as a short epoch."""
    numbered, made = Split.from_arrays(np.zeros((40, 1), np.float32), np.zeros((40, 1), np.float32)), []
    make = tf.data.Dataset.__iter__
    monkeypatch.setattr(tf.data.Dataset, "__iter__", lambda dataset: made.append(dataset) or make(dataset))
    model = keras.Sequential([keras.Input([1]), keras.layers.Dense(1)])
    model.compile("sgd", "mse")
    training, validation = training_batches(numbered, 10, seed=0), evaluation_batches(numbered, 10)
    model.fit(
        training, steps_per_epoch=4, epochs=3, validation_data=validation, validation_steps=4, shuffle=False, verbose=0
    )
    assert [made.count(each) for each in (training, validation)] == [1, 3]


def test_an_empty_split_gives_no_batches():
    assert evaluation_batches(Split.from_arrays(np.zeros((0, 2)), np.zeros((0, 1))), 8) is None


@pytest.fixture
def executions(monkeypatch):
    """The steps per execution of an epoch of so many steps, for a model whose forward pass takes so long."""

    def of_epoch(steps: int, start_step: int = 0, strategy=None, seconds: float = 0.001) -> int:
        monkeypatch.setattr(time, "perf_counter", itertools.count(0.0, seconds).__next__)
        split = Split.from_arrays(np.zeros((steps, 1), np.float32), np.zeros((steps, 1), np.float32))
        strategy = strategy or tf.distribute.get_strategy()
        return steps_per_execution(lambda inputs, training: inputs, split, 1, strategy, start_step)

    return of_epoch


def test_steps_per_execution_divides_the_epoch_and_what_is_left_of_it(executions):
    assert [executions(steps) for steps in (1, 6, 37, 64, 176)] == [1, 6, 37, 64, 88]
    assert [executions(64, start) for start in (64, 64 + 16, 3 * 64 + 6, 1)] == [64, 16, 2, 1]
    assert executions(64, strategy=Workers(1, 2)) == 1


def test_an_execution_is_over_in_half_a_second(executions):
    """A step takes three times as long as a forward pass."""
    assert [executions(64, seconds=seconds) for seconds in (0.004, 0.02, 0.08, 0.2, 5)] == [32, 8, 2, 1, 1]


def test_an_epoch_can_be_executed_in_groups_of_steps_whatever_the_number_of_examples():
    for size in range(1, 6000, 13):
        steps = steps_per_epoch(Split.from_arrays(np.zeros((size, 1)), np.zeros((size, 1))), 10)
        assert 0.98 * (size // 10) <= steps <= max(1, size // 10)
        if steps >= 400:
            assert any(steps % group == 0 for group in range(8, 33))


def test_a_split_smaller_than_a_batch_is_one_batch():
    split = Split.from_arrays(np.arange(7), np.zeros((7, 1)))
    ((inputs, _),) = first(training_batches(split, 10, seed=0), 1)
    assert (steps_per_epoch(split, 10), sorted(inputs)) == (1, [*range(7)])
    ((inputs, _),) = first(training_batches(split, 10, 0, strategy=Workers(1, 2))[0].batch(2), 1)
    assert inputs.shape == (2, 3)
    with pytest.raises(UserError, match="--devices 8: there are 7 training examples; use fewer devices"):
        training_batches(split, 16, 0, strategy=Workers(1, 8))


def test_batches_of_one_are_as_many_as_examples():
    split = Split.from_arrays(np.arange(49.0)[:, None], np.zeros((49, 1)))
    assert steps_per_epoch(split, 1) == 49
    dealt = [inputs.numpy().item() for inputs, _ in training_batches(split, 1, seed=0).take(49)]
    assert sorted(dealt) == [*range(49)]


def batch_random(size: int) -> BatchRandom:
    seed, batch = tf.constant([5, 7], tf.int64), tf.constant(size, tf.int64)
    return BatchRandom(seed, batch, tf.range(size) % 2 == 0, itertools.count())


def test_random_shift_equals_reflection_padding_and_cropping():
    images = np.random.default_rng(0).integers(0, 256, (200, 8, 6, 3), np.uint8)
    shifted = random_shift(tf.constant(images), batch_random(200), pixels=2).numpy()
    assert shifted.dtype == np.uint8
    offsets = set()
    for image, moved in zip(images, shifted, strict=True):
        padded = np.pad(image, ((2, 2), (2, 2), (0, 0)), mode="reflect")
        crops = {(down, right): padded[down : down + 8, right : right + 6] for down in range(5) for right in range(5)}
        (found,) = (offset for offset, crop in crops.items() if np.array_equal(crop, moved))
        offsets.add(found)
    assert len(offsets) == 25


def test_mirrored_images_are_shifted_too():
    images = np.random.default_rng(0).integers(0, 256, (50, 8, 6, 3), np.uint8)
    mirrored = np.arange(50) % 3 == 0
    shifted, both = (
        random_shift(tf.constant(images), batch_random(50), 2, which).numpy() for which in (None, tf.constant(mirrored))
    )
    np.testing.assert_array_equal(both[~mirrored], shifted[~mirrored])
    np.testing.assert_array_equal(both[mirrored], shifted[mirrored][:, :, ::-1])


def test_each_example_has_its_turn_once_in_any_two_epochs():
    numbers = np.arange(50, dtype=np.float32)[:, None]

    def turned(inputs, targets, random):
        return random.turns, targets

    had = np.zeros([4, 50], bool)
    for step, (turns, targets) in enumerate(
        training_batches(Split.from_arrays(numbers, numbers), 10, 3, turned).take(4 * 5)
    ):
        had[step // 5, targets.numpy()[:, 0].astype(int)] = turns
    assert had[0].sum() == 25
    np.testing.assert_array_equal(had[:-1], ~had[1:])


MEMORY = """
import resource
import numpy as np
import tensorflow as tf
from common.batches import training_batches
from common.batches import Split

split = Split.from_arrays(tf.ones([400, 1000, 1000], tf.uint8), np.ones((400, 1), np.float32))

before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
for batch in training_batches(split, 1, seed=0).take(30):
    pass
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024)
"""


@pytest.mark.long
def test_the_stream_does_not_copy_the_data():
    """400 MB of examples, and 30 batches of 1 MB each."""
    run = run_program("-c", MEMORY)
    assert run.returncode == 0, run.stderr
    assert int(run.stdout) < 100e6
    images = tf.zeros([4, 8, 8, 3], tf.uint8)
    assert Split.from_arrays(images, np.zeros((4, 1), np.float32)).inputs is images
