"""Reads images of any format and size in parallel: into memory, or into a file on disk that is mapped."""

import concurrent.futures
import contextlib
import fcntl
import functools
import hashlib
import importlib
import io
import json
import math
import os
import pathlib
import time
import warnings
import zipfile
from collections.abc import Callable, Iterable, Sequence
from typing import Any, BinaryIO, NamedTuple

from common.batches import Arrays, MappedArray
from common.cli import SharedConfig, UserError, some, warn
from common.console import elapsed, say, status_line
from common.hardware import describe_machine, free_memory
from common.records import rename, write_file
from common.splits import held_out, row_digest
from common.user_files import class_files

import numpy as np
import PIL
import tensorflow as tf
from PIL import Image, ImageOps

# Formats that Pillow only identifies, and EPS, which it passes to another program.
_NOT_READ = {"BUFR", "EPS", "GRIB", "HDF5", "MPEG", "WMF"}
_READER = 1  # Increment it when the same file would be read as other pixels.
_CHUNK = 32  # images per task of a thread


class Broken(NamedTuple):
    """An image file that can't be read, and why."""

    path: pathlib.Path
    reason: str


@functools.cache
def image_formats() -> dict[str, str]:
    """Returns the formats that can be read, by suffix: those of Pillow; with the package pillow-heif, HEIC too."""
    with contextlib.suppress(ImportError):
        importlib.import_module("pillow_heif").register_heif_opener()
    Image.init()
    formats = Image.registered_extensions().items()
    return {suffix: name for suffix, name in formats if name in Image.OPEN.keys() - _NOT_READ}


@functools.cache
def _format_names() -> tuple[str, ...]:
    """Returns the formats in Pillow's order: it tries the commonest first."""
    names = set(image_formats().values())
    return tuple(name for name in Image.ID if name in names)


def read_image(path: pathlib.Path, shape: Sequence[int], pixel_range: Sequence[float] = ()) -> np.ndarray:
    """Reads an image file as uint8 of `shape`, (height, width, channels), with 1 or 3 channels.

    Keeps the aspect ratio and pads with black. Applies EXIF rotation. Transparent areas become white. Pixels of more
    than 8 bits are scaled from `pixel_range`, the lowest and highest value of the training images, to 0-255; without
    it, from 16 bits. Of an animation, reads the first frame. Raises a `UserError` for a file that can't be read.
    """
    try:
        with _silent():
            return _pixels(_opened(path, shape[:2])[0], shape, pixel_range)
    except Exception as error:  # Pillow's decoders raise errors of many types.
        raise UserError(broken_line([Broken(path, _reason(error))])) from error


def broken_line(broken: Sequence[Broken]) -> str:
    """Describes image files that can't be read, for a message."""
    if len(broken) == 1:
        return f"{broken[0].path}: not a readable image ({broken[0].reason}); repair or remove it"
    files = some([f"{path} ({reason})" for path, reason in broken])
    return f"{len(broken):,} files are not readable images: {files}; repair or remove them, or give --skip-broken"


def _reason(error: Exception) -> str:
    if isinstance(error, PIL.UnidentifiedImageError):
        return "of no known format"
    return (str(error).strip() or type(error).__name__).splitlines()[0]


@contextlib.contextmanager
def _silent() -> Any:
    """Ignores Pillow's warnings. Use it outside of threads, which share the filters."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _opened(path: pathlib.Path, box: Sequence[int]) -> tuple[Image.Image, tuple[int, int], bool]:
    """Decodes an image file for the size `box`, and turns it upright.

    Returns:
        The image; its width and height in the file; whether it is a colour image of 16 bits, of which Pillow reads 8.
    """
    with Image.open(path, formats=_format_names()) as image:
        size = image.size
        cut = ";16" in str(image.tile) and not _is_deep(image)
        if (reduction := jpeg_reduction(size, box)) > 1 and image.format in ("JPEG", "MPO"):
            image.draft(None, (size[0] // reduction, size[1] // reduction))
        image.load()
        ImageOps.exif_transpose(image, in_place=True)
        return image, size, cut


def jpeg_reduction(size: tuple[int, int], box: Sequence[int]) -> int:
    """Returns 1, 2, 4 or 8: by how much a JPEG decoder may shrink an image, which is many times as fast.

    The image keeps at least 4/3 of the final size. Photos then differ by a quarter of a step of 255, on average, from
    those that are decoded whole.
    """
    large, small = max(size), min(size)
    return next((by for by in (8, 4, 2) if 3 * large >= 4 * by * max(box) and small >= by), 1)


def _is_deep(image: Image.Image) -> bool:
    """Returns whether the pixels of a grey image have more than 8 bits."""
    return image.mode == "F" or image.mode.startswith("I")


def _range(image: Image.Image) -> tuple[float, float]:
    """Returns lowest and highest value of a deep image; at most 0, and at least 1 more than the lowest."""
    values = np.asarray(image)
    values = values[np.isfinite(values)]
    low = float(min(0, values.min(initial=0)))
    return low, float(values.max(initial=low + 1))


def to_8_bits(values: np.ndarray, low: float, high: float) -> np.ndarray:
    """Scales `low` to 0 and `high` to 255, and rounds half to even."""
    values = np.nan_to_num(values.astype(np.float64), nan=low, posinf=high, neginf=low)
    return np.rint((values - low) * (255 / (high - low))).clip(0, 255).astype(np.uint8)


def _pixels(image: Image.Image, shape: Sequence[int], pixel_range: Sequence[float]) -> np.ndarray:
    """Converts a decoded image to uint8 of `shape`; see `read_image`."""
    height, width, channels = shape
    if _is_deep(image):
        if not pixel_range and not image.mode.startswith("I;16"):
            raise ValueError("it has pixels of 32 bits, and no training image has; convert it to 8 bits")
        image = Image.fromarray(to_8_bits(np.asarray(image), *(pixel_range or (0, 65535))))
    if image.has_transparency_data:
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image.convert("RGBA"))
    return fitted(image.convert("L" if channels == 1 else "RGB"), height, width).reshape(shape)


def fitted(image: Image.Image, height: int, width: int) -> np.ndarray:
    """Resizes an image to fit into `height` and `width`, keeps the aspect ratio and pads with black.

    The same as `PIL.ImageOps.pad`, but a very long and narrow image keeps one pixel.
    """
    if image.size == (width, height):
        return np.asarray(image)
    if image.width * height > image.height * width:
        size = width, max(1, round(image.height / image.width * width))
    else:
        size = max(1, round(image.width / image.height * height)), height
    resized = image.resize(size, Image.Resampling.BICUBIC)
    if size == (width, height):
        return np.asarray(resized)
    padded = Image.new(image.mode, (width, height))
    padded.paste(resized, (round((width - size[0]) / 2), round((height - size[1]) / 2)))
    return np.asarray(padded)


def as_image(pixels: np.ndarray) -> Image.Image:
    """Converts uint8 [height, width, channels] to an image."""
    return Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels)


def resized(images: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Resizes decoded images, uint8 [n, height, width, channels], like `read_image`."""
    if images.shape[1:3] == size:
        return images
    return np.stack([_pixels(as_image(image), (*size, image.shape[-1]), ()) for image in images])


class Store:
    """Receives images, uint8 of one shape: in memory, or in a file. Several threads may call `write`."""

    def __init__(self, count: int, shape: tuple[int, int, int], file: BinaryIO | None = None):
        self.count, self.shape, self.file = count, shape, file
        self.memory = None if file else _aligned(count * math.prod(shape))
        self.digests = np.zeros(count, np.uint64)

    def write(self, row: int, image: np.ndarray) -> None:
        """Writes an image to its place. Raises an `OSError` if the disk is full."""
        start = row * image.nbytes
        if self.memory is not None:
            self.memory[start : start + image.nbytes] = image.ravel()
            return
        self.digests[row] = np.frombuffer(row_digest(image), np.uint64)[0]
        content = image.tobytes()
        while content:  # A nearly full disk takes a part, then raises an error.
            content = content[os.pwrite(self.file.fileno(), content, start) :]  # pyright: ignore
            start = (row + 1) * image.nbytes - len(content)

    def keep(self, rows: np.ndarray, channels: int) -> None:
        """Drops all images but `rows`, ascending, and all but the first channels. To be called last."""
        if len(rows) == self.count and channels == self.shape[2]:
            return
        old = self.memory if self.memory is not None else np.memmap(self.file, np.uint8, "r")  # pyright: ignore
        images = old.reshape(-1, *self.shape)[: self.count]
        self.count, self.shape = len(rows), (*self.shape[:2], channels)
        if self.memory is not None:
            self.memory = _aligned(self.count * math.prod(self.shape))
        # No image moves behind its old place, so that a file needs no copy.
        for row, place in enumerate(rows.tolist()):
            self.write(row, images[place, ..., :channels].copy())
        self.digests = self.digests[: self.count]
        if self.file:
            self.file.truncate(self.count * math.prod(self.shape))

    def tensor(self) -> tf.Tensor:
        """Returns the images in memory as a tensor on the CPU, without a copy."""
        images = self.memory.reshape(self.count, *self.shape)  # pyright: ignore[reportOptionalMemberAccess]
        with tf.device("CPU:0"):
            return tf.experimental.dlpack.from_dlpack(images.__dlpack__())


def _aligned(size: int) -> np.ndarray:
    """Allocates uint8 [size] at an address that is a multiple of 64, as TensorFlow requires."""
    memory = np.empty(size + 64, np.uint8)
    return memory[-memory.ctypes.data % 64 :][:size]


def fits_memory(size: int) -> bool:
    """Returns whether that many bytes of images are kept in memory: up to 1 GiB, and an eighth of what is free."""
    return size <= min(2**30, free_memory() // 8)


def cache_folder(config: SharedConfig) -> pathlib.Path:
    """Returns `--cache-dir`, else keras_recipes in XDG_CACHE_HOME, else in ~/.cache."""
    base = pathlib.Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache")
    return (pathlib.Path(config.cache_dir) if config.cache_dir else base / "keras_recipes").expanduser().absolute()


def stored_images(
    name: str,
    origin: Any,
    count: int,
    shape: tuple[int, int, int],
    config: SharedConfig,
    fill: Callable[[Store], dict[str, Any]],
) -> tuple[tf.Tensor | MappedArray, dict[str, np.ndarray]]:
    """Reads images into memory or, if they are too large for it, into a file that later runs use again.

    Args:
        name: the beginning of the name of the file.
        origin: what determines the images; a file is used again if it is equal. JSON-serializable.
        count: the number of images, at most.
        shape: their shape, at most.
        config: uses `cache_dir`.
        fill: writes all images to a `Store`, and returns what is known of them, which the file keeps too.

    Returns:
        The images, uint8 [n, height, width, channels], and what `fill` returned, as arrays.

    Raises:
        UserError: the file can't be written.
    """
    size = count * math.prod(shape)
    if fits_memory(size):
        store = Store(count, shape)
        about = fill(store)
        return store.tensor(), {key: np.asarray(value) for key, value in about.items()}
    digest = hashlib.sha256(json.dumps([_READER, PIL.__version__, shape, origin]).encode()).hexdigest()
    folder = cache_folder(config)
    path = folder / f"{name}-{shape[0]}x{shape[1]}-{digest[:16]}.uint8"
    try:
        if found := _complete(path):
            say(f"images: read before, from {path}")
            return found
        folder.mkdir(parents=True, exist_ok=True)
        part = path.with_suffix(".part")
        # Not in mode "a+b", with which all is written to the end.
        with open(os.open(part, os.O_RDWR | os.O_CREAT, 0o666), "r+b", buffering=0) as file:
            # Another process may read the same images: wait for it, then use its file.
            began = time.monotonic()
            with status_line(lambda: f"waiting for the process that writes {part}  {elapsed(began)}"):
                fcntl.flock(file, fcntl.LOCK_EX)
            if not _complete(path):
                _write_store(Store(count, shape, file), path, part, fill)
        found = _complete(path)
        if not found:
            raise FileNotFoundError(2, "was removed")
        say(f"images: kept for later runs in {path} ({size / 1e9:.1f} GB)")
        return found
    except OSError as error:
        problem = f"--cache-dir {folder}: {error.strerror or error}"
        raise UserError(f"{problem}; the images need {size / 1e9:.1f} GB there: make room, or name another") from error


def _write_store(store: Store, path: pathlib.Path, part: pathlib.Path, fill: Callable[[Store], dict[str, Any]]) -> None:
    """Fills a new file, and names it `path` when it is complete. What a killed process has left is overwritten."""
    try:
        os.ftruncate(store.file.fileno(), 0)  # pyright: ignore[reportOptionalMemberAccess]
        about, content = fill(store), io.BytesIO()
        np.savez(content, digests=store.digests, shape=np.array([store.count, *store.shape]), **about)
        write_file(path.with_suffix(".npz"), content.getvalue())
        rename(part, path)
    except BaseException:
        part.unlink(missing_ok=True)
        raise


def _complete(path: pathlib.Path) -> tuple[MappedArray, dict[str, np.ndarray]] | None:
    """Returns the images that an earlier run has written, and what it knew of them; None if there are none."""
    try:
        with np.load(path.with_suffix(".npz")) as file:
            about = dict(file)
        digests, shape = about.pop("digests"), tuple(about.pop("shape").tolist())
        if path.stat().st_size == math.prod(shape):
            return MappedArray(path, shape, np.uint8, digests), about
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        pass
    return None


def file_states(paths: Iterable[pathlib.Path]) -> list[tuple[str, int, int]]:
    """Returns the name, size and time of change of each file."""
    states = []
    for path in paths:
        with contextlib.suppress(OSError):  # Such as a link to nowhere, which can't be read either.
            state = path.stat()
            states.append((f"{path.parent.name}/{path.name}", state.st_size, state.st_mtime_ns))
    return states


class _Result(NamedTuple):
    """What is known of an image file after it was read; `low` and `high` are of deep images, which are read later."""

    row: int
    reason: str = ""
    size: tuple[int, int] = (0, 0)
    grey: bool = True
    cut: bool = False
    low: float = math.nan
    high: float = math.nan


def read_image_folders(
    folder: pathlib.Path, size: tuple[int, int], config: SharedConfig
) -> tuple[Arrays, tuple[float, ...]]:
    """Reads images from a folder per class, below `train`, `validation` and `test` if these exist; else as "train".

    Says how many files are left out, and to what size the images are brought. There is one channel if all training
    images are greyscale, else there are three. With `--smoke`, reads some images of each class only.

    Returns:
        uint8 [n, height, width, channels] per split, resized to `size` by `read_image`; and the lowest and highest
        pixel of the training images of more than 8 bits, which become 0 and 255; empty if there are none.

    Raises:
        UserError: files can't be read, and there is no `--skip-broken`.
    """
    files = class_files(folder, "images", image_formats().keys(), config.test_data)
    arrays: Arrays = {}
    channels, pixel_range, all_broken, sizes = 3, (), [], []
    for split, found in files.items():  # "train" comes first: the others are read like it.
        labels = np.array([class_name for _, class_name in found])
        few = 450 if split == "train" else 100  # Of these, --smoke takes 300 and 100.
        if config.smoke and len(found) > few:
            rows = np.flatnonzero(held_out(np.arange(len(found)), labels, few / len(found), 0))
            found, labels = [found[row] for row in rows], labels[rows]
        paths, train = [path for path, _ in found], split == "train"
        broken: list[Broken] = []
        fill = functools.partial(
            _read_files, paths, train, pixel_range, config, broken, f"reading {len(paths):,} images of {split}"
        )
        origin = [str(folder.resolve()), config.test_data, split, config.skip_broken, pixel_range, file_states(paths)]
        try:
            images, about = stored_images(split, origin, len(paths), (*size, channels), config, fill)
        except _BrokenError as error:
            about = error.about
        else:
            arrays[split] = (images, labels[about["kept"]])
        if train:
            channels, pixel_range = int(about["channels"]), tuple(about["pixel_range"].tolist())
        kept = set(about["kept"].tolist())  # An earlier run may have read the others.
        all_broken += broken or [Broken(path, "") for row, path in enumerate(paths) if row not in kept]
        sizes += about["sizes"].tolist()
        if cut := int(about["cut"]):
            warn(f"{folder}: of {cut:,} colour images of 16 bits, only the upper 8 bits are read")
    if all_broken and not config.skip_broken:
        raise UserError(broken_line(all_broken))
    if all_broken:
        warn(f"{folder}: left out {len(all_broken):,} that can't be read: {some([path for path, _ in all_broken])}")
    smallest, largest = (
        f"{width}x{height}" for width, height in (min(sizes, key=math.prod), max(sizes, key=math.prod))
    )
    if (target := f"{size[1]}x{size[0]}") != smallest or target != largest:
        span = smallest if smallest == largest else f"{smallest} to {largest}"
        say(f"images: {span} -> {target}, aspect kept; --image-size changes that")
    if pixel_range:
        low, high = pixel_range
        say(f"images: pixels of more than 8 bits, {low:,g} to {high:,g} -> 0 to 255")
    return arrays, pixel_range


class _BrokenError(Exception):
    """Some files can't be read; `about` is known of the others."""

    def __init__(self, about: dict[str, Any]):
        super().__init__()
        self.about = about


def _read_files(
    paths: list[pathlib.Path],
    train: bool,
    pixel_range: tuple[float, ...],
    config: SharedConfig,
    broken: list[Broken],
    title: str,
    store: Store,
) -> dict[str, Any]:
    """Reads image files into a `Store` in parallel; adds those that can't be read to `broken`."""
    results = _in_threads(
        config, title, range(len(paths)), lambda row: _read(row, paths[row], store, pixel_range, train)
    )
    deep = [result.row for result in results if math.isfinite(result.low)]
    if deep:  # Their range is known now.
        pixel_range = min(results[row].low for row in deep), max(results[row].high for row in deep)
        for result in _in_threads(
            config, f"{title}, again", deep, lambda row: _read(row, paths[row], store, pixel_range, False)
        ):
            results[result.row] = result
    broken += [Broken(paths[result.row], result.reason) for result in results if result.reason]
    read = [result for result in results if not result.reason]
    channels = 1 if train and all(result.grey for result in read) else store.shape[2]
    sizes = sorted({result.size for result in read}, key=math.prod) or [(0, 0)]
    about = {
        "kept": np.array([result.row for result in read], int),
        "channels": np.array(channels),
        "pixel_range": np.array(pixel_range, float),
        "sizes": np.array([sizes[0], sizes[-1]]),
        "cut": np.array(sum(result.cut for result in read)),
    }
    if broken and not config.skip_broken:
        raise _BrokenError(about)
    store.keep(about["kept"], channels)
    return about


def _read(row: int, path: pathlib.Path, store: Store, pixel_range: tuple[float, ...], train: bool) -> _Result:
    """Reads an image file into a row of `store`. Of a deep image of "train", returns only the range."""
    try:
        image, size, cut = _opened(path, store.shape[:2])
        if train and _is_deep(image):
            return _Result(row, "", size, True, cut, *_range(image))
        pixels = _pixels(image, store.shape, pixel_range)
    except Exception as error:  # Pillow's decoders raise errors of many types.
        return _Result(row, _reason(error))
    store.write(row, pixels)
    # Few rows show that an image is coloured.
    grey = all(bool((part == part[..., :1]).all()) for part in (pixels[::16], pixels))
    return _Result(row, "", size, grey, cut)


def _in_threads(config: SharedConfig, title: str, rows: Sequence[int], read: Callable[[int], _Result]) -> list[_Result]:
    """Calls `read` for all rows in threads: Pillow decodes and resizes without Python's lock. Shows the progress."""
    results, began = [], time.monotonic()
    chunks = [rows[start : start + _CHUNK] for start in range(0, len(rows), _CHUNK)]
    pool = concurrent.futures.ThreadPoolExecutor(config.threads or describe_machine().cores)
    try:
        with _silent(), status_line(lambda: f"{title}: {len(results) / len(rows):.0%}  {elapsed(began)}"):
            for part in pool.map(lambda chunk: [read(row) for row in chunk], chunks):
                results += part
    finally:
        pool.shutdown(cancel_futures=True)
    return results
