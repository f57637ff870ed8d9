import itertools

from common import evaluation, runs
from common.batches import Split
from common.evaluation import (
    confusion_figure,
    curves_figure,
    drawn_names,
    evaluate_classifier,
    evaluate_regressor,
    figure_png,
    picture_figure,
)

import keras
import numpy as np
import pytest
import tensorflow as tf
from conftest import load_recipe, smoke_config

NAMES = ("a", "$x_{y$", "c")
STRATEGY = tf.distribute.get_strategy()


@pytest.fixture(scope="module")
def report():
    """A report on random probabilities, which the model passes through."""
    random = np.random.default_rng(0)
    probabilities = random.dirichlet(np.ones(3), 101).astype(np.float32)
    labels = random.integers(0, 3, 101)
    labels[labels == 2] = 1  # A class without examples must not divide by zero.
    inputs = keras.Input([3])
    model = keras.Model(inputs, keras.layers.Activation("linear")(inputs))
    model.compile(loss="categorical_crossentropy", steps_per_execution=7)
    split = Split.from_arrays(probabilities, np.eye(3, dtype=np.float32)[labels])
    return evaluate_classifier(model, split, NAMES, 16, STRATEGY), probabilities, labels


def test_metrics_equal_those_counted_by_hand(report):
    report, probabilities, labels = report
    predicted = probabilities.argmax(1)
    assert report.metrics["accuracy"] == pytest.approx(np.mean(predicted == labels))
    assert report.metrics["loss"] == pytest.approx(-np.mean(np.log(probabilities[np.arange(101), labels])), rel=1e-5)
    for number, name in enumerate(NAMES):
        right = np.sum((predicted == number) & (labels == number))
        precision = right / max(np.sum(predicted == number), 1)
        recall = right / max(np.sum(labels == number), 1)
        if name not in report.details["classes"]:
            assert not np.sum(predicted == number) + np.sum(labels == number)
            continue
        found = report.details["classes"][name]
        assert found["precision"] == pytest.approx(precision)
        assert found["recall"] == pytest.approx(recall)
        assert found["f1-score"] == pytest.approx(2 * precision * recall / (precision + recall) if right else 0)
        assert found["support"] == np.sum(labels == number)
    for name in ("precision", "recall", "f1"):
        key = {"f1": "f1-score"}.get(name, name)
        mean = np.mean([figures[key] for figures in report.details["classes"].values()])
        assert report.metrics[name] == pytest.approx(mean)


def test_confusion_matrix_counts_true_by_predicted(report):
    report, probabilities, labels = report
    for true in range(3):
        for predicted in range(3):
            count = np.sum((labels == true) & (probabilities.argmax(1) == predicted))
            assert report.details["confusion_matrix"][true][predicted] == count


def test_the_most_confident_mistakes_come_first(report):
    report, probabilities, labels = report
    wrong = np.flatnonzero(probabilities.argmax(1) != labels)
    expected = sorted(wrong, key=lambda example: -probabilities[example].max())[:25]
    records = report.details["worst_mistakes"]
    assert [record["example"] for record in records] == expected
    for record in records:
        assert record["true"] == NAMES[labels[record["example"]]]
        assert record["predicted"] == NAMES[probabilities[record["example"]].argmax()]
        assert record["probability"] == probabilities[record["example"]].max()
        assert record["true_probability"] == probabilities[record["example"], labels[record["example"]]]


def mistake_on(inputs) -> evaluation.Report:
    """Evaluates two probability vectors: one mistake, one hit."""
    first = keras.Input([2])
    model = keras.Model(first, keras.layers.Activation("linear")(first))
    model.compile(loss="categorical_crossentropy")
    split = Split.from_arrays(np.float32([[0.9, 0.1], [0.8, 0.2]]), np.float32([[0, 1], [1, 0]]))
    return evaluate_classifier(model, split, ("no", "yes"), 8, STRATEGY, tf.constant(inputs))


def test_mistakes_are_shown_with_their_inputs_and_both_probabilities():
    text = mistake_on(["first | one", "second"]).texts["worst_mistakes"]
    assert "| predicted 90.0%: no true 10.0%: yes | first   one |" in text
    assert "second" not in text
    (axes,) = mistake_on(np.zeros([2, 8, 8, 1], np.uint8)).figures["worst_mistakes"].axes
    assert axes.get_title() == "predicted 90.0%: no\ntrue 10.0%: yes"


def test_a_classifier_may_take_several_inputs():
    first, second = keras.Input([2], name="first"), keras.Input([2], name="second")
    model = keras.Model({"first": first, "second": second}, keras.layers.Average()([first, second]))
    model.compile(loss="categorical_crossentropy")
    probabilities = np.float32([[0.9, 0.1], [0.8, 0.2]])
    split = Split.from_arrays({"first": probabilities, "second": probabilities}, np.float32([[0, 1], [1, 0]]))
    report = evaluate_classifier(model, split, ("no", "yes"), 8, STRATEGY)
    assert (report.metrics["accuracy"], len(report.details["worst_mistakes"])) == (0.5, 1)


def test_regression_metrics_equal_those_counted_by_hand():
    random = np.random.default_rng(0)
    predicted, truth = random.normal(size=(2, 101, 1)).astype(np.float32)
    inputs = keras.Input([1])
    model = keras.Model(inputs, keras.layers.Activation("linear")(inputs))
    model.compile(loss="mse")
    metrics = evaluate_regressor(model, Split.from_arrays(predicted, truth), 16, STRATEGY).metrics
    assert metrics["mse"] == pytest.approx(np.mean((predicted - truth) ** 2), rel=1e-5)
    assert metrics["mae"] == pytest.approx(np.mean(np.abs(predicted - truth)), rel=1e-5)
    assert metrics["r2"] == pytest.approx(1 - np.sum((predicted - truth) ** 2) / np.sum((truth - truth.mean()) ** 2))


@pytest.mark.parametrize("epochs", [1, 2, 3, 30])
def test_learning_curves_have_whole_epochs(epochs):
    figure = curves_figure([{"loss": 1.0, "val_loss": 1.5, "mae": 2.0, "val_mae": 1.0, "seconds": 1.0}] * epochs)
    assert figure_png(figure, "a title").startswith(b"\x89PNG")
    assert figure.get_suptitle() == "a title"
    assert [axes.get_title() for axes in figure.axes] == ["loss", "mae"]
    for axes in figure.axes:
        assert axes.get_legend_handles_labels()[1] == ["train", "validation"]
        low, high = axes.get_xlim()
        shown = [tick for tick in axes.get_xticks() if low <= tick <= high]
        assert shown
        assert all(tick == round(tick) for tick in shown)


def test_learning_curves_without_validation():
    (axes,) = curves_figure([{"loss": 1.0, "accuracy": 0.5}]).axes
    assert (axes.get_title(), axes.get_legend_handles_labels()[1]) == ("loss", ["train"])


def test_the_titles_name_recipe_and_data(tmp_path, monkeypatch):
    titles = []
    monkeypatch.setattr(runs, "figure_png", lambda figure, title: titles.append(title) or b"")
    recipe = load_recipe("linear_regression")
    recipe.train(smoke_config(recipe, tmp_path, epochs=1))
    assert titles == [
        "linear_regression: learning curves, noisy line (generated)",
        "linear_regression: predictions, test split of noisy line (generated)",
    ]


@pytest.mark.parametrize(
    "names",
    [
        [str(digit) for digit in range(10)],
        ["cat", "golden retriever", "a name " * 30, "an_unbroken_name" * 12],
        [f"class number {number}" for number in range(40)],
    ],
)
def test_class_names_are_whole_and_do_not_overlap(names):
    figure = confusion_figure(np.eye(len(names), dtype=int), names)
    figure.set_dpi(110)  # That of the PNG file: sizes of text are rounded to pixels.
    figure_png(figure, "recipe: confusion matrix, test split of some data (sample)")
    (axes,) = figure.axes
    for labels, low, high in ((axes.get_xticklabels(), "x0", "x1"), (axes.get_yticklabels(), "y0", "y1")):
        written = ["".join(label.get_text().split()) for label in labels]
        assert written == ["".join(name.split()) for name in names]
        boxes = sorted([label.get_window_extent() for label in labels], key=lambda box: getattr(box, low))
        assert all(getattr(one, high) <= getattr(two, low) for one, two in itertools.pairwise(boxes))
        assert all(box.x0 >= 0 and box.x1 <= figure.bbox.x1 and box.y0 >= 0 for box in boxes)


def test_many_classes_are_shown_by_index():
    figure = confusion_figure(np.eye(300, dtype=int), [f"class {number}" for number in range(300)])
    assert len(figure_png(figure)) > 1000
    assert max(figure.get_size_inches()) < 10
    labels = [label.get_text() for label in figure.axes[0].get_xticklabels()]
    assert {"#0", "#50"} <= set(labels)
    assert "class_names of result.json" in figure.axes[0].get_xlabel()


RARE = "\N{LATIN SMALL LETTER D WITH PALATAL HOOK}og"  # STIXGeneral has it, DejaVu Sans does not.


@pytest.fixture
def fonts(monkeypatch):
    """Sets the installed fonts."""
    evaluation._more_fonts.cache_clear()
    yield lambda *paths: monkeypatch.setattr(evaluation.font_manager, "findSystemFonts", lambda: [*paths])
    evaluation._more_fonts.cache_clear()


def test_class_names_of_any_script_take_a_font_that_has_them(fonts, tmp_path):
    damaged = tmp_path / "Damaged.ttf"
    damaged.write_bytes(b"no font")
    stix = next(font.fname for font in evaluation.font_manager.fontManager.ttflist if font.name == "STIXGeneral")
    fonts(str(damaged), stix)
    assert drawn_names(["cat", RARE]) == ["cat", RARE]
    figure = confusion_figure(np.eye(2, dtype=int), ["cat", RARE])
    figure_png(figure)  # Matplotlib would warn of a missing character, which is an error here.
    assert [label.get_text() for label in figure.axes[0].get_yticklabels()] == ["cat", RARE]
    assert figure.axes[0].get_xlabel() == "predicted class"


def test_class_names_that_no_font_has_are_replaced_by_their_index(fonts):
    fonts()
    figure = confusion_figure(np.eye(3, dtype=int), ["cat", "狗", RARE])
    assert figure_png(figure, "data: 猫").startswith(b"\x89PNG")
    assert [label.get_text() for label in figure.axes[0].get_yticklabels()] == ["cat", "#1", "#2"]
    assert "class_names of result.json" in figure.axes[0].get_xlabel()
    assert figure.get_suptitle() == "data: ?"


def test_a_class_may_be_called_like_a_formula(report):
    """Even like one with a mistake in it."""
    report, *_ = report
    assert len(figure_png(report.figures["confusion_matrix"])) > 1000
    pictures = np.zeros([2, 8, 8, 1], np.uint8)
    assert len(figure_png(picture_figure(pictures, [NAMES[1], "$1 or $2"]))) > 1000
