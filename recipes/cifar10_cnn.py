"""CIFAR-10 CNN: classify small colour pictures into ten classes with a small convolutional network.

Teaches   how much good training improves a network that tutorials use
Data      CIFAR-10: 45,000 train, 5,000 validation, 10,000 test; offline, drawn shapes
Result    test accuracy 86.32 ± 0.40 % over 3 seeds, 6.4 min, 2 cores of AMD EPYC, stale
          test accuracy 80.23 ± 0.20 % over 3 seeds, 45 s, 2 cores of AMD EPYC, stale,
          with --epochs 5 --precision mixed_bfloat16
          test accuracy 80.27 ± 0.21 % over 3 seeds, 1.9 min, 2 cores of AMD EPYC without bfloat16, stale,
          with --epochs 5
Run       python recipes/cifar10_cnn.py
"""

import dataclasses
from typing import Annotated, Literal

from common.batches import (
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
from common.runs import start_run

import keras


@dataclasses.dataclass(frozen=True)
class Config(SharedConfig):
    image_size: Annotated[int, 18, 4097] = 32  # height and width to which images are resized, in pixels
    epochs: Count = 40  # passes over the training images
    batch_size: Count = 256  # images per step, summed over all devices
    learning_rate: Positive = 0.015  # peak of the learning rate schedule
    kernel_speed: Positive = 2.0  # learning rate of convolutions, as a multiple of that of the other layers
    warmup: Share = 0.3  # share of training in which the learning rate rises to its peak
    weight_decay: float = 0.1  # weight decay of the optimizer
    label_smoothing: Share = 0.05  # share of each label that is spread evenly over all classes
    shift: int = 2  # maximum random shift of a training image along each axis, in pixels
    naive_epochs: Count = 10  # epochs of the baseline, which is trained as in tutorials
    class_weights: Literal["none", "balanced"] = "none"  # balanced: each class has the same influence on the loss


def load_data(config: Config) -> Data:
    return load_images(CIFAR10, config, size=(config.image_size, config.image_size))


def build_model(config: Config, data: Data) -> keras.Model:
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
    return keras.Model(images, probabilities, name="cifar10_cnn")


def train(config: Config, data: Data | None = None) -> dict[str, float]:
    run = start_run(config)
    data = data or load_data(config)
    steps = steps_per_epoch(data.train, config.batch_size)

    def augment(images, labels, random):
        return random_shift(images, random, pixels=config.shift, mirrored=random.turns), labels

    # Linear warmup from zero, then cosine decay to zero.
    total_steps = config.epochs * steps
    warmup_steps = int(config.warmup * total_steps)
    schedule = keras.optimizers.schedules.CosineDecay(
        initial_learning_rate=0.0,
        decay_steps=total_steps - warmup_steps,
        warmup_target=config.learning_rate,
        warmup_steps=warmup_steps,
    )
    with run.strategy.scope():
        model = build_model(config, data)
        model.compile(
            # AdamW for biases and dense layers. With the default epsilon (1e-7), it turns gradients near zero, mostly
            # rounding noise, into full-size steps.
            optimizer=Muon(schedule, config.kernel_speed, weight_decay=config.weight_decay, epsilon=1e-3),
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
    baselines = {"naive_accuracy": naive_accuracy(config, data)} if config.baseline else {}
    return run.finish(model, data, report, baselines=baselines)


@status("training the baseline")
def naive_accuracy(config: Config, data: Data) -> float:
    """Test accuracy of the same model, trained as in tutorials."""
    model = build_model(config, data)
    model.compile("adam", "categorical_crossentropy", metrics=["accuracy"])
    model.fit(
        training_batches(data.train, 32, config.seed),
        steps_per_epoch=steps_per_epoch(data.train, 32),
        shuffle=False,
        epochs=min(config.epochs, config.naive_epochs),
        verbose=0,
    )
    test, steps = evaluation_batches(data.test, 500), evaluation_steps(data.test, 500)
    return model.evaluate(test, steps=steps, return_dict=True, verbose=0)["accuracy"]


def main() -> None:
    run_recipe(train, Config, __doc__)


if __name__ == "__main__":
    main()
