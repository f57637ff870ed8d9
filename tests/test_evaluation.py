from common.batches import Split
from common.evaluation import curves_figure, evaluate_classifier, evaluate_regressor, figure_png, picture_figure

import keras
import numpy as np
import pytest
import tensorflow as tf

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


def test_mistakes_are_shown_with_the_texts_they_were_made_on():
    inputs = keras.Input([2])
    model = keras.Model(inputs, keras.layers.Activation("linear")(inputs))
    model.compile(loss="categorical_crossentropy")
    split = Split.from_arrays(np.float32([[0.9, 0.1], [0.8, 0.2]]), np.float32([[0, 1], [1, 0]]))
    report = evaluate_classifier(model, split, ("no", "yes"), 8, STRATEGY, tf.constant(["first | one", "second"]))
    assert "| yes, not no | first   one |" in report.texts["worst_mistakes"]
    assert "second" not in report.texts["worst_mistakes"]


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


def test_figures_are_png_files():
    history = [
        {"loss": 1.0, "val_loss": 1.5, "mae": 2.0, "val_mae": 1.0},
        {"loss": 0.5, "val_loss": 1, "mae": 1, "val_mae": 1},
    ]
    for figure in (curves_figure(history), curves_figure([{"loss": 1.0}])):
        assert figure_png(figure).startswith(b"\x89PNG")
    assert [axes.get_title() for axes in curves_figure(history).axes] == ["loss", "mae"]


def test_a_class_may_be_called_like_a_formula(report):
    """Even like one with a mistake in it."""
    report, *_ = report
    assert len(figure_png(report.figures["confusion_matrix"])) > 1000
    pictures = np.zeros([2, 8, 8, 1], np.uint8)
    assert len(figure_png(picture_figure(pictures, [NAMES[1], "$1 or $2"]))) > 1000
