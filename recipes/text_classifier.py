"""Text classifier: tell praise from blame in film reviews, from the raw text.

Teaches   a vocabulary of words and word pairs as a layer of the model, and embeddings learned from scratch
Data      IMDB reviews: 22,500 train, 2,500 validation, 25,000 test; a grammar's where there is no network
Result    test accuracy 89.80 ± 0.20 % over 3 seeds, 23 s, 2 cores of Intel(R) Xeon(R) Processor
Run       python recipes/text_classifier.py
"""

import dataclasses
import math
from typing import Annotated

from common.batches import Split, evaluation_batches, steps_per_epoch, steps_per_execution, training_batches
from common.cli import Count, Positive, Share, SharedConfig, UserError, run_recipe
from common.data import IMDB, Data, load_texts
from common.evaluation import evaluate_classifier
from common.runs import start_run

import keras
import numpy as np
import sklearn.feature_extraction
import sklearn.linear_model
import sklearn.pipeline
import tensorflow as tf


@dataclasses.dataclass(frozen=True)
class Config(SharedConfig):
    epochs: Count = 5  # passes over the training texts
    batch_size: Count = 256  # texts per step, over all devices together
    learning_rate: Positive = 0.02  # step size of Adam at the start; it falls to zero along a cosine
    label_smoothing: Share = 0.1  # share of each label that is spread over all classes
    token_dropout: Share = 0.5  # share of a training text's words and pairs left out, others in each epoch
    vocabulary: Annotated[int, 3, math.inf] = 200_000  # words and word pairs the model knows: the most frequent ones
    length: Count = 1000  # words and word pairs of a text that are looked at
    dimensions: Count = 16  # size of an embedding
    text_column: str = "text"  # the column with the text, with --data FILE.csv
    label_column: str = "label"  # the column with the class, with --data FILE.csv


def load_data(config: Config) -> Data:
    return load_texts(IMDB, config, config.text_column, config.label_column)


def build_tokenizer(config: Config, data: Data) -> keras.layers.TextVectorization:
    """Lower case, no punctuation; words, then pairs of neighbours, as numbers. Fitted on train only."""
    tokenizer = keras.layers.TextVectorization(
        max_tokens=config.vocabulary,
        standardize="lower_and_strip_punctuation",
        ngrams=2,
        output_sequence_length=config.length,
        name="tokenizer",
    )
    tokenizer.adapt(tf.data.Dataset.from_tensor_slices(data.train.inputs).batch(1000))
    if len(tokenizer.get_vocabulary()) <= 2:  # Padding and unknown words are always there.
        raise UserError(f"{data.name}: the training texts hold no words; give texts that do")
    return tokenizer


def build_model(config: Config, data: Data) -> keras.Model:
    """From token numbers to probabilities; the tokenizer goes in front when training is done."""
    tokens = keras.Input([config.length], dtype="int32", name="tokens")
    x = keras.layers.Embedding(config.vocabulary, config.dimensions)(tokens)
    # The mean over the tokens that are there. One more in the divisor, for a text without any.
    there = keras.ops.expand_dims(keras.ops.cast(keras.ops.not_equal(tokens, 0), x.dtype), axis=-1)
    x = keras.ops.sum(x * there, axis=1) / (keras.ops.sum(there, axis=1) + 1)
    # In float32 whatever the precision of the rest: probabilities need the digits.
    probabilities = keras.layers.Dense(len(data.class_names), activation="softmax", dtype="float32")(x)
    return keras.Model(tokens, probabilities, name="text_classifier")


def train(config: Config, data: Data | None = None) -> dict[str, float]:
    run = start_run(config)
    data = data or load_data(config)
    steps = steps_per_epoch(data.train, config.batch_size)

    # Tokenized once, not in every epoch.
    tokenizer = build_tokenizer(config, data)
    train_tokens, validation_tokens, test_tokens = (
        tokenized(split, tokenizer) for split in (data.train, data.validation, data.test)
    )

    def augment(tokens, labels, random):
        left_out = random.uniform(0.0, 1.0, (config.length,)) < config.token_dropout
        return tf.where(left_out, 0, tokens), labels

    schedule = keras.optimizers.schedules.CosineDecay(config.learning_rate, decay_steps=config.epochs * steps)
    with run.strategy.scope():
        model = build_model(config, data)
        model.compile(
            optimizer=keras.optimizers.Adam(schedule),
            loss=keras.losses.CategoricalCrossentropy(label_smoothing=config.label_smoothing),
            metrics=["accuracy"],
            steps_per_execution=steps_per_execution(steps, run.strategy),
        )
    model.fit(
        training_batches(train_tokens, config.batch_size, config.seed, augment, run.strategy, run.start_step),
        steps_per_epoch=steps,
        shuffle=False,  # Shuffled already.
        epochs=config.epochs,
        validation_data=evaluation_batches(validation_tokens, config.batch_size, run.strategy),
        validation_steps=steps_per_epoch(validation_tokens, config.batch_size),
        callbacks=run.callbacks(data),
        verbose=run.verbose,
    )
    report = evaluate_classifier(
        model, test_tokens, data.class_names, config.batch_size, run.strategy, data.test.inputs
    )
    texts = keras.Input([], dtype="string", name="text")
    from_text = keras.Model(texts, model(tokenizer(texts)), name="text_classifier")
    return run.finish(from_text, data, report, baselines(data) if config.baseline else {})


def tokenized(split: Split, tokenizer: keras.layers.TextVectorization) -> Split:
    """The texts of a split as token numbers [n, length], a thousand at a time to save memory."""
    chunks = [tokenizer(split.inputs[start : start + 1000]) for start in range(0, len(split) or 1, 1000)]
    return Split.of(np.concatenate(chunks).astype(np.int32), split.targets)


def baselines(data: Data) -> dict[str, float]:
    """Test accuracy of always saying the commonest class, and of a linear model on counted words."""

    def labels(split):
        return np.asarray(split.targets).argmax(axis=1)

    commonest = np.bincount(labels(data.train)).argmax()
    counted_words = sklearn.pipeline.make_pipeline(
        sklearn.feature_extraction.text.CountVectorizer(binary=True, max_features=20_000, token_pattern=r"\w+"),
        sklearn.linear_model.LogisticRegression(C=0.1, max_iter=1000),
    )
    counted_words.fit(data.train.inputs.numpy(), labels(data.train))
    return {
        "majority_accuracy": float(np.mean(labels(data.test) == commonest)),
        "bag_of_words_accuracy": counted_words.score(data.test.inputs.numpy(), labels(data.test)),
    }


def main() -> None:
    run_recipe(train, Config, __doc__)


if __name__ == "__main__":
    main()
