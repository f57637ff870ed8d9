"""Batch t as a pure function of (seed, t): exact resume, sharding and shuffling from one rule."""

import dataclasses
import itertools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from common.cli import UserError
from common.upstream import distributed

import numpy as np
import tensorflow as tf

# Inputs and targets of each split, as they were read: arrays [n, ...], or dictionaries of them. Where the kind of
# output is a class, a target is its name.
Arrays = dict[str, tuple[Any, Any]]


@dataclasses.dataclass(frozen=True)
class Split:
    """The examples of one split, in main memory.

    `inputs` and `targets` are tensors [n, ...] of any shape and type, or dictionaries of them. For the kinds of most
    recipes: inputs are uint8 [n, height, width, channels], string [n] or float32 [n, columns]; targets are float32,
    one-hot [n, classes] or numbers [n, 1].
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
    """The number of batches that deal `split` out evenly, none larger than `batch_size`.

    From 32 on a multiple of 8, for executions of several steps (see `steps_per_execution`), or the number of examples.
    """
    steps = -(-len(split) // batch_size)
    return steps if steps <= 32 else min(-(-steps // 8) * 8, len(split))


def steps_per_execution(steps: int, strategy: tf.distribute.Strategy, at_most: int = 32) -> int:
    """The largest divisor of `steps` up to `at_most`, for `model.compile`.

    Several steps per execution save Keras' work between steps. A divisor, because `fit` would
    otherwise run past the end of the epoch: it executes whole groups of steps only. And one step under
    several replicas: there, Keras 3.15's loop over steps fails ("You must feed a value for placeholder
    tensor"), see `tests/test_upstream.py`.
    """
    if strategy.num_replicas_in_sync > 1:
        return 1
    return max(size for size in range(1, at_most + 1) if steps % size == 0)


class BatchRandom(NamedTuple):
    """What the random numbers of a batch follow from; given to an augmentation, which passes it to `uniform`.

    `turns` is True for half of the examples, bool [batch], and in the next epoch for the other half: mirrored by it,
    two epochs show each image both ways, which by chance they do for half of them only (Jordan, "94% on CIFAR-10 in
    3.29 Seconds on a Single GPU", https://arxiv.org/abs/2404.00498). `calls` counts.
    """

    seed: tf.Tensor
    batch: tf.Tensor
    turns: tf.Tensor
    calls: Iterator[int]
    replica: tf.Tensor | int = 0
    replicas: int = 1


def uniform(random: BatchRandom, minimum: float, maximum: float, dtype: tf.DType = tf.float32) -> tf.Tensor:
    """Uniform numbers in [minimum, maximum), one for each example.

    The same however the batch is sliced: drawn for the whole global batch, from (seed, step, number of the call), of
    which those of this replica are returned. So two devices augment just as one would.
    """
    seed = tf.random.experimental.stateless_fold_in(random.seed, next(random.calls))
    drawn = tf.random.stateless_uniform([random.batch], seed, minimum, maximum, dtype)
    return drawn[random.replica :: random.replicas]


def random_shift(images: tf.Tensor, random: BatchRandom, pixels: int, mirrored: tf.Tensor | None = None) -> tf.Tensor:
    """Moves each image by up to `pixels` along both axes; the edge is filled by reflection.

    Whole pixels, so images stay uint8; [batch, height, width, channels]. Those that are `mirrored`, bool [batch], are
    turned left to right as well.
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
    """An endless stream of shuffled global batches, from step `start_step` on.

    Step t belongs to epoch t // steps_per_epoch, whose order is a permutation that follows from
    (seed, epoch). An epoch deals every example out once, to batches whose sizes differ by one at most,
    so that no small last batch is left over and no device without an example.

    Args:
        split: the training examples.
        batch_size: upper limit of a global batch, over all devices together.
        seed: the seed of the run.
        augment: called on each slice inside the tf.data map; must be made of TensorFlow operations.
        strategy: where the batches go; each replica computes only its own slice of them.
        start_step: number of the first batch.

    Returns:
        A `tf.data.Dataset` of (inputs, targets) or, under several replicas, a `DistributedDataset` of
        (inputs, targets, sample_weight): Keras averages the replicas' mean losses as if their slices
        were of equal size, and the weight sets that right. Pass `steps_per_epoch` to `fit`.
    """
    return _deal(split, batch_size, strategy, seed, augment, start_step)


def evaluation_batches(split: Split, batch_size: int, strategy: tf.distribute.Strategy | None = None) -> Any:
    """Every example once, in order, in batches of up to `batch_size` whose sizes differ by one at most.

    Returns:
        A `tf.data.Dataset` of (inputs, targets), under several replicas a `DistributedDataset`; None where the
        split is empty. Its length is left unknown, as Keras makes a second iterator for each validation of a known
        one: pass `validation_steps` or `steps`.
    """
    return _deal(split, batch_size, strategy) if len(split) else None


def _deal(
    split: Split,
    batch_size: int,
    strategy: tf.distribute.Strategy | None,
    seed: int | None = None,
    augment: Augment | None = None,
    start_step: int = 0,
) -> Any:
    """The stream for training, or without a seed for evaluation."""
    strategy = strategy or tf.distribute.get_strategy()
    replicas, steps = strategy.num_replicas_in_sync, steps_per_epoch(split, batch_size)
    shuffle, fold_in = tf.random.experimental.index_shuffle, tf.random.experimental.stateless_fold_in
    if len(split) // steps < replicas:
        raise UserError(
            f"--devices {replicas}: a batch of {len(split) // steps} examples (of {len(split)} in the split) "
            "leaves devices without any; use fewer devices or larger batches"
        )

    def of_worker(context: tf.distribute.InputContext) -> tf.data.Dataset:
        # A worker with several replicas deals their slices out one after the other.
        local = context.num_replicas_in_sync // context.num_input_pipelines

        @tf.autograph.experimental.do_not_convert  # It would put its own traceback into the messages of errors.
        def replica_slice(number: tf.Tensor) -> tuple:
            step, replica = number // local, context.input_pipeline_id * local + number % local
            first = step % steps * len(split) // steps
            batch = (step % steps + 1) * len(split) // steps - first
            if seed is None:  # In a row each, as predictions are going to be joined in this order.
                start, stop = replica * batch // replicas, (replica + 1) * batch // replicas
                examples = tf.range(first + start, first + stop)
            else:  # In turn, so that a replica knows the places of its examples in the batch: see `cure_dropout`.
                examples = tf.range(first + replica, first + batch, replicas)
                epoch_seed = fold_in(tf.constant([seed, 0], tf.int64), step // steps)
                examples = shuffle(examples, epoch_seed, tf.constant(len(split) - 1, tf.int64))
            parts = (split.inputs, split.targets)
            inputs, targets = tf.nest.map_structure(lambda part: tf.gather(part, examples), parts)
            if augment is not None:
                batch_seed = fold_in(tf.constant([seed, 1], tf.int64), step)
                turns = (examples + step // steps) % 2 == 0
                random = BatchRandom(batch_seed, batch, turns, itertools.count(), replica, replicas)
                inputs, targets = augment(inputs, targets, random)
            if replicas == 1 or seed is None:
                return inputs, targets
            weight = tf.cast(tf.size(examples, tf.int64) * replicas / batch, tf.float32)
            return inputs, targets, tf.fill(tf.shape(examples), weight)

        numbers = tf.data.Dataset.range(start_step * local, tf.int64.max)
        numbers = numbers.apply(tf.data.experimental.assert_cardinality(tf.data.INFINITE_CARDINALITY))
        if seed is None:
            numbers = numbers.take_while(lambda number: number < steps * local)
        options = tf.data.Options()
        # The rewriting of the graph would copy the tensors it captures: the whole data set.
        options.experimental_optimization.apply_default_optimizations = False
        batches = numbers.map(replica_slice, num_parallel_calls=tf.data.AUTOTUNE)
        return batches.prefetch(tf.data.AUTOTUNE).with_options(options)

    return distributed(of_worker, strategy)
