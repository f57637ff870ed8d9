"""Measures how fast large sets of images are read, how much memory that takes, and how fast training is from a file.

    python tools/measure_images.py photos --count 120000

Generates JPEG files of 256x256 pixels in a folder, unless it exists, and then measures, in processes of their own:

- decoding by Pillow alone, in as many threads as there are cores;
- the first run's reading, at --image-size, into a file; the peak of anonymous memory; the same of a second run;
- training of cifar10_cnn on a subset, from memory and from a file, and whether the weights are equal.

Run it on an idle machine.
"""

import concurrent.futures
import json
import os
import pathlib
import re
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from typing import Any

from common import images
from common.cli import Parser, run_script
from common.records import load_program, weights_sha256

import keras
import numpy as np
import psutil
from PIL import Image

ROOT = pathlib.Path(__file__).parent.parent
SUBSET = 3000  # images that are trained on


def main() -> None:
    parser = Parser(__doc__)
    parser.add_argument("folder", type=pathlib.Path, help="folder of the images")
    parser.add_argument("--count", type=int, default=10_000, help="images to generate (default: 10,000)")
    parser.add_argument("--image-size", type=int, default=96, help="size to which they are resized (default: 96)")
    parser.add_argument("--part", choices=PARTS, help="measure this part only")
    parser.add_argument("--cache-dir", default="", help="folder for the file of images; default: that of FOLDER")
    arguments = parser.parse_args()
    if arguments.part:
        print(json.dumps(PARTS[arguments.part](arguments)))
        return
    if not arguments.folder.exists():
        generate(arguments.folder, arguments.count)
    with tempfile.TemporaryDirectory(dir=arguments.cache_dir or arguments.folder.parent) as cache:
        words = [sys.executable, __file__, str(arguments.folder), "--image-size", str(arguments.image_size)]
        for title, part in (("Pillow", "decode"), ("first run", "read"), ("second run", "read"), ("training", "train")):
            output = subprocess.run([*words, "--part", part, "--cache-dir", cache], capture_output=True, text=True)
            if output.returncode:
                sys.exit(output.stderr)
            print(f"{title}: {output.stdout.splitlines()[-1]}", flush=True)


def generate(folder: pathlib.Path, count: int) -> None:
    """Writes photo-like images: smooth colours, sharp shapes and a little noise; a class per kind of shape."""
    noise = np.random.default_rng(0).integers(-12, 13, (512, 512, 3))

    def write(number: int) -> None:
        random = np.random.default_rng(number)
        place = folder / f"class{number % 10}"
        place.mkdir(parents=True, exist_ok=True)
        coarse = Image.fromarray(random.integers(0, 256, (9, 9, 3), np.uint8))
        pixels = np.asarray(coarse.resize((256, 256), Image.Resampling.BICUBIC)).astype(np.int16)
        top, left = random.integers(0, 150, 2)
        pixels[top : top + 20 + 8 * (number % 10), left : left + 100] += 60
        down, right = random.integers(0, 256, 2)
        pixels += noise[down : down + 256, right : right + 256].astype(np.int16)
        Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(place / f"{number:06}.jpg", quality=85)

    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(write, range(count)))


def decode(arguments: Any) -> dict[str, float]:
    """The speed of Pillow: files that are opened and decoded, no more."""
    files = sorted(arguments.folder.rglob("*.jpg"))
    files = files[:: max(1, len(files) // 8000)]

    def load(chunk: list[pathlib.Path]) -> None:
        for file in chunk:
            with Image.open(file) as image:
                image.load()

    began = time.perf_counter()
    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(load, [files[start : start + 32] for start in range(0, len(files), 32)]))
    return {"images_per_second": len(files) / (time.perf_counter() - began)}


def read(arguments: Any) -> dict[str, Any]:
    """Reads all images into a file, or finds that file; up to the first batch that a training would take."""
    peak = [anonymous_memory()]
    ended = threading.Event()

    def watch() -> None:
        while not ended.wait(0.05):
            peak[0] = max(peak[0], anonymous_memory())

    threading.Thread(target=watch, daemon=True).start()
    recipe, size = load_program(ROOT / "recipes" / "cifar10_cnn.py"), arguments.image_size
    config = recipe.Config(data=str(arguments.folder), image_size=size, cache_dir=arguments.cache_dir)
    began = time.perf_counter()
    data = recipe.load_data(config)
    seconds = time.perf_counter() - began
    data.digest()
    next(iter(recipe.training_batches(data.train, 256, 0)))
    ended.set()
    return {
        "images_per_second": sum(data.counts().values()) / seconds,
        "seconds": seconds,
        "seconds_since_start": time.time() - process_start(),
        "peak_anonymous_bytes": peak[0],
        "kept_in": type(data.train.stored_inputs).__name__,
    }


def train(arguments: Any) -> dict[str, Any]:
    """Trains on the same images from memory and from a file, in turns: speed and weights."""
    recipe = load_program(ROOT / "recipes" / "cifar10_cnn.py")
    speeds, weights = {"memory": [], "file": []}, {}
    with tempfile.TemporaryDirectory(dir=arguments.cache_dir) as folder:
        for number, file in enumerate(sorted(arguments.folder.rglob("*.jpg"))):
            if number % 10 == 0 and number < 10 * SUBSET:
                place = pathlib.Path(folder, "images", file.parent.name)
                place.mkdir(parents=True, exist_ok=True)
                (place / file.name).symlink_to(file.absolute())
        for turn in range(3):
            for kind, rates in speeds.items():
                images.fits_memory = lambda size, kind=kind: kind == "memory"
                run = pathlib.Path(folder, f"{kind}{turn}")
                config = recipe.Config(
                    data=str(pathlib.Path(folder, "images")), image_size=arguments.image_size, epochs=2,
                    cache_dir=arguments.cache_dir, run_dir=str(run), baseline=False, deterministic=True, quiet=True,
                )  # fmt: skip
                recipe.train(config)
                rates.append(json.loads((run / "result.json").read_text())["examples_per_second"])
                weights[kind] = weights_sha256(keras.models.load_model(run / "model.keras"))
    medians = {kind: statistics.median(rates) for kind, rates in speeds.items()}
    return {"images_per_second": speeds, "ratio": medians["file"] / medians["memory"],
            "equal_weights": weights["file"] == weights["memory"]}  # fmt: skip


def anonymous_memory() -> int:
    """Returns the bytes of memory of this process that no file stands for."""
    status = pathlib.Path("/proc/self/status").read_text()
    return 1024 * int(re.search(r"RssAnon:\s+(\d+)", status)[1])


def process_start() -> float:
    """Returns when this process started, in seconds since 1970."""
    return psutil.Process().create_time()


PARTS = {"decode": decode, "read": read, "train": train}

if __name__ == "__main__":
    run_script(main)
