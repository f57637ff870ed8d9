"""One worker of a group, started by test_multiworker.py: trains some recipes for some steps, one after the other."""

import importlib
import json
import pathlib
import sys

from common.records import weights_sha256

import keras

EPOCHS = 3
# How many steps the training on the full data has, and with it the schedule that these few steps are the beginning of;
# of distillation, whose schedule for 8 epochs is too steep for float32 (see below), with --epochs 40.
STEPS = {"cifar10_fast": 1248, "dense_classifier": 2160, "dense_regression": 5760}
STEPS |= {"linear_regression": 900, "text_classifier": 264}
STEPS_OF_OTHERS, STEPS_PER_EPOCH = 7000, 7
# What makes the networks of some recipes quicker to test.
SMALL = {"text_classifier": {"vocabulary": 2000, "length": 60}, "cifar10_fast": {"width": 8}}
# Steps of Muon have the size of the learning rate, whatever the gradient: where rounding decides which value of a
# pooling window is the largest, weights differ by 1e-4 and more after ten steps. In mnist_cnn, with three workers,
# rounding tips a relu (4e-4; with gelu in its place, 1e-6). In float64, rounding decides nowhere.
COMPARED_IN_FLOAT64 = {"cifar10_cnn", "cifar10_fast", "distillation", "mnist_cnn", "quantization"}


def in_float64(build):
    """Gives what `build` gives, with all layers in float64."""

    def of_layer(layer):
        return type(layer).from_config({**layer.get_config(), "dtype": "float64"})

    def build_in_float64(*arguments, **named):
        model = build(*arguments, **named)
        copy = keras.models.clone_model(model, clone_function=of_layer)
        copy.set_weights(model.get_weights())
        return copy

    return build_in_float64


def with_normalization(config, data):
    images = keras.Input(data.train.input_shape, dtype="uint8", name="image")
    x = keras.layers.Rescaling(1 / 255)(images)
    x = keras.layers.Conv2D(8, 3, strides=2, use_bias=False)(x)
    x = keras.layers.BatchNormalization(synchronized=True)(x)
    x = keras.layers.ReLU()(x)
    x = keras.layers.Flatten()(x)
    probabilities = keras.layers.Dense(len(data.class_names), activation="softmax")(x)
    return keras.Model(images, probabilities)


def main() -> None:
    folder, names = pathlib.Path(sys.argv[1]), sys.argv[2:]
    fit, trained = keras.Model.fit, []

    def fit_shortly(model, *arguments, **named):
        trained.append(model)
        return fit(model, *arguments, **{**named, "epochs": EPOCHS})

    keras.Model.fit = fit_shortly
    for name in names:
        module = importlib.import_module("mnist_cnn" if name == "normalization" else name)
        if name == "normalization":
            module.build_model = with_normalization
        if name in COMPARED_IN_FLOAT64:
            module.build_model = in_float64(module.build_model)
        if name == "quantization":  # LiteRT takes no float64.
            module.once = lambda run, make: {}
        config = module.Config(
            data="sample",
            smoke=True,
            epochs=STEPS.get(name, STEPS_OF_OTHERS) // STEPS_PER_EPOCH,
            validation_size=0.13,
            batch_size=6 if name == "linear_regression" else 36,
            threads=1,
            deterministic=True,
            baseline=name == "distillation",
            quiet=True,
            run_dir=str(folder / name),
            **SMALL.get(name, {}),
        )
        metrics = module.train(config)
        print(json.dumps({"name": name, "metrics": metrics, "weights": weights_sha256(trained[-1])}), flush=True)


if __name__ == "__main__":
    main()
