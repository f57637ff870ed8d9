"""Reads trained models: runs, and what scripts/export.py makes of them for Keras, SavedModel, LiteRT and ONNX."""

import base64
import importlib
import json
import operator
import os
import pathlib
import tempfile
import zipfile
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

from common.cli import UserError
from common.records import file_sha256, read_run
from common.startup import quiet_native_stderr

import keras
import numpy as np
import tensorflow as tf

BATCH = 512
# What a file holds besides the model: in the zip archive of Keras, or one that follows LiteRT's own data; as properties
# of ONNX; in the folder assets.extra of a SavedModel.
DESCRIPTION, TOKENIZER = "description.json", "tokenizer.keras"


class Artefact(NamedTuple):
    """A model in a file.

    `description` says what it takes and gives: `task`, as in `Data`; `shape` and `dtype` of one input, or of several
    dictionaries; `class_names` (empty where there are none), `columns` and `text_column` of a CSV. `answer` turns
    inputs [n, *shape] into outputs [n, ...], of which several are dictionaries: for a class probabilities
    [n, classes], for a number values [n, 1].
    """

    description: dict[str, Any]
    answer: Callable[[Any], Any]


def describe(result: dict[str, Any], model: keras.Model) -> dict[str, Any]:
    """The description of a run's model, from the run's result."""
    names, taken = ("recipe", "task", "class_names", "columns", "weights_sha256"), signature(model)
    told = {name: result[name] for name in names}
    told["shape"] = tf.nest.map_structure(lambda each: each.shape.as_list()[1:], taken)
    told["dtype"] = tf.nest.map_structure(lambda each: each.dtype.name, taken)
    return {**told, "text_column": result["config"].get("text_column", "")}


def without_class_names(model: keras.Model) -> keras.Model:
    """The model, of a classifier with nothing but its probabilities as output: numbers are what all formats know."""
    return keras.Model(by_name(model.input), _numbers(model.output), name=model.name)


def by_name(tensors: Any) -> Any:
    """Several tensors as a dictionary, a single one by itself."""
    named = tensors if isinstance(tensors, dict) else {each.name: each for each in tf.nest.flatten(tensors)}
    return named if len(named) > 1 else next(iter(named.values()))


def _numbers(outputs: Any) -> Any:
    """What a model gives, by name, but for the names of classes."""
    if isinstance(outputs, dict) and set(outputs) == {"class", "probabilities"}:
        return outputs["probabilities"]
    return by_name(outputs)


def signature(model: keras.Model) -> Any:
    """Shapes and types of what a model takes."""
    return tf.nest.map_structure(lambda each: tf.TensorSpec(each.shape, each.dtype, each.name), by_name(model.input))


def optional_package(name: str) -> Any:
    """An optional package."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        package = name.split(".")[0].replace("_", "-")
        raise UserError(f"the package {package} is missing; .venv/bin/pip install -e '.[export]'") from error


def load(path: pathlib.Path, threads: int = 0) -> Artefact:
    """Reads a run from its directory, or what scripts/export.py wrote; a `UserError` says what can't be read.

    `threads` is for LiteRT and ONNX; 0: one per core.
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
        if TOKENIZER not in notes:
            return Artefact(description, answer)
        with tempfile.TemporaryDirectory() as folder:
            (file := pathlib.Path(folder, TOKENIZER)).write_bytes(notes[TOKENIZER])
            tokens = keras_answer(load_keras(file))
        return Artefact(description, lambda texts: answer(tokens(texts)))
    except UserError:
        raise
    except Exception as error:  # Each reader has errors of its own, and refuses what could do harm with some of them.
        raise UserError(f"{path}: can't be read ({error}); export it again") from error


def load_run(run_dir: pathlib.Path) -> tuple[dict[str, Any], keras.Model]:
    """The result and the model of a finished run; a `UserError` if it is not the model that the training wrote."""
    result, path = read_run(run_dir), run_dir / "model.keras"
    try:
        if file_sha256(path) != result["model_sha256"]:
            raise ValueError("it is not the file that the training wrote")
        return result, load_keras(path)
    except Exception as error:  # Keras refuses what could do harm with errors of many types.
        raise UserError(f"{path}: can't be read ({error}); train again, or take another run") from error


def load_keras(path: pathlib.Path) -> keras.Model:
    """A model from its archive, which must be no trap."""
    with zipfile.ZipFile(path) as archive:
        # A whole model hardly shrinks: weights are noise to a packer.
        if sum(entry.file_size for entry in archive.infolist()) > 100 * path.stat().st_size:
            raise ValueError("unpacked, it would fill memory and disk")
    return keras.models.load_model(path, compile=False)


def keras_answer(model: keras.Model) -> Callable[[Any], Any]:
    """What a model answers, in batches, as numbers."""
    network = without_class_names(model)
    return _in_batches(lambda inputs: network(tf.nest.map_structure(tf.constant, inputs), training=False))


def _in_batches(answer: Callable[[Any], Any]) -> Callable[[Any], Any]:
    def answer_all(inputs: Any) -> Any:
        starts = range(0, len(tf.nest.flatten(inputs)[0]), BATCH)
        answers = [answer(tf.nest.map_structure(operator.itemgetter(slice(at, at + BATCH)), inputs)) for at in starts]
        return tf.nest.map_structure(lambda *parts: np.concatenate(parts), *answers)

    return answer_all


def _of_named(answer: Callable[..., dict[str, np.ndarray]], names: Iterable[str]) -> Callable[[Any], Any]:
    """What a runtime answers that knows its inputs and outputs by name."""
    first, *_ = names
    return _in_batches(lambda inputs: _numbers(answer(**inputs if isinstance(inputs, dict) else {first: inputs})))


def _zip_notes(path: pathlib.Path) -> dict[str, bytes]:
    if not zipfile.is_zipfile(path):  # LiteRT alone writes no archive.
        return {}
    with zipfile.ZipFile(path) as archive:
        return {name: archive.read(name) for name in (DESCRIPTION, TOKENIZER) if name in archive.namelist()}


def _load_keras(path: pathlib.Path, threads: int) -> tuple[dict[str, bytes], Callable]:
    return _zip_notes(path), keras_answer(load_keras(path))


def _load_saved_model(path: pathlib.Path, threads: int) -> tuple[dict[str, bytes], Callable]:
    notes = {DESCRIPTION: (path / "assets.extra" / DESCRIPTION).read_bytes()}
    loaded = tf.saved_model.load(path)
    taken = loaded.signatures["inputs"].structured_input_signature[1]
    # By way of `loaded`: a signature alone would lose its variables.
    answer = _of_named(lambda **named: loaded.signatures["inputs"](**tf.nest.map_structure(tf.constant, named)), taken)
    return notes, answer


def _load_litert(path: pathlib.Path, threads: int) -> tuple[dict[str, bytes], Callable]:
    litert = optional_package("ai_edge_litert.interpreter")
    with quiet_native_stderr():
        interpreter = litert.Interpreter(str(path), num_threads=threads or os.cpu_count())
        interpreter.allocate_tensors()  # It says once what it calculates with.
        runner = interpreter.get_signature_runner()
    return _zip_notes(path), _of_named(runner, runner.get_input_details())


def _load_onnx(path: pathlib.Path, threads: int) -> tuple[dict[str, bytes], Callable]:
    onnxruntime = optional_package("onnxruntime")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    notes = session.get_modelmeta().custom_metadata_map
    inputs, outputs = ([each.name for each in of] for of in (session.get_inputs(), session.get_outputs()))
    answer = _of_named(lambda **named: dict(zip(outputs, session.run(outputs, named), strict=True)), inputs)
    return {key: base64.b64decode(note) for key, note in notes.items()}, answer
