"""Text classifier in plain Keras: trains on a CSV with the columns text and label, and saves the model.

Install   pip install keras tensorflow tensorboard pandas pyarrow
Run       python text_classifier.py FILE.csv [TEST.csv]    without TEST.csv, 10 % of FILE.csv is the test split
Watch     tensorboard --logdir runs
Use       keras.models.load_model("runs/.../model.keras").predict(tf.constant(["A fine film."]))
Idea      a linear classifier on word n-grams, initialized with log-count ratios (Wang and Manning 2012)
"""

import argparse
import unicodedata

import keras
import numpy as np
import pandas as pd
import tensorflow as tf
from keras import callbacks, layers, ops

LENGTH, WORDS, TOKENS = 6000, 1200, 1000  # characters and words read per text; n-grams kept per text (the rarest)
NO_SPACES = ("CJK", "HIRAGANA", "KATAKANA", "THAI", "LAO", "KHMER", "MYANMAR")  # each character counts as a word
EPOCHS, BATCH_SIZE, SEED, LEARNING_RATE, LABEL_SMOOTHING, START, PRIME = 3, 256, 0, 0.01, 0.1, 0.25, 1_000_003

parser = argparse.ArgumentParser()
parser.add_argument("train", metavar="FILE.csv")
parser.add_argument("test", metavar="TEST.csv", nargs="?")
files = {part: path for part, path in vars(parser.parse_args()).items() if path}
try:
    tables = [pd.read_csv(path, dtype=str, keep_default_na=False, engine="pyarrow") for path in files.values()]
    table = pd.concat(tables, keys=files, names=["part", None]).reset_index("part")[["text", "label", "part"]]
except (OSError, ValueError, KeyError) as error:
    parser.error(f"{files}: {error}")
full = table[(table["text"].str.strip() != "") & (table["label"].str.strip() != "")]
texts, labels, parts = full.to_numpy(object).T
# If there is no test or validation split, take 10 % of each class from train; duplicates stay in the same split.
rank = pd.Series(pd.util.hash_array(texts)).groupby([labels, parts]).rank("dense") % 10
for number, part in enumerate(["test", "validation"], start=1):
    parts[(part not in parts) & (parts == "train") & (rank == number)] = part
counts = pd.crosstab(labels, parts).reindex(columns=["train", "validation", "test"], fill_value=0)
print(f"{len(table) - len(full)} rows without text or label are left out\n{counts}")
if (missing := counts.index[counts.min(axis=1) == 0].tolist()) or len(counts) < 2:
    parser.error(f"at least 2 classes are needed, of each 3 different texts: {missing[:10] or list(counts.index)}")
# Map characters to integers, ignoring case. Anything but letters, digits and marks maps to 0.
forms = {form for text in texts[parts == "train"] for letter in set(text) for form in (letter.lower(), letter.upper())}
letters = sorted(form for form in forms if len(form) == 1 and unicodedata.category(form)[0] in "LMN") or ["a"]
number = np.array([0, 0, *(ord(letter.lower()[0]) for letter in letters)])
spaced = [False, False, *(not unicodedata.name(letter, "").startswith(NO_SPACES) for letter in letters)]
split = layers.TextVectorization(standardize=None, split="character", output_sequence_length=LENGTH, vocabulary=letters)
text = keras.Input([], dtype="string", name="text")
letter, joinable = ops.take(number, split(text)), ops.take(number * spaced, split(text))
# Hash each word: sum a hash of each letter and its neighbors, as differences of a cumulative sum at the word ends.
before, after = ops.pad(joinable[:, :-1], [[0, 0], [1, 0]]), ops.pad(joinable[:, 1:], [[0, 0], [0, 1]])
mixed = ((before * PRIME + letter) * PRIME + after) * PRIME
sums = ops.cumsum(ops.where(letter > 0, mixed * mixed * PRIME, 0), axis=1)
is_end = ops.logical_and(letter > 0, ops.equal(joinable * after, 0))
ends = ops.sort(ops.where(is_end, ops.arange(LENGTH), LENGTH), axis=1)[:, :WORDS]
sums = ops.take_along_axis(sums, ops.minimum(ends, LENGTH - 1), axis=1)
word = ops.where(ends < LENGTH, sums - ops.pad(sums[:, :-1], [[0, 0], [1, 0]]), 0)
pair = ops.where(ends[:, 1:] < LENGTH, word[:, :-1] * PRIME + word[:, 1:], 0)
grams = ops.sort(ops.concatenate([word, pair], axis=1), axis=1)
grams = ops.where(grams != ops.pad(grams[:, :-1], [[0, 0], [1, 0]]), grams, 0)  # Remove duplicates.
# Drop n-grams that occur in a single text: they do not generalize. The rarest get the largest indices.
train_grams = keras.Model(text, grams).predict(tf.constant(texts[parts == "train"]), 250)
vocabulary = pd.Series(train_grams[train_grams != 0]).value_counts().loc[lambda counts: counts > 1].index.to_numpy()
if not len(vocabulary):
    parser.error("no two training texts share a word")
tokens, _ = ops.top_k(layers.IntegerLookup(vocabulary=vocabulary, mask_token=0)(grams) - 1, TOKENS)
tokenizer = keras.Model(text, ops.cast(ops.maximum(tokens, 0), "int32"))
targets = (labels[:, None] == counts.index.to_numpy(object)).astype("float32")
data = {part: (tokenizer.predict(tf.constant(texts[parts == part]), 250), targets[parts == part]) for part in counts}
rows = [data["train"][0][of_class == 1] for of_class in data["train"][1].T]
inside = 1.0 + np.stack([np.bincount(row.ravel(), minlength=len(vocabulary) + 1) for row in rows], axis=1)
outside = inside.sum(axis=1, keepdims=True) - inside
ratios = np.log(inside / inside[1:].sum(axis=0)) - np.log(outside / outside[1:].sum(axis=0))
keras.utils.set_random_seed(SEED)
tokens = keras.Input([TOKENS], dtype="int32")
embedding = layers.Embedding(*ratios.shape)
is_known = ops.cast(tokens > 0, "float32")[..., None]
total = ops.sum(embedding(tokens) * is_known, axis=1) / ops.sqrt(ops.sum(is_known, axis=1) + 1)
embedding.set_weights([START * ratios])  # Scaled down; training adapts the rest.
log_priors = np.log(data["train"][1].mean(axis=0))  # Prediction for a text without known words.
model = keras.Model(tokens, layers.Softmax()(total + log_priors))
schedule = keras.optimizers.schedules.CosineDecay(LEARNING_RATE, EPOCHS * -(-len(data["train"][0]) // BATCH_SIZE))
loss = keras.losses.CategoricalCrossentropy(label_smoothing=LABEL_SMOOTHING)
model.compile(keras.optimizers.Adam(schedule), loss, metrics=["accuracy"])
folder = f"runs/{pd.Timestamp.now():%Y%m%d-%H%M%S}"
fit_callbacks = [callbacks.TensorBoard(folder), callbacks.EarlyStopping(patience=EPOCHS, restore_best_weights=True)]
model.fit(*data["train"], BATCH_SIZE, EPOCHS, callbacks=fit_callbacks, validation_data=data["validation"], verbose=2)
keras.Model(text, model(tokenizer(text))).save(f"{folder}/model.keras")
counts.to_csv(f"{folder}/classes.csv")
print(f"test accuracy {model.evaluate(*data['test'], verbose=0)[1]:.4f}")
