"""Says what a trained model makes of new pictures, texts or rows.

    python scripts/predict.py runs/my_run cat.png dog.jpg
    python scripts/predict.py runs/my_run reviews.txt
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
import zipfile

from common.cli import Parser, UserError, run_script
from common.records import file_sha256, read_run
from common.upstream import cure_iterator_wait
from common.user_files import numbers, read_csv, read_image, read_texts

import keras
import numpy as np
import rich
import tensorflow as tf
from rich.markup import escape
from rich.table import Table

BATCH = 512
# A whole model hardly shrinks in its archive: weights are noise to a packer.
LARGEST_EXPANSION = 100


def main() -> None:
    parser = Parser(__doc__)
    parser.add_argument("run_dir", type=pathlib.Path, help="folder of a finished run")
    parser.add_argument("files", nargs="+", help="what to predict; - for standard input")
    parser.add_argument("--json", action="store_true", help="one JSON object to a line")
    arguments = parser.parse_args()
    answers = predict(arguments.run_dir, arguments.files)
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


def predict(run_dir: pathlib.Path, files: list[str]) -> list[dict]:
    """One answer for each picture, line or row.

    Returns:
        Of a classifier, `input`, `class`, `probability` and the `probabilities` of all classes by name; of a
        regression, `input` and `value`.
    """
    result, model = load_run(run_dir)
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
            titles, inputs = read_inputs(model, result, sources)
        except UserError as error:
            line = str(error).replace(str(pathlib.Path(folder, "standard_input")), "standard input")
            raise UserError(line) from error
    cure_iterator_wait()
    batches = tf.data.Dataset.from_tensor_slices(inputs).batch(BATCH)
    outputs = model.predict(batches, verbose=0)
    if not result["class_names"]:
        return [{"input": title, "value": float(value)} for title, value in zip(titles, outputs[:, 0], strict=True)]
    return [
        {
            "input": title,
            "class": class_name.decode(),
            "probability": float(probabilities.max()),
            "probabilities": dict(zip(result["class_names"], map(float, probabilities), strict=True)),
        }
        for title, class_name, probabilities in zip(titles, outputs["class"], outputs["probabilities"], strict=True)
    ]


def load_run(run_dir: pathlib.Path) -> tuple[dict, keras.Model]:
    """The result and the model of a finished run."""
    result, path = read_run(run_dir), run_dir / "model.keras"
    try:
        if file_sha256(path) != result["model_sha256"]:
            raise ValueError("it is not the file that the training wrote")
        with zipfile.ZipFile(path) as archive:
            if sum(entry.file_size for entry in archive.infolist()) > LARGEST_EXPANSION * path.stat().st_size:
                raise ValueError("unpacked, it would fill memory and disk")
        return result, keras.models.load_model(path, compile=False)
    except Exception as error:  # Keras refuses what could do harm with errors of many types.
        raise UserError(f"{path}: can't be read ({error}); train again, or take another run") from error


def standard_input(folder: pathlib.Path) -> pathlib.Path:
    """What comes in through standard input, as a file."""
    path = folder / "standard_input"
    path.write_bytes(sys.stdin.buffer.read())
    return path


def read_inputs(
    model: keras.Model, result: dict, sources: list[tuple[str, pathlib.Path]]
) -> tuple[list[str], np.ndarray]:
    """What the model takes, read from the files, and a title for each example."""
    kind, shape = model.inputs[0].dtype, model.input_shape[1:]
    if kind == "uint8":
        return [title for title, _ in sources], np.stack([read_image(path, shape) for _, path in sources])
    if kind == "string":
        column = result["config"].get("text_column", "")
        texts = [text for _, path in sources for text in read_texts(path, column)]
        return [text.decode() for text in texts], np.array(texts, object)
    titles, rows = [], []
    for title, path in sources:
        table = read_csv(path, [])
        columns = result["columns"] or list(table.columns)  # Generated columns have no names.
        missing = [column for column in columns if column not in table]
        if missing or len(columns) != shape[0]:
            wanted = ", ".join(result["columns"]) or f"{shape[0]} columns"
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
