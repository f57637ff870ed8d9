"""Dense regression: predict a number from a thousand columns with a small dense network.

Teaches   when a network beats a linear model: the target is a nonlinear function of a few hidden variables
Data      generated: 18,000 train, 2,000 validation, 5,000 test; known noise of variance 0.25
Result    test mean squared error 0.4779 ± 0.0035 over 3 seeds, 28 s, 2 cores of AMD EPYC without bfloat16, stale
Run       python recipes/dense_regression.py
"""

import dataclasses

from common.batches import (
    Arrays,
    evaluation_batches,
    evaluation_steps,
    steps_per_epoch,
    steps_per_execution,
    training_batches,
)
from common.cli import Count, Positive, SharedConfig, run_recipe
from common.console import status
from common.data import Data, load_table
from common.evaluation import evaluate_regressor
from common.optimizers import FusedAdam
from common.runs import start_run

import keras
import numpy as np
import sklearn.linear_model
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

CAUSES, COLUMNS, NOISE = 6, 1000, 0.5


@dataclasses.dataclass(frozen=True)
class Config(SharedConfig):
    epochs: Count = 20  # passes over the training examples
    batch_size: Count = 64  # examples per step, summed over all devices
    learning_rate: Positive = 0.0003  # peak learning rate of AdamW; cosine decay to zero
    weight_decay: float = 1.0  # weight decay of AdamW
    target: str = "target"  # the column to predict, with --data FILE.csv


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
    return load_table("curve of hidden causes", config, generate, config.target, classes=False)


def build_model(config: Config, data: Data) -> keras.Model:
    inputs = keras.Input(data.train.input_shape, name="columns")
    # Always float32: bfloat16 can't tell 2001 from 2002.
    normalize = keras.layers.Normalization(dtype="float32")
    normalize.adapt(np.asarray(data.train.inputs))
    x = normalize(inputs)
    x = keras.layers.Dense(500, activation="relu")(x)
    x = keras.layers.Dense(100, activation="relu")(x)
    # Always float32: predictions lose too much precision in 16 bits.
    x = keras.layers.Dense(1, dtype="float32")(x)
    # From standardized values back to the units of the target.
    denormalize = keras.layers.Normalization(invert=True, dtype="float32")
    denormalize.adapt(np.asarray(data.train.targets))
    return keras.Model(inputs, denormalize(x), name="dense_regression")


def train(config: Config, data: Data | None = None) -> dict[str, float]:
    run = start_run(config)
    data = data or load_data(config)
    steps = steps_per_epoch(data.train, config.batch_size)
    with run.strategy.scope():
        model = build_model(config, data)
        learning_rate = keras.optimizers.schedules.CosineDecay(config.learning_rate, config.epochs * steps)
        model.compile(
            optimizer=FusedAdam(learning_rate, weight_decay=config.weight_decay),
            loss="mse",
            # The share of the variance that is not explained: gradients don't depend on the unit of the target.
            # `loss` shows this share; `mse` is in the units of the target.
            loss_weights=1 / max(float(np.var(data.train.targets)), 1e-30),
            metrics=["mse", "mae"],
            steps_per_execution=steps_per_execution(model, data.train, config.batch_size, run.strategy, run.start_step),
        )
    model.fit(
        training_batches(data.train, config.batch_size, config.seed, strategy=run.strategy, start_step=run.start_step),
        steps_per_epoch=steps,
        shuffle=False,  # The dataset is shuffled already.
        epochs=config.epochs,
        validation_data=evaluation_batches(data.validation, config.batch_size, run.strategy),
        validation_steps=evaluation_steps(data.validation, config.batch_size),
        callbacks=run.callbacks(data),
        verbose=run.verbose,
    )
    report = evaluate_regressor(model, data.test, config.batch_size, run.strategy)
    extra_metrics = {"noise_floor_mse": NOISE**2} if data.source == "generated" else {}
    baselines = {"ridge_mse": ridge_mse(data)} if config.baseline else {}
    return run.finish(model, data, report, extra_metrics, baselines)


@status("fitting the baseline: ridge regression")
def ridge_mse(data: Data) -> float:
    """Test error of a linear model with ridge penalty on the same examples."""
    linear = make_pipeline(StandardScaler(), sklearn.linear_model.Ridge())
    linear.fit(np.asarray(data.train.inputs), np.asarray(data.train.targets)[:, 0])
    errors = linear.predict(np.asarray(data.test.inputs)) - np.asarray(data.test.targets)[:, 0]
    return float(np.mean(errors**2))


def main() -> None:
    run_recipe(train, Config, __doc__)


if __name__ == "__main__":
    main()
