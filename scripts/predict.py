"""Predicts new images, texts or table rows with a trained model.

    python scripts/predict.py runs/my_run cat.png dog.jpg
    python scripts/predict.py runs/my_run pictures -o answers.csv
    python scripts/predict.py digits.tflite scan.png --top 3
    echo "a film to remember" | python scripts/predict.py runs/my_run - --json

The model determines the kind of input. Images: one per file, of any size. Texts: one per line, or a .csv file with the
text column used in training. Tables: a CSV or Parquet file with the columns used in training, in any order. Folders are
searched for such files. `-` reads standard input: an image, lines of text or a CSV.

A file that can't be read is named at the end, with exit code 2; all others are predicted.
"""

import collections
import csv
import heapq
import json
import operator
import os
import pathlib
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from common import artefacts
from common.cli import Parser, UserError, run_script, warn
from common.console import columns, is_terminal, print_line, status_line
from common.images import read_image
from common.records import rename
from common.tables import read_inputs
from common.user_files import read_texts

import numpy as np
import tensorflow as tf
from PIL import Image
from rich.cells import cell_len
from rich.console import Console
from rich.markup import escape
from rich.table import Column, Table
from rich.text import Text


def main() -> None:
    parser = Parser(__doc__)
    parser.add_argument("model", type=pathlib.Path, help="folder of a finished run, or what scripts/export.py wrote")
    parser.add_argument("files", nargs="+", help="files and folders to predict; - for standard input")
    parser.add_argument("--top", type=int, default=1, metavar="K", help="the K most probable classes (default: 1)")
    forms = parser.add_mutually_exclusive_group()
    forms.add_argument("--json", action="store_true", help="one JSON object to a line")
    forms.add_argument("-o", "--output", type=pathlib.Path, metavar="FILE.csv", help="a row per input, to a CSV file")
    arguments = parser.parse_args()
    if arguments.top < 1:
        raise UserError(f"--top {arguments.top}: must be at least 1")
    if arguments.output and arguments.output.suffix.lower() != ".csv":
        raise UserError(f"--output {arguments.output}: the name must end in .csv")
    problems, (description, model) = [], artefacts.load(arguments.model)
    if arguments.top > 1 and description["task"]["output"] != "class":
        raise UserError(f"--top {arguments.top}: only for models that predict a class; leave it out")
    answers = predictions(arguments.model, description, model, arguments.files, problems)
    answers = (with_top(answer, arguments.top) for answer in answers)
    try:
        if arguments.output:
            count = write_csv(arguments.output, answers)
            print_line(f"predictions: {count:,} rows in {arguments.output}" if count else "predictions: none")
        elif arguments.json:
            for answer in answers:
                print(json.dumps(answer, ensure_ascii=False))
        elif table := as_table(answers, columns() if description["task"]["input"] == "text" else None):
            # In a file, each row is one line.
            Console(width=None if is_terminal(sys.stdout) else 100_000).print(table)
        sys.stdout.flush()
    except OSError as error:
        if not isinstance(error, BrokenPipeError):  # The reader, such as `head`, closed the pipe.
            print(f"error: standard output: {error.strerror}; write to another place", file=sys.stderr)
        os._exit(2)  # A normal exit would flush standard output and fail again.
    raise_for(problems)


def predict(path: pathlib.Path, files: list[str]) -> list[dict]:
    """Returns one dict per image, line or row: `input`, plus the fields of the writer for this kind of output.

    Raises a `UserError` if a file can't be read.
    """
    problems = []
    answers = list(predictions(path, *artefacts.load(path), files, problems))
    raise_for(problems)
    return answers


def predictions(
    path: pathlib.Path, description: dict, model: Callable[[Any], Any], files: list[str], problems: list[str]
) -> Iterator[dict]:
    """Yields what `predict` returns, and appends a line to `problems` for each file that can't be read.

    Only about `artefacts.BATCH` examples are in memory, or one file with more of them.
    """
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
        sources = []
        for file in files:
            if file == "-":
                sources.append(("standard input", standard_input(pathlib.Path(folder))))
            elif os.path.isdir(file):
                sources += files_in(pathlib.Path(file), description["task"]["input"])
            else:
                sources.append((file, pathlib.Path(file)))
        for titles, inputs in read_all(read, description, sources, problems):
            with status_line(lambda: "predicting"):
                outputs = model(inputs)
            for row, title in enumerate(titles):
                output = tf.nest.map_structure(operator.itemgetter(row), outputs)
                # The name of a file may not be UTF-8.
                shown = title.encode(errors="backslashreplace").decode()
                yield {"input": shown, **write(description, output)}


def files_in(folder: pathlib.Path, kind: str) -> list[tuple[str, pathlib.Path]]:
    """Returns title and path of all files in a folder, and in its folders, that the reader of a kind of input takes.

    Warns about files with other suffixes. Raises a `UserError` if there are no files to read.
    """
    suffixes, found, others = SUFFIXES.get(kind, set()), [], collections.Counter()
    for place, folders, names in os.walk(folder, followlinks=True):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for path in (pathlib.Path(place, name) for name in sorted(names) if not name.startswith(".")):
            if path.suffix.lower() in suffixes:
                found.append((str(path), path))
            else:
                others[path.suffix.lower() or "none"] += 1
    if not found:
        raise UserError(f"{folder}: a folder without files for a model of {kind}s; give files, or another folder")
    if others:
        counts = ", ".join(f"{suffix} ({count:,})" for suffix, count in others.most_common(10))
        warn(f"{folder}: files with other suffixes are left out: {counts}")
    return found


def read_all(
    read: Callable, description: dict, sources: list[tuple[str, pathlib.Path]], problems: list[str]
) -> Iterator[tuple[list[str], Any]]:
    """Yields titles and inputs of all files, some files at a time. Appends a line to `problems` for each other file."""
    remaining = collections.deque(sources)
    while remaining:
        titles, parts = [], []
        with status_line(lambda: f"reading  {len(sources) - len(remaining):,}/{len(sources):,} files"):
            while remaining and len(titles) < artefacts.BATCH:
                title, path = remaining.popleft()
                try:
                    if not path.exists():
                        remedy = "give files or folders to predict, or - for standard input"
                        raise UserError(f"{title}: no such file; {remedy}")
                    found, inputs = read(description, [(title, path)])
                except UserError as error:
                    problems.append(str(error).replace(str(path), title))
                    continue
                titles, parts = titles + found, [*parts, inputs]
        if titles:
            yield titles, tf.nest.map_structure(lambda *arrays: np.concatenate(arrays), *parts)


def raise_for(problems: list[str]) -> None:
    """Raises a `UserError` if there are problems. Prints the first ten of several before that."""
    if len(problems) > 1:
        for problem in problems[:10]:
            print_line(f"error: {problem}", sys.stderr)
        more = f" (the first 10 of {len(problems):,} are above)" if len(problems) > 10 else ""
        raise UserError(f"{len(problems):,} inputs can't be predicted{more}; repair or remove them")
    for problem in problems:
        raise UserError(problem)


def with_top(answer: dict, count: int) -> dict:
    """Adds the next classes by probability, up to `count` classes, as `class_2`, `probability_2`, and so on."""
    if count == 1:
        return answer
    ranked = heapq.nlargest(count, answer["probabilities"].items(), key=operator.itemgetter(1))
    names = [{f"class_{rank}": name, f"probability_{rank}": value} for rank, (name, value) in enumerate(ranked, 1)]
    return {key: value for fields in (answer, *names[1:]) for key, value in fields.items()}


def write_csv(path: pathlib.Path, answers: Iterable[dict]) -> int:
    """Writes a row per answer, with a column for the probability of each class, and returns their number.

    Atomic: an earlier file is replaced when all answers are written. Writes no file if there are none.
    """
    part, count = path.with_name(path.name + ".part"), 0
    try:
        with open(part, "w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            for answer in answers:
                probabilities = answer.pop("probabilities", {})
                row = answer | {f"probability of {name}": value for name, value in probabilities.items()}
                if count == 0:
                    writer.writerow(row)
                plain = (value if isinstance(value, str | float) else json.dumps(value) for value in row.values())
                writer.writerow(plain)
                count += 1
        if count:
            rename(part, path)
    except OSError as error:
        raise UserError(f"--output {path}: {error.strerror}; write to another place") from error
    finally:
        part.unlink(missing_ok=True)
    return count


def standard_input(folder: pathlib.Path) -> pathlib.Path:
    """Saves standard input to a file in `folder`."""
    path = folder / "standard_input"
    if sys.stdin is None:
        raise UserError("-: there is no standard input; give files")
    path.write_bytes(sys.stdin.buffer.read())
    return path


def read_images(description: dict, sources: list[tuple[str, pathlib.Path]]) -> tuple[list[str], np.ndarray]:
    """Reads one image per file."""
    shape, pixel_range = description["shape"], description.get("pixel_range", ())
    return [title for title, _ in sources], np.stack([read_image(path, shape, pixel_range) for _, path in sources])


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
# Suffixes of the files that a reader takes from a folder.
Image.init()
SUFFIXES = {
    "image": {suffix for suffix, form in Image.registered_extensions().items() if form in Image.OPEN},
    "text": {".txt", ".csv"},
    "table": {".csv"},
}


def as_table(predictions: Iterable[dict], width: int | None = None) -> Table | None:
    """Formats predictions as a table, without the probabilities of the other classes; None if there are no predictions.

    With `width`, inputs are shortened so that the table has at most that width.
    """
    names, rows = [], []
    for prediction in predictions:
        names = [name for name in prediction if name != "probabilities"]
        cells = (prediction[name] for name in names)
        rows.append([f"{cell:.4f}" if isinstance(cell, float) else str(cell) for cell in cells])
        if width:  # No more than can be shown: texts may be long.
            rows[-1][0] = " ".join(rows[-1][0][: 4 * width].split())
    if not rows:
        return None
    table = Table(*(Column(name, overflow="fold") for name in names))
    others = sum(max(map(cell_len, column)) + 3 for column in zip(names, *rows, strict=True) if column[0] != "input")
    for first, *cells in rows:
        title = Text(first)
        if width:
            title.truncate(max(20, width - others - 4), overflow="ellipsis")
        table.add_row(title, *map(escape, cells))
    return table


if __name__ == "__main__":
    run_script(main)
