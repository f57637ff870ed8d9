"""Cures for bugs of Keras; `tests/test_upstream.py` fails for each one that is no longer needed."""

import functools
from typing import Any

from keras.src import tree
from keras.src.backend.tensorflow.optimizer import TFOptimizer
from keras.src.backend.tensorflow.trainer import TensorFlowTrainer


@functools.cache
def cure_symbolic_build() -> None:
    """Lets `fit` and `evaluate` build a model from one replica's slice of the first batch.

    Keras 3.15 adds the replicas' slices up to get a batch to build with, which fails as soon as their
    sizes differ ("Inputs to operation AddN must have the same size and shape"); the same place breaks
    several workers (https://github.com/keras-team/keras/issues/20585). Only shapes and types are
    looked at, and any one slice has those.
    """
    original = TensorFlowTrainer._maybe_symbolic_build

    def from_one_slice(self: TensorFlowTrainer, iterator: Any = None, data_batch: Any = None) -> None:
        if self._distribute_strategy is not None and iterator is not None:
            _, _, batches = next(iter(iterator))
            local = self._distribute_strategy.experimental_local_results
            data_batch = tree.map_structure(lambda leaf: local(leaf)[0], next(batches))
        original(self, data_batch=data_batch)

    TensorFlowTrainer._maybe_symbolic_build = from_one_slice


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
