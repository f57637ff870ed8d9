"""Flips single bytes of what a run wrote and reads, cuts files short, and checks that all of it is noticed.

    python tools/damage.py --flips 1000 --truncations 100

A small training is run and a small TFDS folder is made; then one file after the other is
damaged, read in the way a recipe or `predict.py` does, and repaired. A checkpoint must be refused and the one before
it used; `model.keras` and a shard of data must be refused in one line; so must `config.json` and `result.json` that are
cut short. People may edit these two, so their single bytes are not checked.
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
    parser.add_argument("--flips", type=int, default=1000, help="how many single bytes (default: 1000)")
    parser.add_argument("--truncations", type=int, default=100, help="how many cuts (default: 100)")
    parser.add_argument("--seed", type=int, default=0, help="decides files and places")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        counts = damage(pathlib.Path(folder), arguments.flips, arguments.truncations, random.Random(arguments.seed))
    for name, count in counts.items():
        print(f"{name}: {count}")


class DamageAcceptedError(Exception):
    """Some damage went unnoticed, or was reported badly."""


def damage(folder: pathlib.Path, flips: int, truncations: int, random: random.Random) -> dict[str, int]:
    """Damages files and checks each time that it is noticed.

    Returns:
        How often each kind of file was damaged.

    Raises:
        DamageAcceptedError: some damage went unnoticed, or was reported badly.
    """
    run, data = make_run(folder / "run"), make_tfds(folder / "tfds")
    checkpoint, _ = newest_checkpoint(run / "checkpoints")
    checks = {
        **{file: lambda file: checkpoint_is_refused(run, file) for file in sorted(checkpoint.iterdir())},
        run / "model.keras": lambda file: is_refused(lambda: load_run(run), file),
        data: lambda file: is_refused(lambda: read_tfds(folder / "tfds"), file.parent),
    }
    cut_only = {
        run / "config.json": lambda file: is_refused(lambda: read_json(file), file),
        run / "result.json": lambda file: is_refused(lambda: read_run(run), file),
    }
    counts = collections.Counter()
    for number in range(flips + truncations):
        flip = number < flips
        found = checks if flip else checks | cut_only
        file = random.choice(list(found))
        whole = file.read_bytes()
        place = random.randrange(len(whole) - 1)  # A text may lack its last line break.
        flipped = whole[:place] + bytes([whole[place] ^ random.randrange(1, 256)]) + whole[place + 1 :]
        file.write_bytes(flipped if flip else whole[:place])
        problem = found[file](file)
        if problem:
            raise DamageAcceptedError(f"{file}, byte {place} of {len(whole)}: {problem}")
        counts[f"{file.parent.name}/{file.name}"] += 1
        file.write_bytes(whole)
    return dict(sorted(counts.items()))


def is_refused(read: Callable[[], object], file: pathlib.Path) -> str:
    """What is wrong, unless the reader raises a `UserError` that names the file."""
    try:
        read()
    except UserError as error:
        return "" if str(file) in str(error) else f"not named: {error}"
    return "accepted"


def is_warned_of(read: Callable[[], object], file: pathlib.Path) -> str:
    """What is wrong, unless the reader prints one warning that names the file."""
    with contextlib.redirect_stderr(io.StringIO()) as printed:
        read()
    lines = printed.getvalue().splitlines()
    named = len(lines) == 1 and lines[0].startswith("warning: ") and str(file) in lines[0]
    return "" if named else f"accepted: {lines}"


def checkpoint_is_refused(run: pathlib.Path, file: pathlib.Path) -> str:
    """What is wrong, unless there is a warning and the checkpoint before is used."""
    found = []
    problem = is_warned_of(lambda: found.append(newest_checkpoint(run / "checkpoints")), file.parent)
    return problem or ("" if found[0] and found[0][0] < file.parent else "no earlier checkpoint was used")


def make_run(directory: pathlib.Path) -> pathlib.Path:
    """A finished run with two checkpoints."""
    recipe = str(ROOT / "recipes" / "mnist_cnn.py")
    flags = ("--smoke", "--data", "sample", "--no-baseline", "--quiet")
    often = ("--batch-size", "8", "--checkpoint-every", "2")  # By itself, so short a training has one only.
    subprocess.run([sys.executable, recipe, *flags, *often, "--run-dir", str(directory)], check=True)
    return directory


def make_tfds(folder: pathlib.Path) -> pathlib.Path:
    """A prepared TFDS set of 40 pictures by the name of MNIST; its shard for training."""
    pictures = np.random.default_rng(0).integers(0, 256, (40, 28, 28, 1), np.uint8)
    labels = np.arange(40) % 10
    split = tf.data.Dataset.from_tensor_slices({"image": pictures, "label": labels.astype(np.int64)})
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
    """Reads the set as a recipe does."""
    load_images(MNIST, SharedConfig(data="tfds", data_dir=str(folder)), (28, 28))


if __name__ == "__main__":
    run_script(main)
