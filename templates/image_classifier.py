"""Image classifier in plain Keras: trains on one folder of images per class and saves the model.

Install   pip install keras tensorflow tensorboard pandas scikit-learn pillow
Run       python image_classifier.py FOLDER    FOLDER/CLASS/image.png, or FOLDER/{train,validation,test}/CLASS/image.png
          python image_classifier.py           trains on the handwritten digits of scikit-learn
Watch     tensorboard --logdir runs
Use       keras.models.load_model("runs/.../model.keras").predict(pixels)    [n, height, width, channels], 0 to 255
"""

import argparse
import pathlib
import zlib

import keras
import numpy as np
import pandas as pd
import sklearn.datasets
from keras import callbacks, layers
from PIL import Image, ImageOps

IMAGE_SIZE = (28, 28)  # width and height; images are resized and padded; use 64 or 96 for photos
SHIFT, FLIP = 0.07, False  # augmentation: maximum translation as a fraction of the image size; horizontal flips
EPOCHS, BATCH_SIZE, SEED, LEARNING_RATE, WARMUP, WEIGHT_DECAY, LABEL_SMOOTHING = 15, 128, 0, 0.006, 0.15, 0.02, 0.05
PARTS = {"train": "train", "validation": "validation", "valid": "validation", "val": "validation", "test": "test"}


def read(path):
    """Reads an image as uint8 [height, width, 3], EXIF rotation applied, on white; None if it can't be read."""
    try:
        image = ImageOps.exif_transpose(Image.open(path))
        if image.mode.startswith(("I", "F")):
            return None  # More than 8 bits per channel.
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image.convert("RGBA"))
        return np.asarray(ImageOps.pad(image.convert("RGB"), IMAGE_SIZE, color="white"))
    except (OSError, ValueError, SyntaxError):
        return None


parser = argparse.ArgumentParser()
parser.add_argument("folder", nargs="?", type=pathlib.Path)
if root := parser.parse_args().folder:
    files = [path.relative_to(root) for path in sorted(root.rglob("*")) if path.is_file()]
    depth = 1 + any(path.parts[0].lower() in PARTS for path in files)
    used = [path for path in files if path.suffix.lower() in Image.registered_extensions() and len(path.parts) > depth]
    used = [path for path in used if depth == 1 or path.parts[0].lower() in PARTS]
    print("unused:", pd.Series([f"{x.parts[0]}/*{x.suffix}" for x in set(files) - set(used)]).value_counts().to_dict())
    images = [read(root / path) for path in used]
    broken = [str(path) for path, image in zip(used, images, strict=True) if image is None]
    if broken or not used:
        parser.error(f"{root}: {len(used)} pictures in folders of classes, not readable in 8 bits are {broken[:10]}")
    names = np.array([path.parts[depth - 1] for path in used])
    parts = np.array([PARTS[path.parts[0].lower()] if depth == 2 else "train" for path in used], object)
else:
    digits, names = sklearn.datasets.load_digits(return_X_y=True)
    digit_images = [Image.fromarray(digit) for digit in (digits.reshape(-1, 8, 8) * 15.9).astype("uint8")]
    images = [np.asarray(image.convert("RGB").resize(IMAGE_SIZE)) for image in digit_images]
    parts = np.full(len(digit_images), "train", object)
pixels = np.stack(images)
pixels = pixels[..., :1] if (pixels == pixels[..., :1]).all() else pixels  # Grayscale needs one channel.
# If there is no test or validation split, take 10 % of each class from train; duplicates stay in the same split.
rank = pd.Series([zlib.crc32(image) for image in images]).groupby([names, parts]).rank("dense") % 10
for number, part in enumerate(["test", "validation"], start=1):
    parts[(part not in parts) & (parts == "train") & (rank == number)] = part
print(counts := pd.crosstab(names, parts).reindex(columns=["train", "validation", "test"], fill_value=0))
if (missing := counts.index[counts.min(axis=1) == 0].tolist()) or len(counts) < 2:
    parser.error(f"at least 2 classes are needed, of each 3 different pictures: {missing[:10] or list(counts.index)}")
targets = (names[:, None] == counts.index.to_numpy()).astype("float32")  # one-hot
data = {part: (pixels[parts == part], targets[parts == part]) for part in counts}

keras.utils.set_random_seed(SEED)
inputs = keras.Input(pixels.shape[1:], dtype="uint8", name="pixels")
x = layers.RandomTranslation(SHIFT, SHIFT, fill_mode="nearest")(layers.Rescaling(1 / 255)(inputs))
x = layers.RandomFlip("horizontal")(x) if FLIP else x
for filters in (32, 64, 128, 256):
    if min(x.shape[1:3]) >= 8:
        x = layers.MaxPooling2D()(layers.Conv2D(filters, 3, activation="relu")(x))
x = layers.Dense(128, activation="relu")(layers.Flatten()(x))
model = keras.Model(inputs, layers.Dense(len(counts), activation="softmax")(x))

batch_size = min(BATCH_SIZE, len(data["train"][0]) // 30 + 1)  # At least 30 steps per epoch.
warmup = int(WARMUP * (steps := EPOCHS * -(-len(data["train"][0]) // batch_size)))
schedule = keras.optimizers.schedules.CosineDecay(0.0, steps - warmup, warmup_target=LEARNING_RATE, warmup_steps=warmup)
optimizer = keras.optimizers.AdamW(schedule, weight_decay=WEIGHT_DECAY, epsilon=1e-3)
model.compile(optimizer, keras.losses.CategoricalCrossentropy(label_smoothing=LABEL_SMOOTHING), metrics=["accuracy"])
folder = f"runs/{pd.Timestamp.now():%Y%m%d-%H%M%S}"
fit_callbacks = [callbacks.TensorBoard(folder), callbacks.EarlyStopping(patience=EPOCHS, restore_best_weights=True)]
model.fit(*data["train"], batch_size, EPOCHS, callbacks=fit_callbacks, validation_data=data["validation"], verbose=2)
model.save(f"{folder}/model.keras")
counts.to_csv(f"{folder}/classes.csv")
print(f"test accuracy {model.evaluate(*data['test'], verbose=0)[1]:.4f}")
