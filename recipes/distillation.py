"""Distillation: train a small network on the predictions of a large one.

Teaches   a teacher's soft answers as targets (Hinton et al. 2015), computed once and kept
Data      CIFAR-10: 45,000 train, 5,000 validation, 10,000 test; offline, drawn shapes
Result    test accuracy 83.38 ± 0.31 % over 3 seeds, 4.6 min, 2 cores of AMD EPYC, stale,
          with --precision mixed_bfloat16 --teacher runs/teacher/model.keras
Run       python recipes/distillation.py
"""

import dataclasses
import hashlib
import os
import pathlib
import zipfile
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
from common.cli import Count, Positive, Share, SharedConfig, UserError, run_recipe
from common.console import status
from common.data import CIFAR10, Data, class_weights, load_images
from common.evaluation import evaluate_classifier
from common.optimizers import Muon
from common.progress import EpochLine
from common.records import file_sha256
from common.runs import once, start_run

import keras
import numpy as np


@dataclasses.dataclass(frozen=True)
class Config(SharedConfig):
    image_size: Annotated[int, 18, 4097] = 32  # height and width to which images are resized, in pixels
    epochs: Count = 8  # passes over the training images, also of the teacher; with many, distillation gains less
    batch_size: Count = 256  # images per step, summed over all devices
    learning_rate: Positive = 0.015  # peak of the learning rate schedule
    shift: int = 2  # maximum random shift of a training image along each axis, in pixels
    teacher: str = ""  # path of the teacher, a model.keras; if empty, a network four times as wide is trained
    temperature: Positive = 2.0  # divides the logits; higher values give more weight to the less likely classes
    label_weight: Share = 0.1  # weight of the true labels in the loss; the rest is that of the teacher
    class_weights: Literal["none", "balanced"] = "none"  # balanced: each class has the same influence on the loss


def load_data(config: Config) -> Data:
    return load_images(CIFAR10, config, size=(config.image_size, config.image_size))


def build_model(config: Config, data: Data, width: int = 1) -> keras.Model:
    """The network of cifar10_cnn, or one whose layers are `width` times as wide."""
    images = keras.Input(data.train.input_shape, dtype="uint8", name="image")
    x = keras.layers.Rescaling(1 / 127.5, offset=-1)(images)
    x = keras.layers.Conv2D(32 * width, 3, activation="relu")(x)
    x = keras.layers.MaxPooling2D()(x)
    x = keras.layers.Conv2D(64 * width, 3, activation="relu")(x)
    x = keras.layers.MaxPooling2D()(x)
    x = keras.layers.Conv2D(64 * width, 3, activation="relu")(x)
    x = keras.layers.Flatten()(x)
    x = keras.layers.Dense(64 * width, activation="relu")(x)
    # Always float32: softmax outputs lose too much precision in 16 bits.
    logits = keras.layers.Dense(len(data.class_names), dtype="float32", name="logits")(x)
    return keras.Model(images, keras.layers.Softmax(dtype="float32")(logits), name="distillation")


@status("computing the logits of the teacher")
def teacher_logits(path: pathlib.Path, data: Data) -> np.ndarray:
    """The teacher's logits for the training images, then for the validation images: [n, classes]; cached on disk."""
    part = path.with_name(f"part-{os.getpid()}.npz")  # Renamed when complete.
    try:
        origin = hashlib.sha256(f"{file_sha256(path)} {data.digest()}".encode()).hexdigest()[:16]
        kept = path.with_name(f"logits-{origin}.npz")
        if not kept.exists():
            teacher = keras.models.load_model(path, compile=False)
            names, splits = [*data.class_names], filter(len, (data.train, data.validation))
            if isinstance(teacher.output, dict):  # The saved model of a run also outputs class names.
                names = teacher.get_layer("class_names").get_vocabulary()
                teacher = keras.Model(teacher.inputs, teacher.output["probabilities"])
            answers = np.concatenate([teacher.predict(evaluation_batches(each, 256), verbose=0) for each in splits])
            if names != [*data.class_names] or answers.shape[1:] != (len(names),) or not np.min(answers) >= 0:
                raise ValueError("no probabilities of these classes")
            np.savez(part, logits=np.log(answers + 1e-7))
            os.replace(part, kept)
        return np.load(kept)["logits"].reshape(len(data.train) + len(data.validation), len(data.class_names))
    except (OSError, ValueError, LookupError, TypeError, EOFError, zipfile.BadZipFile) as error:
        remedy = "make room" if part.exists() else "give another model.keras, or remove logits-*.npz"
        part.unlink(missing_ok=True)
        raise UserError(f"--teacher {path}: {str(error).partition(chr(10))[0]}; {remedy}") from error


def with_logits(split: Split, logits: np.ndarray) -> Split:
    """The split with a second input: the logits of the teacher. The images, which may be in a file, are not copied."""
    stored = np.zeros([split.stored_targets.shape[0], logits.shape[1]], np.float32)
    stored[slice(None) if split.rows is None else split.rows] = logits
    return Split.from_arrays({"image": split.stored_inputs, "teacher_logits": stored}, split.stored_targets, split.rows)


class Distiller(keras.distillation.Distiller):
    @property
    def metrics(self):
        # Omits the parts of the loss: Keras 3.15 divides them by the number of replicas.
        return [metric for metric in super().metrics if not metric.name.endswith("_loss")]


def with_teacher(student: keras.Model, config: Config) -> Distiller:
    """The student in training. Each image comes with the logits of the teacher, which were computed before."""
    logits = student.get_layer("logits").output
    said = keras.Input(logits.shape[1:], dtype=logits.dtype, name="teacher_logits")
    inputs = {"image": student.input, "teacher_logits": said}
    return Distiller(
        teacher=keras.Model(inputs, keras.layers.Identity(dtype=logits.dtype)(said)),
        student=keras.Model(inputs, logits),
        # An object, since Keras 3.15 applies a loss given by name, the default, to logits.
        distillation_losses=keras.distillation.LogitsDistillation(config.temperature, keras.losses.KLDivergence()),
        student_loss_weight=config.label_weight,
    )


def train(config: Config, data: Data | None = None) -> dict[str, float]:
    run = start_run(config, teacher=config.teacher)
    data = data or load_data(config)
    steps = steps_per_epoch(data.train, config.batch_size)

    def augment(images, labels, random):
        return random_shift(images, random, pixels=config.shift, mirrored=random.turns), labels

    def augment_taught(inputs, labels, random):
        return {**inputs, "image": augment(inputs["image"], labels, random)[0]}, labels

    # Linear warmup from zero, then cosine decay to zero.
    total_steps = config.epochs * steps
    warmup_steps = int(0.3 * total_steps)
    schedule = keras.optimizers.schedules.CosineDecay(
        0.0, total_steps - warmup_steps, warmup_target=config.learning_rate, warmup_steps=warmup_steps
    )

    def fit(build, training, validation, augment, callbacks, from_logits=False, start_step=0):
        with run.strategy.scope():
            model = build()
            model.compile(
                # With the default epsilon (1e-7), Adam turns gradients near zero into full-size steps.
                optimizer=Muon(schedule, weight_decay=0.1, epsilon=1e-3),
                loss=keras.losses.CategoricalCrossentropy(from_logits, label_smoothing=0.05),
                metrics=["accuracy"],
                steps_per_execution=steps_per_execution(model, training, config.batch_size, run.strategy, start_step),
            )
        model.fit(
            training_batches(
                training, config.batch_size, config.seed, augment, run.strategy, start_step, class_weights(data, config)
            ),
            steps_per_epoch=steps,
            shuffle=False,  # The dataset is shuffled already.
            epochs=config.epochs,
            validation_data=evaluation_batches(validation, config.batch_size, run.strategy),
            validation_steps=evaluation_steps(validation, config.batch_size),
            callbacks=callbacks,
            verbose=run.verbose,
        )
        return model

    def evaluate(model):
        return evaluate_classifier(model, data.test, data.class_names, config.batch_size, run.strategy)

    # Before the teacher, so that the initial weights don't depend on whether it is trained here.
    with run.strategy.scope():
        student, alone = build_model(config, data), build_model(config, data)
        alone.set_weights(student.get_weights())
        student.compile(loss="categorical_crossentropy")
    path = pathlib.Path(config.teacher or run.directory / "teacher.keras")
    if config.teacher:  # Checked before the run begins.
        logits = once(run, lambda: teacher_logits(path, data))
    callbacks = run.callbacks(data, augment)
    if not config.teacher:
        if not once(run, lambda: any(path.parent.glob("logits-*"))):  # A resumed run may have computed them.
            teacher = fit(
                lambda: build_model(config, data, width=4), data.train, data.validation, augment, [EpochLine("teacher")]
            )
            once(run, lambda: teacher.save(path))
        logits = once(run, lambda: teacher_logits(path, data))
    parts = np.split(logits, [len(data.train)])
    taught = [with_logits(*pair) for pair in zip((data.train, data.validation), parts, strict=True)]
    fit(lambda: with_teacher(student, config), *taught, augment_taught, callbacks, True, run.start_step)
    if config.baseline:
        fit(lambda: alone, data.train, data.validation, augment, [EpochLine("baseline, without a teacher")])
    baselines = {"alone_accuracy": evaluate(alone).metrics["accuracy"]} if config.baseline else {}
    return run.finish(student, data, evaluate(student), baselines=baselines)


def main() -> None:
    run_recipe(train, Config, __doc__)


if __name__ == "__main__":
    main()
