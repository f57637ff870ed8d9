"""Batch t as a pure function of (seed, t): exact resume, sharding and shuffling from one rule."""

import dataclasses
import itertools
import math
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from common.cli import UserError
from common.upstream import replica_datasets

import keras
import numpy as np
import tensorflow as tf

# Inputs and targets of each split, as they were read: arrays [n, ...], or dictionaries of them. Where the kind of
# output is a class, a target is its name.
Arrays = dict[str, tuple[Any, Any]]


@dataclasses.dataclass(frozen=True)
class Split:
    """The examples of one split, in main memory.

    `inputs` and `targets` are tensors [n, ...] of any shape and type, or dictionaries of them. In most recipes: inputs
    uint8 [n, height, width, channels], string [n] or float32 [n, columns]; targets float32, one-hot [n, classes] or
    numbers [n, 1].
    """

    inputs: Any
    targets: Any

    @classmethod
    def of(cls, inputs: Any, targets: Any) -> "Split":
        """Moves arrays into a split. Never onto a GPU: a data set need not fit there."""
        with tf.device("CPU:0"):
            return cls(*tf.nest.map_structure(tf.convert_to_tensor, (inputs, targets)))

    def __len__(self) -> int:
        return int(tf.nest.flatten(self.targets)[0].shape[0])

    def arrays(self, rows: slice | np.ndarray = slice(None)) -> tuple[Any, Any]:
        """Inputs and targets of these rows as NumPy arrays, taken in main memory even where there is a GPU."""
        with tf.device("CPU:0"):
            take = (lambda part: part[rows]) if isinstance(rows, slice) else (lambda part: tf.gather(part, rows))
            return tf.nest.map_structure(lambda part: np.asarray(take(part)), (self.inputs, self.targets))


# Takes inputs, targets and the batch's random numbers; returns new inputs and targets.
Augment = Callable[[tf.Tensor, tf.Tensor, "BatchRandom"], tuple[tf.Tensor, tf.Tensor]]


def steps_per_epoch(split: Split, batch_size: int) -> int:
    """The number of training batches in an epoch, all of `batch_size` examples; 1 where the split has fewer.

    Up to one in fifty is left out where the number then has a divisor from 8 to 32, see `steps_per_execution`.
    """
    most = max(1, len(split) // batch_size)
    return next((n for n in range(most, most - most // 50 - 1, -1) if any(n % d == 0 for d in range(8, 33))), most)


def evaluation_steps(split: Split, batch_size: int) -> int:
    """The number of batches of `evaluation_batches`, for `validation_steps`."""
    return -(-len(split) // batch_size)


def steps_per_execution(
    model: keras.Model, split: Split, batch_size: int, strategy: tf.distribute.Strategy, start_step: int = 0
) -> int:
    """The number of training steps that Keras executes at once, for `model.compile`.

    Several steps save Keras' work between steps, but only between executions does Python answer to a signal. So an
    execution takes half a second at most, by the time of a forward pass of the built `model`, of which a step takes
    about three. On several replicas it is one step: there, Keras 3.15's loop over steps fails ("You must feed a value
    for placeholder tensor"). The number divides the steps per epoch, and those that remain from `start_step` on.
    """
    if strategy.num_replicas_in_sync > 1:
        return 1
    inputs = tf.nest.map_structure(tf.convert_to_tensor, split.arrays(slice(batch_size))[0])
    forward = tf.function(lambda inputs: model(inputs, training=False), autograph=False)
    forward(inputs)  # Traces the graph.
    began = time.perf_counter()
    tf.nest.map_structure(np.asarray, forward(inputs))
    step_seconds = 3 * (time.perf_counter() - began)
    steps = steps_per_epoch(split, batch_size)
    steps = math.gcd(steps, start_step % steps)
    return max(size for size in range(1, steps + 1) if steps % size == 0 and (size == 1 or size * step_seconds <= 0.5))


class BatchRandom(NamedTuple):
    """The seed of the random numbers for one batch; an augmentation passes it to `uniform`.

    `turns` is True for half of the examples, bool [batch], and in the next epoch for the other half: flipped by it,
    two epochs show each image both ways, which random flips do for half of the images only (Jordan, "94% on CIFAR-10 in
    3.29 Seconds on a Single GPU", https://arxiv.org/abs/2404.00498). `batch` is the size of the global batch; `calls`
    counts the calls of `uniform`.
    """

    seed: tf.Tensor
    batch: tf.Tensor | int
    turns: tf.Tensor
    calls: Iterator[int]
    replica: tf.Tensor | int = 0
    replicas: int = 1


def uniform(random: BatchRandom, minimum: float, maximum: float, dtype: tf.DType = tf.float32) -> tf.Tensor:
    """Uniform random numbers in [minimum, maximum), one for each example.

    They are drawn for the whole global batch, from (seed, step, number of the call); a replica gets those of its own
    examples, so two devices augment as one does.
    """
    seed = tf.random.experimental.stateless_fold_in(random.seed, next(random.calls))
    drawn = tf.random.stateless_uniform([random.batch], seed, minimum, maximum, dtype)
    return drawn[random.replica :: random.replicas]


def random_shift(images: tf.Tensor, random: BatchRandom, pixels: int, mirrored: tf.Tensor | None = None) -> tf.Tensor:
    """Moves each image by up to `pixels` along both axes; the edge is filled by reflection.

    Whole pixels, so images stay uint8; [batch, height, width, channels]. Those that are `mirrored`, bool [batch], are
    flipped left to right as well.
    """
    for axis in (1, 2):
        size = images.shape[axis]
        if pixels >= size:
            raise UserError(f"--shift {pixels}: the images have {size} pixels along that axis; shift by fewer")
        offsets = uniform(random, -pixels, pixels + 1, dtype=tf.int32)
        positions = tf.abs(tf.range(size) + offsets[:, None])
        positions = size - 1 - tf.abs(size - 1 - positions)
        if axis == 2 and mirrored is not None:  # Columns are picked once, as that takes most of the time.
            positions = tf.where(mirrored[:, None], positions[:, ::-1], positions)
        images = tf.gather(images, positions, axis=axis, batch_dims=1)
    return images


def training_batches(
    split: Split,
    batch_size: int,
    seed: int,
    augment: Augment | None = None,
    strategy: tf.distribute.Strategy | None = None,
    start_step: int = 0,
) -> Any:
    """An endless stream of shuffled global batches of equal size, from step `start_step` on.

    The order of an epoch is a permutation of all examples that follows from (seed, epoch). Its batches are the first
    `steps_per_epoch * batch_size` places; the examples that are left out differ from epoch to epoch. A split with fewer
    examples than `batch_size` is one batch.

    Args:
        split: the training examples.
        batch_size: size of a global batch, over all devices together; a multiple of the number of replicas.
        seed: the seed of the run.
        augment: called on each replica's slice inside the tf.data map; must be made of TensorFlow operations.
        strategy: where the batches go; each replica computes only its own slice of them.
        start_step: number of the first batch.

    Returns:
        A `tf.data.Dataset` of (inputs, targets), on several replicas a `DistributedDataset`.
    """
    strategy = strategy or tf.distribute.get_strategy()
    replicas, steps = strategy.num_replicas_in_sync, steps_per_epoch(split, batch_size)
    rows = min(batch_size, len(split)) // replicas
    if not rows:
        raise UserError(f"--devices {replicas}: there are {len(split)} training examples; use fewer devices")
    shuffle, fold_in = tf.random.experimental.index_shuffle, tf.random.experimental.stateless_fold_in

    def replica_batch(step: tf.Tensor, replica: tf.Tensor) -> tuple:
        places = (step % steps * rows + tf.range(rows, dtype=tf.int64)) * replicas + replica
        epoch_seed = fold_in(tf.constant([seed, 0], tf.int64), step // steps)
        examples = shuffle(places, epoch_seed, tf.constant(len(split) - 1, tf.int64))
        inputs, targets = _gather(split, examples)
        if augment is None:
            return inputs, targets
        batch_seed = fold_in(tf.constant([seed, 1], tf.int64), step)
        turns = (examples + step // steps) % 2 == 0
        return augment(
            inputs, targets, BatchRandom(batch_seed, rows * replicas, turns, itertools.count(), replica, replicas)
        )

    return _stream(replica_batch, strategy, start_step)


def evaluation_batches(split: Split, batch_size: int, strategy: tf.distribute.Strategy | None = None) -> Any:
    """Every example once, in order, in batches of up to `batch_size` whose sizes differ by one at most.

    None where the split is empty. The length is unknown to Keras, which makes a second iterator for each validation of
    a known length: pass `evaluation_steps` as `validation_steps` or `steps`.
    """
    if not len(split):
        return None
    strategy = strategy or tf.distribute.get_strategy()
    replicas, steps = strategy.num_replicas_in_sync, evaluation_steps(split, batch_size)
    if len(split) // steps < replicas:
        problem = f"a batch of {len(split) // steps} examples (of {len(split)}) leaves devices without any"
        raise UserError(f"--devices {replicas}: {problem}; use fewer devices or larger batches")

    def replica_batch(step: tf.Tensor, replica: tf.Tensor) -> tuple:
        # A replica's rows are contiguous, as Keras concatenates the predictions of the replicas in their order.
        first, end = step * len(split) // steps, (step + 1) * len(split) // steps
        return _gather(split, tf.range(*(first + part * (end - first) // replicas for part in (replica, replica + 1))))

    return _stream(replica_batch, strategy, 0, steps)


def _gather(split: Split, examples: tf.Tensor) -> tuple:
    return tf.nest.map_structure(lambda part: tf.gather(part, examples), (split.inputs, split.targets))


def _stream(replica_batch: Callable, strategy: tf.distribute.Strategy, start: int, end: int | None = None) -> Any:
    """The batches `replica_batch(step, replica)` of the steps from `start` to `end`, or without an end."""

    def worker_dataset(context: tf.distribute.InputContext) -> tf.data.Dataset:
        # A worker with several replicas yields their slices one after the other.
        local = context.num_replicas_in_sync // context.num_input_pipelines

        @tf.autograph.experimental.do_not_convert  # It would put its own traceback into the messages of errors.
        def numbered_batch(number: tf.Tensor) -> tuple:
            return replica_batch(number // local, context.input_pipeline_id * local + number % local)

        numbers = tf.data.Dataset.range(start * local, tf.int64.max)
        numbers = numbers.apply(tf.data.experimental.assert_cardinality(tf.data.INFINITE_CARDINALITY))
        if end is not None:
            numbers = numbers.take_while(lambda number: number < end * local)
        options = tf.data.Options()
        # The rewriting of the graph would copy the tensors it captures: the whole data set.
        options.experimental_optimization.apply_default_optimizations = False
        # The thread that tunes parallelism delays the deletion of an iterator by up to a minute in TensorFlow 2.21.
        options.autotune.enabled = False
        batches = numbers.map(numbered_batch, num_parallel_calls=tf.data.AUTOTUNE)
        return batches.prefetch(tf.data.AUTOTUNE).with_options(options)

    return replica_datasets(worker_dataset, strategy)
