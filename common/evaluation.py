"""Evaluation on the test split: metrics, figures and the worst mistakes."""

import dataclasses
import functools
import io
import math
import textwrap
import unicodedata
from collections.abc import Sequence
from typing import Any

from common.batches import Split, evaluation_batches, evaluation_steps
from common.console import status
from common.data import Data

import keras
import numpy as np
import sklearn.metrics
import tensorflow as tf
from matplotlib import font_manager
from matplotlib.figure import Figure
from matplotlib.ft2font import FT2Font
from matplotlib.text import Text
from matplotlib.ticker import MaxNLocator


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

    The balanced accuracy is the mean recall of the classes that occur in the split.

    In plain Keras: `model.predict`, then `sklearn.metrics.classification_report`. Macro averages cover the classes that
    occur in the split or in the predictions. The compiled `model` returns probabilities [n, classes], in the order of
    `class_names`. Pass `shown_inputs`, images or texts that illustrate mistakes, if the model takes other inputs.
    """
    probabilities = predictions(model, split, batch_size, strategy).astype(np.float32)
    one_hot = split.targets.numpy()
    loss = float(np.mean(keras.losses.get(model.loss)(one_hot, probabilities)))
    true, predicted = one_hot.argmax(axis=1), probabilities.argmax(axis=1)
    by_class = sklearn.metrics.classification_report(true, predicted, output_dict=True, zero_division=0)
    accuracy, macro, _ = (by_class.pop(key) for key in ("accuracy", "macro avg", "weighted avg"))
    confusion = sklearn.metrics.confusion_matrix(true, predicted, labels=range(len(class_names)))
    balanced = float(np.mean([metrics["recall"] for metrics in by_class.values() if metrics["support"]]))
    confidence = probabilities.max(axis=1)
    mistakes = sorted(np.flatnonzero(true != predicted).tolist(), key=lambda example: -confidence[example])[:25]
    records = [
        {
            "example": example,
            "true": class_names[true[example]],
            "predicted": class_names[predicted[example]],
            "probability": float(confidence[example]),
            "true_probability": float(probabilities[example, true[example]]),
        }
        for example in mistakes
    ]
    averages = {"precision": macro["precision"], "recall": macro["recall"], "f1": macro["f1-score"]}
    report = Report(
        metrics={"loss": loss, "accuracy": accuracy, "balanced_accuracy": balanced, **averages},
        details={
            "classes": {class_names[int(label)]: metrics for label, metrics in by_class.items()},
            "confusion_matrix": confusion.tolist(),
            "worst_mistakes": records,
        },
    )
    report.figures["confusion_matrix"] = confusion_figure(confusion, class_names)
    if not mistakes:
        return report
    # Only these: a set of images may not fit into memory.
    shown = split.arrays(np.array(mistakes))[0] if shown_inputs is None else np.asarray(shown_inputs)[mistakes]
    if isinstance(shown, dict):
        return report

    def titles(names: Sequence[str]) -> list[str]:
        return [
            f"predicted {record['probability']:.1%}: {names[predicted[record['example']]]}\n"
            f"true {record['true_probability']:.1%}: {names[true[record['example']]]}"
            for record in records
        ]

    if shown.dtype == np.uint8:
        report.figures["worst_mistakes"] = picture_figure(shown, titles(drawn_names(class_names)))
    elif shown.dtype == object:
        report.texts["worst_mistakes"] = text_table(shown, titles(class_names))
    return report


def majority_accuracy(data: Data) -> float:
    """Returns the test accuracy of always predicting the most frequent class of the training examples."""
    commonest = data.train.targets.numpy().sum(axis=0).argmax()
    return float(data.test.targets.numpy()[:, commonest].mean(dtype=np.float64))


@status("evaluating")
def evaluate_regressor(model: keras.Model, split: Split, batch_size: int, strategy: tf.distribute.Strategy) -> Report:
    """Computes mean squared error, mean absolute error and R² of a model that predicts one number per example.

    The metrics are computed in float64.
    """
    predicted = predictions(model, split, batch_size, strategy).astype(np.float64)
    true = split.targets.numpy().astype(np.float64)
    figure = Figure(figsize=(5.5, 5.5), layout="constrained")
    axes = figure.add_subplot(xlabel="true value", ylabel="predicted value")
    axes.plot(true[:2000], predicted[:2000], ".", markersize=3, label=f"{min(2000, len(true)):,} examples")
    mean = float(true.mean())
    axes.axline((mean, mean), slope=1, color="black", linewidth=1, label="predicted = true")
    axes.legend()
    metric_functions = {"mse": sklearn.metrics.mean_squared_error, "mae": sklearn.metrics.mean_absolute_error}
    if len(true) > 1:  # R² needs at least two examples.
        metric_functions["r2"] = sklearn.metrics.r2_score
    metrics = {name: float(function(true, predicted)) for name, function in metric_functions.items()}
    return Report(metrics, figures={"predictions": figure})


def predictions(
    model: keras.Model, split: Split, batch_size: int, strategy: tf.distribute.Strategy | None = None
) -> np.ndarray:
    """Returns the output of the model for each example, float32 [n, ...]."""
    # Keras 3.15 concatenates the outputs of several steps per execution in quadratic time.
    model.steps_per_execution = 1
    batches = evaluation_batches(split, batch_size, strategy)
    return model.predict(batches, steps=evaluation_steps(split, batch_size), verbose=0)


def confusion_figure(confusion: np.ndarray, class_names: Sequence[str]) -> Figure:
    """Draws a confusion matrix. With more than 40 classes, their indices replace the names."""
    numbered = "class\n(# is its index in\nclass_names of result.json)"
    if len(class_names) > 40:
        figure = Figure(figsize=(9, 8), layout="constrained")
        axes = figure.add_subplot(xlabel=f"predicted {numbered}", ylabel="true class")
        figure.colorbar(axes.imshow(confusion, cmap="Blues"), label="examples")
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_locator(MaxNLocator(12, integer=True))
            axis.set_major_formatter("#{x:.0f}")
        return figure
    names = drawn_names(class_names)
    labels = [_wrapped(name, 40) for name in names]
    lines = max(label.count("\n") + 1 for label in labels)
    columns = max(_columns(line) for label in labels for line in label.split("\n"))
    size = max(4.0, 1.5 + max(0.55, 0.17 * lines) * len(labels) + 0.09 * columns)  # In inches.
    figure = Figure(figsize=(size, size), layout="constrained")
    axes = figure.add_subplot()
    sklearn.metrics.ConfusionMatrixDisplay(confusion, display_labels=labels).plot(
        ax=axes,
        cmap="Blues",
        colorbar=False,
        xticks_rotation="vertical" if columns > 3 else "horizontal",
        include_values=len(labels) <= 20,
    )
    axes.set(xlabel=f"predicted {'class' if names == [*class_names] else numbered}", ylabel="true class")
    return figure


def picture_figure(images: np.ndarray, titles: list[str]) -> Figure:
    """Draws up to 25 uint8 images [n, height, width, channels] in a square grid, with titles."""
    side = min(5, math.ceil(math.sqrt(len(images))))
    labels = [_wrapped(title, 30) for title in titles[: side**2]]
    lines = max(label.count("\n") + 1 for label in labels)
    figure = Figure(figsize=(max(4.5, 1.9 * side), 0.5 + (1.8 + 0.12 * lines) * side), layout="constrained")
    for place, (image, label) in enumerate(zip(images[: side**2], labels, strict=True), start=1):
        axes = figure.add_subplot(side, side, place, xticks=[], yticks=[])
        axes.imshow(image.squeeze(), cmap="gray", vmin=0, vmax=255)
        axes.set_title(label, fontsize=7)
    return figure


def _columns(text: str) -> int:
    """Returns the width of a text in narrow characters; those of Chinese and Japanese have twice that width."""
    return sum(2 if unicodedata.east_asian_width(character) in "WF" else 1 for character in text)


def _wrapped(text: str, columns: int) -> str:
    """Breaks lines that are too long. Escapes dollar signs, between which Matplotlib would parse a formula."""
    lines = [textwrap.fill(line, columns // max(map(_columns, line), default=1)) for line in text.split("\n")]
    return "\n".join(lines).replace("$", r"\$")


def drawn_names(class_names: Sequence[str]) -> list[str]:
    """Returns the names of classes for a figure: `#2` for the class of index 2 if no installed font has its name."""
    _, missing = _fonts("".join(class_names))
    return [f"#{index}" if missing & set(name) else name for index, name in enumerate(class_names)]


def _fonts(text: str) -> tuple[list[str], set[str]]:
    """Returns font families that together have the characters of a text, and the characters that no font has."""
    default = font_manager.findfont(font_manager.FontProperties())
    families, missing = _more_fonts(frozenset(_without(set(text) - {"\n"}, default)))
    return ["sans-serif", *families], missing


@functools.cache
def _more_fonts(missing: set[str]) -> tuple[list[str], set[str]]:
    # Not Matplotlib's own list: it lacks fonts that were installed after its first use.
    lacking = {path: _without(missing, path) for path in font_manager.findSystemFonts()} if missing else {}
    families = []
    while missing and lacking:
        # The font with most of the characters; of these, a regular one.
        path = min(lacking, key=lambda path: (len(missing & lacking[path]), "Regular" not in path, path))
        if missing <= lacking[path]:
            break
        # Its path becomes the name of a family, because Matplotlib finds fonts by family only.
        font_manager.fontManager.ttflist.append(font_manager.FontEntry(fname=path, name=path, size="scalable"))
        families, missing = [*families, path], missing & lacking[path]
    return families, missing


def _without(characters: set[str], path: str) -> set[str]:
    """Returns the characters that a font lacks: all of them if it is damaged or consists of pictures."""
    try:
        font = FT2Font(path)
    except (OSError, RuntimeError):
        return characters
    charmap = font.get_charmap() if font.scalable else ()
    return {character for character in characters if ord(character) not in charmap}


def text_table(texts: np.ndarray, titles: list[str]) -> str:
    """Returns a Markdown table of titles and the first 300 characters of each text."""
    cells = [text.decode(errors="replace")[:300] for text in texts]
    rows = [[cell.replace("|", " ").replace("\n", " ") for cell in row] for row in zip(titles, cells, strict=True)]
    return "\n".join(["| class | text |", "|---|---|", *(f"| {title} | {text} |" for title, text in rows)])


def curves_figure(history: list[dict[str, float]]) -> Figure:
    """Draws learning curves, one chart per metric for train and validation; `history` has one dict per epoch."""
    names = [name for name in history[0] if f"val_{name}" in history[0] or name == "loss"]
    figure = Figure(figsize=(5 * len(names), 3.6), layout="constrained")
    for place, name in enumerate(names, start=1):
        axes = figure.add_subplot(1, len(names), place, xlabel="epoch", title=name)
        for key, label in ((name, "train"), (f"val_{name}", "validation")):
            if key in history[0]:
                axes.plot(range(1, len(history) + 1), [logs[key] for logs in history], marker=".", label=label)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
        axes.legend()
    return figure


def figure_png(figure: Figure, title: str = "") -> bytes:
    """Encodes a figure as PNG, with a title and with fonts that have its characters."""
    if title and not figure.get_suptitle():
        figure.suptitle(_wrapped(title, int(9 * figure.get_figwidth())))
    texts = figure.findobj(Text)
    families, missing = _fonts("".join(text.get_text() for text in texts))
    for text in texts:
        text.set_fontfamily(families)
        if missing & set(text.get_text()):
            text.set_text(text.get_text().translate(dict.fromkeys(map(ord, missing), "?")))
    png = io.BytesIO()
    figure.savefig(png, format="png", dpi=110)
    return png.getvalue()
