"""Patches of Keras and TensorFlow for wrong results and crashes, and workarounds that need no patch.

Each patch applies to specific versions only. `tests/test_upstream.py` fails when a patch is no longer needed.
"""

import importlib.metadata
from collections.abc import Callable
from typing import Any, NamedTuple

from common.cli import UserError, warn

import tensorflow as tf
from keras.src import tree
from keras.src.backend.tensorflow import trainer as tensorflow_trainer
from keras.src.backend.tensorflow.trainer import TensorFlowTrainer
from packaging.specifiers import SpecifierSet
from tensorflow.python.distribute import input_lib, input_util


class Patch(NamedTuple):
    """A patch of a package: affected versions, the failure without it, and the function that applies it."""

    package: str
    versions: str
    reason: str
    apply: Callable[[], None]

    def fits(self) -> bool:
        """Returns whether the patch is made for the installed version."""
        return importlib.metadata.version(self.package) in SpecifierSet(self.versions)


# Names of the patches that this process has applied.
applied: list[str] = []


def apply_patch(name: str, required: bool = False) -> None:
    """Applies one of `PATCHES`, once. Warns and skips it if it is made for other versions.

    Raises:
        UserError: the patch is `required`, but is made for other versions.
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
    """Builds a model from the shapes and dtypes of one replica's slice.

    Keras 3.15 takes a batch from the iterator and adds up the slices of all replicas. Besides the failing sum, that
    batch would be missing from a validation that continues with the iterator.
    """
    original = TensorFlowTrainer._maybe_symbolic_build

    def build_from_one_slice(self: TensorFlowTrainer, iterator: Any = None, data_batch: Any = None) -> None:
        if iterator is None:
            return original(self, data_batch=data_batch)
        batch = tree.map_structure(lambda leaf: tf.nest.flatten(leaf, True)[0], iterator._get_iterator().element_spec)
        with self.distribute_strategy.scope():
            return self._symbolic_build(data_batch=batch)

    TensorFlowTrainer._maybe_symbolic_build = build_from_one_slice


def _patch_several_workers() -> None:
    """Averages logs over all workers. Keras 3.15 averages over the first axis, which scalars do not have.

    A single all-reduce handles all logs, and the flags by which workers agree to stop and save: see `Cluster.agreed`.
    """
    original = tensorflow_trainer.reduce_per_replica

    def reduce_over_workers(values: Any, strategy: tf.distribute.Strategy, reduction: str) -> Any:
        if reduction not in ("auto", "mean") or not isinstance(strategy, tf.distribute.MultiWorkerMirroredStrategy):
            return original(values, strategy, reduction)
        requested, agreed = strategy.flags

        def pack(logs: Any) -> tf.Tensor:
            return tf.stack([*(tf.cast(value, tf.float32) for value in tree.flatten(logs)), *tf.unstack(requested)])

        *means, stop, save = tf.unstack(strategy.reduce("MEAN", strategy.run(pack, args=(values,)), axis=None))
        agreed.assign([stop, save])
        return tree.pack_sequence_as(values, means)

    tensorflow_trainer.reduce_per_replica = reduce_over_workers


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
    """Equivalent of `strategy.distribute_datasets_from_function` with an input pipeline per replica.

    In TensorFlow 2.21, one pipeline prefetches for all replicas of a worker, in threads that may outlive it. About one
    in some hundred iterator deletions then ends in a segmentation fault, and each validation deletes an iterator.
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
