"""Cures for bugs and gaps of Keras.

`tests/test_upstream.py` fails for each one that is no longer needed.
"""

import functools
import threading
from collections.abc import Callable, Sequence
from typing import Any

from common.cli import UserError

import keras
import tensorflow as tf
from keras.src import tree
from keras.src.backend.tensorflow import nn as tensorflow_nn
from keras.src.backend.tensorflow import random as tensorflow_random
from keras.src.backend.tensorflow import trainer as tensorflow_trainer
from keras.src.backend.tensorflow.optimizer import TFOptimizer
from keras.src.backend.tensorflow.trainer import TensorFlowTrainer
from keras.src.losses import loss as loss_module
from tensorflow.python.data.ops import dataset_ops
from tensorflow.python.distribute import input_lib, input_util
from tensorflow.python.framework import ops


def cure_replicas() -> None:
    """Makes several replicas compute what one would; each cure does nothing where there is only one."""
    cure_loss_average()
    cure_batch_normalization()
    cure_dropout()


@functools.cache
def cure_symbolic_build() -> None:
    """Lets `fit` and `evaluate` build a model before its first step, from what one replica's slice of a batch is like.

    On one device, Keras 3.15 creates the variables of metrics and optimizer while the first step is traced, and
    TensorFlow then traces it anew, as whatever creates variables: a second more for each training of a small network.
    On several, Keras adds the replicas' slices up to get a batch to build with, which fails as soon as their sizes
    differ ("Inputs to operation AddN must have the same size and shape"); the same place breaks several workers
    (https://github.com/keras-team/keras/issues/20585). Only shapes and types are looked at, so here no batch is taken:
    it would be missing from a validation that goes on with its iterator.
    """
    original = TensorFlowTrainer._maybe_symbolic_build

    def from_one_slice(self: TensorFlowTrainer, iterator: Any = None, data_batch: Any = None) -> None:
        if iterator is None:
            return original(self, data_batch=data_batch)
        batch = tree.map_structure(lambda leaf: tf.nest.flatten(leaf, True)[0], iterator._get_iterator().element_spec)
        with self.distribute_strategy.scope():
            return self._symbolic_build(data_batch=batch)

    TensorFlowTrainer._maybe_symbolic_build = from_one_slice


@functools.cache
def cure_loss_average() -> None:
    """Lets the training loss of an epoch be the mean over its examples, where replicas have unequal slices.

    `training_batches` gives the examples of a replica a sample weight of (size of its slice x replicas / size of the
    batch), for the gradient to be right. Keras 3.15 weights the replica's mean loss by the size of its
    slice once more, when it averages over the epoch. Here the sample weight is taken out before.
    """
    train_step, unscale = TensorFlowTrainer.train_step, loss_module.unscale_loss_for_distribution
    of_replica = threading.local()  # Each replica is traced in a thread of its own.

    def remember_weight(self: TensorFlowTrainer, data: tuple) -> dict:
        _, _, of_replica.weight = keras.utils.unpack_x_y_sample_weight(data)
        try:
            return train_step(self, data)
        finally:
            of_replica.weight = None

    def unscale_and_unweight(value: tf.Tensor) -> tf.Tensor:
        weight = getattr(of_replica, "weight", None)
        return unscale(value) if weight is None else unscale(value) / tf.cast(weight[0], value.dtype)

    TensorFlowTrainer.train_step = remember_weight
    loss_module.unscale_loss_for_distribution = unscale_and_unweight


@functools.cache
def cure_batch_normalization() -> None:
    """Makes `BatchNormalization` take its mean and variance from all replicas, as it would from one.

    Keras 3.15 has `synchronized=False` as default: then the moving averages differ between workers
    (https://keras.io/api/layers/normalization_layers/batch_normalization).
    """
    original = keras.layers.BatchNormalization.__init__

    def synchronized(self: keras.layers.BatchNormalization, *arguments: Any, **named: Any) -> None:
        original(self, *arguments, **{"synchronized": True, **named})

    keras.layers.BatchNormalization.__init__ = synchronized


@functools.cache
def cure_dropout() -> None:
    """Gives each example of a batch its own dropout mask, the same on several replicas as on one.

    In Keras 3.15 all replicas draw the same mask, each for its own slice. Here they draw the mask of the whole
    batch, of which replica r out of n takes the rows r, r + n, r + 2 n, ..., as `training_batches` deals the examples.
    Numbers that were drawn for more rows begin with those for fewer: so the size of the batch need not be known.
    """
    original = tensorflow_random.dropout

    def of_whole_batch(inputs: tf.Tensor, rate: float, noise_shape: Sequence | None = None, seed: Any = None) -> Any:
        context = tf.distribute.get_replica_context()
        replicas = context.num_replicas_in_sync if context else 1
        same_for_all = noise_shape is not None and isinstance(noise_shape[0], int) and noise_shape[0] == 1
        if replicas == 1 or same_for_all:
            return original(inputs, rate, noise_shape, seed)
        rows, *others = tf.unstack(tf.shape(inputs))
        ones = tf.ones([rows * replicas, *others], inputs.dtype)
        if noise_shape is not None:
            noise_shape = [None, *noise_shape[1:]]
        mask = original(ones, rate, noise_shape, seed)
        return inputs * tf.reshape(mask[context.replica_id_in_sync_group :: replicas], tf.shape(inputs))

    tensorflow_random.dropout = of_whole_batch


@functools.cache
def cure_distiller() -> None:
    """Lets `Distiller` compute and report on several replicas what it does on one.

    In Keras 3.15 its loss leaves out the sample weights of `training_batches`, equal throughout a replica's slice. And
    of the parts of its loss it reports the mean over slices, divided by their number; here the mean over examples.
    """
    original = keras.distillation.Distiller.compute_loss

    def over_all_examples(update: Callable, examples: tf.Tensor, part: Any) -> None:
        update(part * tf.distribute.get_strategy().num_replicas_in_sync, sample_weight=examples)

    def weighted(self: Any, x: Any = None, y: Any = None, y_pred: Any = None, sample_weight: Any = None, **named: Any):
        trackers = (self.student_loss_tracker, self.distillation_loss_tracker, self.total_loss_tracker)
        for tracker in trackers:
            update = functools.partial(over_all_examples, tracker.update_state, tf.shape(y)[0])
            object.__setattr__(tracker, "update_state", update)
        loss = original(self, x, y, y_pred, **named)
        for tracker in trackers:
            object.__delattr__(tracker, "update_state")
        return loss if sample_weight is None else loss * tf.cast(sample_weight[0], loss.dtype)

    keras.distillation.Distiller.compute_loss = weighted


@functools.cache
def cure_several_workers() -> None:
    """Lets `fit` and `evaluate` run under `MultiWorkerMirroredStrategy`, together with `cure_symbolic_build`.

    Keras 3.15 averages the logs of the replicas along their first axis, but they are single numbers
    ("Invalid reduction dimension 0 for input with 0 dimensions", https://github.com/keras-team/keras/issues/20585).

    Raises:
        UserError: another version of Keras than the cure was written for.
    """
    if not keras.__version__.startswith("3.15."):
        raise UserError(
            f"keras {keras.__version__}: several workers need what was made for 3.15; install keras==3.15.* for them"
        )
    original = tensorflow_trainer.reduce_per_replica

    def over_all_workers(values: Any, strategy: tf.distribute.Strategy, reduction: str) -> Any:
        if reduction in ("auto", "mean") and isinstance(strategy, tf.distribute.MultiWorkerMirroredStrategy):
            return tree.map_structure(lambda value: strategy.reduce("MEAN", value, axis=None), values)
        return original(values, strategy, reduction)

    tensorflow_trainer.reduce_per_replica = over_all_workers


@functools.cache
def cure_iterator_wait() -> None:
    """Lets an iterator go at once when it is no longer needed: at the end of `fit`, and of each validation.

    The thread by which tf.data tunes parallelism sleeps for 10 ms, then 20, and so on up to a minute. In TensorFlow
    2.21 it mostly sleeps on when the iterator is deleted, which waits for it: up to as long again as `fit` has
    taken. Here nothing is tuned: `tf.data.AUTOTUNE` means as many threads as there are cores.
    """
    original = dataset_ops.DatasetV2._apply_debug_options  # What every iterator calls first.

    def without_tuning(self: tf.data.Dataset) -> tf.data.Dataset:
        options = tf.data.Options()
        options.autotune.enabled = False
        return original(self.with_options(options))

    dataset_ops.DatasetV2._apply_debug_options = without_tuning


@functools.cache
def cure_adam() -> None:
    """Lets a step of `Adam` and `AdamW` be one operation for each variable, as TensorFlow has it.

    In Keras 3.15 it is a dozen, each through all of the variable: a sixth of dense_regression's time. And for words
    that a batch repeats, the second moment of an embedding gets the sum of the squares, not the square of the sum.
    """
    original = keras.optimizers.Adam.update_step

    def in_one_operation(self: keras.optimizers.Adam, gradient: Any, variable: Any, learning_rate: Any) -> None:
        gradient = tf.cast(tf.convert_to_tensor(gradient), variable.dtype)
        if self.amsgrad:
            return original(self, gradient, variable, learning_rate)
        index, steps = self._get_variable_index(variable), tf.cast(self.iterations + 1, variable.dtype)
        state = {"var": variable, "m": self._momentums[index], "v": self._velocities[index]}
        handles = {name: (one.value if isinstance(one, keras.Variable) else one).handle for name, one in state.items()}
        rates = {"lr": tf.cast(learning_rate, variable.dtype), "beta1": self.beta_1, "beta2": self.beta_2}
        powers = {"beta1_power": self.beta_1**steps, "beta2_power": self.beta_2**steps, "epsilon": self.epsilon}
        return tf.raw_ops.ResourceApplyAdam(**handles, **rates, **powers, grad=gradient)

    keras.optimizers.Adam.update_step = in_one_operation


@functools.cache
def cure_silu() -> None:
    """Lets the gradient of SiLU be computed in one pass through the activations.

    TensorFlow 2.21 does it in seven, and its sigmoid of bfloat16 is the slowest of them: a tenth of the time of
    cifar10_fast in bfloat16. XLA makes one pass of it, in float32 inside.
    """
    original = tensorflow_nn.silu

    @tf.function(jit_compile=True, autograph=False)
    def gradient(inputs: tf.Tensor, of_outputs: tf.Tensor) -> tf.Tensor:
        precise = tf.float64 if inputs.dtype == tf.float64 else tf.float32
        x, of_outputs = tf.cast(inputs, precise), tf.cast(of_outputs, precise)
        sigmoid = tf.sigmoid(x)
        return tf.cast(of_outputs * sigmoid * (1 + x * (1 - sigmoid)), inputs.dtype)

    tensorflow_nn.silu = tf.custom_gradient(lambda inputs: (original(inputs), functools.partial(gradient, inputs)))


@functools.cache
def cure_fusion() -> None:
    """Lets `BatchNormalization` of images be one operation forwards and one backwards, on a single replica.

    In Keras 3.15 it is a dozen, each of which goes through all activations, in float32 whatever the precision: a
    fifth of the time of a step of cifar10_fast in bfloat16. TensorFlow has all in one.
    """
    original = keras.layers.BatchNormalization.call

    def fused(self: keras.layers.BatchNormalization, inputs: Any, training: Any = None, mask: Any = None) -> Any:
        others = mask is not None or self.renorm or tf.distribute.get_strategy().num_replicas_in_sync > 1
        others = others or len(inputs.shape) != 4 or self.axis not in (-1, 3) or inputs.dtype == tf.float64
        if others or not (training and self.trainable):
            return original(self, inputs, training, mask)
        scale = self.gamma if self.scale else tf.ones_like(self.moving_mean)
        shift = self.beta if self.center else tf.zeros_like(self.moving_mean)
        given = {"x": inputs, "scale": scale, "offset": shift, "mean": [], "variance": [], "epsilon": self.epsilon}
        outputs, mean, variance, *_ = tf.raw_ops.FusedBatchNormV3(**given, is_training=True)
        size = tf.cast(tf.size(inputs) / inputs.shape[3], tf.float32)
        # TensorFlow's variance is the estimate for all there is, Keras' that of the batch.
        for moving, value in ((self.moving_mean, mean), (self.moving_variance, variance * (size - 1) / size)):
            moving.assign(moving * self.momentum + value * (1 - self.momentum))
        return outputs

    keras.layers.BatchNormalization.call = fused


@functools.cache
def cure_filter_gradient() -> None:
    """Lets a processor compute in bfloat16 how convolutions of small images shall change their filters.

    oneDNN 3.7, which is in TensorFlow 2.21, takes three to four times as long for it as for the convolution itself,
    with AMX; of images 3 wide, longer than in float32. Here it is a product of matrices for each place of the filter.
    """
    entry = ops.gradient_registry._registry["Conv2D"]
    original = entry["type"]

    def by_products(operation: tf.Operation, of_outputs: tf.Tensor) -> Sequence[tf.Tensor]:
        images, kernel = operation.inputs[0], operation.inputs[1]
        height, width, channels = images.shape[1:]
        rows, columns, kernel_channels, filters = kernel.shape
        padding, layout = operation.get_attr("padding").decode(), operation.get_attr("data_format")
        steps = {*operation.get_attr("strides"), *operation.get_attr("dilations")}
        small = height and width in range(1, 9) and images.dtype == tf.bfloat16
        if not small or layout != b"NHWC" or steps != {1} or padding == "EXPLICIT" or channels != kernel_channels:
            return original(operation, of_outputs)
        given = {"input_sizes": tf.shape(images), "filter": kernel, "strides": [1] * 4, "padding": padding}
        of_images = tf.raw_ops.Conv2DBackpropInput(**given, out_backprop=of_outputs)
        around = [((size - 1) // 2, size // 2) if padding == "SAME" else (0, 0) for size in (rows, columns)]
        padded, flat = tf.pad(images, [(0, 0), *around, (0, 0)]), tf.reshape(of_outputs, [-1, filters])
        height, width = of_outputs.shape[1:3]
        products = [
            tf.matmul(tf.reshape(padded[:, y : y + height, x : x + width], [-1, channels]), flat, transpose_a=True)
            for y in range(rows)
            for x in range(columns)
        ]
        return of_images, tf.reshape(tf.stack(products), kernel.shape)

    entry["type"] = by_products


def distributed(
    dataset: Callable[[tf.distribute.InputContext], tf.data.Dataset], strategy: tf.distribute.Strategy
) -> Any:
    """`strategy.distribute_datasets_from_function`, with a pipeline for each replica.

    In TensorFlow 2.21, one pipeline feeds all replicas of a worker ahead of time, by threads that may outlive it: one
    deletion in some hundred ends the process by a segmentation fault, on a busy machine, and each validation
    deletes an iterator. `MultiWorkerMirroredStrategy` refuses the option to have it otherwise.
    """
    if not isinstance(strategy, tf.distribute.MirroredStrategy | tf.distribute.MultiWorkerMirroredStrategy):
        return strategy.distribute_datasets_from_function(dataset)
    devices, replicas = strategy.extended.worker_devices, strategy.num_replicas_in_sync
    first = getattr(strategy.cluster_resolver, "task_id", 0) * len(devices)
    return input_util.get_distributed_datasets_from_function(
        dataset,
        input_lib.InputWorkers([("CPU:0", (device,)) for device in devices]),
        [tf.distribute.InputContext(replicas, first + number, replicas) for number in range(len(devices))],
        strategy,
        tf.distribute.InputOptions(
            experimental_fetch_to_device=False,
            experimental_replication_mode=tf.distribute.InputReplicationMode.PER_REPLICA,
        ),
    )


@functools.cache
def cure_gradient_leak() -> None:
    """Lets the graph of a training go when the training is over: some 10 MB for each `fit` of a small network.

    Keras 3.15 sums gradients up over the replicas by `all_reduce`, even where there is only one. That is a
    `tf.custom_gradient`, whose closure TensorFlow 2.21 keeps for ever, and with it the graph that it was traced in
    (https://github.com/tensorflow/tensorflow/issues/97697). With several replicas it stays so.
    """
    original = TFOptimizer._all_reduce_sum_gradients

    def for_several_replicas(self: TFOptimizer, grads_and_vars: list) -> list:
        replicas = self._distribution_strategy.num_replicas_in_sync
        return original(self, grads_and_vars) if replicas > 1 else grads_and_vars

    TFOptimizer._all_reduce_sum_gradients = for_several_replicas


def with_vocabulary_in_config(layer: keras.layers.TextVectorization) -> keras.layers.TextVectorization:
    """The same layer, which can be saved whatever its words are.

    Keras 3.15 saves a vocabulary that was learned by `adapt` as a file with a word per line, and reads it back by
    `str.splitlines`, which also splits at characters that words can hold, such as U+0085 ("The passed vocabulary has
    at least one repeated term"). One that was given to the layer is saved in its configuration.
    """
    return keras.layers.TextVectorization.from_config({**layer.get_config(), "vocabulary": layer.get_vocabulary()})


def free_of_tensors(model: keras.Model) -> None:
    """Turns the constants of `Normalization` into arrays of numbers.

    They are tensors, which tf2onnx 1.17 takes for inputs of the model when they come from outside its graph.
    """
    for layer in model.layers:
        if isinstance(layer, keras.layers.Normalization):
            layer.mean, layer.variance = map(keras.ops.convert_to_numpy, (layer.mean, layer.variance))
