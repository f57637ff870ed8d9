"""Evaluation on the test split: metrics, figures and the worst mistakes."""

import dataclasses
import io
import math
import warnings
from typing import Any

from common.batches import Split, evaluation_batches, evaluation_steps
from common.console import status

import keras
import numpy as np
import sklearn.metrics
import tensorflow as tf
from matplotlib.figure import Figure


@dataclasses.dataclass(frozen=True)
class Report:
    """Test metrics, with `details` for `result.json`, and `figures` and `texts` for plots and TensorBoard."""

    metrics: dict[str, float]
    details: dict[str, Any] = dataclasses.field(default_factory=dict)
    figures: dict[str, Figure] = dataclasses.field(default_factory=dict)
    texts: dict[str, str] = dataclasses.field(default_factory=dict)


@status("evaluating")
def evaluate_classifier(
    model: keras.Model,
    split: Split,
    class_names: tuple[str, ...],
    batch_size: int,
    strategy: tf.distribute.Strategy,
    shown_inputs: tf.Tensor | None = None,
) -> Report:
    """Computes loss, accuracy, precision, recall and F1 (macro and per class), confusion matrix and worst mistakes.

    In plain Keras: `model.predict`, then `sklearn.metrics.classification_report`. Macro averages cover the classes that
    occur in the split or in the predictions. The compiled `model` returns probabilities [n, classes], in the order of
    `class_names`. Pass `shown_inputs`, images or texts that illustrate mistakes, if the model takes other inputs.
    """
    probabilities = _predict(model, split, batch_size, strategy)
    one_hot = split.targets.numpy()
    loss = float(np.mean(keras.losses.get(model.loss)(one_hot, probabilities)))
    true, predicted = one_hot.argmax(axis=1), probabilities.argmax(axis=1)
    by_class = sklearn.metrics.classification_report(true, predicted, output_dict=True, zero_division=0)
    accuracy, macro, _ = (by_class.pop(key) for key in ("accuracy", "macro avg", "weighted avg"))
    confusion = sklearn.metrics.confusion_matrix(true, predicted, labels=range(len(class_names)))
    confidence = probabilities.max(axis=1)
    mistakes = sorted(np.flatnonzero(true != predicted).tolist(), key=lambda example: -confidence[example])[:25]
    labels = [(class_names[true[example]], class_names[predicted[example]]) for example in mistakes]
    records = [
        {"example": example, "true": true_name, "predicted": predicted_name, "probability": float(confidence[example])}
        for example, (true_name, predicted_name) in zip(mistakes, labels, strict=True)
    ]
    averages = {"precision": macro["precision"], "recall": macro["recall"], "f1": macro["f1-score"]}
    report = Report(
        metrics={"loss": loss, "accuracy": accuracy, **averages},
        details={
            "classes": {class_names[int(label)]: metrics for label, metrics in by_class.items()},
            "confusion_matrix": confusion.tolist(),
            "worst_mistakes": records,
        },
    )
    if len(class_names) <= 40:  # A larger figure would be unreadable and take gigabytes of memory.
        size = max(4.0, 1.5 + 0.55 * len(class_names))
        report.figures["confusion_matrix"] = Figure(figsize=(size, size), layout="constrained")
        display = sklearn.metrics.ConfusionMatrixDisplay(confusion, display_labels=list(map(verbatim, class_names)))
        axes, numbered = report.figures["confusion_matrix"].add_subplot(), len(class_names) <= 20
        display.plot(ax=axes, cmap="Blues", colorbar=False, xticks_rotation=45, include_values=numbered)
    shown = split.inputs if shown_inputs is None else shown_inputs
    if isinstance(shown, dict) or not mistakes:
        return report
    shown, titles = np.asarray(shown)[mistakes], [f"{right}, not {wrong}" for right, wrong in labels]
    if shown.dtype == np.uint8:
        report.figures["worst_mistakes"] = picture_figure(shown, titles)
    elif shown.dtype == object:
        report.texts["worst_mistakes"] = text_table(shown, titles)
    return report


@status("evaluating")
def evaluate_regressor(model: keras.Model, split: Split, batch_size: int, strategy: tf.distribute.Strategy) -> Report:
    """Computes mean squared error, mean absolute error and R² of a model that predicts one number per example."""
    predicted, true = _predict(model, split, batch_size, strategy), split.targets.numpy()
    figure = Figure(figsize=(5, 5), layout="constrained")
    axes = figure.add_subplot(xlabel="true", ylabel="predicted")
    axes.plot(true[:2000], predicted[:2000], ".", markersize=3)
    axes.axline((float(true.mean()), float(true.mean())), slope=1, color="black", linewidth=1)
    metric_functions = {"mse": sklearn.metrics.mean_squared_error, "mae": sklearn.metrics.mean_absolute_error}
    if len(true) > 1:  # R² needs at least two examples.
        metric_functions["r2"] = sklearn.metrics.r2_score
    metrics = {name: float(function(true, predicted)) for name, function in metric_functions.items()}
    return Report(metrics, figures={"predictions": figure})


def _predict(model: keras.Model, split: Split, batch_size: int, strategy: tf.distribute.Strategy) -> np.ndarray:
    # Keras 3.15 concatenates the outputs of several steps per execution in quadratic time.
    model.steps_per_execution = 1
    batches = evaluation_batches(split, batch_size, strategy)
    predicted = model.predict(batches, steps=evaluation_steps(split, batch_size), verbose=0)
    return predicted.astype(np.float32)


def picture_figure(images: np.ndarray, titles: list[str]) -> Figure:
    """Draws up to 25 uint8 images [n, height, width, channels] in a square grid, with titles."""
    side = min(5, math.ceil(math.sqrt(len(images))))
    figure = Figure(figsize=(1.7 * side, 1.9 * side))
    figure.subplots_adjust(0.01, 0.01, 0.99, 0.95, hspace=0.2, wspace=0.1)
    for place, (image, title) in enumerate(zip(images[: side**2], titles, strict=False), start=1):
        axes = figure.add_subplot(side, side, place, xticks=[], yticks=[])
        axes.imshow(image.squeeze(), cmap="gray", vmin=0, vmax=255)
        axes.set_title(verbatim(title), fontsize=7)
    return figure


def verbatim(text: str) -> str:
    """Escapes dollar signs, because Matplotlib would parse the text between them as a formula."""
    return text.replace("$", r"\$")


def text_table(texts: np.ndarray, titles: list[str]) -> str:
    """Returns a Markdown table of titles and the first 300 characters of each text."""
    cells = [text.decode(errors="replace").replace("|", " ").replace("\n", " ")[:300] for text in texts]
    return "\n".join(["| class | text |", "|---|---|", *map("| {} | {} |".format, titles, cells)])


def curves_figure(history: list[dict[str, float]]) -> Figure:
    """Draws learning curves, one chart per metric for train and validation; `history` has one dict per epoch."""
    names = [name for name in history[0] if f"val_{name}" in history[0] or name == "loss"]
    figure = Figure(figsize=(5 * len(names), 3.6), layout="constrained")
    for place, name in enumerate(names, start=1):
        axes = figure.add_subplot(1, len(names), place, xlabel="epoch", title=name)
        for key, label in ((name, "train"), (f"val_{name}", "validation")):
            if key in history[0]:
                axes.plot(range(1, len(history) + 1), [logs[key] for logs in history], marker=".", label=label)
        axes.legend()
    return figure


def figure_png(figure: Figure) -> bytes:
    """Encodes a figure as PNG."""
    png = io.BytesIO()
    with warnings.catch_warnings():
        # Class names may use any script; the font draws a box for a missing character.
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        figure.savefig(png, format="png", dpi=110)
    return png.getvalue()
