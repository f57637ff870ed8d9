"""Reads the user's own pictures, texts and tables, and names the file or row that can't be used."""

import pathlib
import warnings
from collections.abc import Callable

from common.cli import UserError
from common.examples import Examples

import numpy as np
import pandas as pd
from PIL import Image, ImageOps

_IMAGE_SUFFIXES = {".png", ".jpg", ".jpeg", ".bmp", ".gif"}
_SPLIT_FOLDERS = ("train", "validation", "test")


def read_image_folders(folder: pathlib.Path, shape: tuple[int, int, int]) -> dict[str, Examples]:
    """Pictures in a folder per class, below `train`, `validation` and `test` where these exist.

    Args:
        folder: holds the class folders, or a `train` folder that does.
        shape: height, width and channels (1 or 3) to bring the pictures to. Their aspect is kept; what
            is left free is black.

    Returns:
        Examples of uint8 [n, height, width, channels] by split; only "train" where there are no
        folders for the splits.

    Raises:
        UserError: a folder without pictures, or a file that is no picture.
    """
    files = _class_files(folder, _IMAGE_SUFFIXES, "images (PNG, JPEG, BMP or GIF)")
    return _labelled(files, lambda paths: np.stack([_read_image(path, shape) for path in paths]))


def read_labelled_texts(path: pathlib.Path, text_column: str, label_column: str) -> dict[str, Examples]:
    """Texts from a CSV with a text and a label column, or from a folder per class of .txt files."""
    if path.is_dir():
        files = _class_files(path, {".txt"}, "texts (.txt)")
        return _labelled(files, lambda paths: np.array([_read_text(file) for file in paths], dtype=object))
    table = _read_csv(path, [text_column, label_column])
    texts = table[text_column]
    for row in np.flatnonzero(texts.str.strip() == ""):
        raise UserError(
            f"{path}, row {row + 2}: no text in column {text_column!r}; fill it or remove the row"
        )
    inputs = np.array([text.encode() for text in texts], dtype=object)
    return {"train": Examples(inputs, *_class_numbers(path, table[label_column]))}


def read_table(path: pathlib.Path, target: str, classes: bool) -> dict[str, Examples]:
    """Rows of numbers from a CSV: column `target` to predict, all others as inputs."""
    table = _read_csv(path, [target])
    names = [name for name in table.columns if name != target]
    if not names:
        raise UserError(f"{path}: there is no column beside {target!r}; add the inputs")
    inputs = np.stack([_numbers(path, table[name]) for name in names], axis=1)
    if classes:
        return {"train": Examples(inputs, *_class_numbers(path, table[target]))}
    return {"train": Examples(inputs, _numbers(path, table[target]))}


def _class_files(
    folder: pathlib.Path, suffixes: set[str], kind: str
) -> dict[str, dict[str, list[pathlib.Path]]]:
    """The files by split and class name."""
    if not folder.is_dir():
        raise UserError(f"--data {folder}: not a folder; give a folder that holds a folder per class")
    splits = {name: folder / name for name in _SPLIT_FOLDERS if (folder / name).is_dir()}
    if splits and "train" not in splits:
        raise UserError(f"{folder}: has a folder {next(iter(splits))!r} but none called 'train'; add it")
    splits = splits or {"train": folder}
    found = {}
    for split, place in splits.items():
        found[split] = {
            entry.name: sorted(file for file in entry.iterdir() if file.suffix.lower() in suffixes)
            for entry in sorted(place.iterdir())
            if entry.is_dir() and not entry.name.startswith(".")
        }
        for name, files in found[split].items():
            if not files:
                raise UserError(f"{place / name}: no {kind} in this folder; add some or remove it")
        if not found[split]:
            raise UserError(f"{place}: no folders of {kind}; make one for each class")
    if len(found["train"]) < 2:
        raise UserError(
            f"{splits['train']}: only one class; a classifier needs a folder for each of two or more"
        )
    return found


def _labelled(
    files: dict[str, dict[str, list[pathlib.Path]]], read: Callable[[list[pathlib.Path]], np.ndarray]
) -> dict[str, Examples]:
    class_names = tuple(sorted({name for by_class in files.values() for name in by_class}))
    examples = {}
    for split, by_class in files.items():
        labels = [class_names.index(name) for name, paths in by_class.items() for _ in paths]
        paths = [path for paths in by_class.values() for path in paths]
        examples[split] = Examples(read(paths), np.array(labels), class_names)
    return examples


def _read_image(path: pathlib.Path, shape: tuple[int, int, int]) -> np.ndarray:
    height, width, channels = shape
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(path) as image:
                upright = _opaque(ImageOps.exif_transpose(image)).convert("L" if channels == 1 else "RGB")
    except Exception as error:  # Each of Pillow's decoders has errors of its own.
        raise UserError(f"{path}: not a readable image; repair or remove it") from error
    return np.asarray(ImageOps.pad(upright, (width, height))).reshape(shape)


def _opaque(image: Image.Image) -> Image.Image:
    """Transparent parts become white, as on a page; 16 bits of grey become 8."""
    if image.mode.startswith("I"):
        return Image.fromarray((np.asarray(image).astype(np.int64) // 257).clip(0, 255).astype(np.uint8))
    if not image.has_transparency_data:
        return image
    layered = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", image.size, "white"), layered)


def _read_text(path: pathlib.Path) -> bytes:
    try:
        return path.read_text(encoding="utf-8").encode()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not readable as UTF-8 text; repair or remove it") from error


def _read_csv(path: pathlib.Path, columns: list[str]) -> pd.DataFrame:
    if path.is_dir():
        raise UserError(f"--data {path}: a folder; give a CSV file")
    options = {"dtype": str, "keep_default_na": False, "index_col": False, "skip_blank_lines": False}
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # A row longer than the first line is only warned of.
            names = pd.read_csv(path, header=None, nrows=1, **options).iloc[0].str.strip()
            table = pd.read_csv(path, **options)
    except pd.errors.EmptyDataError as error:
        raise UserError(f"{path}: the file is empty; it needs a line of column names and rows") from error
    except pd.errors.ParserWarning as error:
        raise UserError(f"{path}: rows have more values than column names; mend the first line") from error
    except (OSError, ValueError) as error:  # ParserError and UnicodeDecodeError are ValueErrors.
        raise UserError(f"{path}: not readable as CSV ({error}); save it as UTF-8 with commas") from error
    for name in names[names.duplicated()]:
        raise UserError(f"{path}: there are two columns {name!r}; rename or remove one")
    table.columns = names
    for column in columns:
        if column not in table.columns:
            raise UserError(
                f"{path}: no column {column!r}; name one of its columns by flag: {', '.join(names)}"
                + ("; or save it with commas, if these are several" if len(names) == 1 else "")
            )
    if table.empty:
        raise UserError(f"{path}: no rows below the column names; add some")
    return table


def _numbers(path: pathlib.Path, column: pd.Series) -> np.ndarray:
    with np.errstate(over="ignore"):
        numbers = pd.to_numeric(column, errors="coerce").to_numpy(np.float32)
    for row in np.flatnonzero(~np.isfinite(numbers)):
        raise UserError(
            f"{path}, row {row + 2}: {column.iloc[row]!r} in column {column.name!r} is not a number that "
            "fits float32; correct it or remove the row"
        )
    return numbers


def _class_numbers(path: pathlib.Path, column: pd.Series) -> tuple[np.ndarray, tuple[str, ...]]:
    labels = column.str.strip()
    for row in np.flatnonzero(labels == ""):
        raise UserError(
            f"{path}, row {row + 2}: no label in column {column.name!r}; fill it or remove the row"
        )
    class_names, numbers = np.unique(labels.to_numpy(str), return_inverse=True)
    if len(class_names) < 2:
        raise UserError(
            f"{path}: column {column.name!r} holds a single class; a classifier needs two or more"
        )
    return numbers, tuple(str(name) for name in class_names)
