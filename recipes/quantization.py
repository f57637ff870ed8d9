"""Quantization: store a network in 8 bits instead of 32, and measure the accuracy that this costs.

Teaches   three kinds of post-training quantization (dynamic, float16, int8), measured on the test split with LiteRT
Data      CIFAR-10: 45,000 train, 5,000 validation, 10,000 test; offline, drawn shapes
Result    test accuracy 86.15 ± 0.27 % over 3 seeds, 4.2 min, 2 cores of Intel(R) Xeon(R) Processor, stale,
          with --precision mixed_bfloat16
Run       python recipes/quantization.py
"""

import contextlib
import dataclasses
import io
import pathlib
from typing import Annotated, Literal

from common.batches import (
    Split,
    evaluation_batches,
    evaluation_steps,
    random_shift,
    steps_per_epoch,
    steps_per_execution,
    training_batches,
)
from common.cli import Count, Positive, Share, SharedConfig, run_recipe
from common.console import status
from common.data import CIFAR10, Data, class_weights, load_images
from common.evaluation import evaluate_classifier
from common.optimizers import Muon
from common.runs import once, start_run
from common.startup import quiet_native_stderr

import keras
import numpy as np
import tensorflow as tf
from ai_edge_litert.interpreter import Interpreter


@dataclasses.dataclass(frozen=True)
class Config(SharedConfig):
    image_size: Annotated[int, 18, 4097] = 32  # height and width to which images are resized, in pixels
    epochs: Count = 40  # passes over the training images
    batch_size: Count = 256  # images per step, summed over all devices
    learning_rate: Positive = 0.015  # peak of the learning rate schedule
    label_smoothing: Share = 0.05  # share of each label that is spread evenly over all classes
    shift: int = 2  # maximum random shift of a training image along each axis, in pixels
    representative_images: Count = 500  # training images that calibrate the int8 activation ranges
    class_weights: Literal["none", "balanced"] = "none"  # balanced: each class has the same influence on the loss


def load_data(config: Config) -> Data:
    return load_images(CIFAR10, config, size=(config.image_size, config.image_size))


def build_model(config: Config, data: Data) -> keras.Model:
    """The network of cifar10_cnn."""
    images = keras.Input(data.train.input_shape, dtype="uint8", name="image")
    x = keras.layers.Rescaling(1 / 127.5, offset=-1)(images)
    x = keras.layers.Conv2D(32, 3, activation="relu")(x)
    x = keras.layers.MaxPooling2D()(x)
    x = keras.layers.Conv2D(64, 3, activation="relu")(x)
    x = keras.layers.MaxPooling2D()(x)
    x = keras.layers.Conv2D(64, 3, activation="relu")(x)
    x = keras.layers.Flatten()(x)
    x = keras.layers.Dense(64, activation="relu")(x)
    # Always float32: softmax outputs lose too much precision in 16 bits.
    probabilities = keras.layers.Dense(len(data.class_names), activation="softmax", dtype="float32")(x)
    return keras.Model(images, probabilities, name="quantization")


def quantized(model: keras.Model, kind: str, path: pathlib.Path, images: np.ndarray) -> pathlib.Path:
    """Writes a LiteRT model, and returns its path.

    dynamic: weights in int8, and for as long as a layer calculates its inputs too; float16: weights in float16;
    int8: all in int8, for which the range of every activation must be known beforehand: `images` show it.
    """
    settings = {} if kind == "float32" else {"optimizations": [tf.lite.Optimize.DEFAULT]}
    if kind == "float16":
        settings["target_spec"] = {"supported_types": [tf.float16]}
    if kind == "int8":
        settings["target_spec"] = {"supported_ops": [tf.lite.OpsSet.TFLITE_BUILTINS_INT8]}
        settings["representative_dataset"] = lambda: ([image[None]] for image in images)
    with contextlib.redirect_stdout(io.StringIO()):  # The converter prints its progress.
        model.export(path, format="litert", verbose=False, **settings)
    return path


def litert_accuracy(path: pathlib.Path, split: Split) -> float:
    """Accuracy of a LiteRT model on a split."""
    interpreter = Interpreter(str(path))
    (taken,), (given,) = interpreter.get_input_details(), interpreter.get_output_details()
    right = 0
    for start in range(0, len(split), 500):
        batch, labels = split.arrays(slice(start, start + 500))
        interpreter.resize_tensor_input(taken["index"], batch.shape)
        interpreter.allocate_tensors()
        interpreter.set_tensor(taken["index"], batch)
        interpreter.invoke()
        right += np.sum(interpreter.get_tensor(given["index"]).argmax(axis=1) == labels.argmax(axis=1))
    return float(right / len(split))


def train(config: Config, data: Data | None = None) -> dict[str, float]:
    run = start_run(config)
    data = data or load_data(config)
    steps = steps_per_epoch(data.train, config.batch_size)

    def augment(images, labels, random):
        return random_shift(images, random, pixels=config.shift, mirrored=random.turns), labels

    # Linear warmup from zero, then cosine decay to zero.
    total_steps = config.epochs * steps
    warmup_steps = int(0.3 * total_steps)
    schedule = keras.optimizers.schedules.CosineDecay(
        initial_learning_rate=0.0,
        decay_steps=total_steps - warmup_steps,
        warmup_target=config.learning_rate,
        warmup_steps=warmup_steps,
    )
    with run.strategy.scope():
        model = build_model(config, data)
        model.compile(
            # With the default epsilon (1e-7), Adam turns gradients near zero, mostly rounding noise,
            # into full-size steps.
            optimizer=Muon(schedule, weight_decay=0.1, epsilon=1e-3),
            loss=keras.losses.CategoricalCrossentropy(label_smoothing=config.label_smoothing),
            metrics=["accuracy"],
            steps_per_execution=steps_per_execution(model, data.train, config.batch_size, run.strategy, run.start_step),
        )
    model.fit(
        training_batches(
            data.train,
            config.batch_size,
            config.seed,
            augment,
            run.strategy,
            run.start_step,
            class_weights(data, config),
        ),
        steps_per_epoch=steps,
        shuffle=False,  # The dataset is shuffled already.
        epochs=config.epochs,
        validation_data=evaluation_batches(data.validation, config.batch_size, run.strategy),
        validation_steps=evaluation_steps(data.validation, config.batch_size),
        callbacks=run.callbacks(data, augment),
        verbose=run.verbose,
    )
    report = evaluate_classifier(model, data.test, data.class_names, config.batch_size, run.strategy)

    @status("quantizing")
    def quantize() -> dict[str, float]:
        keras.config.set_dtype_policy("float32")  # Also if the training used another precision.
        network = build_model(config, data)  # Outside the strategy's scope: on one device.
        network.set_weights(model.get_weights())
        (images, _), extra_metrics, sizes = data.train.arrays(slice(config.representative_images)), {}, {}
        for kind in ("float32", "dynamic", "float16", "int8"):
            path = quantized(network, kind, run.directory / f"{kind}.tflite", images)
            extra_metrics[f"{kind}_litert_accuracy"] = litert_accuracy(path, data.test)
            sizes[kind] = path.stat().st_size
        return extra_metrics | {"int8_share_of_bytes": sizes["int8"] / sizes["float32"]}

    with quiet_native_stderr():  # The converter prints there too.
        extra_metrics = once(run, quantize)
    return run.finish(model, data, report, extra_metrics)


def main() -> None:
    run_recipe(train, Config, __doc__)


if __name__ == "__main__":
    main()
