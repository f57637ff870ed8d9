"""What a trained model does on the test split, beyond a single number."""

import dataclasses
import io
import warnings
from typing import Any

from common.batches import evaluation_batches, steps_per_epoch
from common.examples import Split

import keras
import numpy as np
import sklearn.metrics
import tensorflow as tf
from matplotlib.figure import Figure

_SHOWN_MISTAKES = 25


@dataclasses.dataclass(frozen=True)
class Report:
    """Test metrics, and what is behind them: `details` for JSON, `figures` and `texts` for people."""

    metrics: dict[str, float]
    details: dict[str, Any] = dataclasses.field(default_factory=dict)
    figures: dict[str, Figure] = dataclasses.field(default_factory=dict)
    texts: dict[str, str] = dataclasses.field(default_factory=dict)


def evaluate_classifier(
    model: keras.Model,
    split: Split,
    class_names: tuple[str, ...],
    batch_size: int,
    strategy: tf.distribute.Strategy,
    shown_inputs: tf.Tensor | None = None,
) -> Report:
    """Loss and accuracy; precision, recall and F1 per class and macro; confusion matrix; worst mistakes.

    In plain Keras: `model.predict`, then `sklearn.metrics.precision_recall_fscore_support`.

    Args:
        model: compiled; gives probabilities [n, classes].
        split: the test split, targets one-hot.
        class_names: in the order of the model's outputs.
        batch_size: examples per prediction step.
        strategy: the one the model was made under.
        shown_inputs: pictures or texts to show the mistakes with, where the model takes something else.
    """
    probabilities = _predict(model, split, batch_size, strategy)
    truth = np.asarray(split.targets)
    labels, predicted = truth.argmax(axis=1), probabilities.argmax(axis=1)
    loss = float(np.mean(keras.losses.get(model.loss)(truth, probabilities)))
    numbers = range(len(class_names))
    precision, recall, f1, support = sklearn.metrics.precision_recall_fscore_support(
        labels, predicted, labels=numbers, zero_division=0
    )
    present = support > 0  # The macro average is over the classes that the split holds.
    confusion = sklearn.metrics.confusion_matrix(labels, predicted, labels=numbers)
    mistakes = np.flatnonzero(labels != predicted)
    confidence = probabilities.max(axis=1)
    mistakes = mistakes[np.argsort(-confidence[mistakes], kind="stable")][:_SHOWN_MISTAKES]
    records = [
        {
            "example": int(example),
            "true": class_names[labels[example]],
            "predicted": class_names[predicted[example]],
            "probability": float(confidence[example]),
        }
        for example in mistakes
    ]
    shown = (split.inputs if shown_inputs is None else shown_inputs).numpy()[mistakes]
    figures = {"confusion_matrix": confusion_figure(confusion, class_names)}
    texts = {}
    if shown.dtype == np.uint8 and len(mistakes):
        titles = [f"{record['true']}, not {record['predicted']}" for record in records]
        figures["worst_mistakes"] = picture_figure(shown, titles)
    elif shown.dtype == object and len(mistakes):
        rows = [
            f"| {record['true']} | {record['predicted']} | {record['probability']:.3f} | {excerpt(text)} |"
            for record, text in zip(records, shown, strict=True)
        ]
        texts["worst_mistakes"] = "\n".join(
            ["| true | predicted | probability | text |", "|---|---|---|---|", *rows]
        )
    return Report(
        metrics={
            "loss": loss,
            "accuracy": float(np.mean(labels == predicted)),
            "precision": float(precision[present].mean()),
            "recall": float(recall[present].mean()),
            "f1": float(f1[present].mean()),
        },
        details={
            "classes": {
                name: {
                    "precision": float(precision[number]),
                    "recall": float(recall[number]),
                    "f1": float(f1[number]),
                    "examples": int(support[number]),
                }
                for number, name in enumerate(class_names)
            },
            "confusion_matrix": confusion.tolist(),
            "worst_mistakes": records,
        },
        figures=figures,
        texts=texts,
    )


def evaluate_regressor(
    model: keras.Model, split: Split, batch_size: int, strategy: tf.distribute.Strategy
) -> Report:
    """Mean squared error, mean absolute error and R² of a model that gives one number per example."""
    predicted = _predict(model, split, batch_size, strategy)
    truth = np.asarray(split.targets)
    figure = Figure(figsize=(5, 5), layout="constrained")
    axes = figure.add_subplot(xlabel="true", ylabel="predicted")
    axes.plot(truth[:2000], predicted[:2000], ".", markersize=3)
    axes.axline((float(truth.mean()), float(truth.mean())), slope=1, color="black", linewidth=1)
    return Report(
        metrics={
            "mse": float(sklearn.metrics.mean_squared_error(truth, predicted)),
            "mae": float(sklearn.metrics.mean_absolute_error(truth, predicted)),
            # Of fewer than two examples, there is no variance to explain.
            **({"r2": float(sklearn.metrics.r2_score(truth, predicted))} if len(truth) > 1 else {}),
        },
        figures={"predictions": figure},
    )


def _predict(
    model: keras.Model, split: Split, batch_size: int, strategy: tf.distribute.Strategy
) -> np.ndarray:
    # Keras 3.15 joins the outputs of several steps per execution at quadratic cost.
    model.steps_per_execution = 1
    batches = evaluation_batches(split, batch_size, strategy)
    predicted = model.predict(batches, steps=steps_per_epoch(split, batch_size), verbose=0)
    return predicted.astype(np.float32)


def confusion_figure(confusion: np.ndarray, class_names: tuple[str, ...]) -> Figure:
    """The confusion matrix [true, predicted] as a picture; colours are shares of the true class."""
    size = max(4.0, 1.5 + 0.55 * len(class_names))
    figure = Figure(figsize=(size, size), layout="constrained")
    axes = figure.add_subplot(xlabel="predicted", ylabel="true")
    shares = confusion / np.maximum(confusion.sum(axis=1, keepdims=True), 1)
    axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    axes.set_xticks(range(len(class_names)), class_names, rotation=45, ha="right")
    axes.set_yticks(range(len(class_names)), class_names)
    if len(class_names) <= 20:
        for (row, column), count in np.ndenumerate(confusion):
            colour = "white" if shares[row, column] > 0.5 else "black"
            axes.text(column, row, str(count), ha="center", va="center", color=colour, fontsize=7)
    return figure


def picture_figure(images: np.ndarray, titles: list[str]) -> Figure:
    """Up to 25 uint8 pictures [n, height, width, channels] in a square, each with its title."""
    side = min(5, int(np.ceil(np.sqrt(len(images)))))
    figure = Figure(figsize=(1.7 * side, 1.9 * side), layout="constrained")
    for place, (image, title) in enumerate(zip(images[: side**2], titles, strict=False), start=1):
        axes = figure.add_subplot(side, side, place)
        axes.imshow(image.squeeze(), cmap="gray", vmin=0, vmax=255)
        axes.set_title(title, fontsize=7)
        axes.axis("off")
    return figure


def curves_figure(history: list[dict[str, float]]) -> Figure:
    """Learning curves, one chart per metric, train and validation together; one dict per epoch."""
    names = [name for name in history[0] if f"val_{name}" in history[0] or name == "loss"]
    figure = Figure(figsize=(5 * len(names), 3.6), layout="constrained")
    epochs = range(1, len(history) + 1)
    for place, name in enumerate(names, start=1):
        axes = figure.add_subplot(1, len(names), place, xlabel="epoch", title=name)
        for key, label in ((name, "train"), (f"val_{name}", "validation")):
            if key in history[0]:
                axes.plot(epochs, [logs[key] for logs in history], marker=".", label=label)
        axes.legend()
    return figure


def figure_png(figure: Figure) -> bytes:
    """A figure as the bytes of a PNG file."""
    png = io.BytesIO()
    with warnings.catch_warnings():
        # Class names may be in any script; the font draws a box for what it lacks.
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        figure.savefig(png, format="png", dpi=110)
    return png.getvalue()


def excerpt(text: bytes) -> str:
    """The beginning of a text, fit for a cell of a Markdown table."""
    return text.decode(errors="replace").replace("|", " ").replace("\n", " ")[:300]
