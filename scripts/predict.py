"""Says what a trained model makes of new pictures, texts or rows.

    python scripts/predict.py runs/my_run cat.png dog.jpg
    python scripts/predict.py digits.tflite scan.png
    echo "a film to remember" | python scripts/predict.py runs/my_run - --json

What the files hold follows from the model: pictures, of any size and each a file; texts, one to a line, or in a .csv
with the text column of the training; or a CSV with the columns that the model was trained on, in any order. `-` reads
standard input: a picture, lines or a CSV of numbers.
"""

import json
import os
import pathlib
import sys
import tempfile

from common import artefacts
from common.cli import Parser, UserError, run_script
from common.user_files import numbers, read_csv, read_image, read_texts

import numpy as np
import rich
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
    """One answer for each picture, line or row.

    Returns:
        Of a classifier, `input`, `class`, `probability` and the `probabilities` of all classes by name; of a
        regression, `input` and `value`.
    """
    description, answer = artefacts.load(path)
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
            titles, inputs = read_inputs(description, sources)
        except UserError as error:
            line = str(error).replace(str(pathlib.Path(folder, "standard_input")), "standard input")
            raise UserError(line) from error
    class_names, answers = description["class_names"], answer(inputs).tolist()
    if not class_names:
        return [{"input": title, "value": value} for title, (value,) in zip(titles, answers, strict=True)]
    return [
        {
            "input": title,
            "class": class_names[np.argmax(probabilities)],
            "probability": max(probabilities),
            "probabilities": dict(zip(class_names, probabilities, strict=True)),
        }
        for title, probabilities in zip(titles, answers, strict=True)
    ]


def standard_input(folder: pathlib.Path) -> pathlib.Path:
    """What comes in through standard input, as a file."""
    path = folder / "standard_input"
    if sys.stdin is None:
        raise UserError("-: there is no standard input; give files")
    path.write_bytes(sys.stdin.buffer.read())
    return path


def read_inputs(description: dict, sources: list[tuple[str, pathlib.Path]]) -> tuple[list[str], np.ndarray]:
    """What the model takes, read from the files, and a title for each example."""
    kind, shape = description["dtype"], description["shape"]
    if kind == "uint8":
        return [title for title, _ in sources], np.stack([read_image(path, shape) for _, path in sources])
    if kind == "string":
        column = description["text_column"]
        texts = [text for _, path in sources for text in read_texts(path, column)]
        return [text.decode() for text in texts], np.array(texts, object)
    titles, rows = [], []
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


def as_table(answers: list[dict]) -> Table:
    """The answers for people, without the probabilities of the other classes."""
    columns = [name for name in answers[0] if name != "probabilities"]
    table = Table(*columns)
    for answer in answers:
        cells = (answer[name] for name in columns)
        table.add_row(*(f"{cell:.4f}" if isinstance(cell, float) else escape(cell) for cell in cells))
    return table


if __name__ == "__main__":
    run_script(main)
