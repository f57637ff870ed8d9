"""Decodes image files by TensorFlow operations, for SavedModels: with the pixels of training, or not at all."""

import functools
from collections.abc import Sequence
from typing import Any

import tensorflow as tf


def decoded(file: tf.Tensor, shape: tf.TensorShape, pixel_range: Sequence[float] = ()) -> tf.Tensor:
    """Decodes a JPEG or PNG file to uint8 of `shape`, like `images.read_image`, but for steps of 1 or 2.

    Refuses all other files, because TensorFlow can't read them, or reads other pixels than Pillow.
    """
    height, width, channels = shape
    is_png = tf.strings.substr(file, 0, 8) == b"\x89PNG\r\n\x1a\n"
    is_jpeg = tf.strings.substr(file, 0, 3) == b"\xff\xd8\xff"
    file = _checked(file, is_png | is_jpeg, "image_bytes: neither JPEG nor PNG; convert the image to one of them")
    data = tf.io.decode_raw(file, tf.uint8)
    exif = tf.cond(is_png, lambda: _png_exif(data), lambda: _jpeg_exif(data))
    orientation = tf.cond(exif > 0, lambda: _orientation(data, exif), lambda: 0)
    # Where Pillow looks if there is no EXIF orientation. Here it may be compressed.
    other = tf.strings.regex_full_match(file, r"\C*(tiff:Orientation|Raw profile type exif)\C*")
    problem = "image_bytes: its orientation is in metadata that can't be read here; rotate the pixels, or remove it"
    file = _checked(file, (orientation > 0) | ~other, problem)
    image = tf.cond(is_png, lambda: _png(file, pixel_range), lambda: _jpeg(file, max(height, width)))
    image = tf.cond((orientation >= 5) & (orientation <= 8), lambda: tf.transpose(image, [1, 0, 2]), lambda: image)
    for axis, flipped in ((1, [2, 3, 6, 7]), (0, [3, 4, 7, 8])):
        is_flipped = tf.reduce_any(orientation == flipped)
        image = tf.cond(is_flipped, lambda image=image, axis=axis: tf.reverse(image, [axis]), lambda image=image: image)
    if channels == 1:
        image = (tf.tensordot(image, [19595, 38470, 7471], 1)[..., None] + 32768) // 65536
    size = tf.shape(image)
    rows, columns = (tf.cast(size[axis], tf.float64) for axis in (0, 1))
    wide = columns * height > rows * width
    new_rows = tf.where(wide, tf.maximum(tf.cast(tf.round(rows / columns * width), tf.int32), 1), height)
    new_columns = tf.where(wide, width, tf.maximum(tf.cast(tf.round(columns / rows * height), tf.int32), 1))
    # Like Pillow: columns first, and rounded in between.
    for new in ((size[0], new_columns), (new_rows, new_columns)):
        image = tf.image.resize(image, new, tf.image.ResizeMethod.BICUBIC, antialias=True)
        image = tf.round(tf.clip_by_value(image, 0, 255))
    top, left = (
        tf.cast(tf.round((whole - tf.cast(part, tf.float64)) / 2), tf.int32)
        for whole, part in ((height, new_rows), (width, new_columns))
    )
    image = tf.image.pad_to_bounding_box(tf.cast(image, tf.uint8), top, left, height, width)
    return tf.ensure_shape(image, shape)


def _checked(file: tf.Tensor, condition: tf.Tensor, problem: str) -> tf.Tensor:
    with tf.control_dependencies([tf.debugging.Assert(condition, [problem])]):
        return tf.identity(file)


def _jpeg(file: tf.Tensor, largest: int) -> tf.Tensor:
    """Decodes a JPEG file to int32 [height, width, 3], reduced like `images.jpeg_reduction`."""
    size = tf.image.extract_jpeg_shape(file)[:2]
    large, small = tf.reduce_max(size), tf.reduce_min(size)
    step = sum(tf.cast((3 * large >= 4 * by * largest) & (small >= by), tf.int32) for by in (2, 4, 8))
    decode = [
        functools.partial(tf.io.decode_jpeg, file, 3, ratio=by, dct_method="INTEGER_ACCURATE") for by in (1, 2, 4, 8)
    ]
    return tf.cast(tf.switch_case(step, decode), tf.int32)


def _png(file: tf.Tensor, pixel_range: Sequence[float]) -> tf.Tensor:
    """Decodes a PNG file to int32 [height, width, 3]. Transparent areas become white."""
    low, high = pixel_range or (0, 65535)

    def deep() -> tf.Tensor:
        values = (tf.cast(tf.io.decode_png(file, 1, tf.uint16), tf.float64) - low) * (255 / (high - low))
        return tf.tile(tf.cast(tf.clip_by_value(tf.round(values), 0, 255), tf.int32), [1, 1, 3])

    def shallow() -> tf.Tensor:
        image, alpha = tf.split(tf.cast(tf.io.decode_png(file, 4), tf.int32), [3, 1], axis=-1)
        # Without alpha channel, TensorFlow 2.21 fills it by the largest value of the file's own bits, such as 15 of 4.
        filled = tf.bitwise.left_shift(1, _number(tf.io.decode_raw(tf.strings.substr(file, 24, 1), tf.uint8), 0, 1)) - 1
        alpha = tf.where(tf.reduce_all(alpha == filled), 255, alpha)
        mixed = 128 * (image * alpha + 255 * (255 - alpha)) + 128 * 128
        return (mixed // 256 + mixed) // 256 // 128  # Pillow's division by 255.

    # Bits per pixel and colour type, from the header.
    return tf.cond(tf.strings.substr(file, 24, 2) == b"\x10\x00", deep, shallow)


def _number(data: tf.Tensor, start: Any, size: int, little: Any = False) -> tf.Tensor:
    """Returns the number in `size` bytes of `data`, uint8 [n], from `start`, int32 of any shape."""
    values = [tf.cast(tf.gather(data, start + place), tf.int32) for place in range(size)]
    numbers = [sum(value * 256**place for place, value in enumerate(order)) for order in (values, values[::-1])]
    return tf.where(little, *numbers)


def _jpeg_exif(data: tf.Tensor) -> tf.Tensor:
    """Returns where the EXIF data of a JPEG file begin; 0 if there are none."""

    def is_exif(start: tf.Tensor) -> tf.Tensor:
        # Marker APP1, length, "Exif", two zeros.
        part = tf.pad(data[start : start + 10], [[0, 10]])[:10]
        return tf.reduce_all(tf.gather(part, [1, 4, 5, 6, 7, 8, 9]) == tf.constant([0xE1, *b"Exif\0\0"], tf.uint8))

    def more(start: tf.Tensor) -> tf.Tensor:
        # Up to the marker of the pixels.
        return tf.cond(start + 10 < tf.size(data), lambda: (data[start + 1] != 0xDA) & ~is_exif(start), lambda: False)

    def after(start: tf.Tensor) -> tuple[tf.Tensor]:
        # A marker may follow more than one byte of ones.
        return (tf.cond(data[start + 1] == 0xFF, lambda: start + 1, lambda: start + 2 + _number(data, start + 2, 2)),)

    start = tf.while_loop(more, after, (tf.constant(2),))[0]
    return tf.where(is_exif(start), start + 10, 0)


def _png_exif(data: tf.Tensor) -> tf.Tensor:
    """Returns where the EXIF data of a PNG file begin; 0 if there are none."""

    def is_exif(start: tf.Tensor) -> tf.Tensor:
        part = tf.pad(data[start : start + 8], [[0, 8]])[:8]
        return tf.reduce_all(part[4:] == tf.constant([*b"eXIf"], tf.uint8))

    def more(start: tf.Tensor) -> tf.Tensor:
        return (start + 8 < tf.size(data)) & ~is_exif(start)

    start = tf.while_loop(more, lambda start: (start + 12 + _number(data, start, 4),), (tf.constant(8),))[0]
    return tf.where(is_exif(start), start + 8, 0)


def _orientation(data: tf.Tensor, start: tf.Tensor) -> tf.Tensor:
    """Returns the orientation, 1 to 8, that the EXIF data from `start` note; 0 if there is none."""
    little = data[start] == ord("I")
    folder = start + _number(data, start + 4, 4, little)
    entries = folder + 2 + 12 * tf.range(_number(data, folder, 2, little))
    entries = tf.boolean_mask(entries, _number(data, entries, 2, little) == 0x0112)
    is_long = _number(data, entries + 2, 2, little) == 4
    values = tf.where(is_long, _number(data, entries + 8, 4, little), _number(data, entries + 8, 2, little))
    return tf.reduce_sum(values[-1:])
