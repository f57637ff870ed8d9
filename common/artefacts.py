"""Loads trained models: runs, and exports by scripts/export.py for Keras, SavedModel, LiteRT and ONNX."""

import base64
import importlib
import json
import operator
import os
import pathlib
import re
import tempfile
import zipfile
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

from common.cli import UserError
from common.records import file_sha256, load_keras, read_run
from common.startup import quiet_native_stderr

import keras
import numpy as np
import tensorflow as tf

BATCH = 512
# Files stored with an exported model: in the zip archive of Keras; in a zip archive appended to the LiteRT file; in the
# metadata of ONNX; in the folder assets.extra of a SavedModel.
DESCRIPTION, ENCODER = "description.json", "encoder.keras"


class Artefact(NamedTuple):
    """A loaded model.

    `description` describes inputs and outputs: `task`, as in `Data`; `shape` and `dtype` of the input, or dictionaries
    of them for several inputs; `class_names` (empty if there are none); kinds of `columns` and `text_column` of a CSV;
    `pixel_range` as in `Data`. `answer` maps inputs [n, *shape] to outputs [n, ...]: probabilities [n, classes] for
    classes, values [n, 1] for numbers. Several inputs or outputs are dictionaries.
    """

    description: dict[str, Any]
    answer: Callable[[Any], Any]


def describe(result: dict[str, Any], model: keras.Model) -> dict[str, Any]:
    """Returns the description of a model from the result of its run."""
    names, inputs = ("recipe", "task", "class_names", "columns", "weights_sha256"), signature(model)
    description = {name: result[name] for name in names}
    description["shape"] = tf.nest.map_structure(lambda spec: spec.shape.as_list()[1:], inputs)
    description["dtype"] = tf.nest.map_structure(lambda spec: spec.dtype.name, inputs)
    description["pixel_range"] = result.get("pixel_range", ())
    return {**description, "text_column": result["config"].get("text_column", "")}


def without_class_names(model: keras.Model) -> keras.Model:
    """Returns the model without the class names of a classifier, because some formats support only numbers."""
    return keras.Model(by_name(model.input), _numbers(model.output), name=model.name)


def by_name(tensors: Any) -> Any:
    """Returns several tensors, or a dictionary, as a dictionary by name, and a single tensor unchanged."""
    named = tensors if isinstance(tensors, dict) else {tensor.name: tensor for tensor in tf.nest.flatten(tensors)}
    return named if len(named) > 1 or isinstance(tensors, dict) else next(iter(named.values()))


def _numbers(outputs: Any) -> Any:
    """Returns the outputs of a model by name, without class names."""
    if isinstance(outputs, dict) and set(outputs) == {"class", "probabilities"}:
        return outputs["probabilities"]
    named = by_name(outputs)
    return next(iter(named.values())) if isinstance(named, dict) and len(named) == 1 else named


def signature(model: keras.Model) -> Any:
    """Returns shapes and dtypes of the inputs of a model."""
    return tf.nest.map_structure(lambda x: tf.TensorSpec(x.shape, x.dtype, x.name), by_name(model.input))


def served_names(names: Iterable[str]) -> dict[str, str]:
    """Returns the name of each input in a SavedModel: only ASCII letters, digits and _, with a letter at the start."""
    served: dict[str, str] = {}
    for name in sorted(names):
        plain = re.sub(r"\W", "_", name, flags=re.ASCII)
        plain = plain if plain[0].isalpha() else f"column_{plain}"
        while plain in served.values():
            plain += "_"
        served[name] = plain
    return served


def optional_package(name: str) -> Any:
    """Imports an optional package. Raises a `UserError` if it is not installed."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        package = name.split(".")[0].replace("_", "-")
        raise UserError(f"the package {package} is missing; run .venv/bin/pip install -e '.[export]'") from error


def load(path: pathlib.Path, threads: int = 0) -> Artefact:
    """Loads a model from a run directory or an export. Raises a `UserError` for a file that can't be read.

    `threads` applies to LiteRT and ONNX; 0: one per core.
    """
    readers = {".keras": _load_keras, ".tflite": _load_litert, ".onnx": _load_onnx}
    read = readers.get(path.suffix) if not path.is_dir() else None
    if (path / "saved_model.pb").exists():
        read = _load_saved_model
    if not read:
        result, model = load_run(path)
        return Artefact(describe(result, model), keras_answer(model))
    try:
        notes, answer = read(path, threads)
        if DESCRIPTION not in notes:
            raise UserError(f"{path}: not written by scripts/export.py; give the folder of its run, or export that")
        description = json.loads(notes[DESCRIPTION])
        if ENCODER not in notes:
            return Artefact(description, answer)
        with tempfile.TemporaryDirectory() as folder:
            (file := pathlib.Path(folder, ENCODER)).write_bytes(notes[ENCODER])
            encode = keras_answer(load_keras(file))
        return Artefact(description, lambda inputs: answer(encode(inputs)))
    except UserError:
        raise
    except Exception as error:  # Readers raise errors of many types, also for files that could do harm.
        raise UserError(f"{path}: can't be read ({error}); export it again") from error


def load_run(run_dir: pathlib.Path) -> tuple[dict[str, Any], keras.Model]:
    """Loads result and model of a finished run. Raises a `UserError` if the model has changed since training."""
    result, path = read_run(run_dir), run_dir / "model.keras"
    try:
        if file_sha256(path) != result["model_sha256"]:
            raise ValueError("it is not the file that the training wrote")
        return result, load_keras(path)
    except Exception as error:  # Keras raises errors of many types, also for files that could do harm.
        raise UserError(f"{path}: can't be read ({error}); train again, or give another run") from error


def keras_answer(model: keras.Model) -> Callable[[Any], Any]:
    """Returns a function that computes the numeric outputs of a model in batches."""
    network = without_class_names(model)
    return _in_batches(lambda inputs: network(tf.nest.map_structure(tf.constant, inputs), training=False))


def _in_batches(answer: Callable[[Any], Any]) -> Callable[[Any], Any]:
    def answer_all(inputs: Any) -> Any:
        starts = range(0, len(tf.nest.flatten(inputs)[0]), BATCH)
        answers = [answer(tf.nest.map_structure(operator.itemgetter(slice(at, at + BATCH)), inputs)) for at in starts]
        return tf.nest.map_structure(lambda *parts: np.concatenate(parts), *answers)

    return answer_all


def _adapted(answer: Callable[..., dict[str, np.ndarray]], names: Iterable[str]) -> Callable[[Any], Any]:
    """Adapts a runtime whose inputs and outputs have names. `names` are those of the inputs."""
    first, *_ = names
    return _in_batches(lambda inputs: _numbers(answer(**inputs if isinstance(inputs, dict) else {first: inputs})))


def _zip_notes(path: pathlib.Path) -> dict[str, bytes]:
    if not zipfile.is_zipfile(path):  # A LiteRT file that scripts/export.py did not write.
        return {}
    with zipfile.ZipFile(path) as archive:
        return {name: archive.read(name) for name in (DESCRIPTION, ENCODER) if name in archive.namelist()}


def _load_keras(path: pathlib.Path, threads: int) -> tuple[dict[str, bytes], Callable]:
    return _zip_notes(path), keras_answer(load_keras(path))


def _load_saved_model(path: pathlib.Path, threads: int) -> tuple[dict[str, bytes], Callable]:
    notes = {DESCRIPTION: (path / "assets.extra" / DESCRIPTION).read_bytes()}
    loaded = tf.saved_model.load(path)
    inputs = loaded.signatures["inputs"].structured_input_signature[1]
    shape = json.loads(notes[DESCRIPTION])["shape"]
    names = served_names(shape if isinstance(shape, dict) else inputs)

    # The function keeps a reference to `loaded`: a signature alone would lose its variables.
    def answer(**named: Any) -> Any:
        return loaded.signatures["inputs"](**{names[name]: tf.constant(values) for name, values in named.items()})

    return notes, _adapted(answer, names)


def _load_litert(path: pathlib.Path, threads: int) -> tuple[dict[str, bytes], Callable]:
    litert = optional_package("ai_edge_litert.interpreter")
    with quiet_native_stderr():
        interpreter = litert.Interpreter(str(path), num_threads=threads or os.cpu_count())
        interpreter.allocate_tensors()  # Logs the delegate that it uses.
        runner = interpreter.get_signature_runner()
    return _zip_notes(path), _adapted(runner, runner.get_input_details())


def _load_onnx(path: pathlib.Path, threads: int) -> tuple[dict[str, bytes], Callable]:
    onnxruntime = optional_package("onnxruntime")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    notes = session.get_modelmeta().custom_metadata_map
    inputs, outputs = ([node.name for node in nodes] for nodes in (session.get_inputs(), session.get_outputs()))
    answer = _adapted(lambda **named: dict(zip(outputs, session.run(outputs, named), strict=True)), inputs)
    return {key: base64.b64decode(note) for key, note in notes.items()}, answer
