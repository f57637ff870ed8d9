"""Reads the user's images and texts. Errors name the file or row that can't be used."""

import pathlib
import re
import warnings

from common.batches import Arrays
from common.cli import UserError
from common.tables import read_csv

import numpy as np
import pandas as pd
from PIL import Image, ImageOps


def read_image_folders(folder: pathlib.Path, size: tuple[int, int]) -> Arrays:
    """Reads images from a folder per class, below `train`, `validation` and `test` if these exist; else as "train".

    Returns:
        uint8 [n, height, width, channels] per split, resized to `size` by `read_image`. There is one channel if all
        training images are greyscale, else there are three.
    """
    files = _class_files(folder, "images", [".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif"])
    arrays, channels = {}, 3
    for split, found in files.items():  # "train" comes first and sets the channels.
        images = np.stack([read_image(path, (*size, channels)) for path, _ in found])
        if split == "train" and (images == images[..., :1]).all():
            images, channels = images[..., :1], 1
        arrays[split] = (images, np.array([class_name for _, class_name in found]))
    return arrays


def read_labelled_texts(path: pathlib.Path, text_column: str, label_column: str) -> Arrays:
    """Reads texts from a CSV with a text and a label column, or from .txt files in a folder per class."""
    if path.is_dir():
        return {
            split: (np.array([_read_text(file) for file, _ in found], object), np.array([name for _, name in found]))
            for split, found in _class_files(path, "texts", [".txt"]).items()
        }
    if text_column == label_column:
        raise UserError(f"--text-column {text_column}: also the --label-column; give another column")
    table = read_csv(path, [text_column, label_column], "name others with --text-column and --label-column")
    texts = np.array([text.encode() for text in _filled(path, table[text_column])], object)
    return {"train": (texts, _filled(path, table[label_column]).astype(str))}


def _class_files(folder: pathlib.Path, kind: str, suffixes: list[str]) -> dict[str, list[tuple[pathlib.Path, str]]]:
    """Returns (file, class name) pairs for each split."""
    kind = f"{kind} ({', '.join(suffixes)})"
    if not folder.is_dir():
        raise UserError(f"--data {folder}: not a folder; give a folder that holds a folder per class")
    folders = {path.name.lower(): path for path in sorted(folder.glob("[!.]*/"))}  # Ignores case.
    splits = {name: folders[name] for name in ("train", "validation", "test") if name in folders}
    if splits and "train" not in splits:
        raise UserError(f"{folder}: has a folder {next(iter(splits.values())).name!r} but none called 'train'; add it")
    for other in folders.keys() - splits if splits else ():
        raise UserError(f"{folders[other]}: not a split; name the folder train, validation or test")
    found = {}
    for split, place in (splits or {"train": folder}).items():
        found[split] = []
        for class_folder in sorted(place.glob("[!.]*/")):
            if re.search("[\ud800-\udfff]", class_folder.name):  # Surrogates for bytes that are not UTF-8.
                raise UserError(f"{str(class_folder)!r}: not a valid class name; rename the folder, in UTF-8")
            files = [path for path in sorted(class_folder.glob("[!.]*")) if path.suffix.lower() in suffixes]
            if not files:
                raise UserError(f"{class_folder}: no {kind} in this folder; add some or remove it")
            for subfolder in class_folder.glob("[!.]*/"):
                raise UserError(f"{subfolder}: a folder inside the folder of a class; move its files up, or remove it")
            found[split] += [(file, class_folder.name) for file in files]
        if not found[split]:
            raise UserError(f"{place}: no folders of {kind}; make one for each class")
    return found


def read_image(path: pathlib.Path, shape: tuple[int, int, int]) -> np.ndarray:
    """Reads an image file as uint8 of `shape`, (height, width, channels), with 1 or 3 channels.

    Keeps the aspect ratio and pads with black. Transparent areas become white.
    """
    height, width, channels = shape
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with Image.open(path) as opened:
                image = ImageOps.exif_transpose(opened)
                if image.mode.startswith("I"):  # Converts 16-bit greyscale to 8 bits.
                    image = Image.fromarray((np.asarray(image).astype(int) // 257).clip(0, 255).astype(np.uint8))
                if image.has_transparency_data:
                    layered = image.convert("RGBA")
                    image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), layered)
                image = image.convert("L" if channels == 1 else "RGB")
    except Exception as error:  # Pillow's decoders raise errors of many types.
        raise UserError(f"{path}: not a readable image ({error}); repair or remove it") from error
    return np.asarray(ImageOps.pad(image, (width, height))).reshape(shape)


def _read_text(path: pathlib.Path) -> bytes:
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not readable as UTF-8 text; repair or remove it") from error
    if not text.strip():
        raise UserError(f"{path}: no text in this file; write some or remove it")
    return text.encode()


def read_texts(path: pathlib.Path, column: str) -> list[bytes]:
    """Reads the texts of a CSV column, or the lines of any other file; skips blank lines."""
    if path.suffix.lower() == ".csv":
        return [text.encode() for text in _filled(path, read_csv(path, [column])[column])]
    return [line for line in _read_text(path).splitlines() if line.strip()]


def _filled(path: pathlib.Path, column: pd.Series) -> np.ndarray:
    """Returns a column as an object array: fixed-width strings would each use the memory of the longest."""
    values = column.str.strip().to_numpy(object)
    for row in np.flatnonzero(values == ""):
        raise UserError(f"{path}, row {row + 2}, column {column.name!r}: empty; fill it or remove the row")
    return values
