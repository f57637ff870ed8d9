"""Images of any format, size and number become the same pixels for training, prediction and serving."""

import dataclasses
import errno
import fcntl
import functools
import json
import os
import pathlib
import shutil
import struct
import types
import zlib

from common import artefacts, served_images
from common import images as images_module
from common.batches import MappedArray, Split
from common.cli import SharedConfig, UserError
from common.data import CIFAR10, MNIST, load_images, some_of_each_class
from common.images import image_formats, jpeg_reduction, read_image
from common.records import weights_sha256

import damage
import export
import keras
import numpy as np
import predict
import pytest
import tensorflow as tf
from conftest import load_recipe, smoke_config
from PIL import Image

SPLITS = ("train", "validation", "test")
SIZE = (8, 8)
RECIPES = ["mnist_cnn", "cifar10_cnn", "cifar10_fast", "pruning", "distillation", "quantization"]


def rows(split) -> list[bytes]:
    return [image.tobytes() for image in split.inputs.numpy()]


def photo(width: int, height: int, channels: int = 3, seed: int = 0) -> Image.Image:
    """Smooth shapes with some noise."""
    random = np.random.default_rng(seed)
    coarse = random.integers(0, 256, (7, 7, channels), np.uint8)
    smooth = np.dstack(
        [Image.fromarray(part).resize((width, height), Image.Resampling.BICUBIC) for part in np.moveaxis(coarse, 2, 0)]
    )
    noisy = (smooth.astype(int) + random.integers(-20, 20, smooth.shape)).clip(0, 255).astype(np.uint8)
    return Image.fromarray(noisy.squeeze())


def write_photos(folder: pathlib.Path, count: int = 12, suffix: str = "jpg", **options) -> pathlib.Path:
    """Two classes of photos, 60x80 to 71x80."""
    for number in range(2 * count):
        (place := folder / ("cat", "dog")[number % 2]).mkdir(parents=True, exist_ok=True)
        photo(60 + number // 2, 80, seed=number).save(place / f"{number}.{suffix}", **options)
    return folder


def write_pictures(folder: pathlib.Path, classes=("cat", "dog"), count=12, mode="RGB") -> pathlib.Path:
    for number, name in enumerate(classes):
        (folder / name).mkdir(parents=True)
        for index in range(count):
            # Wider than high: 12 x 6, of one grey that tells class and picture.
            Image.new("L", (12, 6), 100 * number + 5 * index + 20).convert(mode).save(folder / name / f"{index}.png")
    return folder


def test_a_folder_per_class_becomes_pictures_with_their_aspect_kept(tmp_path):
    write_pictures(tmp_path)
    (tmp_path / "cat" / "notes.txt").write_text("no picture")
    (tmp_path / "cat" / "._0.png").write_text("what macOS leaves beside a picture")
    (tmp_path / ".hidden").mkdir()
    data = load_images(CIFAR10, SharedConfig(data=str(tmp_path)), SIZE)
    assert data.source == "files"
    assert data.class_names == ("cat", "dog")
    assert [len(getattr(data, split)) for split in SPLITS] == [20, 2, 2]
    for split in SPLITS:
        images, labels = (np.asarray(getattr(data, split).inputs), np.asarray(getattr(data, split).targets).argmax(1))
        assert images.shape[1:] == (8, 8, 1)
        np.testing.assert_array_equal(images[:, 4, 4, 0] >= 120, labels == 1)
        assert not images[:, [0, 1, 6, 7]].any(), "12 x 6 in 8 x 8 leaves two black rows above and below"
        assert images[:, 2:6].all()


def test_pictures_may_be_links(tmp_path):
    """The usual way to make a subset of a large set."""
    write_pictures(tmp_path / "all")
    for name in ("cat", "dog"):
        (tmp_path / "some" / name).mkdir(parents=True)
        for number in range(6):
            file = pathlib.Path(name, f"{number}.png")
            (tmp_path / "some" / file).symlink_to(tmp_path / "all" / file)
    data = load_images(CIFAR10, SharedConfig(data=str(tmp_path / "some")), SIZE)
    assert sum(data.counts().values()) == 12
    assert (np.asarray(data.train.inputs).max((1, 2, 3)) > 0).all()


def test_the_channels_follow_the_pictures_of_train(tmp_path):
    """A coloured picture in test makes no difference: it becomes grey, as one to be predicted would."""
    write_pictures(tmp_path / "grey" / "train", mode="RGBA")
    write_pictures(tmp_path / "grey" / "test", count=1)
    Image.new("RGB", (8, 8), "red").save(tmp_path / "grey" / "test" / "cat" / "red.png")
    write_pictures(tmp_path / "colour")
    Image.new("RGB", (8, 8), "red").save(tmp_path / "colour" / "cat" / "red.png")
    for dataset in (MNIST, CIFAR10):
        grey, colour = (
            load_images(dataset, SharedConfig(data=str(tmp_path / name)), SIZE) for name in ("grey", "colour")
        )
        assert (grey.train.inputs.shape[1:], colour.train.inputs.shape[1:]) == ((8, 8, 1), (8, 8, 3))
        assert 76 in grey.test.inputs.numpy(), "0.299 of 255"


def test_a_photo_is_turned_as_its_camera_noted(tmp_path):
    """EXIF orientation 6: the camera stood on its side, so the top row of the file is the right column."""
    photo = Image.fromarray(np.repeat(np.uint8([[255], [0], [0], [0]]), 4, axis=1))
    exif = Image.Exif()
    exif[0x0112] = 6
    photo.save(tmp_path / "photo.png", exif=exif)
    expected = np.zeros((4, 4, 1), np.uint8)
    expected[:, 3] = 255
    np.testing.assert_array_equal(read_image(tmp_path / "photo.png", (4, 4, 1)), expected)


@pytest.mark.parametrize("spelled", [str.lower, str.title, str.upper])
def test_folders_for_the_splits_are_used_as_they_are(tmp_path, spelled):
    write_pictures(tmp_path / spelled("train"))
    write_pictures(tmp_path / spelled("test"), count=3)
    data = load_images(CIFAR10, SharedConfig(data=str(tmp_path), validation_size=0.25), SIZE)
    assert [len(getattr(data, split)) for split in SPLITS] == [18, 6, 6]
    write_pictures(tmp_path / spelled("validation"), count=5)
    data = load_images(CIFAR10, SharedConfig(data=str(tmp_path)), SIZE)
    assert [len(getattr(data, split)) for split in SPLITS] == [24, 10, 6]


def test_the_test_split_of_own_files_is_the_same_for_all_seeds(tmp_path):
    write_pictures(tmp_path)
    tests = [load_images(CIFAR10, SharedConfig(data=str(tmp_path), seed=seed), SIZE).test for seed in (0, 1)]
    assert rows(tests[0]) == rows(tests[1])


# Files.


@pytest.mark.filterwarnings("ignore:IM image format is deprecated")
def test_all_formats_of_pillow_are_read(tmp_path, capsys):
    """Each format that Pillow can write, under each of its suffixes; what else there is is counted."""
    for number, name in enumerate(("cat", "dog")):
        (tmp_path / name).mkdir()
        for suffix, form in image_formats().items():
            if form in Image.SAVE:
                image = photo(32, 32, seed=number).convert("1" if form in ("MSP", "XBM") else "RGB")
                try:
                    image.save(tmp_path / name / f"picture{suffix}")
                except (OSError, ValueError):
                    (tmp_path / name / f"picture{suffix}").unlink(missing_ok=True)  # An encoder that this Pillow lacks.
    (tmp_path / "cat" / "notes.txt").write_text("no image")
    (tmp_path / "dog" / "notes.TXT").write_text("no image")
    (tmp_path / "README.md").write_text("no image")
    written = list(tmp_path.rglob("picture*"))
    assert {".tif", ".jfif", ".png", ".bmp", ".gif", ".webp", ".tga", ".ppm"} <= {path.suffix for path in written}
    data = load_images(CIFAR10, SharedConfig(data=str(tmp_path)), (32, 32))
    # Equal pixels are in one split.
    assert sum(data.counts().values()) == len(written)
    assert f"{tmp_path}: left out 2 .txt, 1 .md\n" in capsys.readouterr().out
    assert not {".mpg", ".eps", ".txt", ".pdf"} & image_formats().keys()


def test_heic_is_read_if_its_package_is_there(tmp_path):
    pytest.importorskip("pillow_heif")
    assert {".heic", ".heif"} <= image_formats().keys()
    image = Image.new("RGB", (64, 64), (200, 10, 10))
    image.save(tmp_path / "photo.heic")
    assert abs(read_image(tmp_path / "photo.heic", (8, 8, 3)).astype(int) - (200, 10, 10)).max() < 6


def broken_folder(folder: pathlib.Path) -> pathlib.Path:
    write_photos(folder)
    (folder / "cat" / "0.jpg").write_bytes(b"")
    (folder / "dog" / "1.jpg").write_text("<html>404</html>")
    (folder / "dog" / "3.jpg").write_bytes((folder / "dog" / "5.jpg").read_bytes()[:900])
    return folder


def test_all_broken_images_are_told_at_once(tmp_path):
    broken_folder(tmp_path / "train")
    broken_folder(tmp_path / "test")
    for number in range(15):
        (tmp_path / "train" / "cat" / f"more{number:02}.png").write_text("none")
    with pytest.raises(UserError) as told:
        load_images(CIFAR10, SharedConfig(data=str(tmp_path)), SIZE)
    line = str(told.value)
    assert line.startswith(f"21 files are not readable images: {tmp_path}/train/cat/0.jpg (of no known format), ")
    assert line.count("of no known format") == 10
    assert line.count(" (") == 10
    assert line.endswith(" and 11 more; repair or remove them, or give --skip-broken")


def test_broken_images_are_left_out_on_request(tmp_path, capsys):
    broken_folder(tmp_path)
    data = load_images(CIFAR10, SharedConfig(data=str(tmp_path), skip_broken=True), SIZE)
    assert sum(data.counts().values()) == 21
    wanted = {read_image(path, (*SIZE, 3)).tobytes(): path.parent.name for path in tmp_path.rglob("*.jpg")
              if path.name not in ("0.jpg", "1.jpg", "3.jpg")}  # fmt: skip
    for split in SPLITS:
        targets = getattr(data, split).targets.numpy().argmax(1)
        assert [data.class_names[of] for of in targets] == [wanted[row] for row in rows(getattr(data, split))]
    assert "left out 3 that can't be read: " in (told := capsys.readouterr().err)
    assert "dog/3.jpg" in told


def test_a_smoke_test_reads_few_images(tmp_path, monkeypatch):
    for number in range(600):
        (place := tmp_path / ("cat", "dog")[number % 2]).mkdir(exist_ok=True)
        Image.new("RGB", (8, 8), (number % 256, number // 256, 0)).save(place / f"{number}.png")
    read = []
    opened = images_module._opened
    monkeypatch.setattr(images_module, "_opened", lambda path, box: read.append(path) or opened(path, box))
    data = load_images(CIFAR10, SharedConfig(data=str(tmp_path), smoke=True), SIZE)
    assert len(read) <= 460
    assert 290 <= len(data.train) + len(data.validation) <= 300
    assert len(data.test) >= 40


def test_a_folder_of_test_images(tmp_path):
    write_photos(tmp_path / "one")
    write_photos(tmp_path / "two", 3)
    config = SharedConfig(data=str(tmp_path / "one"), test_data=str(tmp_path / "two"))
    data = load_images(CIFAR10, config, SIZE)
    assert len(data.test) == 6
    assert len(data.train) + len(data.validation) == 24
    with pytest.raises(UserError, match=r"^--test-data .*nowhere: not a folder"):
        load_images(CIFAR10, dataclasses.replace(config, test_data=str(tmp_path / "nowhere")), SIZE)
    with pytest.raises(UserError, match=r"^--test-data .*: is for files of your own"):
        load_images(CIFAR10, dataclasses.replace(config, data="sample"), SIZE)
    write_photos(tmp_path / "three" / "train")
    write_photos(tmp_path / "three" / "test")
    with pytest.raises(UserError, match="has test examples already; leave one out"):
        load_images(CIFAR10, dataclasses.replace(config, data=str(tmp_path / "three")), SIZE)


# Pixels.


def test_the_size_is_said(tmp_path, capsys):
    write_photos(tmp_path)
    load_images(CIFAR10, SharedConfig(data=str(tmp_path)), (48, 48))
    assert "images: 60x80 to 71x80 -> 48x48, aspect kept" in capsys.readouterr().out


@pytest.mark.parametrize("source", ["sample", "tfds"])
def test_every_source_is_resized(tmp_path, source):
    damage.make_tfds(tmp_path)
    config = SharedConfig(data=source, data_dir=str(tmp_path))
    whole, small = (load_images(MNIST, config, size) for size in ((28, 28), (14, 14)))
    image = Image.fromarray(whole.test.inputs.numpy()[0].squeeze()).resize((14, 14), Image.Resampling.BICUBIC)
    assert small.test.input_shape == (14, 14, 1)
    np.testing.assert_array_equal(small.test.inputs[0, ..., 0], image)


@pytest.mark.parametrize("bits", [10, 12, 14, 16])
@pytest.mark.parametrize("suffix", ["png", "tif"])
def test_deep_images_have_the_range_of_the_training_images(tmp_path, bits, suffix, capsys):
    """Of 10 bits in a file for 16: not black. The test images are read by the range of train."""
    high = 2**bits - 14
    for split, values in (("train", (0, high)), ("test", (high // 2, high))):
        for name in ("cat", "dog"):
            (tmp_path / split / name).mkdir(parents=True)
            for number in range(6):
                pixels = np.full((8, 8), values[name == "dog"], np.uint16)
                pixels[0] = np.random.default_rng(number).integers(0, high, 8)
                Image.fromarray(pixels).save(tmp_path / split / name / f"{number}.{suffix}")
    data = load_images(MNIST, SharedConfig(data=str(tmp_path)), SIZE)
    assert data.pixel_range == (0, high)
    assert f"pixels of more than 8 bits, 0 to {high:,} -> 0 to 255" in capsys.readouterr().out
    values = data.test.inputs.numpy()[:, 4, 4, 0]
    expected = {"cat": high // 2 * 255 / high, "dog": 255}
    for value, of in zip(values, data.test.targets.numpy().argmax(1), strict=True):
        assert abs(float(value) - expected[data.class_names[of]]) < 1
    file = tmp_path / "test" / "cat" / f"0.{suffix}"
    assert read_image(file, (8, 8, 1), data.pixel_range).tobytes() in rows(data.test), "as predict.py reads it"


def test_negative_and_float_pixels_have_a_range_too(tmp_path):
    for name, level in (("cat", -1000.0), ("dog", 3000.0)):
        (tmp_path / name).mkdir()
        for number in range(6):
            pixels = np.full((8, 8), level, np.float32)
            pixels[0], pixels[1, 1] = 100 * number, np.nan
            Image.fromarray(pixels).save(tmp_path / name / f"{number}.tif")
    data = load_images(MNIST, SharedConfig(data=str(tmp_path)), SIZE)
    assert data.pixel_range == (-1000, 3000)
    of = data.train.targets.numpy().argmax(1)
    np.testing.assert_array_equal(data.train.inputs[:, 4, 4, 0], of * 255)
    with pytest.raises(UserError, match="pixels of 32 bits, and no training image has"):
        read_image(tmp_path / "cat" / "0.tif", (8, 8, 1))


def test_transparent_areas_become_white(tmp_path):
    clear = Image.new("RGBA", (8, 8), (0, 0, 0, 0))
    clear.convert("P").save(tmp_path / "palette.png", transparency=bytes([0] * 10))
    clear.save(tmp_path / "colour.webp", lossless=True)
    for file in ("palette.png", "colour.webp"):
        assert (read_image(tmp_path / file, (8, 8, 3)) == 255).all()


def test_a_narrow_image_keeps_a_pixel(tmp_path):
    Image.new("L", (1000, 1), 200).save(tmp_path / "line.png")
    np.testing.assert_array_equal(read_image(tmp_path / "line.png", (8, 8, 1)).max((1, 2)), [0, 0, 0, 0, 200, 0, 0, 0])


def test_a_large_jpeg_is_decoded_smaller(tmp_path):
    """It keeps at least 4/3 of the final size, and nearly the same pixels."""
    assert [jpeg_reduction(size, (48, 48)) for size in ((127, 90), (128, 90), (900, 3000), (60, 256))] == [1, 2, 8, 4]
    assert jpeg_reduction((9000, 3), (48, 48)) == 2
    photo(900, 700).resize((450, 350)).resize((900, 700)).save(tmp_path / "photo.jpg")
    Image.open(tmp_path / "photo.jpg").save(tmp_path / "photo.png")
    assert jpeg_reduction((900, 700), (48, 48)) == 8
    small, exact = (read_image(tmp_path / f"photo.{suffix}", (32, 32, 3)).astype(int) for suffix in ("jpg", "png"))
    assert abs(small - exact).max() < 16
    assert abs(small - exact).mean() < 2


# Memory and disk.


@pytest.fixture
def on_disk(monkeypatch):
    monkeypatch.setattr(images_module, "fits_memory", lambda size: False)


def loaded(folder, cache, **settings):
    return load_images(CIFAR10, SharedConfig(data=str(folder), cache_dir=str(cache), **settings), (16, 16))


@pytest.mark.parametrize("kind", ["colour", "grey", "broken"])
def test_a_file_holds_what_memory_holds(tmp_path, monkeypatch, kind):
    folder = tmp_path / "images"
    broken_folder(folder) if kind == "broken" else write_photos(folder)
    for path in folder.rglob("*.jpg") if kind == "grey" else ():
        Image.open(path).convert("L").save(path)
    settings = {"skip_broken": kind == "broken"}
    memory = loaded(folder, tmp_path / "cache", **settings)
    assert not (tmp_path / "cache").exists()
    monkeypatch.setattr(images_module, "fits_memory", lambda size: False)
    first = loaded(folder, tmp_path / "cache", **settings)
    monkeypatch.setattr(images_module, "_read", lambda *_: pytest.fail("read again"))
    for disk in (first, loaded(folder, tmp_path / "cache", **settings)):
        assert isinstance(disk.train.stored_inputs, MappedArray)
        assert disk.train.input_shape == (16, 16, 1 if kind == "grey" else 3)
        assert disk.counts() == memory.counts()
        assert disk.digest() == memory.digest()
        for split in SPLITS:
            np.testing.assert_array_equal(getattr(disk, split).inputs, getattr(memory, split).inputs)
            np.testing.assert_array_equal(getattr(disk, split).targets, getattr(memory, split).targets)


def test_tfds_images_in_a_file(tmp_path, monkeypatch):
    damage.make_tfds(tmp_path)
    config = SharedConfig(data="tfds", data_dir=str(tmp_path), cache_dir=str(tmp_path / "cache"))
    memory = load_images(MNIST, config, (28, 28))
    monkeypatch.setattr(images_module, "fits_memory", lambda size: False)
    for _ in range(2):
        disk = load_images(MNIST, config, (28, 28))
        assert isinstance(disk.train.stored_inputs, MappedArray)
        assert disk.digest() == memory.digest()
    assert len(list((tmp_path / "cache").glob("*.uint8"))) == 2


def test_changed_files_are_read_again(tmp_path, on_disk):
    folder = write_photos(tmp_path / "images")
    before = loaded(folder, tmp_path / "cache").digest()
    file = folder / "cat" / "0.jpg"
    os.utime(file, ns=(1, 1))
    assert loaded(folder, tmp_path / "cache").digest() == before
    assert len(list((tmp_path / "cache").glob("*.uint8"))) == 2
    photo(60, 80, seed=99).save(file)
    assert loaded(folder, tmp_path / "cache").digest() != before
    # The same names, sizes and times elsewhere are other images.
    shutil.copytree(folder, tmp_path / "copy")
    loaded(tmp_path / "copy", tmp_path / "cache")
    assert len(list((tmp_path / "cache").glob("*.uint8"))) == 4


def test_an_unfinished_or_damaged_file_is_written_again(tmp_path, on_disk, monkeypatch):
    folder = write_photos(tmp_path / "images")
    cache = tmp_path / "cache"
    whole = loaded(folder, cache).digest()
    (file,) = cache.glob("*.uint8")
    for damaged in ("cut", "no digests"):
        if damaged == "cut":
            os.truncate(file, 1000)
        else:
            file.with_suffix(".npz").write_bytes(b"PK none")
        file.with_suffix(".part").write_bytes(b"of a process that was killed")
        assert loaded(folder, cache).digest() == whole
        assert sorted(path.suffix for path in cache.iterdir()) == [".npz", ".uint8"]
    shutil.rmtree(cache)
    with monkeypatch.context() as patch:
        patch.setattr(images_module, "_in_threads", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            loaded(folder, cache)
    assert not list(cache.iterdir())


def test_a_full_disk_is_told_with_a_remedy(tmp_path, on_disk, monkeypatch):
    folder, calls = write_photos(tmp_path / "images"), []

    def fills_up(descriptor, content, start):
        calls.append(len(content))
        if len(calls) > 3:
            raise OSError(errno.ENOSPC, "No space left on device")
        return len(content) // 2

    monkeypatch.setattr(os, "pwrite", fills_up)
    with pytest.raises(UserError, match=r"^--cache-dir .*cache: No space left on device; the images need 0.0 GB there"):
        loaded(folder, tmp_path / "cache")
    assert not list((tmp_path / "cache").iterdir())


def test_a_second_process_waits_for_the_first(tmp_path, on_disk, monkeypatch):
    """It then finds the file, and reads nothing."""
    folder, cache = write_photos(tmp_path / "images"), tmp_path / "cache"
    whole = loaded(folder, cache).digest()
    (file,) = cache.glob("*.uint8")
    os.rename(file, file.with_suffix(".part"))
    real = fcntl.flock

    def finish_first(target, operation):
        file.with_suffix(".part").rename(file)
        return real(target, operation)

    monkeypatch.setattr(fcntl, "flock", finish_first)
    monkeypatch.setattr(images_module, "_read", lambda *_: pytest.fail("read again"))
    assert loaded(folder, cache).digest() == whole


def test_images_are_in_memory_once(tmp_path):
    """The tensor of a set shares the memory that its files were read into."""
    store = images_module.Store(10, (4, 4, 3))
    tensor = store.tensor()
    store.write(3, np.full((4, 4, 3), 7, np.uint8))
    assert (tensor[3].numpy() == 7).all()
    assert store.memory.ctypes.data % 64 == 0


@pytest.mark.parametrize("name", ["mnist_cnn", "cifar10_fast", "distillation"])
@pytest.mark.long
def test_weights_are_the_same_from_memory_and_from_disk(tmp_path, monkeypatch, name):
    """With the baselines, which must not copy a set either."""
    recipe, folder, found = load_recipe(name), write_photos(tmp_path / "images", 60), []
    taken = property(lambda split: pytest.fail("copied a split"))
    for place in ("memory", "disk"):
        monkeypatch.setattr(images_module, "fits_memory", lambda size, place=place: place == "memory")
        settings = {"data": str(folder), "cache_dir": str(tmp_path / "cache"), "image_size": 24, "baseline": True}
        config = smoke_config(recipe, tmp_path / place, smoke=False, batch_size=16, **settings)
        with monkeypatch.context() as patch:
            patch.setattr(Split, "inputs", taken)
            recipe.train(config)
        found.append(weights_sha256(keras.models.load_model(tmp_path / place / "model.keras")))
    assert found[0] == found[1]


# Serving.


def png_of_16_bits(path: pathlib.Path, pixels: np.ndarray, colour_type: int) -> None:
    """Pillow reads such colour files, and writes none."""

    def chunk(name: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    header = struct.pack(">IIBBBBB", pixels.shape[1], pixels.shape[0], 16, colour_type, 0, 0, 0)
    content = zlib.compress(b"".join(b"\0" + row.astype(">u2").tobytes() for row in pixels))
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", content) + chunk(b"IEND", b""))


def turned(orientation: int) -> Image.Exif:
    exif = Image.Exif()
    exif[0x010F], exif[0x0112] = "maker", orientation
    return exif


def write_all_modes(folder: pathlib.Path) -> None:
    """Images of all sizes and modes that training reads, as JPEG, PNG and other formats."""
    colour, random = photo(97, 61), np.random.default_rng(0)
    grey, clear = colour.convert("L"), photo(97, 61, 4)
    for width, height in ((28, 28), (420, 300), (61, 97), (33, 10), (5, 90), (1300, 900), (300, 2)):
        photo(width, height).save(folder / f"{width}x{height}.jpg")
        photo(width, height).save(folder / f"{width}x{height}.png")
    modes = {"L": grey, "RGBA": clear, "LA": clear.convert("LA"), "P": colour.convert("P"), "1": grey.convert("1")}
    for name, image in modes.items():
        image.save(folder / f"mode_{name}.png")
    for colours in (2, 4, 16):
        colour.quantize(colours).save(folder / f"palette_{colours}.png")
    colour.quantize(40).save(folder / "clear_palette.png", transparency=bytes(range(0, 240, 6)))
    grey.save(folder / "clear_grey.png", transparency=grey.getpixel((40, 30)))
    colour.save(folder / "clear_colour.png", transparency=colour.getpixel((3, 4)))
    grey.save(folder / "grey.jpg")
    colour.convert("CMYK").save(folder / "cmyk.jpg")
    photo(900, 700).convert("CMYK").save(folder / "large_cmyk.jpg")
    colour.save(folder / "progressive.jpg", progressive=True, subsampling=0)
    Image.fromarray(random.integers(0, 1010, (40, 50)).astype(np.uint16)).save(folder / "deep.png")
    for colour_type, channels in ((2, 3), (4, 2), (6, 4)):
        png_of_16_bits(folder / f"deep_{channels}.png", random.integers(0, 2**16, (20, 30, channels)), colour_type)
    for orientation in range(10):
        for suffix in ("jpg", "png"):
            colour.save(folder / f"turned_{orientation}.{suffix}", exif=turned(orientation))
    colour.save(folder / "turned_by_xmp.jpg", xmp=b'<x tiff:Orientation="6"/>')
    for suffix in ("gif", "bmp", "webp", "tif", "tga", "ppm", "jp2", "avif"):
        for mode in ("RGB", "L", "1", "P", "RGBA", "CMYK"):
            try:
                colour.convert(mode).save(folder / f"{mode}.{suffix}")
            except (OSError, ValueError):
                (folder / f"{mode}.{suffix}").unlink(missing_ok=True)  # This format has no such mode.


PIXEL_RANGE = (0.0, 1009.0)


@functools.cache
def serving(shape, pixel_range):
    """Decodes as a SavedModel does: in a graph."""
    decode = functools.partial(served_images.decoded, shape=tf.TensorShape(shape), pixel_range=pixel_range)
    return tf.function(decode, input_signature=[tf.TensorSpec([], tf.string)])


@pytest.mark.parametrize("shape", [(28, 28, 1), (32, 32, 3), (20, 33, 3)])
def test_a_served_image_has_the_pixels_of_training_or_is_refused(tmp_path, shape):
    write_all_modes(tmp_path)
    decode = serving(shape, PIXEL_RANGE)
    refused = set()
    for path in tmp_path.iterdir():
        expected = read_image(path, shape, PIXEL_RANGE)
        try:
            served = decode(tf.constant(path.read_bytes())).numpy()
        except tf.errors.InvalidArgumentError:
            refused.add(path.name if path.suffix in (".jpg", ".png") else path.suffix)
            continue
        assert served.dtype == np.uint8
        np.testing.assert_allclose(served.astype(int), expected.astype(int), atol=2, err_msg=path.name)
    assert refused == {"turned_by_xmp.jpg", ".gif", ".bmp", ".webp", ".tif", ".tga", ".ppm", ".jp2", ".avif"}


def test_a_damaged_file_is_not_served(tmp_path):
    photo(97, 61).save(tmp_path / "photo.jpg", exif=turned(6))
    photo(97, 61).save(tmp_path / "photo.png")
    decode = serving((32, 32, 3), PIXEL_RANGE)
    for name in ("photo.jpg", "photo.png"):
        content = (tmp_path / name).read_bytes()
        for size in (0, 1, 8, 20, 30, len(content) // 2):
            with pytest.raises((tf.errors.OpError, UnicodeDecodeError)):  # The message may quote the file.
                decode(tf.constant(content[:size]))


@pytest.mark.long
def test_the_range_of_deep_images_is_kept_with_the_model(tmp_path):
    """In result.json, for predict.py, and in exports."""
    for name, level in (("cat", 200), ("dog", 1009)):
        (tmp_path / "images" / name).mkdir(parents=True)
        for number in range(30):
            pixels = np.random.default_rng(number).integers(0, level + 1, (28, 28)).astype(np.uint16)
            pixels[0, 0] = level
            Image.fromarray(pixels).save(tmp_path / "images" / name / f"{number}.png")
    recipe = load_recipe("mnist_cnn")
    recipe.train(smoke_config(recipe, tmp_path / "run", data=str(tmp_path / "images"), epochs=1))
    result, model = artefacts.load_run(tmp_path / "run")
    assert result["pixel_range"] == [0, 1009]
    description = artefacts.describe(result, model)
    export.save(model, description, "saved_model", tmp_path / "saved")
    files = sorted((tmp_path / "images").rglob("*.png"))[::10]
    serve = tf.saved_model.load(tmp_path / "saved").signatures["serving_default"]
    served = serve(image_bytes=tf.constant([file.read_bytes() for file in files]))["probabilities"]
    _, inputs = predict.read_images(json.loads(json.dumps(description)), [(str(file), file) for file in files])
    assert inputs.max() == 255
    np.testing.assert_allclose(served, artefacts.keras_answer(model)(inputs), atol=1e-5)


# Sizes.


@pytest.mark.parametrize("name", RECIPES)
def test_each_recipe_builds_at_each_size(name):
    """From the smallest that its pooling allows; below, the limit is named."""
    recipe = load_recipe(name)
    least = {"mnist_cnn": 10, "pruning": 10, "cifar10_fast": 9}.get(name, 18)
    with pytest.raises(UserError, match=f"^--image-size: {least - 1} must be at least {least} and less than 4,097"):
        recipe.Config(image_size=least - 1)
    for size in (least, 29, 48, 96):
        config = recipe.Config(image_size=size)
        images = np.random.default_rng(0).integers(0, 256, (20, size, size, 3)).astype(np.uint8)
        split = recipe.training_batches.__globals__["Split"].from_arrays(
            images, np.eye(2, dtype=np.float32)[[0, 1] * 10]
        )
        data = types.SimpleNamespace(train=split, class_names=("cat", "dog"))
        model = recipe.build_model(config, data)
        assert model(images[:2]).shape == (2, 2)
    with pytest.raises(UserError, match=r"^--image-size: "):
        recipe.Config(image_size=5000)


@pytest.mark.parametrize("name", RECIPES)
@pytest.mark.long
def test_each_recipe_trains_at_another_size(tmp_path, name):
    recipe, folder = load_recipe(name), write_photos(tmp_path / "images", 40)
    settings = {"data": str(folder), "image_size": 41, "epochs": 1, "baseline": True}
    metrics = recipe.train(smoke_config(recipe, tmp_path / "run", **settings))
    assert 0 <= metrics["accuracy"] <= 1
    assert keras.models.load_model(tmp_path / "run" / "model.keras").input_shape == (None, 41, 41, 3)


def test_a_part_of_a_set_has_each_class(tmp_path):
    write_photos(tmp_path, 30)
    for path in sorted((tmp_path / "dog").iterdir())[4:]:
        path.unlink()
    split = load_images(CIFAR10, SharedConfig(data=str(tmp_path)), SIZE).train
    rows = some_of_each_class(split, 4)
    assert len(rows) < 8
    assert set(split.targets.numpy()[rows].argmax(1)) == {0, 1}
    assert len(some_of_each_class(split, 1000)) == len(split)
