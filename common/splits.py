"""Splits examples at random: stratified by class, with groups, such as equal inputs, in the same split."""

import hashlib
from typing import Any

import numpy as np
import pandas as pd
import tensorflow as tf


def input_digests(inputs: Any) -> np.ndarray:
    """Returns a 64-bit number per example, uint64 [n]; equal inputs have equal numbers.

    `inputs` are arrays [n, ...], tensors or a `MappedArray`, or dictionaries of them. Reads an array in a file without
    copying it to memory, and not at all if its digests are known.
    """
    digests: Any = np.uint64(0)
    for part in tf.nest.flatten(inputs):
        if (numbers := getattr(part, "digests", None)) is not None:
            digests = digests * np.uint64(1_000_003) + numbers
            continue
        part = np.asarray(part)
        if part.ndim == 1:
            numbers = pd.util.hash_array(np.asarray(part), categorize=False)
        else:
            numbers = np.frombuffer(b"".join(map(row_digest, part)), np.uint64)
        digests = digests * np.uint64(1_000_003) + numbers
    return digests


def row_digest(row: np.ndarray) -> bytes:
    """Returns 8 bytes that stand for the content of an array."""
    return hashlib.blake2b(np.ascontiguousarray(row).data, digest_size=8).digest()


def held_out(groups: np.ndarray, labels: np.ndarray, share: float, seed: int) -> np.ndarray:
    """Chooses the examples to hold out, bool [n]: about `share` of each class, and whole groups only.

    Holds out at least one group of each class that has more than one, and leaves at least one.

    Args:
        groups: the group of each example, [n].
        labels: the class of each example, [n]; a group has the class of its first example.
        share: share of the examples to hold out; 0: none.
        seed: determines the choice.
    """
    _, first, group = np.unique(groups, return_index=True, return_inverse=True)
    sizes, (_, classes) = np.bincount(group), np.unique(labels[first], return_inverse=True)
    left, quota = np.bincount(classes).tolist(), (share * np.bincount(classes, sizes)).tolist()
    chosen, taken = np.zeros(len(first), bool), [0] * len(left)
    order = np.random.default_rng(seed).permutation(len(first))
    for number, of, size in zip(order.tolist(), classes[order].tolist(), sizes[order].tolist(), strict=True):
        if left[of] > 1 and taken[of] + size / 2 <= quota[of]:
            chosen[number], taken[of], left[of] = True, taken[of] + size, left[of] - 1
    for of in range(len(left) if share else 0):
        if not taken[of] and left[of] > 1:  # Its smallest group.
            mine = order[classes[order] == of]
            chosen[mine[np.argmin(sizes[mine])]] = True
    return chosen[group]
