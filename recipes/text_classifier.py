"""Text classifier: classify film reviews as positive or negative, from raw text.

Teaches   n-grams of words, counted by layers of the model, and initial weights computed from the counts
Data      IMDB reviews: 22,500 train, 2,500 validation, 25,000 test; offline, sentences from a grammar
Result    test accuracy 91.49 ± 0.08 % over 3 seeds, 24 s, 2 cores of AMD EPYC, stale
Run       python recipes/text_classifier.py
"""

import dataclasses
import math
from typing import Annotated, Literal

from common.batches import (
    Split,
    evaluation_batches,
    evaluation_steps,
    steps_per_epoch,
    steps_per_execution,
    training_batches,
)
from common.cli import Count, Positive, Share, SharedConfig, UserError, run_recipe
from common.console import status
from common.data import IMDB, Data, class_weights, load_texts
from common.evaluation import evaluate_classifier
from common.optimizers import FusedAdam
from common.runs import start_run
from common.texts import word_hashes

import keras
import numpy as np
import sklearn.feature_extraction
import sklearn.linear_model
import sklearn.pipeline
import tensorflow as tf


@dataclasses.dataclass(frozen=True)
class Config(SharedConfig):
    epochs: Count = 3  # passes over the training texts
    batch_size: Count = 256  # texts per step, summed over all devices
    learning_rate: Positive = 0.01  # initial learning rate of Adam; cosine decay to zero
    label_smoothing: Share = 0.1  # share of each label that is spread evenly over all classes
    vocabulary: Count = 1_000_000  # number of n-grams that the model knows: the most frequent ones
    length: Annotated[int, 3, math.inf] = 1000  # maximum number of words per text, and of its n-grams; keeps the rarest
    class_weights: Literal["none", "balanced"] = "none"  # balanced: each class has the same influence on the loss
    text_column: str = "text"  # the column with the text, with --data FILE.csv
    label_column: str = "label"  # the column with the class, with --data FILE.csv
    group: str = ""  # texts with equal values in this column are in one split, such as the author; with --data FILE.csv


def load_data(config: Config) -> Data:
    return load_texts(IMDB, config, config.text_column, config.label_column, config.group)


@status("learning the vocabulary")
def build_tokenizer(config: Config, data: Data) -> tuple[keras.Model, Split]:
    """Maps raw texts to the ids of their distinct words, pairs and triples. Fitted on the training split only.

    Also returns the tokens of this split.
    """
    texts = keras.Input([], dtype="string", name="text")
    # An n-gram's id is a hash of 64 bits; 0 is padding.
    word = word_hashes(texts, data.train.inputs.numpy(), config.length)
    pair = keras.ops.where(word[:, 1:] != 0, word[:, :-1] * 1_000_003 + word[:, 1:], 0)
    triple = keras.ops.where(word[:, 2:] != 0, pair[:, :-1] * 1_000_003 + word[:, 2:], 0)
    ngrams = keras.ops.sort(keras.ops.concatenate([word, pair, triple], axis=1), axis=1)
    first = keras.ops.pad(ngrams[:, 1:] != ngrams[:, :-1], [[0, 0], [1, 0]], constant_values=True)
    ngrams = keras.ops.where(first, ngrams, 0)

    # N-grams of a single training text don't generalize. The most frequent come first.
    train_ngrams = tokenized(data.train, keras.Model(texts, ngrams))
    counted = train_ngrams.inputs.numpy()
    found, counts = np.unique(counted[counted != 0], return_counts=True)
    if not len(found):
        raise UserError(f"{data.name}: the training texts hold no words; give texts that do")
    order = np.argsort(-counts, kind="stable")[: config.vocabulary]
    known = found[order][counts[order] > 1]
    if not len(known):
        raise UserError(f"{data.name}: no two training texts share a word; give more texts")
    numbers = keras.layers.IntegerLookup(vocabulary=known, mask_token=0, name="ngrams")(ngrams)
    # The largest ids are the rarest n-grams; unknown ones (id 1) become padding.
    tokens, _ = keras.ops.top_k(numbers - 1, config.length)
    tokens = keras.ops.cast(keras.ops.maximum(tokens, 0), "int32")
    return keras.Model(texts, tokens, name="tokenizer"), tokenized(train_ngrams, keras.Model(ngrams, tokens))


def tokenized(split: Split, tokenizer: keras.Model) -> Split:
    """Token ids of the texts of a split: [n, length]."""
    batches = tf.data.Dataset.from_tensor_slices(split.inputs).batch(100).map(tokenizer, tf.data.AUTOTUNE)
    nothing = np.zeros([0, *tokenizer.output_shape[1:]], tokenizer.output.dtype)
    return Split.from_arrays(np.concatenate([nothing, *batches.as_numpy_iterator()]), split.targets)


def log_count_ratios(tokens: Split) -> np.ndarray:
    """Log-count ratios of the tokens (Wang and Manning 2012): [tokens, classes]."""
    of_class = tokens.targets.numpy().T == 1
    numbers = tokens.inputs.numpy()
    counts = np.stack([np.bincount(numbers[rows].ravel(), minlength=numbers.max() + 1) for rows in of_class], axis=1)
    counts = counts[1:] + 1.0  # Add-one smoothing; padding doesn't count.
    outside = counts.sum(axis=1, keepdims=True) - counts
    ratios = np.log(counts / counts.sum(axis=0)) - np.log(outside / outside.sum(axis=0))
    return np.pad(ratios, [(1, 0), (0, 0)])


def build_model(config: Config, data: Data, ratios: np.ndarray) -> keras.Model:
    """Maps token ids to probabilities; the saved model contains the tokenizer too.

    A text without known words gets the frequencies of the classes: equal ones, if the loss is balanced.
    """
    tokens = keras.Input([config.length], dtype="int32", name="tokens")
    evidence = keras.layers.Embedding(*ratios.shape, name="evidence")
    x = evidence(tokens)
    evidence.set_weights([0.25 * ratios])  # Scaled down, because the n-grams of a text overlap.
    # Sums over the tokens. The square root of their number keeps long texts from dominating.
    there = keras.ops.expand_dims(keras.ops.cast(keras.ops.not_equal(tokens, 0), x.dtype), axis=-1)
    x = keras.ops.sum(x * there, axis=1) / keras.ops.sqrt(keras.ops.sum(there, axis=1) + 1)
    if config.class_weights == "none":
        x = x + np.log(data.train.targets.numpy().mean(axis=0, dtype=np.float32))
    # Always float32: softmax outputs lose too much precision in 16 bits.
    probabilities = keras.layers.Activation("softmax", dtype="float32")(x)
    return keras.Model(tokens, probabilities, name="text_classifier")


def train(config: Config, data: Data | None = None) -> dict[str, float]:
    run = start_run(config)
    data = data or load_data(config)
    steps = steps_per_epoch(data.train, config.batch_size)

    # Tokenized once, before training.
    tokenizer, train_tokens = build_tokenizer(config, data)
    with status("tokenizing"):
        validation_tokens, test_tokens = (tokenized(split, tokenizer) for split in (data.validation, data.test))
    ratios = log_count_ratios(train_tokens)

    schedule = keras.optimizers.schedules.CosineDecay(config.learning_rate, decay_steps=config.epochs * steps)
    with run.strategy.scope():
        model = build_model(config, data, ratios)
        model.compile(
            optimizer=FusedAdam(schedule),
            loss=keras.losses.CategoricalCrossentropy(label_smoothing=config.label_smoothing),
            metrics=["accuracy"],
            steps_per_execution=steps_per_execution(
                model, train_tokens, config.batch_size, run.strategy, run.start_step
            ),
        )
    model.fit(
        training_batches(
            train_tokens,
            config.batch_size,
            config.seed,
            strategy=run.strategy,
            start_step=run.start_step,
            class_weights=class_weights(data, config),
        ),
        steps_per_epoch=steps,
        shuffle=False,  # The dataset is shuffled already.
        epochs=config.epochs,
        validation_data=evaluation_batches(validation_tokens, config.batch_size, run.strategy),
        validation_steps=evaluation_steps(validation_tokens, config.batch_size),
        callbacks=run.callbacks(data, preprocessing=tokenizer),
        verbose=run.verbose,
    )
    report = evaluate_classifier(
        model, test_tokens, data.class_names, config.batch_size, run.strategy, data.test.inputs
    )
    texts = keras.Input([], dtype="string", name="text")
    from_text = keras.Model(texts, model(tokenizer(texts)), name="text_classifier")
    return run.finish(from_text, data, report, baselines=baselines(data, tokenizer) if config.baseline else {})


@status("fitting the baselines")
def baselines(data: Data, tokenizer: keras.Model) -> dict[str, float]:
    """Test accuracy of a linear model on word counts."""

    def labels(split):
        return np.asarray(split.targets).argmax(axis=1)

    tokenizer_words = keras.Model(tokenizer.input, tokenizer.get_layer("words").output)
    words, test_words = (tokenized(split, tokenizer_words).inputs.numpy() for split in (data.train, data.test))
    counted_words = sklearn.pipeline.make_pipeline(
        sklearn.feature_extraction.text.CountVectorizer(
            binary=True, max_features=20_000, analyzer=lambda words: words[words != 0].tolist()
        ),
        sklearn.linear_model.LogisticRegression(C=0.1, max_iter=1000),
    )
    counted_words.fit(words, labels(data.train))
    return {"bag_of_words_accuracy": counted_words.score(test_words, labels(data.test))}


def main() -> None:
    run_recipe(train, Config, __doc__)


if __name__ == "__main__":
    main()
