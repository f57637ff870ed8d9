"""Patches of Keras and TensorFlow, for wrong results and crashes only, and workarounds that patch nothing.

Each patch names the versions that it is made for. `tests/test_upstream.py` fails when one is no longer needed.
"""

import importlib.metadata
from collections.abc import Callable
from typing import Any, NamedTuple

from common.cli import UserError, warn

import keras
import tensorflow as tf
from keras.src import tree
from keras.src.backend.tensorflow import trainer as tensorflow_trainer
from keras.src.backend.tensorflow.trainer import TensorFlowTrainer
from packaging.specifiers import SpecifierSet
from tensorflow.python.distribute import input_lib, input_util


class Patch(NamedTuple):
    """A correction of a package: its versions, what fails without it, and the function that applies it."""

    package: str
    versions: str
    reason: str
    apply: Callable[[], None]

    def fits(self) -> bool:
        """Whether the installed version is one that the patch is made for."""
        return importlib.metadata.version(self.package) in SpecifierSet(self.versions)


# The names of the patches that this process runs with.
applied: list[str] = []


def apply_patch(name: str, required: bool = False) -> None:
    """Applies one of `PATCHES`, once. For other versions than it is made for, it is skipped with a warning.

    Raises:
        UserError: the patch is `required`, but made for other versions.
    """
    patch = PATCHES[name]
    if name in applied:
        return
    if patch.fits():
        patch.apply()
        applied.append(name)
        return
    problem = f"{patch.package} {importlib.metadata.version(patch.package)}: the patch {name!r} is made for"
    problem += f" {patch.versions}: {patch.reason}"
    if required:
        raise UserError(f"{problem}; install {patch.package}{patch.versions}")
    warn(f"{problem}; skipped")


def _patch_symbolic_build() -> None:
    """Builds a model from the shape of one replica's slice.

    Keras 3.15 adds up the slices of all replicas to get a batch to build with. Shapes and types are enough: a
    batch that is taken would be missing from a validation that continues with its iterator.
    """
    original = TensorFlowTrainer._maybe_symbolic_build

    def from_one_slice(self: TensorFlowTrainer, iterator: Any = None, data_batch: Any = None) -> None:
        if iterator is None:
            return original(self, data_batch=data_batch)
        batch = tree.map_structure(lambda leaf: tf.nest.flatten(leaf, True)[0], iterator._get_iterator().element_spec)
        with self.distribute_strategy.scope():
            return self._symbolic_build(data_batch=batch)

    TensorFlowTrainer._maybe_symbolic_build = from_one_slice


def _patch_several_workers() -> None:
    """Averages the logs of all workers, where Keras 3.15 averages along the first axis of single numbers.

    One all-reduce takes all logs, and the flags by which the workers agree to stop and to save: see `Cluster.agreed`.
    """
    original = tensorflow_trainer.reduce_per_replica

    def over_all_workers(values: Any, strategy: tf.distribute.Strategy, reduction: str) -> Any:
        if reduction not in ("auto", "mean") or not isinstance(strategy, tf.distribute.MultiWorkerMirroredStrategy):
            return original(values, strategy, reduction)
        asked, agreed = strategy.flags

        def packed(logs: Any) -> tf.Tensor:
            return tf.stack([*(tf.cast(value, tf.float32) for value in tree.flatten(logs)), *tf.unstack(asked)])

        *means, stop, save = tf.unstack(strategy.reduce("MEAN", strategy.run(packed, args=(values,)), axis=None))
        agreed.assign([stop, save])
        return tree.pack_sequence_as(values, means)

    tensorflow_trainer.reduce_per_replica = over_all_workers


PATCHES = {
    "symbolic build": Patch(
        "keras",
        "==3.15.*",
        "on several replicas fit fails with 'must have the same size and shape' or 'PerReplica'",
        _patch_symbolic_build,
    ),
    "logs of several workers": Patch(
        "keras",
        "==3.15.*",
        "fit fails with 'Invalid reduction dimension 0' (https://github.com/keras-team/keras/issues/20585)",
        _patch_several_workers,
    ),
}


def replica_datasets(
    worker_dataset: Callable[[tf.distribute.InputContext], tf.data.Dataset], strategy: tf.distribute.Strategy
) -> Any:
    """`strategy.distribute_datasets_from_function`, with a pipeline for each replica.

    In TensorFlow 2.21, one pipeline feeds all replicas of a worker ahead of time, by threads that may outlive it: one
    deletion of an iterator in some hundred ends the process by a segmentation fault, and each validation deletes one.
    `MultiWorkerMirroredStrategy` has no option for a pipeline per replica.
    """
    if not isinstance(strategy, tf.distribute.MirroredStrategy | tf.distribute.MultiWorkerMirroredStrategy):
        return strategy.distribute_datasets_from_function(worker_dataset)
    devices, replicas = strategy.extended.worker_devices, strategy.num_replicas_in_sync
    first = getattr(strategy.cluster_resolver, "task_id", 0) * len(devices)
    return input_util.get_distributed_datasets_from_function(
        worker_dataset,
        input_lib.InputWorkers([("CPU:0", (device,)) for device in devices]),
        [tf.distribute.InputContext(replicas, first + number, replicas) for number in range(len(devices))],
        strategy,
        tf.distribute.InputOptions(
            experimental_fetch_to_device=False,
            experimental_replication_mode=tf.distribute.InputReplicationMode.PER_REPLICA,
        ),
    )


def with_vocabulary_in_config(layer: keras.layers.TextVectorization) -> keras.layers.TextVectorization:
    """The same layer with its vocabulary in its configuration, so that any vocabulary can be saved.

    Keras 3.15 saves a vocabulary that was learned by `adapt` as a file with a word per line, and reads it with
    `str.splitlines`, which also splits at characters that words can hold, such as U+0085 ("The passed vocabulary has
    at least one repeated term"). It saves a vocabulary that was given to the layer in its configuration.
    """
    return keras.layers.TextVectorization.from_config({**layer.get_config(), "vocabulary": layer.get_vocabulary()})
