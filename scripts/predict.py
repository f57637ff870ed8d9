"""Says what a trained model makes of new pictures, texts or rows.

    python scripts/predict.py runs/my_run cat.png dog.jpg
    python scripts/predict.py digits.tflite scan.png
    echo "a film to remember" | python scripts/predict.py runs/my_run - --json

What the files hold follows from the model: pictures, of any size and each a file; texts, one to a line, or in a .csv
with the text column of the training; or a CSV with the columns that the model was trained on, in any order. `-` reads
standard input: a picture, lines or a CSV of numbers.
"""

import json
import operator
import os
import pathlib
import sys
import tempfile

from common import artefacts
from common.cli import Parser, UserError, run_script
from common.user_files import numbers, read_csv, read_image, read_texts

import numpy as np
import rich
import tensorflow as tf
from rich.markup import escape
from rich.table import Table


def main() -> None:
    parser = Parser(__doc__)
    parser.add_argument("model", type=pathlib.Path, help="folder of a finished run, or what scripts/export.py wrote")
    parser.add_argument("files", nargs="+", help="what to predict; - for standard input")
    parser.add_argument("--json", action="store_true", help="one JSON object to a line")
    arguments = parser.parse_args()
    answers = predict(arguments.model, arguments.files)
    try:
        if arguments.json:
            print("\n".join(map(json.dumps, answers)))
        else:
            rich.print(as_table(answers))
        sys.stdout.flush()
    except OSError as error:
        if not isinstance(error, BrokenPipeError):  # A reader such as `head` has seen enough.
            print(f"error: standard output: {error.strerror}; write to another place", file=sys.stderr)
        os._exit(2)  # Python's own farewell would try to write once more.


def predict(path: pathlib.Path, files: list[str]) -> list[dict]:
    """One answer for each picture, line or row: `input`, and what the writer of the model's kind of output gives."""
    description, answer = artefacts.load(path)
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
            titles, inputs = read(description, sources)
        except UserError as error:
            line = str(error).replace(str(pathlib.Path(folder, "standard_input")), "standard input")
            raise UserError(line) from error
    outputs = answer(inputs)
    rows = (tf.nest.map_structure(operator.itemgetter(row), outputs) for row in range(len(titles)))
    return [{"input": title, **write(description, row)} for title, row in zip(titles, rows, strict=True)]


def standard_input(folder: pathlib.Path) -> pathlib.Path:
    """What comes in through standard input, as a file."""
    path = folder / "standard_input"
    if sys.stdin is None:
        raise UserError("-: there is no standard input; give files")
    path.write_bytes(sys.stdin.buffer.read())
    return path


def read_pictures(description: dict, sources: list[tuple[str, pathlib.Path]]) -> tuple[list[str], np.ndarray]:
    """A picture from each file."""
    return [title for title, _ in sources], np.stack([read_image(path, description["shape"]) for _, path in sources])


def read_lines(description: dict, sources: list[tuple[str, pathlib.Path]]) -> tuple[list[str], np.ndarray]:
    """The texts of the files."""
    texts = [text for _, path in sources for text in read_texts(path, description["text_column"])]
    return [text.decode() for text in texts], np.array(texts, object)


def read_rows(description: dict, sources: list[tuple[str, pathlib.Path]]) -> tuple[list[str], np.ndarray]:
    """The rows of the files, with the columns of the training."""
    shape, titles, rows = description["shape"], [], []
    for title, path in sources:
        table = read_csv(path, [])
        columns = description["columns"] or list(table.columns)  # Generated columns have no names.
        missing = [column for column in columns if column not in table]
        if missing or len(columns) != shape[0]:
            wanted = ", ".join(description["columns"]) or f"{shape[0]} columns"
            has = ", ".join(table.columns)
            raise UserError(f"{title}: the model takes {wanted}, and the file has {has}; rename or add columns")
        rows.append(numbers(path, table[columns]))
        titles += [f"{title}, row {number}" for number in range(2, len(table) + 2)]
    return titles, np.concatenate(rows)


def write_class(description: dict, probabilities: np.ndarray) -> dict:
    """The likeliest class, and the probabilities of all by name."""
    class_names, probabilities = description["class_names"], probabilities.tolist()
    return {
        "class": class_names[np.argmax(probabilities)],
        "probability": max(probabilities),
        "probabilities": dict(zip(class_names, probabilities, strict=True)),
    }


def write_number(description: dict, values: np.ndarray) -> dict:
    """The predicted number."""
    (value,) = values.tolist()
    return {"value": value}


# A recipe of another kind adds its functions here. A reader takes the model's description and (title, path) of each
# file, and gives a title for each example and the model's inputs [n, ...]. A writer takes the description and the
# model's output for one example, and gives what JSON can hold.
READERS = {"image": read_pictures, "text": read_lines, "table": read_rows}
WRITERS = {"class": write_class, "number": write_number}


def as_table(answers: list[dict]) -> Table:
    """The answers for people, without the probabilities of the other classes."""
    columns = [name for name in answers[0] if name != "probabilities"]
    table = Table(*columns)
    for answer in answers:
        cells = (answer[name] for name in columns)
        table.add_row(*(f"{cell:.4f}" if isinstance(cell, float) else escape(str(cell)) for cell in cells))
    return table


if __name__ == "__main__":
    run_script(main)
