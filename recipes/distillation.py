"""Distillation: a large network teaches a small one more than the labels tell it.

Teaches   a teacher's soft answers as targets (Hinton et al. 2015), computed once and kept
Data      CIFAR-10: 45,000 train, 5,000 validation, 10,000 test; drawn shapes where there is no network
Result    not yet measured
Run       python recipes/distillation.py
"""

import dataclasses
import os
import pathlib

from common.batches import (
    Split,
    evaluation_batches,
    random_shift,
    steps_per_epoch,
    steps_per_execution,
    training_batches,
)
from common.cli import Count, Positive, Share, SharedConfig, UserError, run_recipe
from common.data import CIFAR10, Data, load_images
from common.evaluation import evaluate_classifier
from common.runs import start_run

import keras
import numpy as np
import tensorflow as tf


@dataclasses.dataclass(frozen=True)
class Config(SharedConfig):
    epochs: Count = 20  # passes over the training images, of the teacher too
    batch_size: Count = 256  # images per step, over all devices together
    learning_rate: Positive = 0.006  # peak of the schedule
    warmup: Share = 0.3  # share of the training in which the learning rate rises to its peak
    shift: int = 2  # pixels by which a training image may move along each axis
    teacher: str = ""  # a saved Keras model that teaches, as model.keras of a run; empty: a wider network
    temperature: Positive = 4.0  # divides the logits, so that the second and third guess of the teacher count
    label_weight: Share = 0.1  # what the true labels weigh in the loss; the teacher has the rest


def load_data(config: Config) -> Data:
    return load_images(CIFAR10, config, size=(32, 32))


def build_student(data: Data) -> keras.Model:
    """The network of cifar10_cnn without its softmax, since logits are what is distilled."""
    images = keras.Input(data.train.inputs.shape[1:], dtype="uint8", name="image")
    x = keras.layers.Rescaling(1 / 127.5, offset=-1)(images)
    x = keras.layers.Conv2D(32, 3, activation="relu")(x)
    x = keras.layers.MaxPooling2D()(x)
    x = keras.layers.Conv2D(64, 3, activation="relu")(x)
    x = keras.layers.MaxPooling2D()(x)
    x = keras.layers.Conv2D(64, 3, activation="relu")(x)
    x = keras.layers.Flatten()(x)
    x = keras.layers.Dense(64, activation="relu")(x)
    # In float32 whatever the precision of the rest: probabilities need the digits.
    return keras.Model(images, keras.layers.Dense(len(data.class_names), dtype="float32")(x), name="student")


def build_teacher(data: Data) -> keras.Model:
    images = keras.Input(data.train.inputs.shape[1:], dtype="uint8", name="image")
    x = keras.layers.Rescaling(1 / 127.5, offset=-1)(images)
    for filters in (64, 128, 256):
        x = keras.layers.Conv2D(filters, 3, padding="same", use_bias=False)(x)
        x = keras.layers.MaxPooling2D()(x)
        x = keras.layers.BatchNormalization()(x)
        x = keras.layers.Activation("relu")(x)
    x = keras.layers.GlobalMaxPooling2D()(x)
    return keras.Model(images, keras.layers.Dense(len(data.class_names), dtype="float32")(x), name="teacher")


def teacher_logits(path: pathlib.Path, data: Data) -> np.ndarray:
    """What the teacher says of the images of train, then of validation: [n, classes]. Kept beside its model."""
    kept = path.with_name(f"{path.stem}-{data.digest()[:16]}.npz")
    if not kept.exists():
        try:
            teacher = keras.models.load_model(path, compile=False)
            answers = teacher.predict(np.concatenate([data.train.inputs, data.validation.inputs]), verbose=0)
        except (OSError, ValueError) as error:
            raise UserError(f"--teacher {path}: no model of such images ({error}); give a run's model.keras") from error
        # A run saves its model with the names of the classes.
        probabilities = answers["probabilities"] if isinstance(answers, dict) else answers
        if probabilities.shape[1] != len(data.class_names):
            raise UserError(f"--teacher {path}: knows {probabilities.shape[1]} classes; give one of the same data")
        np.savez(path.with_name("part.npz"), logits=np.log(probabilities + 1e-7))
        os.replace(path.with_name("part.npz"), kept)
    with np.load(kept) as arrays:
        return arrays["logits"]


def train(config: Config, data: Data | None = None) -> dict[str, float]:
    run = start_run(config)
    data = data or load_data(config)
    steps = steps_per_epoch(data.train, config.batch_size)

    def augment(images, labels, random):
        return random_shift(images, random, pixels=config.shift, mirrored=random.turns), labels

    def augment_image(inputs, labels, random):
        images, labels = augment(inputs["image"], labels, random)
        return {**inputs, "image": images}, labels

    # Up from zero in a straight line, then down to zero along a cosine.
    total_steps = config.epochs * steps
    warmup_steps = int(config.warmup * total_steps)
    schedule = keras.optimizers.schedules.CosineDecay(
        initial_learning_rate=0.0,
        decay_steps=total_steps - warmup_steps,
        warmup_target=config.learning_rate,
        warmup_steps=warmup_steps,
    )

    def fit(model, training, validation, augment, callbacks=(), start_step=0):
        model.compile(
            # The usual epsilon of 1e-7 would blow gradients of nearly zero up to full steps.
            optimizer=keras.optimizers.AdamW(schedule, weight_decay=0.02, epsilon=1e-3),
            loss=keras.losses.CategoricalCrossentropy(from_logits=True),
            metrics=["accuracy"],
            steps_per_execution=steps_per_execution(steps, run.strategy),
        )
        model.fit(
            training_batches(training, config.batch_size, config.seed, augment, run.strategy, start_step),
            steps_per_epoch=steps,
            shuffle=False,  # Shuffled already.
            epochs=config.epochs,
            validation_data=evaluation_batches(validation, config.batch_size, run.strategy),
            validation_steps=steps_per_epoch(validation, config.batch_size),
            callbacks=list(callbacks),
            verbose=run.verbose,
        )

    def with_softmax(model):
        with run.strategy.scope():
            probabilities = keras.layers.Activation("softmax", dtype="float32")(model.output)
            complete = keras.Model(model.inputs, probabilities, name=model.name)
            complete.compile(loss="categorical_crossentropy")
        return complete

    def save_teacher():
        with_softmax(teacher).save(path.with_name("part.keras"))
        os.replace(path.with_name("part.keras"), path)

    callbacks = run.callbacks(data, augment)
    path = pathlib.Path(config.teacher or run.directory / "teacher.keras")
    if not config.teacher and not run.once(path.exists):  # A resumed run may have it.
        with run.strategy.scope():
            teacher = build_teacher(data)
        fit(teacher, data.train, data.validation, augment)
        run.once(save_teacher)
    logits = run.once(lambda: teacher_logits(path, data))

    with run.strategy.scope():
        student = build_student(data)
        inputs = {"image": student.input, "teacher_logits": keras.Input(logits.shape[1:], name="teacher_logits")}
        distiller = keras.distillation.Distiller(
            # The teacher has spoken already; what it said comes along with the image.
            teacher=keras.Model(inputs, keras.layers.Identity()(inputs["teacher_logits"])),
            student=keras.Model(inputs, student.output),
            # Given by name, as it is by default, Keras 3.15 takes the loss of the logits, not of probabilities.
            distillation_losses=keras.distillation.LogitsDistillation(config.temperature, keras.losses.KLDivergence()),
            student_loss_weight=config.label_weight,
        )
    taught = [
        Split({"image": split.inputs, "teacher_logits": tf.constant(part)}, split.targets)
        for split, part in zip((data.train, data.validation), np.split(logits, [len(data.train)]), strict=True)
    ]
    fit(distiller, *taught, augment_image, callbacks, run.start_step)

    def evaluate(model):
        return evaluate_classifier(model, data.test, data.class_names, config.batch_size, run.strategy)

    beside = {}
    if config.baseline:  # The same student, with the labels alone.
        with run.strategy.scope():
            alone = build_student(data)
        fit(alone, data.train, data.validation, augment)
        beside["alone_accuracy"] = evaluate(with_softmax(alone)).metrics["accuracy"]
    model = with_softmax(student)
    return run.finish(model, data, evaluate(model), beside)


def main() -> None:
    run_recipe(train, Config, __doc__)


if __name__ == "__main__":
    main()
