"""Exports a trained model, and checks that the exported file gives the same predictions.

    python scripts/export.py runs/my_run --format litert
    python scripts/export.py runs/my_run --format litert --quantize int8
    python scripts/export.py runs/my_run --format saved_model -o /srv/models/digits/1

The export includes the class names and the preprocessing of raw inputs. Up to 1,000 examples of the run's data are
passed to the exported file and to the Keras model. If their predictions differ by more than the tolerance, or if too
many predicted classes differ, nothing is written, an earlier export is kept, and the exit code is 3.
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
from collections.abc import Callable, Sequence
from typing import Any

from common import artefacts
from common.cli import Parser, UserError, run_script
from common.data import Data
from common.records import load_program, write_file
from common.served_images import decoded
from common.startup import quiet_native_stderr

import keras
import numpy as np
import tensorflow as tf

ROOT = pathlib.Path(__file__).parent.parent
SUFFIXES = {"keras": ".keras", "saved_model": "", "litert": ".tflite", "onnx": ".onnx"}
QUANTIZATIONS = dict.fromkeys(SUFFIXES, ("none",))
QUANTIZATIONS |= {"keras": ("none", "int8"), "litert": ("none", "dynamic", "float16", "int8")}
COMPARED, EXAMPLES = 1000, 500  # inputs for the parity check; inputs that calibrate int8
# Largest accepted difference to the predictions of the Keras model: fewer bits, larger error.
TOLERANCES = {"none": 1e-3, "float16": 1e-2, "dynamic": 0.2, "int8": 0.5}


def main() -> None:
    parser = Parser(__doc__)
    parser.add_argument("run_dir", type=pathlib.Path, help="folder of a finished run")
    parser.add_argument("--format", required=True, choices=SUFFIXES, help="format of the exported file")
    parser.add_argument("-o", "--output", type=pathlib.Path, help="default: in the folder exported of the run")
    parser.add_argument("--data-dir", default="", help="folder of prepared TFDS data, if not that of the run")
    parser.add_argument("--quantize", choices=TOLERANCES, default="none", help="for litert; int8 also for keras")
    parser.add_argument("--tolerance", type=float, help=f"largest accepted difference (default: {TOLERANCES})")
    arguments = parser.parse_args()
    result, model = artefacts.load_run(arguments.run_dir)
    folder = arguments.run_dir / "exported"
    form, quantization = arguments.format, arguments.quantize
    if quantization not in QUANTIZATIONS[form]:
        raise UserError(f"--quantize {quantization}: not supported for {form}; use --format litert")
    name = result["recipe"] if quantization == "none" else f"{result['recipe']}-{quantization}"
    path = arguments.output or folder / (name + SUFFIXES[form])
    if path.resolve() == (arguments.run_dir / "model.keras").resolve():
        raise UserError(f"-o {path}: is the run's own model; name another file")
    if arguments.tolerance is not None and not 0 <= arguments.tolerance < math.inf:
        raise UserError(f"--tolerance {arguments.tolerance}: give a finite number, at least 0")
    data = run_data(result, arguments.data_dir)
    inputs, (examples, _) = first_inputs(data, COMPARED), data.train.arrays(slice(EXAMPLES))
    tolerance = TOLERANCES[quantization] if arguments.tolerance is None else arguments.tolerance
    parity = export(in_float32(model), result, form, path, inputs, tolerance, quantization, examples)
    agreement = f"largest difference {parity['largest_difference']:.2g}"
    if result["class_names"]:
        agreement += f", {parity['equal_answers']:.2%} equal answers"
    print(f"parity with the Keras model: {parity['inputs']:,} inputs, {agreement}")
    if not parity["passed"]:
        stays = "; the file there is from an earlier export" if path.exists() else ""
        print(f"parity failed (tolerance {tolerance:g}): {path} is not written{stays}", file=sys.stderr)
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
    """Writes the model of a run to `path`. If the parity check fails, `path` is not changed.

    Returns:
        The parity report; it is also written next to the artefact, as `NAME.parity.json`.

    Raises:
        UserError: `path` can't be written, or does not fit the format.
    """
    suffix = SUFFIXES[form]
    if suffix and path.suffix != suffix:
        raise UserError(f"{path}: the name must end in {suffix}")
    if suffix and path.is_dir():
        raise UserError(f"{path}: is a folder; remove it or name a file")
    if not suffix and path.exists() and not is_saved_model(path):
        raise UserError(f"{path}: exists and is not a SavedModel; name a new folder")
    created = [folder for folder in path.parents if not folder.exists()]
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent) as folder:
            temporary = pathlib.Path(folder, path.name)
            description = artefacts.describe(result, model)
            save(model, description, form, temporary, quantization, examples)
            parity = {"format": form, "quantization": quantization, "weights_sha256": result["weights_sha256"]}
            models = artefacts.keras_answer(model), artefacts.load(temporary).answer
            parity |= compare(*models, inputs, tolerance, description["task"]["output"])
            if parity["passed"]:
                report = path.with_name(path.name + ".parity.json")
                write_file(pathlib.Path(folder, report.name), json.dumps(parity, indent=2) + "\n")
                if path.is_dir():
                    shutil.rmtree(path)
                os.replace(temporary, path)
                os.replace(pathlib.Path(folder, report.name), report)
    except (OSError, tf.errors.OpError) as error:  # TensorFlow raises OpError for SavedModels.
        where, reason = getattr(error, "filename", None), getattr(error, "strerror", None) or "can't be written"
        where = where if where and pathlib.Path(where) in path.parents else path  # Never name the temporary folder.
        raise UserError(f"{where}: {reason}; free some space there, or choose another place") from error
    finally:
        for parent in created:
            with contextlib.suppress(OSError):  # The folder is not empty: the export succeeded.
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
    """Writes a model and its description to a new file or folder.

    LiteRT and ONNX have no strings, and LiteRT has no float64. For texts and tables, the file holds the network that
    follows the encoder, such as a tokenizer, plus the encoder as a Keras model.

    Args:
        model: the model as saved by the run.
        description: see `artefacts.describe`.
        form: a key of `SUFFIXES`.
        path: must end in the suffix of the format.
        quantization: one of `QUANTIZATIONS[form]`. `dynamic`: int8 weights, activations quantized at inference time;
            `float16`: float16 weights; `int8`: int8 weights and activations, in Keras only dense and embedding layers.
        examples: inputs [n, *shape] that calibrate the range of activations, for int8 in LiteRT.

    Raises:
        UserError: a package is missing, or the format does not support an operation of the model.
    """
    metadata = {artefacts.DESCRIPTION: json.dumps(description).encode()}
    if form == "keras":
        (_with_int8_weights(model) if quantization == "int8" else model).save(path)
    elif form == "saved_model":
        _save_for_serving(model, path, description["task"]["input"] == "image", description["pixel_range"])
    else:
        network = artefacts.without_class_names(model)
        parts = [layer for layer in network.layers if isinstance(layer, keras.Model)]
        if len(parts) == 2 and description["task"]["input"] in ("text", "table"):
            inputs, network = network.input, parts[1]
            encoder = keras.Model(inputs, network._inbound_nodes[-1].input_tensors[0])
            with tempfile.TemporaryDirectory() as folder:
                encoder.save(file := pathlib.Path(folder, artefacts.ENCODER))
                metadata[artefacts.ENCODER] = file.read_bytes()
            examples = examples if examples is None else artefacts.keras_answer(encoder)(examples)
            network = in_float32(network, "float64")
        # The converters print their progress, and tf2onnx 1.17 uses names that NumPy has removed.
        with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings(), quiet_native_stderr():
            warnings.simplefilter("ignore")
            if form == "onnx":
                artefacts.optional_package("tf2onnx")
                _free_of_tensors(network)
            settings = _converter_settings(quantization, examples) if form == "litert" else {}
            failure = None
            settings |= {"input_signature": [artefacts.signature(network)]}
            try:
                network.export(path, format=form, verbose=False, **settings)
            except Exception as error:  # The converters raise many types of exceptions.
                failure = error
        if isinstance(failure, OSError):
            raise failure
        if failure:  # Not inside the block above, which redirects the output.
            reason = str(failure).strip().partition("\n")[0].rpartition("): ")[2]
            raise UserError(f"{form} does not support an operation of the model ({reason}); choose another --format")
    if form == "saved_model":
        (path / "assets.extra").mkdir()
        (path / "assets.extra" / artefacts.DESCRIPTION).write_bytes(metadata[artefacts.DESCRIPTION])
    elif form == "onnx":
        onnx = artefacts.optional_package("onnx")
        graph = onnx.load(path)
        for name, content in metadata.items():
            graph.metadata_props.add(key=name, value=base64.b64encode(content).decode())
        onnx.save(graph, path)
    else:
        with zipfile.ZipFile(path, "a") as archive:
            for name, content in metadata.items():
                archive.writestr(name, content, zipfile.ZIP_DEFLATED)  # An encoder of many columns is mostly text.


def _converter_settings(quantization: str, examples: Any) -> dict[str, Any]:
    # Exclude TensorFlow operations, which Keras allows by default: few runtimes support them.
    operations = tf.lite.OpsSet.TFLITE_BUILTINS_INT8 if quantization == "int8" else tf.lite.OpsSet.TFLITE_BUILTINS
    types = [tf.float16] if quantization == "float16" else []
    return {
        "target_spec": {"supported_ops": [operations], "supported_types": types},
        "optimizations": [] if quantization == "none" else [tf.lite.Optimize.DEFAULT],
        "representative_dataset": (lambda: ([row[None]] for row in examples)) if quantization == "int8" else None,
    }


def _free_of_tensors(model: keras.Model) -> None:
    """Converts the mean and variance of `Normalization` layers to NumPy arrays.

    As tensors from outside the model's graph, tf2onnx 1.17 would treat them as inputs of the model.
    """
    for layer in model.layers:
        if isinstance(layer, keras.layers.Normalization):
            layer.mean, layer.variance = map(keras.ops.convert_to_numpy, (layer.mean, layer.variance))


def _with_int8_weights(model: keras.Model) -> keras.Model:
    """Returns a copy of the model with int8 weights in dense and embedding layers, and a scale per column."""
    copy = keras.models.clone_model(model)
    copy.set_weights(model.get_weights())
    layers = list(copy.layers)
    for layer in layers:
        if isinstance(layer, keras.Model):
            layers += layer.layers
        elif isinstance(layer, keras.layers.Dense | keras.layers.Embedding):
            layer.quantize("int8")
    return copy


def in_float32(model: keras.Model, dtype: str = "mixed_b?float16") -> keras.Model:
    """Converts layers of a dtype, a regular expression, to float32, since few runtimes support mixed precision."""
    if not re.search(f'"{dtype}"', config := model.to_json()):
        return model
    # Only names and dtypes: "bfloat16" may also be a word in a vocabulary.
    config = re.sub(rf'("(?:name|dtype)": )"({dtype}|b?float16)"', r'\1"float32"', config)
    copy = keras.models.model_from_json(config)
    with tempfile.TemporaryDirectory() as folder:
        # Through a file: `set_weights` does not update the constants that `Normalization` derives from its weights.
        model.save_weights(file := pathlib.Path(folder, "model.weights.h5"))
        copy.load_weights(file)
    return copy


def _save_for_serving(model: keras.Model, path: pathlib.Path, images: bool, pixel_range: Sequence[float]) -> None:
    """Writes a SavedModel with two signatures: `serving_default` for clients, `inputs` for the model's own inputs.

    They differ only for images: `serving_default` takes encoded image files. Its input name ends in `_bytes`, because
    TensorFlow Serving requires this suffix for base64 values. Several inputs have `artefacts.served_names`.
    """
    network = keras.Model(artefacts.by_name(model.input), artefacts.by_name(model.output))
    signature: Any = artefacts.signature(model)
    names = artefacts.served_names(signature) if isinstance(signature, dict) else {}
    if isinstance(signature, dict):
        specs = {names[name]: spec for name, spec in signature.items()}
        signature = {name: tf.TensorSpec(spec.shape, spec.dtype, name) for name, spec in specs.items()}

    def predict(inputs: Any) -> dict[str, tf.Tensor]:
        outputs = network({name: inputs[names[name]] for name in names} or inputs, training=False)
        return outputs if isinstance(outputs, dict) else {"value": outputs}

    def predict_files(files: tf.Tensor) -> dict[str, tf.Tensor]:
        image = tf.TensorSpec(signature.shape[1:], tf.uint8)
        return predict(
            tf.map_fn(lambda file: decoded(file, image.shape, pixel_range), files, fn_output_signature=image)
        )

    archive = keras.export.ExportArchive()
    archive.track(network)
    archive.add_endpoint("inputs", predict, [signature])
    serving = (predict_files, [tf.TensorSpec([None], tf.string, "image_bytes")]) if images else (predict, [signature])
    archive.add_endpoint("serving_default", *serving)
    archive.write_out(path, verbose=False)


def is_saved_model(folder: pathlib.Path) -> bool:
    """Checks that a folder holds a SavedModel and nothing else."""
    names = {path.name for path in folder.glob("*")}
    return {"saved_model.pb"} <= names <= {"saved_model.pb", "fingerprint.pb", "variables", "assets", "assets.extra"}


def compare(reference: Callable, exported: Callable, inputs: Any, tolerance: float, output: str) -> dict[str, Any]:
    """Compares the predictions of two models. `output` is the kind of output, such as "class" or "mask".

    Differences are relative to the largest deviation of an expected value from the mean if that exceeds 1. For classes
    and masks, the share of equal classes must also reach a threshold: 0.9, or less if the expected classes vary, namely
    halfway between the share of the most frequent class and 1.
    """
    pairs = list(zip(tf.nest.flatten(reference(inputs)), tf.nest.flatten(exported(inputs)), strict=True))
    difference, equal, threshold = float(np.max([_difference(*pair) for pair in pairs])), [], 0.0
    for expected, actual in pairs:
        if output in ("class", "mask"):
            expected, actual = np.argmax(expected, axis=-1), np.argmax(actual, axis=-1)
            # An uncertain model has small differences throughout, and a constant prediction must not pass.
            threshold = min(0.9, (1 + np.bincount(expected.ravel()).max() / expected.size) / 2)
        equal.append(np.mean(actual == expected if expected.dtype.kind == "O" else np.isclose(actual, expected)))
    return {
        "inputs": len(pairs[0][0]),
        "largest_difference": difference,
        "equal_answers": float(np.mean(equal)),
        # NaN fails: comparisons with it are false.
        "passed": bool(difference <= tolerance and np.mean(equal) >= threshold),
    }


def _difference(expected: np.ndarray, actual: np.ndarray) -> float:
    if expected.dtype == object:  # Strings.
        return float(np.any(actual != expected))
    difference = np.subtract(actual, expected, dtype=np.result_type(expected, np.float32))
    return float(np.max(np.abs(difference)) / max(1.0, np.abs(expected - expected.mean(dtype=np.float64)).max()))


def run_data(result: dict[str, Any], data_dir: str = "") -> Data:
    """Loads the data that a run was trained on.

    Raises:
        UserError: the data is not available, or has changed.
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
        raise UserError(f"{data.name}: not the data that the run was trained on; restore that data")
    return data


def first_inputs(data: Data, count: int) -> Any:
    """Returns the first `count` inputs of the test split, filled up from validation and train if needed."""
    parts = [split.arrays(slice(count))[0] for split in (data.test, data.validation, data.train)]
    return tf.nest.map_structure(lambda *arrays: np.concatenate(arrays)[:count], *parts)


if __name__ == "__main__":
    run_script(main)
