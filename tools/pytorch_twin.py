"""Trains the network of a recipe in PyTorch, for tools/benchmark.py.

    python tools/pytorch_twin.py FOLDER
    python tools/pytorch_twin.py FOLDER --compile

FOLDER contains network.json (layers, loss and optimizer settings of the Keras model) and arrays.npz (initial weights
and training examples). The implementation follows PyTorch practice: data in main memory, augmentation per batch,
channels-last memory format, fused AdamW, and autocast if the recipe uses mixed precision. With --compile, it uses
`torch.compile`. Prints one line of JSON. Needs requirements-benchmark.txt.
"""

import argparse
import json
import math
import pathlib
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional

ACTIVATIONS = {"linear": nn.Identity, "relu": nn.ReLU, "silu": nn.SiLU, "softmax": nn.Identity}


class Lambda(nn.Module):
    """Wraps a function as a layer."""

    def __init__(self, function: Callable):
        super().__init__()
        self.function = function

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Applies the function."""
        return self.function(x)


class EmbeddingSum(nn.Module):
    """The network of text_classifier: the sum of embeddings, divided by the square root of the token count plus 1."""

    def __init__(self, embeddings: np.ndarray):
        super().__init__()
        self.table = nn.Embedding.from_pretrained(torch.tensor(embeddings), freeze=False, padding_idx=0)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """Maps tokens [batch, length] to logits [batch, classes]."""
        mask = (tokens != 0).unsqueeze(-1)
        return (self.table(tokens) * mask).sum(1) / torch.sqrt(mask.sum(1) + 1.0)


def build(layers: list[dict], weights: list[np.ndarray]) -> nn.Module:
    """Builds the network without a final softmax, which PyTorch computes in the loss."""
    if any(layer["kind"] == "Embedding" for layer in layers):
        return EmbeddingSum(weights[0])
    modules, remaining = [], [torch.tensor(weight) for weight in weights]
    for layer in layers:
        kind = layer["kind"]
        if kind == "Rescaling":
            scale, offset = layer["scale"], layer["offset"]
            modules.append(Lambda(lambda x, scale=scale, offset=offset: x.float() * scale + offset))
        elif kind == "Normalization":
            mean, variance, _ = remaining.pop(0), remaining.pop(0), remaining.pop(0)
            shape = (1, -1, 1, 1) if layer["images"] else (1, -1)
            mean, deviation = mean.reshape(shape), variance.sqrt().clamp(min=1e-7).reshape(shape)
            if layer["invert"]:
                modules.append(Lambda(lambda x, mean=mean, deviation=deviation: x * deviation + mean))
            else:
                modules.append(Lambda(lambda x, mean=mean, deviation=deviation: (x.float() - mean) / deviation))
        elif kind == "Conv2D":
            kernel = remaining.pop(0).permute(3, 2, 0, 1)
            module = nn.Conv2d(
                *(kernel.shape[1], kernel.shape[0], kernel.shape[2]), padding=layer["padding"], bias=layer["use_bias"]
            )
            module.weight = nn.Parameter(kernel, requires_grad=layer["trainable"])
            if layer["use_bias"]:
                module.bias = nn.Parameter(remaining.pop(0))
            modules += [module, ACTIVATIONS[layer["activation"]]()]
        elif kind == "Dense":
            kernel = remaining.pop(0).T.contiguous()
            module = nn.Linear(kernel.shape[1], kernel.shape[0], bias=layer["use_bias"])
            module.weight = nn.Parameter(kernel)
            if layer["use_bias"]:
                module.bias = nn.Parameter(remaining.pop(0))
            modules += [module, ACTIVATIONS[layer["activation"]]()]
        elif kind == "BatchNormalization":
            gamma, beta, mean, variance = remaining.pop(0), remaining.pop(0), remaining.pop(0), remaining.pop(0)
            module = nn.BatchNorm2d(len(beta), eps=layer["epsilon"], momentum=1 - layer["momentum"])
            module.weight, module.bias = nn.Parameter(gamma), nn.Parameter(beta)
            module.running_mean, module.running_var = mean, variance
            modules.append(module)
        elif kind == "MaxPooling2D":
            modules.append(nn.MaxPool2d(2))
        elif kind == "GlobalMaxPooling2D":
            # Not amax: compiled in bfloat16, its gradient compares rounded with unrounded values, and is NaN.
            modules += [nn.AdaptiveMaxPool2d(1), nn.Flatten()]
        elif kind == "Flatten":
            modules.append(Lambda(lambda x: x.permute(0, 2, 3, 1).flatten(1)))
        elif kind == "Activation":
            modules.append(ACTIVATIONS[layer["activation"]]())
        elif kind != "InputLayer":
            raise SystemExit(f"error: no twin of the layer {kind}")
    if remaining:
        raise SystemExit(f"error: {len(remaining)} weights are left over")
    return nn.Sequential(*modules)


class Muon(torch.optim.AdamW):
    """The PyTorch version of Muon in common/optimizers.py."""

    def __init__(self, parameters: list[nn.Parameter], constants: dict, **settings: Any):
        self.kernels = [parameter for parameter in parameters if parameter.ndim == 4]
        super().__init__([parameter for parameter in parameters if parameter.ndim != 4], **settings)
        self.velocities = [torch.zeros_like(kernel) for kernel in self.kernels]
        self.rate, self.decay = settings["lr"] * constants["kernel_speed"], settings["lr"] * settings["weight_decay"]
        self.momentum, self.unit_filters = constants["kernel_momentum"], constants["unit_filters"]

    @torch.no_grad()
    def step(self) -> None:
        """Updates all parameters."""
        super().step()
        for kernel, velocity in zip(self.kernels, self.velocities, strict=True):
            velocity.mul_(self.momentum).add_(kernel.grad)
            kernel.mul_(len(kernel) ** 0.5 / kernel.norm() if self.unit_filters else 1 - self.decay)
            step = orthogonal((kernel.grad + self.momentum * velocity).flatten(1))
            kernel.sub_(self.rate * step.view_as(kernel))

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clears all gradients."""
        super().zero_grad(set_to_none)
        for kernel in self.kernels:
            kernel.grad = None


def orthogonal(matrix: torch.Tensor) -> torch.Tensor:
    """Approximately orthogonalizes a matrix by Newton-Schulz iterations, like common/optimizers.py."""
    if matrix.shape[0] > matrix.shape[1]:
        return orthogonal(matrix.T).T
    matrix = matrix / (matrix.norm() + 1e-7)
    for _ in range(3):
        square = matrix @ matrix.T
        matrix = 3.4445 * matrix + (2.0315 * square @ square - 4.7750 * square) @ matrix
    return matrix


def optimizer_for(network: nn.Module, kind: str, constants: dict) -> torch.optim.Optimizer:
    """Creates the optimizer with the settings of the Keras optimizer, but a constant learning rate: the peak."""
    parameters = [parameter for parameter in network.parameters() if parameter.requires_grad]
    rate = constants["learning_rate"]
    if kind == "SGD":
        return torch.optim.SGD(parameters, rate, momentum=constants["momentum"], nesterov=constants["nesterov"])
    settings = {
        "lr": rate,
        "betas": (constants["beta_1"], constants["beta_2"]),
        "eps": constants["epsilon"],
        "weight_decay": constants["weight_decay"] or 0.0,
        "fused": True,
    }
    return Muon(parameters, constants, **settings) if kind == "Muon" else torch.optim.AdamW(parameters, **settings)


def augment(images: torch.Tensor, shift: int, flip: bool) -> torch.Tensor:
    """Randomly shifts (with reflection) and flips uint8 images [batch, channels, height, width], channels last."""
    count, _, height, width = images.shape
    images = images.permute(0, 2, 3, 1)
    if shift:
        rows, columns = (
            (torch.arange(size) + torch.randint(-shift, shift + 1, (count, 1))).abs() for size in (height, width)
        )
        rows = height - 1 - (height - 1 - rows).abs()
        columns = width - 1 - (width - 1 - columns).abs()
        if flip:
            columns = torch.where(torch.rand(count, 1) < 0.5, columns, columns.flip(1))
        images = images[torch.arange(count)[:, None, None], rows[:, :, None], columns[:, None, :]]
    return images.permute(0, 3, 1, 2)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=pathlib.Path)
    parser.add_argument("--compile", action="store_true", help="with torch.compile")
    parser.add_argument("--seed", type=int, default=0, help="of order and augmentation (default: 0)")
    arguments = parser.parse_args()
    description = json.loads((arguments.folder / "network.json").read_text())
    torch.set_num_threads(description["threads"])
    torch.manual_seed(arguments.seed)
    with np.load(arguments.folder / "arrays.npz") as arrays:
        network = build(description["layers"], [arrays[f"weight_{number}"] for number in range(description["weights"])])
        inputs, targets = torch.from_numpy(arrays["inputs"]), torch.from_numpy(arrays["targets"])
    if inputs.ndim == 4:
        inputs = inputs.permute(0, 3, 1, 2)  # A view: the memory stays channels last.
        network = network.to(memory_format=torch.channels_last)
    optimizer = optimizer_for(network, description["optimizer"], description["constants"])
    smoothing, batch_size = description["label_smoothing"], min(description["batch_size"], len(inputs))

    def loss_of(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=description["precision"] == "mixed_bfloat16"):
            outputs = network(x)
        if description["loss"] == "mse":
            return functional.mse_loss(outputs.float(), y) * description["loss_weight"]
        return functional.cross_entropy(outputs.float(), y, label_smoothing=smoothing)

    step_loss = torch.compile(loss_of) if arguments.compile else loss_of
    network.train()
    start, examples, losses = None, 0, []
    for _ in range(description["epochs"]):
        # Drop the last partial batch: another batch size would trigger a second compilation.
        for batch in torch.randperm(len(inputs))[: len(inputs) // batch_size * batch_size].split(batch_size):
            x, y = inputs[batch], targets[batch]
            if x.ndim == 4:
                x = augment(x, description["shift"], description["mirror"])
            optimizer.zero_grad(set_to_none=True)
            loss = step_loss(x, y)
            loss.backward()
            optimizer.step()
            losses.append(loss.detach())
            if start is None:  # Exclude the first step, which may compile.
                first_step, start = time.time(), time.perf_counter()
                continue
            examples += len(batch)
        final_loss = float(torch.stack(losses).mean())
        losses.clear()
    seconds = time.perf_counter() - start
    if not math.isfinite(final_loss):
        raise SystemExit(f"error: the loss of the twin is {final_loss}, so its speed means nothing")
    print(json.dumps({"examples_per_second": examples / seconds, "first_step": first_step, "loss": final_loss}))


if __name__ == "__main__":
    main()
