"""Writes a trained model for another program, and proves that it answers there as it does here.

    python scripts/export.py runs/my_run --format litert
    python scripts/export.py runs/my_run --format litert --quantize int8
    python scripts/export.py runs/my_run --format saved_model -o /srv/models/digits/1

Class names and the handling of raw inputs go along. 1,000 inputs of the run's own data, or all where there are fewer,
go through the new file and through the Keras model; when their answers differ by more than the tolerance, or too many
name another class, nothing is written and the exit code is 3; what an earlier export left there stays.
"""

import base64
import contextlib
import dataclasses
import io
import json
import math
import os
import pathlib
import re
import shutil
import sys
import tempfile
import warnings
import zipfile
from collections.abc import Callable
from typing import Any

from common import artefacts
from common.cli import Parser, UserError, run_script
from common.data import Data
from common.records import load_program, write_file
from common.startup import quiet_native_stderr

import keras
import numpy as np
import tensorflow as tf

ROOT = pathlib.Path(__file__).parent.parent
SUFFIXES = {"keras": ".keras", "saved_model": "", "litert": ".tflite", "onnx": ".onnx"}
QUANTIZATIONS = dict.fromkeys(SUFFIXES, ("none",))
QUANTIZATIONS |= {"keras": ("none", "int8"), "litert": ("none", "dynamic", "float16", "int8")}
COMPARED, EXAMPLES = 1000, 500  # inputs that are compared; inputs that show int8 how large the numbers inside become
# How far answers may be from the Keras model's, by quantization: fewer bits, farther off.
TOLERANCES = {"none": 1e-3, "float16": 1e-2, "dynamic": 0.2, "int8": 0.5}


def main() -> None:
    parser = Parser(__doc__)
    parser.add_argument("run_dir", type=pathlib.Path, help="folder of a finished run")
    parser.add_argument("--format", required=True, choices=SUFFIXES, help="what to write")
    parser.add_argument("-o", "--output", type=pathlib.Path, help="left out: in the folder exported of the run")
    parser.add_argument("--data-dir", default="", help="folder of prepared TFDS data, where it is not the run's")
    parser.add_argument("--quantize", choices=TOLERANCES, default="none", help="fewer bits; int8 also of keras")
    parser.add_argument("--tolerance", type=float, help=f"largest difference allowed (default: {TOLERANCES})")
    arguments = parser.parse_args()
    result, model = artefacts.load_run(arguments.run_dir)
    folder = arguments.run_dir / "exported"
    form, quantization = arguments.format, arguments.quantize
    if quantization not in QUANTIZATIONS[form]:
        raise UserError(f"--quantize {quantization}: not for {form}; give --format litert")
    name = result["recipe"] if quantization == "none" else f"{result['recipe']}-{quantization}"
    path = arguments.output or folder / (name + SUFFIXES[form])
    if path.resolve() == (arguments.run_dir / "model.keras").resolve():
        raise UserError(f"-o {path}: is the run's own model; name another file")
    if arguments.tolerance is not None and not 0 <= arguments.tolerance < math.inf:
        raise UserError(f"--tolerance {arguments.tolerance}: give a number from 0")
    data = run_data(result, arguments.data_dir)
    inputs, (examples, _) = first_inputs(data, COMPARED), data.train.arrays(slice(EXAMPLES))
    tolerance = TOLERANCES[quantization] if arguments.tolerance is None else arguments.tolerance
    parity = export(in_float32(model), result, form, path, inputs, tolerance, quantization, examples)
    same = f"largest difference {parity['largest_difference']:.2g}"
    if result["class_names"]:
        same += f", {parity['equal_answers']:.2%} equal answers"
    print(f"parity with the Keras model: {parity['inputs']:,} inputs, {same}")
    if not parity["passed"]:
        stays = "; what is there is of an earlier export" if path.exists() else ""
        print(f"parity failed, tolerance {tolerance:g}: {path} is not written{stays}", file=sys.stderr)
        sys.exit(3)
    print(f"exported: {path}")


def export(
    model: Any,
    result: dict[str, Any],
    form: str,
    path: pathlib.Path,
    inputs: Any,
    tolerance: float,
    quantization: str = "none",
    examples: Any = None,
) -> dict[str, Any]:
    """Writes a run's model to `path`, or leaves that as it was when the parity check fails.

    Returns:
        What the check found; it is also written next to the artefact, as `NAME.parity.json`.

    Raises:
        UserError: `path` can't be written, or does not suit the form.
    """
    suffix = SUFFIXES[form]
    if suffix and path.suffix != suffix:
        raise UserError(f"{path}: the name must end in {suffix}")
    if suffix and path.is_dir():
        raise UserError(f"{path}: is a folder; remove it or name a file")
    if not suffix and path.exists() and not is_saved_model(path):
        raise UserError(f"{path}: is there, and not just a SavedModel; name a new folder")
    made = [folder for folder in path.parents if not folder.exists()]
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent) as folder:
            part = pathlib.Path(folder, path.name)
            description = artefacts.describe(result, model)
            save(model, description, form, part, quantization, examples)
            parity = {"format": form, "quantization": quantization, "weights_sha256": result["weights_sha256"]}
            answers = artefacts.keras_answer(model), artefacts.load(part).answer
            parity |= compare(*answers, inputs, tolerance, description["task"]["output"])
            if parity["passed"]:
                report = path.with_name(path.name + ".parity.json")
                write_file(pathlib.Path(folder, report.name), json.dumps(parity, indent=2) + "\n")
                if path.is_dir():
                    shutil.rmtree(path)
                os.replace(part, path)
                os.replace(pathlib.Path(folder, report.name), report)
    except (OSError, tf.errors.OpError) as error:  # TensorFlow writes SavedModels.
        where, reason = getattr(error, "filename", None), getattr(error, "strerror", None) or "can't be written"
        where = where if where and pathlib.Path(where) in path.parents else path  # And not a temporary folder.
        raise UserError(f"{where}: {reason}; make room there or choose another place") from error
    finally:
        for parent in made:
            with contextlib.suppress(OSError):  # It holds the artefact.
                parent.rmdir()
    return parity


def save(
    model: keras.Model,
    description: dict,
    form: str,
    path: pathlib.Path,
    quantization: str = "none",
    examples: Any = None,
) -> None:
    """Writes a run's model, with its description, to a new file or folder.

    LiteRT and ONNX can't split texts into words: their files hold the part of the model after its tokenizer, and the
    tokenizer as a Keras model.

    Args:
        model: as the run saved it.
        description: see `artefacts.describe`.
        form: one of `SUFFIXES`.
        path: ends in the suffix of the form.
        quantization: one of `QUANTIZATIONS` of the form. dynamic: weights in int8, and the inputs of a layer while it
            is computed; float16: weights in float16; int8: all in int8, in Keras only in dense and embedding layers.
        examples: inputs [n, *shape] that show the range of activations, for int8 in LiteRT.

    Raises:
        UserError: a package is missing, or the format has no operation for a part of the model.
    """
    notes = {artefacts.DESCRIPTION: json.dumps(description).encode()}
    if form == "keras":
        (_with_int8_weights(model) if quantization == "int8" else model).save(path)
    elif form == "saved_model":
        _save_for_serving(model, path, description["task"]["input"] == "image")
    else:
        network = artefacts.without_class_names(model)
        if description["dtype"] == "string" and len(network.layers) == 3:
            _, tokenizer, network = network.layers
            with tempfile.TemporaryDirectory() as folder:
                tokenizer.save(file := pathlib.Path(folder, artefacts.TOKENIZER))
                notes[artefacts.TOKENIZER] = file.read_bytes()
            examples = examples if examples is None else artefacts.keras_answer(tokenizer)(examples)
        # The converters tell of their progress, and tf2onnx 1.17 asks NumPy for names that it no longer has.
        with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings(), quiet_native_stderr():
            warnings.simplefilter("ignore")
            if form == "onnx":
                artefacts.optional_package("tf2onnx")
                _free_of_tensors(network)
            settings = _converter_settings(quantization, examples) if form == "litert" else {}
            failed = None
            settings |= {"input_signature": [artefacts.signature(network)]}
            try:
                network.export(path, format=form, verbose=False, **settings)
            except Exception as error:  # The converters have errors of many types.
                failed = error
        if isinstance(failed, OSError):
            raise failed
        if failed:  # Only here, where what the converter has printed is dropped.
            reason = str(failed).strip().partition("\n")[0].rpartition("): ")[2]
            raise UserError(f"{form} has no operation for a part of the model ({reason}); choose another --format")
    if form == "saved_model":
        (path / "assets.extra").mkdir()
        (path / "assets.extra" / artefacts.DESCRIPTION).write_bytes(notes[artefacts.DESCRIPTION])
    elif form == "onnx":
        onnx = artefacts.optional_package("onnx")
        graph = onnx.load(path)
        for name, note in notes.items():
            graph.metadata_props.add(key=name, value=base64.b64encode(note).decode())
        onnx.save(graph, path)
    else:
        with zipfile.ZipFile(path, "a") as archive:
            for name, note in notes.items():
                archive.writestr(name, note)


def _converter_settings(quantization: str, examples: Any) -> dict[str, Any]:
    # Without the operations of TensorFlow that Keras lets in: few runtimes have them.
    operations = tf.lite.OpsSet.TFLITE_BUILTINS_INT8 if quantization == "int8" else tf.lite.OpsSet.TFLITE_BUILTINS
    types = [tf.float16] if quantization == "float16" else []
    return {
        "target_spec": {"supported_ops": [operations], "supported_types": types},
        "optimizations": [] if quantization == "none" else [tf.lite.Optimize.DEFAULT],
        "representative_dataset": (lambda: ([each[None]] for each in examples)) if quantization == "int8" else None,
    }


def _free_of_tensors(model: keras.Model) -> None:
    """Turns the constants of `Normalization` into NumPy arrays.

    They are tensors from outside the graph of the model, which tf2onnx 1.17 takes for inputs of the model.
    """
    for layer in model.layers:
        if isinstance(layer, keras.layers.Normalization):
            layer.mean, layer.variance = map(keras.ops.convert_to_numpy, (layer.mean, layer.variance))


def _with_int8_weights(model: keras.Model) -> keras.Model:
    """A copy whose dense and embedding layers keep their weights in int8, with a scale for each column."""
    copy = keras.models.clone_model(model)
    copy.set_weights(model.get_weights())
    layers = list(copy.layers)
    for layer in layers:
        if isinstance(layer, keras.Model):
            layers += layer.layers
        elif isinstance(layer, keras.layers.Dense | keras.layers.Embedding):
            layer.quantize("int8")
    return copy


def in_float32(model: keras.Model) -> keras.Model:
    """The model with the precision that its weights have; with fewer bits to calculate, few runtimes know how."""
    if "mixed_" not in (described := model.to_json()):
        return model
    # Not every "bfloat16": it may be a word of a vocabulary.
    same = keras.models.model_from_json(re.sub(r'("(?:name|dtype)": )"(mixed_)?b?float16"', r'\1"float32"', described))
    with tempfile.TemporaryDirectory() as folder:
        # From a file, as `set_weights` leaves the mean and the deviation that `Normalization` calculates with.
        model.save_weights(file := pathlib.Path(folder, "model.weights.h5"))
        same.load_weights(file)
    return same


def _decoded(file: tf.Tensor, shape: tf.TensorShape) -> tf.Tensor:
    """The bytes of a picture file as uint8 of `shape`, as `user_files.read_image` has it.

    But for a few of 255 steps in decoding and rounding, and that TensorFlow knows nothing of EXIF's rotation, nor of
    what is transparent. `tf.image.resize_with_pad` rounds sizes and margins otherwise, which can move all by a pixel.
    """
    height, width, channels = shape
    image = tf.io.decode_image(file, channels, expand_animations=False)
    place, size = tf.constant([height, width], tf.float64), tf.cast(tf.shape(image)[:2], tf.float64)
    inside = tf.maximum(tf.round(size * tf.reduce_min(place / size)), 1)
    top, left = tf.unstack(tf.cast(tf.round((place - inside) / 2), tf.int32))
    image = tf.image.resize(image, tf.cast(inside, tf.int32), tf.image.ResizeMethod.BICUBIC, antialias=True)
    image = tf.cast(tf.round(tf.clip_by_value(image, 0, 255)), tf.uint8)
    return tf.image.pad_to_bounding_box(image, top, left, height, width)


def _save_for_serving(model: keras.Model, path: pathlib.Path, pictures: bool) -> None:
    """A SavedModel with two signatures: `serving_default` takes what people send, `inputs` what the model takes.

    They differ for pictures, which people send as files. The name of that input ends in `_bytes`, as TensorFlow
    Serving wants it for values in base64.
    """
    network = keras.Model(artefacts.by_name(model.input), artefacts.by_name(model.output))
    taken = artefacts.signature(model)

    def answer(inputs: Any) -> dict[str, tf.Tensor]:
        outputs = network(inputs, training=False)
        return outputs if isinstance(outputs, dict) else {"value": outputs}

    def answer_files(files: tf.Tensor) -> dict[str, tf.Tensor]:
        one = tf.TensorSpec(taken.shape[1:], tf.uint8)
        return answer(tf.map_fn(lambda file: _decoded(file, one.shape), files, fn_output_signature=one))

    archive = keras.export.ExportArchive()
    archive.track(network)
    archive.add_endpoint("inputs", answer, [taken])
    sent = (answer_files, [tf.TensorSpec([None], tf.string, "image_bytes")]) if pictures else (answer, [taken])
    archive.add_endpoint("serving_default", *sent)
    archive.write_out(path, verbose=False)


def is_saved_model(folder: pathlib.Path) -> bool:
    """Whether a folder holds a SavedModel and nothing else."""
    names = {each.name for each in folder.glob("*")}
    return {"saved_model.pb"} <= names <= {"saved_model.pb", "fingerprint.pb", "variables", "assets", "assets.extra"}


def compare(expected: Callable, answer: Callable, inputs: Any, tolerance: float, output: str) -> dict[str, Any]:
    """How the answers of two models differ, of which `output` is the kind.

    Numbers may be of any size, so that their difference counts in shares of the largest. Of the classes that the Keras
    model names, for a mask in each pixel, at least nine of ten must be the same, or fewer where it names different
    ones: half way from what always the commonest would reach to all.
    """
    pairs = list(zip(tf.nest.flatten(expected(inputs)), tf.nest.flatten(answer(inputs)), strict=True))
    difference, equal, enough = float(np.max([_difference(*pair) for pair in pairs])), [], 0.0
    for wanted, found in pairs:
        if output in ("class", "mask"):
            wanted, found = np.argmax(wanted, axis=-1), np.argmax(found, axis=-1)
            # Where the model is sure of nothing, all differences are small; and always to say the same is not enough.
            enough = min(0.9, (1 + np.bincount(wanted.ravel()).max() / wanted.size) / 2)
        equal.append(np.mean(found == wanted if wanted.dtype.kind == "O" else np.isclose(found, wanted)))
    return {
        "inputs": len(pairs[0][0]),
        "largest_difference": difference,
        "equal_answers": float(np.mean(equal)),
        # Not so where an answer is no number.
        "passed": bool(difference <= tolerance and np.mean(equal) >= enough),
    }


def _difference(wanted: np.ndarray, found: np.ndarray) -> float:
    if wanted.dtype == object:  # Texts.
        return float(np.any(found != wanted))
    difference = np.subtract(found, wanted, dtype=np.result_type(wanted, np.float32))
    return float(np.max(np.abs(difference)) / max(1.0, np.abs(wanted).max()))


def run_data(result: dict[str, Any], data_dir: str = "") -> Data:
    """The data that a run was trained on.

    Raises:
        UserError: they are not to be had, or have changed.
    """
    recipe = load_program(ROOT / "recipes" / f"{result['recipe']}.py")
    source = result["data"]["source"]
    config = recipe.Config(**result["config"])
    config = dataclasses.replace(
        config,
        data=config.data if source == "files" else source.replace("generated", "auto"),
        data_dir=data_dir or config.data_dir,
        quiet=True,
    )
    data = recipe.load_data(config)
    if data.digest() != result["data"]["digest"]:
        raise UserError(f"{data.name}: not the data that the run was trained on; bring those back")
    return data


def first_inputs(data: Data, count: int) -> Any:
    """The first inputs of test, and where these are too few of validation and train."""
    parts = [split.arrays(slice(count))[0] for split in (data.test, data.validation, data.train)]
    return tf.nest.map_structure(lambda *each: np.concatenate(each)[:count], *parts)


if __name__ == "__main__":
    run_script(main)
