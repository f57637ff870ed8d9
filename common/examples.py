"""Inputs with their targets: as they were read, and as one split of a data set."""

import dataclasses

import numpy as np
import tensorflow as tf


@dataclasses.dataclass(frozen=True)
class Split:
    """The examples of one split, as tensors in main memory.

    `inputs` is uint8 [n, height, width, channels], string [n], float32 [n, columns] or int [n, tokens];
    `targets` is float32: one-hot rows [n, classes], or [n, 1] for a number. `numpy.asarray` of either
    makes no copy.
    """

    inputs: tf.Tensor
    targets: tf.Tensor

    @classmethod
    def of(cls, inputs: np.ndarray, targets: np.ndarray) -> "Split":
        """Moves arrays into a split. Never onto a GPU: a data set need not fit there."""
        with tf.device("CPU:0"):
            return cls(tf.convert_to_tensor(inputs), tf.convert_to_tensor(targets))

    def __len__(self) -> int:
        return int(self.targets.shape[0])


@dataclasses.dataclass(frozen=True)
class Examples:
    """Inputs and targets as arrays, before validation is cut off.

    `inputs` as in `Split`; `targets` is int class numbers [n], or float32 [n] where there are no classes.
    """

    inputs: np.ndarray
    targets: np.ndarray
    class_names: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.targets)

    def split(self, order: np.ndarray) -> Split:
        """The examples at the positions `order`; classes become one-hot rows."""
        targets = self.targets[order]
        if self.class_names:
            targets = np.eye(len(self.class_names), dtype=np.float32)[targets]
        else:
            targets = targets.astype(np.float32)[:, None]
        return Split.of(self.inputs[order], targets)
