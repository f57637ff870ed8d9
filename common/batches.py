"""Batch t as a pure function of (seed, t): exact resume, sharding and shuffling from one rule."""

from collections.abc import Callable
from typing import Any

from common.cli import UserError
from common.examples import Split

import tensorflow as tf

# Takes inputs, targets and the batch's random numbers; returns new inputs and targets.
Augment = Callable[[tf.Tensor, tf.Tensor, "BatchRandom"], tuple[tf.Tensor, tf.Tensor]]


def steps_per_epoch(split: Split, batch_size: int) -> int:
    """The number of batches that deal `split` out evenly, none larger than `batch_size`."""
    return -(-len(split) // batch_size)


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


class BatchRandom:
    """Random numbers for the examples of one batch, the same however the batch is sliced.

    Each call draws for the whole global batch and returns the rows of this slice, so that two
    devices augment just as one would. The draws follow from (seed, step, number of the call).
    """

    def __init__(self, seed: tf.Tensor, batch: tf.Tensor, start: tf.Tensor, stop: tf.Tensor):
        self._seed, self._batch, self._start, self._stop = seed, batch, start, stop
        self._calls = 0

    def uniform(
        self, minimum: float, maximum: float, shape: tuple[int, ...] = (), dtype: tf.DType = tf.float32
    ) -> tf.Tensor:
        """Uniform numbers in [minimum, maximum), one tensor of `shape` for each example."""
        seed = tf.random.experimental.stateless_fold_in(self._seed, self._calls)
        self._calls += 1
        drawn = tf.random.stateless_uniform(
            tf.concat([[self._batch], tf.constant(shape, tf.int64)], 0), seed, minimum, maximum, dtype
        )
        drawn = drawn[self._start : self._stop]
        return tf.ensure_shape(drawn, [None, *shape])


def random_mirror(images: tf.Tensor, random: BatchRandom) -> tf.Tensor:
    """Mirrors each image left to right with probability one half; [batch, height, width, channels]."""
    width = images.shape[2]
    flip = random.uniform(0.0, 1.0) < 0.5
    columns = tf.range(width)
    return tf.gather(images, tf.where(flip[:, None], width - 1 - columns, columns), axis=2, batch_dims=1)


def random_shift(images: tf.Tensor, random: BatchRandom, pixels: int) -> tf.Tensor:
    """Moves each image by up to `pixels` along both axes; the edge is filled by reflection.

    Whole pixels, so images stay uint8; [batch, height, width, channels].
    """
    for axis in (1, 2):
        size = images.shape[axis]
        if pixels >= size:
            raise UserError(
                f"--shift {pixels}: the images have {size} pixels along that axis; shift by fewer"
            )
        offsets = random.uniform(-pixels, pixels + 1, dtype=tf.int32)
        positions = tf.abs(tf.range(size) + offsets[:, None])
        positions = size - 1 - tf.abs(size - 1 - positions)
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
    steps = steps_per_epoch(split, batch_size)

    def order(positions: tf.Tensor, epoch: tf.Tensor) -> tf.Tensor:
        epoch_seed = tf.random.experimental.stateless_fold_in(tf.constant([seed, 0], tf.int64), epoch)
        return tf.random.experimental.index_shuffle(
            positions, epoch_seed, tf.constant(len(split) - 1, tf.int64)
        )

    def randomly(inputs: tf.Tensor, targets: tf.Tensor, step: tf.Tensor, *slice_of: tf.Tensor) -> tuple:
        if augment is None:
            return inputs, targets
        batch_seed = tf.random.experimental.stateless_fold_in(tf.constant([seed, 1], tf.int64), step)
        return augment(inputs, targets, BatchRandom(batch_seed, *slice_of))

    endless = tf.data.Dataset.range(start_step, tf.int64.max)
    endless = endless.apply(tf.data.experimental.assert_cardinality(tf.data.INFINITE_CARDINALITY))
    return _distribute(split, endless, steps, order, randomly, strategy, weighted=True)


def evaluation_batches(split: Split, batch_size: int, strategy: tf.distribute.Strategy | None = None) -> Any:
    """Every example once, in order, in batches of up to `batch_size` whose sizes differ by one at most.

    Returns:
        A `tf.data.Dataset` of (inputs, targets); under several replicas a `DistributedDataset` that begins
        again at its end, since Keras takes a batch more than it evaluates: pass `validation_steps` or
        `steps` to Keras. None where the split is empty.
    """
    if not len(split):
        return None
    steps = steps_per_epoch(split, batch_size)
    return _distribute(
        split,
        tf.data.Dataset.range(steps),
        steps,
        order=lambda positions, epoch: positions,
        randomly=lambda inputs, targets, *_: (inputs, targets),
        strategy=strategy,
        weighted=False,
    )


def _distribute(
    split: Split,
    step_numbers: tf.data.Dataset,
    steps: int,
    order: Callable,
    randomly: Callable,
    strategy: tf.distribute.Strategy | None,
    weighted: bool,
) -> Any:
    strategy = strategy or tf.distribute.get_strategy()
    replicas = strategy.num_replicas_in_sync
    if len(split) // steps < replicas:
        raise UserError(
            f"--devices {replicas}: a batch of {len(split) // steps} examples (of {len(split)} in the split) "
            "leaves devices without any; use fewer devices or larger batches"
        )

    def replica_slice(step: tf.Tensor, replica: tf.Tensor) -> tuple:
        first = step % steps * len(split) // steps
        batch = (step % steps + 1) * len(split) // steps - first
        start, stop = replica * batch // replicas, (replica + 1) * batch // replicas
        examples = order(tf.range(first + start, first + stop), step // steps)
        inputs, targets = tf.gather(split.inputs, examples), tf.gather(split.targets, examples)
        inputs, targets = randomly(inputs, targets, step, batch, start, stop)
        if replicas == 1 or not weighted:
            return inputs, targets
        share = (stop - start) * replicas / batch
        return inputs, targets, tf.fill([stop - start], tf.cast(share, tf.float32))

    if replicas == 1:
        zero = tf.constant(0, tf.int64)
        return _read_ahead(step_numbers.map(lambda step: (step, zero)), replica_slice)

    def of_worker(context: tf.distribute.InputContext) -> tf.data.Dataset:
        # A worker with several replicas deals their slices out one after the other.
        local = context.num_replicas_in_sync // context.num_input_pipelines
        own = tf.data.Dataset.range(local).map(lambda replica: context.input_pipeline_id * local + replica)
        pairs = step_numbers.repeat().flat_map(lambda step: own.map(lambda replica: (step, replica)))
        pairs = pairs.apply(tf.data.experimental.assert_cardinality(tf.data.INFINITE_CARDINALITY))
        return _read_ahead(pairs, replica_slice)

    return strategy.distribute_datasets_from_function(of_worker)


def _read_ahead(pairs: tf.data.Dataset, replica_slice: Callable) -> tf.data.Dataset:
    options = tf.data.Options()
    # The rewriting of the graph would copy the tensors it captures: the whole data set.
    options.experimental_optimization.apply_default_optimizations = False
    batches = pairs.map(replica_slice, num_parallel_calls=tf.data.AUTOTUNE).prefetch(tf.data.AUTOTUNE)
    return batches.with_options(options)
