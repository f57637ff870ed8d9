"""Cures for bugs of Keras; `tests/test_upstream.py` fails for each one that is no longer needed."""

import functools
from typing import Any

from keras.src import tree
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
