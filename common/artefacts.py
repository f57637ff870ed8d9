"""Trained models as files for other programs: Keras, SavedModel, LiteRT and ONNX, each with its class names inside."""

import base64
import contextlib
import importlib
import io
import json
import operator
import os
import pathlib
import re
import tempfile
import warnings
import zipfile
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

from common.cli import UserError
from common.records import file_sha256, read_run
from common.startup import quiet_native_stderr
from common.upstream import free_of_tensors

import keras
import numpy as np
import tensorflow as tf

SUFFIXES = {"keras": ".keras", "saved_model": "", "litert": ".tflite", "onnx": ".onnx"}
QUANTIZATIONS = dict.fromkeys(SUFFIXES, ("none",))
QUANTIZATIONS |= {"keras": ("none", "int8"), "litert": ("none", "dynamic", "float16", "int8")}
BATCH = 512
# What a file holds besides the model: as members of the zip archive in Keras, and in LiteRT of one that follows its own
# data; as properties in ONNX; as files in the folder assets.extra in a SavedModel.
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
    names, taken = ("recipe", "task", "class_names", "columns", "weights_sha256"), _signature(model)
    told = {name: result[name] for name in names if name in result}
    told["shape"] = tf.nest.map_structure(lambda each: each.shape.as_list()[1:], taken)
    told["dtype"] = tf.nest.map_structure(lambda each: each.dtype.name, taken)
    return _with_task({**told, "text_column": result["config"].get("text_column", "")})


def _with_task(description: dict[str, Any]) -> dict[str, Any]:
    """What older versions wrote has no task: it follows from the rest."""
    kind = {"uint8": "image", "string": "text"}.get(str(description["dtype"]), "table")
    return {"task": {"input": kind, "output": "class" if description["class_names"] else "number"}, **description}


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
        description: see `describe`.
        form: one of `SUFFIXES`.
        path: ends in the suffix of the form.
        quantization: one of `QUANTIZATIONS` of the form. dynamic: weights in int8, and the inputs of a layer while it
            is computed; float16: weights in float16; int8: all in int8, in Keras only in dense and embedding layers.
        examples: inputs [n, *shape] that show the range of activations, for int8 in LiteRT.

    Raises:
        UserError: a package is missing, or the format has no operation for a part of the model.
    """
    notes = {DESCRIPTION: json.dumps(description).encode()}
    if form == "keras":
        (_with_int8_weights(model) if quantization == "int8" else model).save(path)
    elif form == "saved_model":
        _save_for_serving(model, path, description["task"]["input"] == "image")
    else:
        network = without_class_names(model)
        if description["dtype"] == "string" and len(network.layers) == 3:
            _, tokenizer, network = network.layers
            with tempfile.TemporaryDirectory() as folder:
                tokenizer.save(file := pathlib.Path(folder, TOKENIZER))
                notes[TOKENIZER] = file.read_bytes()
            examples = examples if examples is None else keras_answer(tokenizer)(examples)
        # The converters tell of their progress, and tf2onnx 1.17 asks NumPy for names that it no longer has.
        with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings(), quiet_native_stderr():
            warnings.simplefilter("ignore")
            if form == "onnx":
                _package("tf2onnx")
                free_of_tensors(network)
            settings = _converter_settings(quantization, examples) if form == "litert" else {}
            failed = None
            try:
                network.export(path, format=form, verbose=False, input_signature=[_signature(network)], **settings)
            except Exception as error:  # The converters have errors of many types.
                failed = error
        if isinstance(failed, OSError):
            raise failed
        if failed:  # Only here, where what the converter has printed is dropped.
            reason = str(failed).strip().partition("\n")[0].rpartition("): ")[2]
            raise UserError(f"{form} has no operation for a part of the model ({reason}); choose another --format")
    if form == "saved_model":
        (path / "assets.extra").mkdir()
        (path / "assets.extra" / DESCRIPTION).write_bytes(notes[DESCRIPTION])
    elif form == "onnx":
        onnx = _package("onnx")
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
    same = keras.models.model_from_json(re.sub("mixed_b?float16", "float32", described))
    same.set_weights(model.get_weights())
    return same


def without_class_names(model: keras.Model) -> keras.Model:
    """The model, of a classifier with nothing but its probabilities as output: numbers are what all formats know."""
    return keras.Model(_by_name(model.input), _numbers(model.output), name=model.name)


def _by_name(tensors: Any) -> Any:
    """Several tensors as a dictionary, a single one by itself."""
    named = tensors if isinstance(tensors, dict) else {each.name: each for each in tf.nest.flatten(tensors)}
    return named if len(named) > 1 else next(iter(named.values()))


def _numbers(outputs: Any) -> Any:
    """What a model gives, by name, but for the names of classes."""
    if isinstance(outputs, dict) and set(outputs) == {"class", "probabilities"}:
        return outputs["probabilities"]
    return _by_name(outputs)


def _signature(model: keras.Model) -> Any:
    return tf.nest.map_structure(lambda each: tf.TensorSpec(each.shape, each.dtype, each.name), _by_name(model.input))


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
    network, taken = keras.Model(_by_name(model.input), _by_name(model.output)), _signature(model)

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


def _package(name: str) -> Any:
    """An optional package."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        package = name.split(".")[0].replace("_", "-")
        raise UserError(f"the package {package} is missing; .venv/bin/pip install -e '.[export]'") from error


def load(path: pathlib.Path, threads: int = 0) -> Artefact:
    """Reads what `save` wrote, or a run from its directory; in LiteRT and ONNX for `threads`, 0: one per core.

    Raises:
        UserError: `path` can't be read as an artefact, or a package is missing.
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
        description = _with_task(json.loads(notes[DESCRIPTION]))
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
    """The result and the model of a finished run.

    Raises:
        UserError: the folder holds none, or another model than the training wrote.
    """
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
    litert = _package("ai_edge_litert.interpreter")
    with quiet_native_stderr():
        interpreter = litert.Interpreter(str(path), num_threads=threads or os.cpu_count())
        interpreter.allocate_tensors()  # It says once what it calculates with.
        runner = interpreter.get_signature_runner()
    return _zip_notes(path), _of_named(runner, runner.get_input_details())


def _load_onnx(path: pathlib.Path, threads: int) -> tuple[dict[str, bytes], Callable]:
    onnxruntime = _package("onnxruntime")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    notes = session.get_modelmeta().custom_metadata_map
    inputs, outputs = ([each.name for each in of] for of in (session.get_inputs(), session.get_outputs()))
    answer = _of_named(lambda **named: dict(zip(outputs, session.run(outputs, named), strict=True)), inputs)
    return {key: base64.b64decode(note) for key, note in notes.items()}, answer
