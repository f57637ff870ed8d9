"""Table in plain Keras: trains on a CSV with numbers, categories, dates and missing values, and saves the model.

Install   pip install keras tensorflow tensorboard pandas pyarrow
Run       python table.py FILE.csv TARGET    TARGET: the column to predict; text and few integers are treated as classes
Watch     tensorboard --logdir runs
Use       keras.models.load_model("runs/.../model.keras")({"mass": np.array([4.2]), "island": np.array(["Muck"])})
          Missing values: NaN for numbers, "" for categories. Dates: days since 1970. (predict rounds to float32.)
"""

import argparse

import keras
import numpy as np
import pandas as pd
from keras import callbacks, layers, ops, optimizers

EPOCHS, BATCH_SIZE, SEED, LEARNING_RATE, WEIGHT_DECAY, UNITS = 30, 256, 0, 0.01, 0.3, (64, 64, 64)
CATEGORIES, CLASSES = 100, 20  # maximum vocabulary of a category; maximum number of integer classes


def parse(column, rows):
    """Returns the kind and values of a column: float64 if all values in `rows` are numbers or dates, else text."""
    values = pd.to_numeric(column.str.replace(",", ".") if separator == ";" else column, errors="coerce")
    dates = pd.to_datetime(column.where(column.str.match(r"\d{4}-\d\d")), errors="coerce", format="ISO8601", utc=True)
    for kind, parsed in ("number", values), ("date", (dates - pd.Timestamp(0, tz="UTC")) / pd.Timedelta(days=1)):
        if (np.isfinite(parsed) | column.isna())[rows].all():
            return kind, parsed.astype("float64")
    return "category", column.fillna("")


parser = argparse.ArgumentParser(usage="table.py FILE.csv TARGET")
parser.add_argument("file_and_target", nargs=2)
path, target = parser.parse_args().file_and_target
try:
    with open(path, encoding="utf-8-sig") as file:
        separator = max(",;\t", key=file.readline().count)
    full = pd.read_csv(path, sep=separator, dtype=str, engine="pyarrow")
    table = full[full[[target]].notna().all(axis=1)].reset_index(drop=True)
except (OSError, ValueError, KeyError) as error:
    parser.error(f"{path}: {error}")
kind, answers = parse(texts := table.pop(target), slice(None))
table.columns = table.columns.str.replace("/", "|")  # Keras does not allow "/" in names.
is_class = kind == "category" or (answers.nunique() <= CLASSES and (answers % 1 == 0).all())
classes = texts if is_class else pd.Series(target, answers.index)
# Use 10 % of each class for test and for validation; duplicate rows stay in the same split.
rank = pd.util.hash_pandas_object(table, index=False).groupby(classes).rank("dense") % 10
parts = np.select([rank == 1, rank == 2], ["test", "validation"], "train")
train, test = parts == "train", parts == "test"
counts = pd.crosstab(classes, parts).reindex(columns=["train", "validation", "test"], fill_value=0)
print(f"{len(full) - len(table)} rows without {target}\n{target} is a {'class' if is_class else 'number'}\n{counts}")
if (missing := counts.index[counts.min(axis=1) == 0].tolist()) or answers.nunique() < 2:
    parser.error(f"{path}: at least 2 values of {target} and 3 different rows of each class are needed: {missing[:10]}")
features, feature = {}, keras.utils.FeatureSpace.feature
for name, column in table.items():
    kind, table[name] = parse(column, train)
    print(f"{name}: {kind}, {column[train].nunique()} values, {column.isna().sum()} gaps")
    if column[train].nunique(dropna=False) > 1:  # Ignore constant columns.
        text, raw = layers.StringLookup(max_tokens=CATEGORIES, mask_token=""), layers.Identity(dtype="float64")
        features[name] = feature("string", text, "one_hot") if kind == "category" else feature("float64", raw, "float")
x = {part: {name: table[name][parts == part].to_numpy() for name in features} for part in counts}
space = keras.utils.FeatureSpace(features, output_mode="dict")
space.adapt(x["train"])
encoded = dict(space.get_encoded_features())
numbers = table[train][list(features)].select_dtypes("number")
if len(numbers.columns):  # float64 preserves small differences of large numbers.
    raw = layers.Concatenate(dtype="float64")([encoded.pop(name) for name in numbers])
    is_missing = ops.logical_not(ops.isfinite(raw))
    median, mean, deviation = numbers.agg(["median", "mean", "std"]).to_numpy()
    scaled = ops.clip((ops.where(is_missing, median, raw) - mean) / np.where(deviation > 0, deviation, 1), -10, 10)
    encoded["numbers"] = ops.cast(ops.concatenate([scaled, is_missing], axis=1), "float32")
encoder = keras.Model(dict(space.get_inputs()), ops.concatenate(list(encoded.values()), axis=1))
keras.utils.set_random_seed(SEED)
mean, deviation = (0.0, 1.0) if is_class else (answers[train].mean(), answers[train].std() or 1.0)
y = (pd.get_dummies(classes, dtype=float) if is_class else (answers - mean) / deviation).to_numpy()
data = {part: (encoder(x[part]).numpy(), y[parts == part]) for part in counts}
head = layers.Dense(len(counts), activation="softmax" if is_class else None)
network = keras.Sequential([*(layers.Dense(units, activation="relu") for units in UNITS), head])
batch_size = min(BATCH_SIZE, int(train.sum()) // 30 + 1)  # At least 30 steps per epoch.
schedule = optimizers.schedules.CosineDecay(LEARNING_RATE, EPOCHS * -(-train.sum() // batch_size))
loss, metrics = ("categorical_crossentropy", ["accuracy"]) if is_class else ("mse", [])
network.compile(optimizers.AdamW(schedule, weight_decay=WEIGHT_DECAY), loss, metrics=metrics)
folder = f"runs/{pd.Timestamp.now():%Y%m%d-%H%M%S}"
fit_callbacks = [callbacks.TensorBoard(folder), callbacks.EarlyStopping(patience=EPOCHS, restore_best_weights=True)]
network.fit(*data["train"], batch_size, EPOCHS, callbacks=fit_callbacks, validation_data=data["validation"], verbose=2)
output = layers.Rescaling(deviation, mean, dtype="float64")(network(encoder.output))
keras.Model(encoder.input, output).save(f"{folder}/model.keras")
counts.to_csv(f"{folder}/classes.csv")
predicted = keras.models.load_model(f"{folder}/model.keras")(x["test"]).numpy()
scores = predicted.argmax(axis=1) == y[test].argmax(axis=1) if is_class else (predicted[:, 0] - answers[test]) ** 2
print(f"test accuracy {np.mean(scores):.4f}" if is_class else f"test mse {np.mean(scores):.6g}")
