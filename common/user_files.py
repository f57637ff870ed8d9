"""Finds the user's files, and reads texts. Errors name the file or row that can't be used."""

import codecs
import collections
import contextlib
import itertools
import pathlib
import re
from collections.abc import Collection

from common.batches import Arrays
from common.cli import SharedConfig, UserError, some, warn
from common.console import say
from common.tables import read_csv

import numpy as np
import pandas as pd

# (file, class name) pairs of each split.
ClassFiles = dict[str, list[tuple[pathlib.Path, str]]]


def read_labelled_texts(
    path: pathlib.Path, text_column: str, label_column: str, group_column: str, config: SharedConfig
) -> tuple[Arrays, np.ndarray | None]:
    """Reads texts from a CSV with a text and a label column, or from .txt files in a folder per class.

    Returns:
        UTF-8 texts, [n], and class names, [n], of "train" and perhaps "validation" and "test"; and the values of the
        group column for "train", [n], if it has a name.

    Raises:
        UserError: names the files or rows that can't be read; with `config.skip_broken`, only if none is left.
    """
    if path.is_dir():
        if group_column:
            raise UserError(f"--group {group_column}: {path} is a folder without columns; give a CSV, or leave it out")
        arrays, broken, encodings = {}, [], collections.Counter()
        for split, files in class_files(path, "texts", [".txt"], config.test_data).items():
            texts = [_text_or_problem(file, encodings) for file, _ in files]
            read = [row for row, text in enumerate(texts) if isinstance(text, bytes)]
            broken += [f"{file}: {text}" for (file, _), text in zip(files, texts, strict=True) if isinstance(text, str)]
            arrays[split] = (_objects(texts)[read], np.array([name for _, name in files])[read])
        _say_encodings(str(path), encodings)
        _leave_out(str(path), broken, "files", arrays, config.skip_broken)
        return arrays, None
    columns = {"--group": group_column, "--text-column": text_column, "--label-column": label_column}
    for (flag, name), (other, same) in itertools.combinations(columns.items(), 2):
        if name == same:
            raise UserError(f"{flag} {name}: also the {other}; give another column")
    arrays, groups = {}, None
    for split, file in {"train": path, "test": pathlib.Path(config.test_data or path)}.items():
        if split == "test" and not config.test_data:
            continue
        names = [text_column, label_column, *([group_column] if group_column and split == "train" else [])]
        table = read_csv(file, names, "name others with --text-column, --label-column and --group")
        values = {name: table[name].str.strip().to_numpy(object) for name in names}
        empty = [(row + 2, name) for name, of in values.items() for row in np.flatnonzero(of == "")]
        broken = [f"{file}, row {row}, column {name!r}: empty" for row, name in sorted(empty)]
        read = np.setdiff1d(np.arange(len(table)), [row - 2 for row, _ in empty])
        texts = _objects([text.encode() for text in values[text_column]])
        arrays[split] = (texts[read], values[label_column][read])
        if split == "train" and group_column:
            groups = values[group_column][read]
        _leave_out(str(file), broken, "rows", arrays, config.skip_broken)
    return arrays, groups


def _objects(values: list) -> np.ndarray:
    """Returns an object array: fixed-width strings would each use the memory of the longest."""
    array = np.empty(len(values), object)
    array[:] = values
    return array


def _leave_out(place: str, broken: list[str], kind: str, arrays: Arrays, skip: bool) -> None:
    """Warns about unreadable files or rows, which `arrays` lack; an error if there are any and `skip` is False."""
    if broken and not skip:
        if len(broken) == 1:
            raise UserError(f"{broken[0]}; correct or remove it, or give --skip-broken")
        number = f"{len(broken):,} {kind} can't be used: {some(broken)}"
        raise UserError(f"{number}; correct or remove them, or give --skip-broken")
    if broken:
        warn(f"{place}: left out {len(broken):,} {kind} that can't be used: {some(broken)}")
    for split, (texts, _) in arrays.items():
        if not len(texts):
            raise UserError(f"{place}: none of the {kind} of {split} can be used; give texts that can be read")


def class_files(folder: pathlib.Path, kind: str, suffixes: Collection[str], test_folder: str = "") -> ClassFiles:
    """Finds files with one of `suffixes` in a folder per class. Says how many other files are left out, by suffix.

    Args:
        folder: holds the folders of the classes, or folders `train`, `validation` and `test` that do; without them, all
            files count as "train".
        kind: what the files are, for messages, such as "images".
        suffixes: in lower case, with the point.
        test_folder: another folder with a folder per class, of the test examples; empty: none.

    Returns:
        (file, class name) pairs by split; "train" comes first.
    """
    shown = f"{kind} ({', '.join(sorted(suffixes))})" if len(suffixes) < 5 else kind
    if not folder.is_dir():
        raise UserError(f"--data {folder}: not a folder; give a folder that holds a folder per class")
    folders = {path.name.lower(): path for path in sorted(folder.glob("[!.]*/"))}  # Ignores case.
    splits = {name: folders[name] for name in ("train", "validation", "test") if name in folders}
    if splits and "train" not in splits:
        raise UserError(f"{folder}: has a folder {next(iter(splits.values())).name!r} but none called 'train'; add it")
    for other in folders.keys() - splits if splits else ():
        raise UserError(f"{folders[other]}: not a split; name the folder train, validation or test")
    places = splits or {"train": folder}
    if test_folder:
        if "test" in places:
            raise UserError(f"--test-data {test_folder}: {places['test']} has test examples already; leave one out")
        places["test"] = pathlib.Path(test_folder)
        if not places["test"].is_dir():
            raise UserError(f"--test-data {test_folder}: not a folder; give a folder that holds a folder per class")
    found: ClassFiles = {}
    left_out: collections.Counter[str] = collections.Counter()
    for split, place in places.items():
        found[split] = []
        empty, nested = [], []
        for path in sorted(place.glob("[!.]*")):
            if not path.is_dir():
                left_out[path.suffix.lower() or "without suffix"] += 1
                continue
            if re.search("[\ud800-\udfff]", path.name):  # Surrogates for bytes that are not UTF-8.
                raise UserError(f"{str(path)!r}: not a valid class name; rename the folder, in UTF-8")
            files = []
            for file in sorted(path.glob("[!.]*")):
                if file.suffix.lower() in suffixes:
                    files.append((file, path.name))
                elif file.is_dir():
                    nested.append(file)
                else:
                    left_out[file.suffix.lower() or "without suffix"] += 1
            if not files:
                empty.append(path)
            found[split] += files
        if nested:
            raise UserError(f"{some(nested)}: a folder inside the folder of a class; move its files up, or remove it")
        if not (found[split] or empty):
            raise UserError(f"{place}: no folders of {shown}; make one for each class")
        if empty:
            raise UserError(f"{some(empty)}: no {shown} in this folder; add some or remove it")
    if left_out:
        counts = ", ".join(f"{count:,} {suffix}" for suffix, count in left_out.most_common(10))
        say(f"{folder}: left out {counts}{', …' * (len(left_out) > 10)}")
    return found


def _text_or_problem(path: pathlib.Path, encodings: collections.Counter[str]) -> bytes | str:
    """Reads a text as UTF-8 bytes, or says why it can't be used. Counts encodings other than UTF-8 and UTF-16."""
    try:
        content = path.read_bytes()
    except OSError as error:
        return f"can't be read ({error.strerror})"
    has_mark = content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    text = encoding = "\0"
    for encoding in ["utf-16"] if has_mark else ["utf-8-sig", "Windows-1252", "Latin-1"]:
        with contextlib.suppress(UnicodeDecodeError):
            text = content.decode(encoding)
            break
    if "\0" in text:
        return "not a text file"
    if not text.strip():
        return "no text in this file"
    if encoding in ("Windows-1252", "Latin-1"):
        encodings[encoding] += 1
    return text.encode()


def _say_encodings(place: str, encodings: collections.Counter[str]) -> None:
    for encoding, count in encodings.items():
        warn(f"{place}: {count:,} {'file is' if count == 1 else 'files are'} not UTF-8; read as {encoding}")


def read_texts(path: pathlib.Path, column: str) -> list[bytes]:
    """Reads the texts of a CSV column, or the lines of any other file; skips blank lines."""
    if path.suffix.lower() in (".csv", ".tsv"):
        return [text.encode() for text in _filled(path, read_csv(path, [column])[column])]
    text = _text_or_problem(path, encodings := collections.Counter())
    if isinstance(text, str):
        raise UserError(f"{path}: {text}; correct or remove it")
    _say_encodings(str(path), encodings)
    return [line for line in text.splitlines() if line.strip()]


def _filled(path: pathlib.Path, column: pd.Series) -> np.ndarray:
    """Returns a column as an object array: fixed-width strings would each use the memory of the longest."""
    values = column.str.strip().to_numpy(object)
    for row in np.flatnonzero(values == ""):
        raise UserError(f"{path}, row {row + 2}, column {column.name!r}: empty; fill it or remove the row")
    return values
