"""Corrupts files of a run by changing single bytes and by truncation, and checks that every change is detected.

    python tools/damage.py --flips 1000 --truncations 100

The script trains a small run and creates a small TFDS folder. It then repeatedly corrupts a file, reads it like a
recipe or `predict.py`, and restores it. A corrupt checkpoint must be rejected in favor of the previous one. A corrupt
`model.keras` or data shard must be rejected with a one-line error, and so must a truncated `config.json` or
`result.json`. Users may edit these two files, so single bytes of them are not changed.
"""

import collections
import contextlib
import io
import logging
import pathlib
import random
import subprocess
import sys
import tempfile
from collections.abc import Callable

from common.artefacts import load_run
from common.checkpoints import newest_checkpoint
from common.cli import Parser, SharedConfig, UserError, run_script
from common.data import MNIST, load_images
from common.records import read_json, read_run

import numpy as np
import tensorflow as tf
import tensorflow_datasets as tfds

ROOT = pathlib.Path(__file__).parent.parent


def main() -> None:
    parser = Parser(__doc__)
    parser.add_argument("--flips", type=int, default=1000, help="number of flipped bytes (default: 1000)")
    parser.add_argument("--truncations", type=int, default=100, help="number of truncated files (default: 100)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the choice of files and positions")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        counts = damage(pathlib.Path(folder), arguments.flips, arguments.truncations, random.Random(arguments.seed))
    for name, count in counts.items():
        print(f"{name}: {count}")


class DamageAcceptedError(Exception):
    """A corrupt file was accepted, or its error message was wrong."""


def damage(folder: pathlib.Path, flips: int, truncations: int, random: random.Random) -> dict[str, int]:
    """Corrupts random files and checks that each corruption is detected.

    Returns:
        The number of corruptions by file.

    Raises:
        DamageAcceptedError: a corrupt file was accepted, or its error message was wrong.
    """
    run, data = make_run(folder / "run"), make_tfds(folder / "tfds")
    checkpoint, _ = newest_checkpoint(run / "checkpoints")
    checks = {
        **{file: lambda file: checkpoint_is_refused(run, file) for file in sorted(checkpoint.iterdir())},
        run / "model.keras": lambda file: is_refused(lambda: load_run(run), file),
        data: lambda file: is_refused(lambda: read_tfds(folder / "tfds"), file.parent),
    }
    truncation_only = {
        run / "config.json": lambda file: is_refused(lambda: read_json(file), file),
        run / "result.json": lambda file: is_refused(lambda: read_run(run), file),
    }
    counts = collections.Counter()
    for number in range(flips + truncations):
        flip = number < flips
        candidates = checks if flip else checks | truncation_only
        file = random.choice(list(candidates))
        original = file.read_bytes()
        offset = random.randrange(len(original) - 1)  # A text file stays valid without its last line break.
        flipped = original[:offset] + bytes([original[offset] ^ random.randrange(1, 256)]) + original[offset + 1 :]
        file.write_bytes(flipped if flip else original[:offset])
        problem = candidates[file](file)
        if problem:
            raise DamageAcceptedError(f"{file}, byte {offset} of {len(original)}: {problem}")
        counts[f"{file.parent.name}/{file.name}"] += 1
        file.write_bytes(original)
    return dict(sorted(counts.items()))


def is_refused(read: Callable[[], object], file: pathlib.Path) -> str:
    """Checks that the reader raises a `UserError` that names the file. Returns the problem, or an empty string."""
    try:
        read()
    except UserError as error:
        return "" if str(file) in str(error) else f"not named: {error}"
    return "accepted"


def is_warned_of(read: Callable[[], object], file: pathlib.Path) -> str:
    """Checks that the reader prints one warning that names the file. Returns the problem, or an empty string."""
    with contextlib.redirect_stderr(io.StringIO()) as output:
        read()
    lines = output.getvalue().splitlines()
    is_named = len(lines) == 1 and lines[0].startswith("warning: ") and str(file) in lines[0]
    return "" if is_named else f"accepted: {lines}"


def checkpoint_is_refused(run: pathlib.Path, file: pathlib.Path) -> str:
    """Checks for a warning and a fallback to an earlier checkpoint. Returns the problem, or an empty string."""
    checkpoints = []
    problem = is_warned_of(lambda: checkpoints.append(newest_checkpoint(run / "checkpoints")), file.parent)
    return problem or ("" if checkpoints[0] and checkpoints[0][0] < file.parent else "no earlier checkpoint was used")


def make_run(directory: pathlib.Path) -> pathlib.Path:
    """Trains a run with two checkpoints."""
    recipe = str(ROOT / "recipes" / "mnist_cnn.py")
    flags = ("--smoke", "--data", "sample", "--no-baseline", "--quiet")
    frequent_saving = (
        "--batch-size",
        "8",
        "--checkpoint-every",
        "2",
    )  # By default, such a short training saves only one.
    subprocess.run([sys.executable, recipe, *flags, *frequent_saving, "--run-dir", str(directory)], check=True)
    return directory


def make_tfds(folder: pathlib.Path) -> pathlib.Path:
    """Writes a TFDS dataset of 40 images under the name of MNIST, and returns the path of its training shard."""
    images = np.random.default_rng(0).integers(0, 256, (40, 28, 28, 1), np.uint8)
    labels = np.arange(40) % 10
    split = tf.data.Dataset.from_tensor_slices({"image": images, "label": labels.astype(np.int64)})
    features = tfds.features.FeaturesDict(
        {"image": tfds.features.Image(shape=(28, 28, 1)), "label": tfds.features.ClassLabel(num_classes=10)}
    )
    logging.getLogger("absl").setLevel(logging.ERROR)
    tfds.disable_progress_bar()
    tfds.dataset_builders.store_as_tfds_dataset(
        name="mnist",
        version="3.0.1",
        features=features,
        split_datasets={"train": split, "test": split},
        data_dir=folder,
    )
    (shard,) = folder.rglob("*train.tfrecord*")
    return shard


def read_tfds(folder: pathlib.Path) -> None:
    """Reads the dataset like a recipe."""
    load_images(MNIST, SharedConfig(data="tfds", data_dir=str(folder)), (28, 28))


if __name__ == "__main__":
    run_script(main)
