"""A run on one machine, kept short to be read and changed.

What stands here takes the place of its namesakes in the rest of `common/` when `scripts/bundle.py` writes a recipe
into one file. The weights come out the same. Left out is what guards a run that nobody watches: several machines,
checkpoints within an epoch, locks and checks of what was written before, and the finer telling of what is wrong.
"""

import collections
import contextlib
import dataclasses
import datetime
import itertools
import json
import math
import os
import pathlib
import platform
import re
import shlex
import signal
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any, Literal

from common.batches import Arrays, Augment, Split, steps_per_epoch
from common.cli import EXIT_INTERRUPTED, SharedConfig, TrainingFailedError, UserError, parse_config
from common.data import Data, Dataset, DataUnavailableError
from common.evaluation import _predict
from common.records import file_sha256, sealed, weights_sha256, write_file
from common.runs import with_class_names
from common.upstream import cure_adam, cure_fusion, cure_silu, cure_symbolic_build

import keras
import numpy as np
import pandas as pd
import sklearn.metrics
import tensorflow as tf
from matplotlib.figure import Figure
from PIL import Image, ImageOps

Strategy = Literal["auto", "none", "mirrored"]
BESIDE_TRAINING = {"data_dir", "run_dir", "resume", "quiet", "baseline", "histograms", "profile"}


def run_recipe(train: Callable[[Any], dict], config_class: type, description: str | None = None) -> None:
    """The whole of a recipe's `main`. Exit codes: 0 done, 2 a mistake to mend, 3 no finite loss, 75 interrupted."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        train(parse_config(config_class, sys.argv[1:], description or ""))
        return
    except UserError as error:
        code, line = 2, f"error: {error}"
    except TrainingFailedError as error:
        code, line = 3, f"training failed: {error}"
    except KeyboardInterrupt:
        code, line = EXIT_INTERRUPTED, "interrupted: the same command with --resume goes on after the last whole epoch"
    print(" ".join(line.split()), file=sys.stderr)
    sys.exit(code)


def start_run(config: SharedConfig, **files: str) -> "Run":
    """Sets up hardware and seeds, and chooses the run directory."""
    if re.search(r':\d+".*:\d+"', os.environ.get("TF_CONFIG", "")) or os.environ.get("SLURM_STEP_NUM_TASKS", "1") > "1":
        raise UserError("several workers: this file trains on one machine alone; start the recipe that it was made of")
    recipe = pathlib.Path(getattr(sys.modules[type(config).__module__], "__file__", "notebook")).stem
    new = f"runs/{recipe}/{datetime.datetime.now():%Y%m%d-%H%M%S-%f}"
    begun = sorted(file.parent for file in pathlib.Path("runs", recipe).glob("*/config.json"))
    unfinished = [run for run in begun if config.resume and not (run / "result.json").exists()]
    directory = pathlib.Path(config.run_dir or (unfinished or [new])[-1])
    if config.resume and (directory / "result.json").exists():
        sys.exit(print(f"{directory}: finished already; a new run needs another folder, and no --resume"))
    if not config.resume and (directory.is_file() or (directory.exists() and os.listdir(directory))):
        raise UserError(f"--run-dir {directory}: is not empty; choose a new folder, or go on with its run by --resume")
    keras.utils.clear_session()
    strategy = choose_strategy(config)
    keras.utils.set_random_seed(config.seed)
    digests = {name: os.path.isfile(path) and file_sha256(pathlib.Path(path)) for name, path in files.items()}
    return Run(recipe, config, directory, strategy, digests)


def choose_strategy(config: SharedConfig) -> tf.distribute.Strategy:
    """Sets memory growth, threads and precision; one device, or a mirror of the model on each of several."""
    gpus, (cpu, *_) = (tf.config.list_physical_devices(kind) for kind in ("GPU", "CPU"))
    devices = 1 if config.strategy == "none" else config.devices or len(gpus) or 1
    if config.devices > devices or 0 < len(gpus) < devices:
        raise UserError(f"--devices {config.devices}: there are {len(gpus)} GPUs, and --strategy none uses one device")
    for gpu in gpus:
        tf.config.experimental.set_memory_growth(gpu, True)
    if config.threads:
        tf.config.threading.set_intra_op_parallelism_threads(config.threads)
        tf.config.threading.set_inter_op_parallelism_threads(config.threads)
    if config.deterministic:
        tf.config.experimental.enable_op_determinism()
    details = map(tf.config.experimental.get_device_details, gpus)
    newer = all((each.get("compute_capability") or (0, 0)) >= (8, 0) for each in details)
    fitting = "float32" if not gpus else "mixed_bfloat16" if newer else "mixed_float16"
    keras.config.set_dtype_policy(fitting if config.precision == "auto" else config.precision)
    cure_adam()
    cure_fusion()
    cure_silu()
    cure_symbolic_build()
    if devices == 1 and config.strategy != "mirrored":
        return tf.distribute.get_strategy()
    if not gpus:
        tf.config.set_logical_device_configuration(cpu, [tf.config.LogicalDeviceConfiguration()] * devices)
    return tf.distribute.MirroredStrategy([f"{'GPU' if gpus else 'CPU'}:{number}" for number in range(devices)])


class Run(keras.callbacks.Callback):
    """One training: its folder, clock and result, and a checkpoint after each epoch, to go on from exactly."""

    def __init__(self, recipe: str, config: SharedConfig, directory: pathlib.Path, strategy: Any, files: dict):
        super().__init__()
        self.recipe, self.config, self.directory, self.strategy, self.files = recipe, config, directory, strategy, files
        self.started, self.verbose = time.time(), 0 if config.quiet else 1 if sys.stdout.isatty() else 2
        self.state = {"epochs": 0, "steps": 0, "history": [], "seconds": 0.0}
        if (directory / "state.json").exists():
            self.state |= _read_json(directory / "state.json")
        self.start_step = self.state["steps"]

    def callbacks(self, data: Data, augment: Augment | None = None, more=()) -> list[keras.callbacks.Callback]:
        """Makes the run directory, and gives the callbacks for `fit`: this run, and TensorBoard."""
        self.data = {"source": data.source, "name": data.name, "digest": data.digest(), **data.counts(), **self.files}
        settings = {"recipe": self.recipe, "config": dataclasses.asdict(self.config), "data": self.data}
        try:
            (self.directory / "plots").mkdir(parents=True, exist_ok=True)
            if (self.directory / "config.json").exists():
                before = _read_json(self.directory / "config.json")
                for name, value in settings["config"].items():
                    if name not in BESIDE_TRAINING and before["config"][name] != value:
                        raise UserError(f"--resume: {name} was {before['config'][name]!r}; give the same flags")
                if before["data"] != self.data:
                    raise UserError(f"--resume: {data.name} or a file is not what this run began with; bring it back")
            write_file(self.directory / "config.json", sealed(settings))
        except OSError as error:
            raise UserError(f"--run-dir {self.directory}: {error.strerror}; choose another folder") from error
        if not self.config.quiet:
            counts = ", ".join(f"{count:,} {split}" for split, count in data.counts().items())
            print(f"data: {data.name} ({data.source}): {counts}\ndevices: {self.strategy.num_replicas_in_sync}")
        folder, steps = str(self.directory / "tensorboard"), (2, 4) if self.config.profile else 0
        return [keras.callbacks.TensorBoard(folder, int(self.config.histograms), profile_batch=steps), *more, self]

    def on_train_begin(self, logs=None):
        self.began = time.perf_counter()
        self.checkpoint = tf.train.Checkpoint(variables=[*self.model.variables, *self.model.optimizer.variables])
        if self.start_step:
            self.checkpoint.read(str(self.directory / self.state["variables"])).assert_consumed()
            self.model._initial_epoch = self.state["epochs"]  # As Keras' own `BackupAndRestore` does it.

    def on_train_batch_end(self, batch, logs=None):
        if not math.isfinite(logs["loss"]):
            raise TrainingFailedError(f"the loss is {logs['loss']}; try a smaller --learning-rate")

    def on_epoch_end(self, epoch, logs=None):
        now, step = time.perf_counter(), (epoch + 1) * self.params["steps"]
        self.state["history"].append({name: float(value) for name, value in logs.items()})
        self.state["seconds"], self.began = self.state["seconds"] + now - self.began, now
        self.state |= {"epochs": epoch + 1, "steps": step, "variables": f"checkpoints/step-{step}"}
        self.checkpoint.write(str(self.directory / self.state["variables"]))
        write_file(self.directory / "state.json", json.dumps(self.state))  # From now on, this checkpoint counts.
        for old in set(self.directory.glob("checkpoints/*.*")) - set(self.directory.glob(f"checkpoints/step-{step}.*")):
            old.unlink()

    def finish(self, model: keras.Model, data: Data, report: "Report", beside: dict[str, float]) -> dict[str, float]:
        """Saves the model, the plots and `result.json`, and prints the result."""
        metrics, path = {**report.metrics, **beside}, self.directory / "model.keras"
        (with_class_names(model, data.class_names) if data.class_names else model).save(path)
        for name, figure in report.figures.items():
            figure.savefig(self.directory / "plots" / f"{name}.png")
        result = {
            **self.state,
            "recipe": self.recipe,
            "data": self.data,
            "metrics": metrics,
            "parameters": sum(math.prod(weight.shape) for weight in model.trainable_weights),
            "seed": self.config.seed,
            "seconds": {"data": data.seconds, "train": self.state["seconds"], "total": time.time() - self.started},
            "examples_per_second": data.counts()["train"] * self.state["epochs"] / self.state["seconds"],
            "weights_sha256": weights_sha256(model),
            "model_sha256": file_sha256(path),
            "class_names": data.class_names,
            "columns": data.columns,
            "evaluation": report.details,
            "versions": {"python": platform.python_version(), "keras": keras.__version__, "tensorflow": tf.__version__},
            "command": shlex.join(["python", *sys.argv]),
        }
        write_file(self.directory / "result.json", sealed(result))
        if not self.config.quiet:
            rows = "\n".join(f"  {name.replace('_', ' '):<24} {value:.4f}" for name, value in metrics.items())
            print(f"test split of {data.name} ({data.source}):\n{rows}")
            print(f"run directory: {self.directory}\nwatch it: tensorboard --logdir {shlex.quote(str(self.directory))}")
        return metrics


@contextlib.contextmanager
def quiet_native_stderr() -> Iterator[None]:
    """Keeps what native code writes to file descriptor 2 from the terminal."""
    saved = os.dup(2)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    try:
        yield
    finally:
        os.dup2(saved, 2)


def once(run: Run, make: Callable[[], Any]) -> Any:
    """What `make` returns; with several machines, one of them would call it."""
    return make()


def _read_json(path: pathlib.Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text())
    except ValueError as error:
        raise UserError(f"--resume: {path} is damaged; start a new run") from error


# Test metrics, and what is behind them: `details` for JSON, `figures` for people.
Report = collections.namedtuple("Report", ["metrics", "details", "figures"], defaults=[{}, {}])
# What the random numbers of a batch follow from; `turns` are True for half of its examples, then for the other half.
BatchRandom = collections.namedtuple("BatchRandom", ["seed", "batch", "turns", "calls"])


def uniform(random: BatchRandom, minimum: float, maximum: float, dtype: tf.DType = tf.float32) -> tf.Tensor:
    """Uniform numbers in [minimum, maximum), one for each example."""
    seed = tf.random.experimental.stateless_fold_in(random.seed, next(random.calls))
    return tf.random.stateless_uniform([random.batch], seed, minimum, maximum, dtype)


def training_batches(split: Split, batch_size: int, seed: int | None, augment=None, strategy=None, start_step=0) -> Any:
    """An endless stream of shuffled batches: what is in number t, and how it is augmented, follows from (seed, t)."""
    shuffle, fold_in = tf.random.experimental.index_shuffle, tf.random.experimental.stateless_fold_in
    steps = steps_per_epoch(split, batch_size)

    @tf.autograph.experimental.do_not_convert  # It would put its own traceback into the messages of errors.
    def batch_of(step: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        first, stop = step % steps * len(split) // steps, (step % steps + 1) * len(split) // steps
        examples = tf.range(first, stop)
        if seed is not None:
            epoch_seed = fold_in(tf.constant([seed, 0], tf.int64), step // steps)
            examples = shuffle(examples, epoch_seed, tf.constant(len(split) - 1, tf.int64))
        inputs, targets = tf.nest.map_structure(lambda part: tf.gather(part, examples), (split.inputs, split.targets))
        if augment is not None:
            batch_seed, turns = fold_in(tf.constant([seed, 1], tf.int64), step), (examples + step // steps) % 2 == 0
            random = BatchRandom(batch_seed, stop - first, turns, itertools.count())
            inputs, targets = augment(inputs, targets, random)
        return inputs, targets

    batches = tf.data.Dataset.range(start_step, tf.int64.max).map(batch_of, num_parallel_calls=tf.data.AUTOTUNE)
    options = tf.data.Options()
    # The rewriting of the graph would copy the tensors it captures: the whole data set.
    options.experimental_optimization.apply_default_optimizations = False
    options.autotune.enabled = False  # TensorFlow 2.21 may wait for it for up to a minute when all is done.
    batches = batches.prefetch(tf.data.AUTOTUNE).with_options(options)
    return (strategy or tf.distribute.get_strategy()).experimental_distribute_dataset(batches)


def evaluation_batches(split: Split, batch_size: int, strategy: tf.distribute.Strategy | None = None) -> Any:
    """Every example in order, again and again: pass the number of steps to Keras. None where the split is empty."""
    return training_batches(split, batch_size, None, strategy=strategy) if len(split) else None


def evaluate_classifier(
    model: keras.Model, split: Split, class_names: tuple[str, ...], batch_size: int, strategy: Any, _: Any = None
) -> Report:
    """Loss and accuracy, macro precision, recall and F1, the confusion matrix, and the mistakes made most surely."""
    probabilities = _predict(model, split, batch_size, strategy)
    one_hot = split.targets.numpy()
    true, predicted, confidence = one_hot.argmax(axis=1), probabilities.argmax(axis=1), probabilities.max(axis=1)
    averages = sklearn.metrics.precision_recall_fscore_support(true, predicted, average="macro", zero_division=0)
    metrics = {"loss": float(np.mean(keras.losses.get(model.loss)(one_hot, probabilities)))}
    metrics |= zip(("accuracy", "precision", "recall", "f1"), (np.mean(true == predicted), *averages[:3]), strict=True)
    surest = sorted(np.flatnonzero(true != predicted).tolist(), key=lambda example: -confidence[example])[:25]
    worst = [{"example": n, "true": class_names[true[n]], "predicted": class_names[predicted[n]]} for n in surest]
    confusion = sklearn.metrics.confusion_matrix(true, predicted, labels=range(len(class_names)))
    figure = Figure(figsize=[max(4.0, 1.5 + 0.55 * len(class_names))] * 2, layout="constrained")
    labels = [name.replace("$", r"\$") for name in class_names]  # Which is no formula for Matplotlib.
    display = sklearn.metrics.ConfusionMatrixDisplay(confusion, display_labels=labels)
    display.plot(ax=figure.add_subplot(), cmap="Blues", colorbar=False, xticks_rotation=45)
    details = {"confusion_matrix": confusion.tolist(), "worst_mistakes": worst}
    return Report(metrics, details, {"confusion_matrix": figure})


def _read_tfds(dataset: Dataset, config: SharedConfig) -> Arrays:
    import requests
    import tensorflow_datasets as tfds

    try:
        builder = tfds.builder(dataset.folder, data_dir=config.data_dir or None)
        if not builder.data_path.exists():  # TFDS alone would try for minutes.
            requests.head(dataset.probe, timeout=4).raise_for_status()
        builder.download_and_prepare()
        class_names, arrays = np.array(builder.info.features["label"].names), {}
        for split in ("train", "test"):
            examples = builder.as_dataset(split=split, batch_size=-1)
            arrays[split] = (examples[dataset.inputs].numpy(), class_names[examples["label"].numpy()])
        return arrays
    except Exception as error:  # TFDS lets through whatever its downloader, its parsers and the disk raise.
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise DataUnavailableError(f"No {dataset.title} ({reason}); run once with network") from error


def _cut(name: str, source: str, arrays: Arrays, config: SharedConfig, started: float, columns: tuple = ()) -> Data:
    """Cuts the splits that are missing from the training examples, by seeded permutations."""
    splits, train = ("train", "validation", "test"), arrays["train"]
    order = {split: np.arange(len(arrays.get(split, train)[1])) for split in splits}
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
            raise UserError(f"{name}: too few examples for a split each; add some")
    inputs, targets = ({split: arrays.get(split, train)[part][order[split]] for split in splits} for part in (0, 1))
    class_names = tuple(np.unique(targets["train"]).tolist()) if targets["train"].dtype.kind == "U" else ()
    if len(class_names) == 1 or (class_names and any(set(targets[split]) - set(class_names) for split in splits)):
        raise UserError(f"{name}: needs two classes or more, and training examples of each")
    for split in splits:
        found = np.searchsorted(class_names, targets[split]) if class_names else targets[split]
        targets[split] = (np.eye(len(class_names))[found] if class_names else found[:, None]).astype(np.float32)
    cut = {split: Split.of(inputs[split], targets[split]) for split in splits}
    return Data(name, source, **cut, class_names=class_names, columns=columns, seconds=time.perf_counter() - started)


def _class_files(folder: pathlib.Path, kind: str, suffixes: list[str]) -> dict[str, list]:
    """The files of each split, each with its class."""
    found, below = {}, {each.name.lower(): each for each in folder.glob("[!.]*/")}  # Train as well as train.
    splits = {name: below[name] for name in ("train", "validation", "test") if name in below}
    for split, place in (splits or {"train": folder}).items():
        files = [file for file in sorted(place.glob("[!.]*/[!.]*")) if file.suffix.lower() in suffixes]
        if {file.parent for file in files} != {*place.glob("[!.]*/"), *place.glob("[!.]*/[!.]*/")} or not files:
            raise UserError(f"--data {place}: needs a folder with {kind} for each class, and no other")
        found[split] = [(file, file.parent.name) for file in files]
    if splits and ("train" not in splits or {*folder.glob("[!.]*/")} != {*splits.values()}):
        raise UserError(f"--data {folder}: needs 'train', beside it only 'validation' and 'test'; rename the folders")
    return found


def read_image(path: pathlib.Path, shape: tuple[int, int, int]) -> np.ndarray:
    """A picture file as uint8 of `shape`: height, width, and 1 channel or 3. The aspect is kept."""
    height, width, channels = shape
    try:
        with Image.open(path) as opened:
            image = ImageOps.exif_transpose(opened)
        if image.mode.startswith("I"):  # 16 bits of grey become 8.
            image = Image.fromarray((np.asarray(image).astype(int) // 257).clip(0, 255).astype(np.uint8))
        if image.has_transparency_data:
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image.convert("RGBA"))
        image = image.convert("L" if channels == 1 else "RGB")
    except Exception as error:  # Each of Pillow's decoders has errors of its own.
        raise UserError(f"{path}: not a readable image; repair or remove it") from error
    return np.asarray(ImageOps.pad(image, (width, height))).reshape(shape)


def read_csv(path: pathlib.Path, columns: list[str], remedy: str = "") -> pd.DataFrame:
    """A CSV as text, every value as it stands; `columns` must be among its columns."""
    try:
        names = pd.read_csv(path, header=None, nrows=1, dtype=str).iloc[0]
        table = pd.read_csv(path, dtype=str, keep_default_na=False, index_col=False)
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: not readable as CSV ({error}); save it as UTF-8 with commas") from error
    if names.duplicated().any() or table.empty:
        raise UserError(f"{path}: needs rows, and a name of its own for each column; add them")
    for column in columns:
        if column not in table:
            raise UserError(f"{path}: no column {column!r} among {', '.join(table)}; {remedy}")
    return table
