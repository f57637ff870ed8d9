"""Dense regression: predict a number from a thousand columns with a small dense network.

Teaches   when a network beats a linear model: the target is a nonlinear function of a few hidden variables
Data      generated: 18,000 train, 2,000 validation, 5,000 test; known noise of variance 0.25
Result    test mean squared error 0.4779 ± 0.0035 over 3 seeds, 28 s, 2 cores of AMD EPYC without bfloat16, stale
Run       python recipes/dense_regression.py
"""

import dataclasses

from common.batches import (
    Arrays,
    Split,
    evaluation_batches,
    evaluation_steps,
    steps_per_epoch,
    steps_per_execution,
    training_batches,
)
from common.cli import Count, Positive, run_recipe
from common.console import status
from common.data import Data, load_table
from common.evaluation import evaluate_regressor
from common.optimizers import FusedAdam
from common.runs import start_run
from common.tables import TableConfig, build_encoder, encoded, fit_features, in_units, target_scale

import keras
import numpy as np
import sklearn.ensemble
import sklearn.linear_model
import sklearn.metrics

CAUSES, COLUMNS, NOISE = 6, 1000, 0.5


@dataclasses.dataclass(frozen=True)
class Config(TableConfig):
    epochs: Count = 20  # passes over the training examples
    batch_size: Count = 64  # examples per step, summed over all devices
    learning_rate: Positive = 0.0003  # peak learning rate of AdamW; cosine decay to zero
    weight_decay: float = 1.0  # weight decay of AdamW


def generate() -> Arrays:
    """Noisy mixtures of six hidden variables, as in a spectrum; the target is a nonlinear function of these."""
    random = np.random.default_rng(42)
    mixing = random.normal(0, 1 / np.sqrt(CAUSES), (CAUSES, COLUMNS))

    def draw(count):
        causes = random.normal(0, 1, (count, CAUSES))
        a, b, c, d, e, f = causes.T
        curve = 2 * np.sin(2 * a) + b * c + np.abs(d) + e + 0.5 * f
        measured = causes @ mixing + random.normal(0, 0.5, (count, COLUMNS))
        return measured.astype(np.float32), curve + random.normal(0, NOISE, count)

    return {"train": draw(20_000), "test": draw(5_000)}


def load_data(config: Config) -> Data:
    return load_table("curve of hidden causes", config, generate, classes=False)


def build_model(config: Config, data: Data, features: int) -> keras.Model:
    """Maps features to the standardized target; the saved model contains the encoder of columns and the units too."""
    inputs = keras.Input([features], name="features")
    x = keras.layers.Dense(500, activation="relu")(inputs)
    x = keras.layers.Dense(100, activation="relu")(x)
    # Always float32: predictions lose too much precision in 16 bits.
    x = keras.layers.Dense(1, dtype="float32")(x)
    return keras.Model(inputs, x, name="dense_regression")


def train(config: Config, data: Data | None = None) -> dict[str, float]:
    run = start_run(config)
    data = data or load_data(config)
    steps = steps_per_epoch(data.train, config.batch_size)

    # Numbers are scaled and categories become one-hot once, before training, as in the training rows. The network
    # learns (target - mean) / deviation, so its loss is the share of the variance that it does not explain.
    encoder, (mean, deviation) = build_encoder(fit_features(data)), target_scale(data)
    with status("encoding"):
        train_rows, validation_rows = (
            encoded(split, encoder, mean, deviation) for split in (data.train, data.validation)
        )
        test_rows = encoded(data.test, encoder)
    with run.strategy.scope():
        model = build_model(config, data, *train_rows.input_shape)
        learning_rate = keras.optimizers.schedules.CosineDecay(config.learning_rate, config.epochs * steps)
        model.compile(
            optimizer=FusedAdam(learning_rate, weight_decay=config.weight_decay),
            loss="mse",
            steps_per_execution=steps_per_execution(model, train_rows, config.batch_size, run.strategy, run.start_step),
        )
    model.fit(
        training_batches(train_rows, config.batch_size, config.seed, strategy=run.strategy, start_step=run.start_step),
        steps_per_epoch=steps,
        shuffle=False,  # The dataset is shuffled already.
        epochs=config.epochs,
        validation_data=evaluation_batches(validation_rows, config.batch_size, run.strategy),
        validation_steps=evaluation_steps(validation_rows, config.batch_size),
        callbacks=run.callbacks(data),
        verbose=run.verbose,
    )
    with run.strategy.scope():
        model = in_units(model, mean, deviation)
    report = evaluate_regressor(model, test_rows, config.batch_size, run.strategy)
    from_columns = keras.Model(encoder.input, model(encoder.output), name="dense_regression")
    own_data = data.source == "files"
    extra_metrics = {} if own_data else {"noise_floor_mse": NOISE**2}
    baselines = baseline_errors(train_rows, test_rows, mean, deviation, own_data) if config.baseline else {}
    return run.finish(from_columns, data, report, extra_metrics, baselines)


@status("fitting the baselines")
def baseline_errors(
    train_rows: Split, test_rows: Split, mean: float, deviation: float, own_data: bool
) -> dict[str, float]:
    """Test error of ridge regression on the same features; on the user's tables, of gradient-boosted trees too."""
    models = {"ridge_mse": sklearn.linear_model.Ridge()}
    if own_data:
        models["gradient_boosting_mse"] = sklearn.ensemble.HistGradientBoostingRegressor(random_state=0)
    # The rows are in random order; 100,000 are enough.
    (inputs, targets), (test_inputs, test_targets) = train_rows.arrays(slice(100_000)), test_rows.arrays()

    def error(model):
        predicted = model.fit(inputs, targets[:, 0]).predict(test_inputs).astype(np.float64)
        return float(sklearn.metrics.mean_squared_error(test_targets[:, 0], predicted * deviation + mean))

    return {name: error(model) for name, model in models.items()}


def main() -> None:
    run_recipe(train, Config, __doc__)


if __name__ == "__main__":
    main()
