"""Evaluates a trained model on labelled data of your own.

    python scripts/evaluate.py runs/my_run pictures
    python scripts/evaluate.py runs/my_run new_reviews.csv -o report

The data have the form that --data takes in training, with the classes of the run: a folder per class of images or .txt
files, or a CSV with the columns of the training. Where such folders are below `test`, those are used. All examples are
evaluated, so give none that the model was trained on.

Prints the metrics and, for each class, what it is mistaken for. With -o, a new folder gets `evaluation.json`, the
confusion matrix and the mistakes in which the model was most confident.
"""

import os
import pathlib
import shutil
import sys
from typing import Any

from common import artefacts, console
from common.batches import Split
from common.cli import Parser, SharedConfig, UserError, listed, run_script, warn
from common.console import is_terminal, say
from common.evaluation import Report, evaluate_classifier, evaluate_regressor, figure_png
from common.records import load_program, rename, write_file, write_json
from common.runs import shown_number
from common.tables import read_target
from common.user_files import read_labelled_texts

import keras
import numpy as np
import tensorflow as tf
from rich.console import Console
from rich.markup import escape
from rich.table import Table

predict = load_program(pathlib.Path(__file__).with_name("predict.py"))
Examples = tuple[list[str], Any, np.ndarray]  # Titles, inputs and labels of all examples.


def main() -> None:
    parser = Parser(__doc__)
    parser.add_argument("run", type=pathlib.Path, help="folder of a finished run")
    parser.add_argument("data", type=pathlib.Path, help="your labelled data")
    parser.add_argument("-o", "--output", type=pathlib.Path, metavar="FOLDER", help="new folder for plots and JSON")
    parser.add_argument("--quiet", action="store_true", help="print errors only")
    arguments = parser.parse_args()
    console.shown = not arguments.quiet
    output = arguments.output
    if output and output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise UserError(f"--output {output}: exists and is not an empty folder; name a new one")
    report = evaluate(arguments.run, arguments.data)
    say(f"{arguments.run}: {report.details['examples']:,} examples of {arguments.data}")
    for name, value in report.metrics.items():
        say(f"  {name.replace('_', ' '):<32} {shown_number(value):>12}")
    if console.shown and "confusion_matrix" in report.details:
        Console(width=None if is_terminal(sys.stdout) else 100_000).print(class_table(report))
    if output:
        write(report, output, f"{arguments.run}, {arguments.data}")
        say(f"report: {output}")


def evaluate(run: pathlib.Path, data: pathlib.Path) -> Report:
    """Returns the report of a run on labelled data.

    The details also hold `run`, `data`, the number of `examples`, and the input of each of the worst mistakes. Raises a
    `UserError` if a file or label can't be used.
    """
    result, model = artefacts.load_run(run)
    description, (kind, output) = artefacts.describe(result, model), result["task"].values()
    if kind not in READERS or output not in ("class", "number"):
        known = f"{', '.join(READERS)} to class or number"
        raise UserError(f"{run}: predicts {output} from {kind}, and evaluate.py knows only {known}")
    if not data.exists():
        raise UserError(f"{data}: no such file or folder; give labelled data")
    used = pathlib.Path(result["config"]["data"])
    if used.exists() and used.samefile(data) and not (data.is_dir() and test_folder(data) != data):
        warn(f"{data}: the run was trained on most of these examples; result.json has the metrics of its test split")
    titles, inputs, labels = READERS[kind](description, result["config"], data)
    network, strategy = artefacts.without_class_names(model), tf.distribute.get_strategy()
    if output == "number":
        split = Split.from_arrays(inputs, labels[:, None].astype(np.float64))
        report = evaluate_regressor(network, split, artefacts.BATCH, strategy)
        metrics = report.metrics
    else:
        split = Split.from_arrays(inputs, one_hot(data, labels, description["class_names"]))
        network.compile(loss=keras.losses.CategoricalCrossentropy())
        report = evaluate_classifier(network, split, tuple(description["class_names"]), artefacts.BATCH, strategy)
        # In training, the loss may have label smoothing.
        metrics = {"cross_entropy": report.metrics["loss"], **report.metrics}
        del metrics["loss"]
        for mistake in report.details["worst_mistakes"]:
            mistake["input"] = titles[mistake["example"]]
    about = {"run": str(run), "data": str(data), "examples": len(titles), "class_names": description["class_names"]}
    return Report(metrics, about | report.details, report.figures, report.texts)


def one_hot(data: pathlib.Path, labels: np.ndarray, class_names: list[str]) -> np.ndarray:
    """Returns labels as one-hot float32 [n, classes]. Raises a `UserError` for classes that the run does not have."""
    number = {name: index for index, name in enumerate(class_names)}
    if unknown := sorted(set(labels.tolist()) - set(number)):
        problem = f"the run has no class {listed(unknown)}, only {listed(class_names)}"
        raise UserError(f"{data}: {problem}; rename or remove the examples")
    if missing := [name for name in class_names if name not in set(labels.tolist())]:
        warn(f"{data}: no example of class {listed(missing)}; averages over classes leave it out")
    return np.eye(len(class_names), dtype=np.float32)[[number[label] for label in labels.tolist()]]


def image_examples(description: dict, config: dict, folder: pathlib.Path) -> Examples:
    """Reads the images of a folder per class."""
    folder = test_folder(folder)
    sources = predict.files_in(folder, "image")
    for _, path in sources:
        if path.parent.parent != folder:
            raise UserError(f"{path}: not in the folder of a class below {folder}; move or remove it")
    labels = np.array([path.parent.name for _, path in sources])
    titles, inputs = read(description, sources)
    return titles, inputs, labels


def text_examples(description: dict, config: dict, path: pathlib.Path) -> Examples:
    """Reads texts and labels of a CSV, or .txt files in a folder per class."""
    path = test_folder(path) if path.is_dir() else path
    arrays, _ = read_labelled_texts(path, config["text_column"], config["label_column"], "", SharedConfig())
    texts, labels = arrays["train"]
    return [text.decode() for text in texts], texts, labels


def table_examples(description: dict, config: dict, path: pathlib.Path) -> Examples:
    """Reads the rows of a CSV, with the columns and the target of the training."""
    titles, inputs = read(description, [(str(path), path)])
    return titles, inputs, read_target(path, config["target"], description["task"]["output"] == "class")


# A reader takes the model's description, the configuration of the run and the path of the data.
READERS = {"image": image_examples, "text": text_examples, "table": table_examples}


def test_folder(folder: pathlib.Path) -> pathlib.Path:
    """Returns the folder `test` of data with splits, else `folder`."""
    splits = {path.name.lower(): path for path in folder.glob("*/")}
    if "train" in splits and "test" not in splits:
        raise UserError(f"{folder}: has a folder 'train' but none called 'test'; give the folder to evaluate")
    return splits.get("test", folder) if splits.keys() <= {"train", "validation", "test"} else folder


def read(description: dict, sources: list[tuple[str, pathlib.Path]]) -> tuple[list[str], Any]:
    """Reads all files as scripts/predict.py does. Raises a `UserError` that names those that can't be read."""
    problems, reader = [], predict.READERS[description["task"]["input"]]
    parts = list(predict.read_all(reader, description, sources, problems))
    predict.raise_for(problems)
    inputs = tf.nest.map_structure(lambda *arrays: np.concatenate(arrays), *(inputs for _, inputs in parts))
    return [title for titles, _ in parts for title in titles], inputs


def class_table(report: Report) -> Table:
    """Returns a table of precision, recall and F1 of each class, and of the classes it is mistaken for."""
    table, names = (
        Table("class", "examples", "precision", "recall", "f1", "mistaken for"),
        report.details["class_names"],
    )
    for name, row in zip(names, report.details["confusion_matrix"], strict=True):
        others = sorted(((count, other) for other, count in zip(names, row, strict=True) if count and other != name))
        mistaken = ", ".join(f"{other} ({count:,})" for count, other in others[:-4:-1])
        by_class = report.details["classes"].get(name, {})
        values = (f"{by_class[key]:.4f}" if by_class else "" for key in ("precision", "recall", "f1-score"))
        table.add_row(escape(name), f"{sum(row):,}", *values, escape(mistaken))
    return table


def write(report: Report, folder: pathlib.Path, title: str) -> None:
    """Writes a report to a new or empty folder: all files or none."""
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        part = folder.with_name(f"{folder.name}.part-{os.getpid()}")
        part.mkdir()
        try:
            write_json(part / "evaluation.json", {"metrics": report.metrics, **report.details})
            for name, figure in report.figures.items():
                write_file(part / f"{name}.png", figure_png(figure, f"{name.replace('_', ' ')}: {title}"))
            for name, text in report.texts.items():
                write_file(part / f"{name}.md", text + "\n")
            rename(part, folder)
        finally:
            shutil.rmtree(part, ignore_errors=True)
    except OSError as error:
        raise UserError(f"--output {folder}: {error.strerror}; write to another place") from error


if __name__ == "__main__":
    run_script(main)
