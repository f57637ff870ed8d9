"""Predicts new images, texts or table rows with a trained model.

    python scripts/predict.py runs/my_run cat.png dog.jpg
    python scripts/predict.py digits.tflite scan.png
    echo "a film to remember" | python scripts/predict.py runs/my_run - --json

The model determines the kind of input. Images: one per file, of any size. Texts: one per line, or a .csv file with the
text column used in training. Tables: a CSV or Parquet file with the columns used in training, in any order. `-` reads
standard input: an image, lines of text or a CSV.
"""

import json
import operator
import os
import pathlib
import sys
import tempfile

from common import artefacts
from common.cli import Parser, UserError, run_script
from common.console import is_terminal, status_line
from common.tables import read_inputs
from common.user_files import read_image, read_texts

import numpy as np
import tensorflow as tf
from rich.console import Console
from rich.markup import escape
from rich.table import Column, Table


def main() -> None:
    parser = Parser(__doc__)
    parser.add_argument("model", type=pathlib.Path, help="folder of a finished run, or what scripts/export.py wrote")
    parser.add_argument("files", nargs="+", help="what to predict; - for standard input")
    parser.add_argument("--json", action="store_true", help="one JSON object to a line")
    arguments = parser.parse_args()
    predictions = predict(arguments.model, arguments.files)
    try:
        if arguments.json:
            print("\n".join(json.dumps(prediction, ensure_ascii=False) for prediction in predictions))
        else:
            # In a file, each row is one line.
            Console(width=None if is_terminal(sys.stdout) else 100_000).print(as_table(predictions))
        sys.stdout.flush()
    except OSError as error:
        if not isinstance(error, BrokenPipeError):  # The reader, such as `head`, closed the pipe.
            print(f"error: standard output: {error.strerror}; write to another place", file=sys.stderr)
        os._exit(2)  # A normal exit would flush standard output and fail again.


def predict(path: pathlib.Path, files: list[str]) -> list[dict]:
    """Returns one dict per image, line or row: `input`, plus the fields of the writer for this kind of output."""
    description, model = artefacts.load(path)
    functions = []
    for side, known in (("input", READERS), ("output", WRITERS)):
        if (kind := description["task"][side]) not in known:
            only = f"only of {', '.join(known)}; add a function to predict.py"
            raise UserError(f"{path}: the kind of its {side} is {kind!r}, and predict.py knows {only}")
        functions.append(known[kind])
    read, write = functions
    if files.count("-") > 1:
        raise UserError("-: standard input can be read only once; give - once")
    with tempfile.TemporaryDirectory() as folder:
        sources = [
            (file, standard_input(pathlib.Path(folder)) if file == "-" else pathlib.Path(file)) for file in files
        ]
        for title, path in sources:
            if not path.is_file():
                problem = "a folder" if path.is_dir() else "no such file"
                raise UserError(f"{title}: {problem}; give files to predict, or - for standard input")
        try:
            with status_line(lambda: "reading"):
                titles, inputs = read(description, sources)
        except UserError as error:
            line = str(error).replace(str(pathlib.Path(folder, "standard_input")), "standard input")
            raise UserError(line) from error
    with status_line(lambda: "predicting"):
        outputs = model(inputs)
    rows = (tf.nest.map_structure(operator.itemgetter(row), outputs) for row in range(len(titles)))
    return [{"input": title, **write(description, row)} for title, row in zip(titles, rows, strict=True)]


def standard_input(folder: pathlib.Path) -> pathlib.Path:
    """Saves standard input to a file in `folder`."""
    path = folder / "standard_input"
    if sys.stdin is None:
        raise UserError("-: there is no standard input; give files")
    path.write_bytes(sys.stdin.buffer.read())
    return path


def read_images(description: dict, sources: list[tuple[str, pathlib.Path]]) -> tuple[list[str], np.ndarray]:
    """Reads one image per file."""
    return [title for title, _ in sources], np.stack([read_image(path, description["shape"]) for _, path in sources])


def read_lines(description: dict, sources: list[tuple[str, pathlib.Path]]) -> tuple[list[str], np.ndarray]:
    """Reads the texts of all files."""
    texts = [text for _, path in sources for text in read_texts(path, description["text_column"])]
    return [text.decode() for text in texts], np.array(texts, object)


def read_rows(description: dict, sources: list[tuple[str, pathlib.Path]]) -> tuple[list[str], dict[str, np.ndarray]]:
    """Reads the columns used in training from all files; ignores others."""
    titles, tables = [], []
    for title, path in sources:
        inputs, rows = read_inputs(path, description["columns"])
        titles += [f"{title}, {row}" for row in rows]
        tables.append(inputs)
    return titles, {name: np.concatenate([table[name] for table in tables]) for name in description["columns"]}


def write_class(description: dict, probabilities: np.ndarray) -> dict:
    """Returns the most likely class, and the probability of each class by name."""
    class_names, probabilities = description["class_names"], probabilities.tolist()
    return {
        "class": class_names[np.argmax(probabilities)],
        "probability": max(probabilities),
        "probabilities": dict(zip(class_names, probabilities, strict=True)),
    }


def write_number(description: dict, values: np.ndarray) -> dict:
    """Returns the predicted number."""
    (value,) = values.tolist()
    return {"value": value}


# Add functions here for recipes with other kinds of inputs or outputs. A reader takes the model's description and the
# (title, path) pairs of the files. It returns a title per example and the model's inputs [n, ...]. A writer takes the
# description and the output for one example, and returns a JSON-serializable dict.
READERS = {"image": read_images, "text": read_lines, "table": read_rows}
WRITERS = {"class": write_class, "number": write_number}


def as_table(predictions: list[dict]) -> Table:
    """Formats the predictions as a table, without the probabilities of the other classes."""
    columns = [name for name in predictions[0] if name != "probabilities"]
    table = Table(*(Column(name, overflow="fold") for name in columns))
    for prediction in predictions:
        cells = (prediction[name] for name in columns)
        table.add_row(*(f"{cell:.4f}" if isinstance(cell, float) else escape(str(cell)) for cell in cells))
    return table


if __name__ == "__main__":
    run_script(main)
