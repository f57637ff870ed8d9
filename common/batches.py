"""Input pipelines. Batch t depends only on (seed, t), so resumed and distributed runs see the same batches."""

import dataclasses
import functools
import itertools
import math
import pathlib
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from common.cli import UserError
from common.upstream import replica_datasets

import keras
import numpy as np
import tensorflow as tf

# Inputs and targets of each split before conversion to tensors: arrays [n, ...], or dictionaries of arrays. For
# classification, targets are class names.
Arrays = dict[str, tuple[Any, Any]]


class MappedArray:
    """An array [n, ...] of numbers in a file without header. It takes no memory but the system's page cache.

    `digests`, if they are known, are the `splits.input_digests` of the array.
    """

    def __init__(self, path: pathlib.Path, shape: tuple[int, ...], dtype: Any, digests: np.ndarray | None = None):
        self.path, self.shape, self.dtype, self.digests = path, tuple(shape), tf.as_dtype(dtype), digests

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return np.memmap(self.path, self.dtype.as_numpy_dtype, "r", shape=self.shape)

    @functools.cached_property
    def tensor(self) -> tf.Tensor:
        """The mapped file as a tensor on the CPU. `ImmutableConst`, TensorFlow's own operation, copies it to memory."""
        # NumPy shares arrays only if they can be written to. Nothing writes to a tensor.
        array = np.memmap(self.path, self.dtype.as_numpy_dtype, "r+", shape=self.shape)
        with tf.device("CPU:0"):
            return tf.experimental.dlpack.from_dlpack(array.__dlpack__())


@dataclasses.dataclass(frozen=True)
class Split:
    """The examples of one split: rows of arrays that all splits of a data set share, in host memory or in a file.

    `stored_inputs` and `stored_targets` are tensors or `MappedArray`s [examples, ...] of any shape and dtype, or
    dictionaries of them. Most recipes use uint8 [n, height, width, channels], string [n] or float32 [n, columns]
    inputs, and one-hot targets, float32 [n, classes], or values, float64 [n, 1]. `rows`, int64 [n], are the examples of
    this split; None: all.
    """

    stored_inputs: Any
    stored_targets: Any
    rows: np.ndarray | None = None

    @classmethod
    def from_arrays(cls, inputs: Any, targets: Any, rows: np.ndarray | None = None) -> "Split":
        """Converts arrays to a split. The tensors stay on the CPU, because a dataset may not fit in GPU memory."""
        with tf.device("CPU:0"):
            inputs, targets = tf.nest.map_structure(
                lambda part: part if isinstance(part, MappedArray) else tf.convert_to_tensor(part), (inputs, targets)
            )
        return cls(inputs, targets, rows)

    def __len__(self) -> int:
        return int(tf.nest.flatten(self.stored_targets)[0].shape[0]) if self.rows is None else len(self.rows)

    @property
    def input_shape(self) -> Any:
        """The shape of an input, without the axis of the examples."""
        return tf.nest.map_structure(lambda part: tuple(part.shape[1:]), self.stored_inputs)

    @property
    def inputs(self) -> Any:
        """The inputs as tensors on the CPU; a copy, unless the split has all rows."""
        return self._taken(self.stored_inputs)

    @property
    def targets(self) -> Any:
        """The targets as tensors on the CPU; a copy, unless the split has all rows."""
        return self._taken(self.stored_targets)

    def _taken(self, stored: Any) -> Any:
        with tf.device("CPU:0"):
            if self.rows is None and not any(isinstance(part, MappedArray) for part in tf.nest.flatten(stored)):
                return stored
            return tf.nest.map_structure(tf.convert_to_tensor, self._arrays(stored, slice(None)))

    def _arrays(self, stored: Any, rows: slice | np.ndarray) -> Any:
        chosen = rows if self.rows is None else self.rows[rows]
        # `np.asarray` of a tensor on the CPU, or of a file, copies nothing.
        return tf.nest.map_structure(lambda part: np.asarray(part)[chosen], stored)

    def arrays(self, rows: slice | np.ndarray = slice(None)) -> tuple[Any, Any]:
        """Returns inputs and targets of the given rows of this split as NumPy arrays, without using a GPU."""
        return self._arrays(self.stored_inputs, rows), self._arrays(self.stored_targets, rows)


# An augmentation: takes inputs, targets and the random seeds of the batch; returns new inputs and targets.
Augment = Callable[[tf.Tensor, tf.Tensor, "BatchRandom"], tuple[tf.Tensor, tf.Tensor]]


def steps_per_epoch(split: Split, batch_size: int) -> int:
    """Returns the number of training batches per epoch: full batches only, or 1 if the split is smaller than a batch.

    Drops up to 2 % of the batches if the number then has a divisor from 8 to 32, which `steps_per_execution` can use.
    """
    most = max(1, len(split) // batch_size)
    return next((n for n in range(most, most - most // 50 - 1, -1) if any(n % d == 0 for d in range(8, 33))), most)


def evaluation_steps(split: Split, batch_size: int) -> int:
    """Returns the number of batches that `evaluation_batches` yields; pass it to `fit` as `validation_steps`."""
    return -(-len(split) // batch_size)


def steps_per_execution(
    model: keras.Model, split: Split, batch_size: int, strategy: tf.distribute.Strategy, start_step: int = 0
) -> int:
    """Returns the `steps_per_execution` to pass to `model.compile`.

    More steps per execution reduce Keras' overhead, but Python handles signals only between executions. An execution
    therefore takes at most half a second. The estimate: a training step takes three times as long as a forward pass of
    the built `model`. The result divides the steps per epoch, and the steps that remain in the epoch of `start_step`.
    On several replicas it is 1, because Keras 3.15 fails there ("You must feed a value for placeholder tensor").
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
    """Seeds for augmenting one batch; an augmentation passes it to `uniform`.

    `turns`, bool [batch], marks the half of the examples to flip, and alternates every epoch. Two epochs then show each
    image in both orientations; independent random flips do so for only half of the images (Jordan, "94% on CIFAR-10 in
    3.29 Seconds on a Single GPU", https://arxiv.org/abs/2404.00498). `batch` is the global batch size; `calls` counts
    the calls of `uniform`.
    """

    seed: tf.Tensor
    batch: tf.Tensor | int
    turns: tf.Tensor
    calls: Iterator[int]
    replica: tf.Tensor | int = 0
    replicas: int = 1


def uniform(random: BatchRandom, minimum: float, maximum: float, dtype: tf.DType = tf.float32) -> tf.Tensor:
    """Returns uniform random numbers in [minimum, maximum), one per example.

    They depend on (seed, step, number of the call) and are values for the global batch. Each replica takes the numbers
    of its own examples, so augmentation does not depend on the number of devices.
    """
    seed = tf.random.experimental.stateless_fold_in(random.seed, next(random.calls))
    values = tf.random.stateless_uniform([random.batch], seed, minimum, maximum, dtype)
    return values[random.replica :: random.replicas]


def random_shift(images: tf.Tensor, random: BatchRandom, pixels: int, mirrored: tf.Tensor | None = None) -> tf.Tensor:
    """Shifts each image [batch, height, width, channels] by up to `pixels` along both axes, with reflection padding.

    Shifts are whole pixels, so images stay uint8. Also flips the images that `mirrored`, bool [batch], marks from left
    to right.
    """
    for axis in (1, 2):
        size = images.shape[axis]
        if pixels >= size:
            raise UserError(f"--shift {pixels}: the images have {size} pixels along that axis; shift by fewer")
        offsets = uniform(random, -pixels, pixels + 1, dtype=tf.int32)
        positions = tf.abs(tf.range(size) + offsets[:, None])
        positions = size - 1 - tf.abs(size - 1 - positions)
        if axis == 2 and mirrored is not None:  # Flip in the same gather, which takes most of the time.
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
    class_weights: np.ndarray | None = None,
) -> Any:
    """Yields shuffled global batches of equal size without end, starting with step `start_step`.

    Each epoch is a permutation of all examples, determined by (seed, epoch). Its first `steps_per_epoch * batch_size`
    examples form the batches; the dropped examples differ between epochs. A split with fewer than `batch_size` examples
    is one batch.

    Args:
        split: the training examples.
        batch_size: global batch size, summed over all devices; a multiple of the number of replicas.
        seed: the seed of the run.
        augment: called on each replica's slice inside `tf.data.Dataset.map`; must use TensorFlow operations only.
        strategy: distributes the batches; each replica computes only its own slice.
        start_step: number of the first batch.
        class_weights: weight of each class in the loss, [classes], for one-hot targets.

    Returns:
        A `tf.data.Dataset` of (inputs, targets), with sample weights as a third part if there are `class_weights`; a
        `DistributedDataset` if there are several replicas.
    """
    distribution = strategy or tf.distribute.get_strategy()
    replicas, steps = distribution.num_replicas_in_sync, steps_per_epoch(split, batch_size)
    rows = min(batch_size, len(split)) // replicas
    if not rows:
        raise UserError(f"--devices {replicas}: there are {len(split)} training examples; use fewer devices")
    shuffle, fold_in = tf.random.experimental.index_shuffle, tf.random.experimental.stateless_fold_in

    def replica_batch(step: tf.Tensor, replica: tf.Tensor) -> tuple:
        positions = (step % steps * rows + tf.range(rows, dtype=tf.int64)) * replicas + replica
        epoch_seed = fold_in(tf.constant([seed, 0], tf.int64), step // steps)
        examples = shuffle(positions, epoch_seed, tf.constant(len(split) - 1, tf.int64))
        inputs, targets = _gather(split, examples)
        weights = () if class_weights is None else (tf.linalg.matvec(targets, class_weights),)
        if augment is None:
            return inputs, targets, *weights
        batch_seed = fold_in(tf.constant([seed, 1], tf.int64), step)
        turns = (examples + step // steps) % 2 == 0
        random = BatchRandom(batch_seed, rows * replicas, turns, itertools.count(), replica, replicas)
        return *augment(inputs, targets, random), *weights

    return _stream(replica_batch, distribution, start_step)


def evaluation_batches(split: Split, batch_size: int, strategy: tf.distribute.Strategy | None = None) -> Any:
    """Yields every example once, in order. Batch sizes differ by at most one and never exceed `batch_size`.

    Returns None if the split is empty. The cardinality is unknown, because Keras creates a second iterator for each
    validation if it is known: pass `evaluation_steps` as `validation_steps` or `steps`.
    """
    if not len(split):
        return None
    distribution = strategy or tf.distribute.get_strategy()
    replicas, steps = distribution.num_replicas_in_sync, evaluation_steps(split, batch_size)
    if len(split) // steps < replicas:
        problem = f"a batch of {len(split) // steps} examples (of {len(split)}) leaves devices without any"
        raise UserError(f"--devices {replicas}: {problem}; use fewer devices or larger batches")

    def replica_batch(step: tf.Tensor, replica: tf.Tensor) -> tuple:
        # Each replica takes contiguous rows, because Keras concatenates the predictions of the replicas in order.
        first, end = step * len(split) // steps, (step + 1) * len(split) // steps
        return _gather(split, tf.range(*(first + part * (end - first) // replicas for part in (replica, replica + 1))))

    return _stream(replica_batch, distribution, 0, steps)


def _gather(split: Split, examples: tf.Tensor) -> tuple:
    examples = examples if split.rows is None else tf.gather(split.rows, examples)

    def take(part: Any) -> tf.Tensor:
        return tf.gather(part.tensor if isinstance(part, MappedArray) else part, examples)

    return tf.nest.map_structure(take, (split.stored_inputs, split.stored_targets))


def _stream(replica_batch: Callable, strategy: tf.distribute.Strategy, start: int, end: int | None = None) -> Any:
    """Returns a dataset of `replica_batch(step, replica)` for steps from `start` to `end`; endless if `end` is None."""

    def worker_dataset(context: tf.distribute.InputContext) -> tf.data.Dataset:
        # A worker with several replicas yields their slices in turn.
        local = context.num_replicas_in_sync // context.num_input_pipelines

        @tf.autograph.experimental.do_not_convert  # AutoGraph would add its own traceback to error messages.
        def numbered_batch(number: tf.Tensor) -> tuple:
            return replica_batch(number // local, context.input_pipeline_id * local + number % local)

        numbers = tf.data.Dataset.range(start * local, tf.int64.max)
        numbers = numbers.apply(tf.data.experimental.assert_cardinality(tf.data.INFINITE_CARDINALITY))
        if end is not None:
            numbers = numbers.take_while(lambda number: number < end * local)
        options = tf.data.Options()
        # Graph rewrites would copy the captured tensors, which hold the whole dataset.
        options.experimental_optimization.apply_default_optimizations = False
        # The autotuning thread delays iterator deletion by up to a minute (TensorFlow 2.21).
        options.autotune.enabled = False
        batches = numbers.map(numbered_batch, num_parallel_calls=tf.data.AUTOTUNE)
        return batches.prefetch(tf.data.AUTOTUNE).with_options(options)

    return replica_datasets(worker_dataset, strategy)
