"""Weights to begin training with, from a finished run or a Keras model."""

import collections
import pathlib
import re

from common.cli import UserError, listed
from common.records import load_keras, read_run

import keras

# Layers of one model by name; those with a name that Keras has chosen, by class and order.
_Layers = dict[tuple[str, int], keras.layers.Layer]


def model_file(path: str) -> pathlib.Path:
    """Returns the model of a finished run, or `path` itself if it is a file. Raises a `UserError` for other folders."""
    if not pathlib.Path(path).is_dir():
        return pathlib.Path(path)
    read_run(pathlib.Path(path))
    return pathlib.Path(path, "model.keras")


class InitialWeights:
    """The weights of a saved model, for a new model with layers of the same names.

    Args:
        path: a .keras file. Raises a `UserError` if it can't be read.
        class_names: the classes of the new model. Those of the saved one are named if they differ.
        preprocessing: layers that are fitted to the data and not part of the model in training, such as a tokenizer.
    """

    def __init__(self, path: pathlib.Path, class_names: tuple[str, ...] = (), preprocessing: keras.Model | None = None):
        self.path = path
        try:
            model = load_keras(path)
        except Exception as error:  # Keras raises errors of many types, also for files that could do harm.
            problem = str(error).strip().partition("\n")[0]
            raise UserError(f"--init-from {path}: can't be read ({problem}); give a run, or a .keras file") from error
        self.weights = {key: layer.get_weights() for key, layer in _layers(model).items()}
        self.vocabularies = _vocabularies(model)
        self.preprocessing = _vocabularies(preprocessing) if preprocessing else {}
        saved = [layer.get_vocabulary() for layer in model.layers if layer.name == "class_names"]
        self.other_classes = saved[0] if saved and saved[0] != [*class_names] else []

    def assign(self, model: keras.Model) -> str:
        """Sets the weights of all layers that have the name and the shapes of a saved one, and describes the result.

        Other layers are not changed, and neither are layers that are fitted to the data, such as `Normalization`; nor
        embeddings if a vocabulary differs, whose rows are those of other words. Raises a `UserError` if no layer fits.
        """
        layers, new, fitted = _layers(model), [], []
        vocabularies = {**self.preprocessing, **_vocabularies(model)}
        other = [name for name, words in vocabularies.items() if words != self.vocabularies.get(name)]
        for key, layer in layers.items():
            weights = self.weights.get(key, [])
            fits = [tuple(weight.shape) for weight in layer.weights] == [values.shape for values in weights]
            if hasattr(layer, "adapt"):
                fitted.append(layer.name)
            elif fits and not (other and isinstance(layer, keras.layers.Embedding)):
                layer.set_weights(weights)
            else:
                new.append(layer.name)
        total = len(layers) - len(fitted)
        if len(new) == total:
            problem = f"none of the layers {listed(new)} is in it with the same name and shapes"
            raise UserError(f"--init-from {self.path}: {problem}; give a run of this recipe, or leave it out")
        line = f"initial weights: {total - len(new)} of {total} layers from {self.path}"
        line += f"; new: {listed(new)}" if new else ""
        line += f"; their classes were {listed(self.other_classes)}" if self.other_classes else ""
        line += f"; other vocabulary: {listed(other)}" if other else ""
        return line + (f"; fitted to this data: {listed(fitted)}" if fitted else "")


def _layers(model: keras.Model) -> _Layers:
    """Returns the layers with weights, also those of models within the model."""
    found, counts = {}, collections.Counter()

    def add(layers: list[keras.layers.Layer]) -> None:
        for layer in layers:
            if isinstance(layer, keras.Model):
                add(layer.layers)
            elif layer.weights and layer not in found.values():
                # Keras counts names through a whole process: `dense_3` may be the first dense layer of a model.
                kind = type(layer).__name__
                chosen_by_keras = re.fullmatch(kind.lower() + r"\d*", layer.name.replace("_", ""))
                name = kind if chosen_by_keras else layer.name
                found[name, counts[name]] = layer
                counts[name] += 1

    add(model.layers)
    return found


def _vocabularies(model: keras.Model) -> dict[str, list]:
    """Returns the vocabularies of all lookup layers by name, without the class names that `Run.finish` adds."""
    found = {}
    for layer in model.layers:
        if isinstance(layer, keras.Model):
            found |= _vocabularies(layer)
        elif hasattr(layer, "get_vocabulary") and layer.name != "class_names":
            found[layer.name] = layer.get_vocabulary()
    return found
