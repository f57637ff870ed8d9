"""One worker of a group, started by test_multiworker.py: trains every recipe for some steps, one after the other."""

import importlib
import json
import pathlib
import sys

from common.records import weights_sha256

import keras

ROOT = pathlib.Path(__file__).parent.parent
EPOCHS = 3
# What makes the networks of some recipes quicker to test. Orthogonal steps also bring rounding errors up to their own
# size, which at full speed are more than 1e-5 after 20 of them.
SMALL = {"text_classifier": {"vocabulary": 2000, "length": 60}, "cifar10_fast": {"width": 8, "kernel_speed": 3.0}}


def with_normalization_and_dropout(config, data):
    images = keras.Input(data.train.inputs.shape[1:], dtype="uint8", name="image")
    x = keras.layers.Rescaling(1 / 255)(images)
    x = keras.layers.Conv2D(8, 3, strides=2)(x)
    x = keras.layers.BatchNormalization()(x)
    x = keras.layers.ReLU()(x)
    x = keras.layers.SpatialDropout2D(0.2)(x)
    x = keras.layers.Flatten()(x)
    x = keras.layers.Dropout(0.5)(x)
    probabilities = keras.layers.Dense(len(data.class_names), activation="softmax")(x)
    return keras.Model(images, probabilities)


def main() -> None:
    folder = pathlib.Path(sys.argv[1])
    fit, trained = keras.Model.fit, []

    def fit_shortly(model, *arguments, **named):
        # The first steps of a training of some thousand, as with the full data, and of its schedule.
        trained.append(model)
        return fit(model, *arguments, **{**named, "epochs": EPOCHS})

    keras.Model.fit = fit_shortly
    names = sorted(path.stem for path in (ROOT / "recipes").glob("*.py"))
    for name in [*names, "normalization_and_dropout"]:
        module = importlib.import_module(name if name in names else "mnist_cnn")
        if name not in names:
            module.build_model = with_normalization_and_dropout
        config = module.Config(
            data="sample",
            smoke=True,
            epochs=1000,
            validation_size=0.13,
            batch_size=4 if name == "linear_regression" else 80,
            threads=1,
            deterministic=True,
            baseline=False,
            quiet=True,
            run_dir=str(folder / name),
            **SMALL.get(name, {}),
        )
        metrics = module.train(config)
        print(json.dumps({"name": name, "metrics": metrics, "weights": weights_sha256(trained[-1])}), flush=True)


if __name__ == "__main__":
    main()
