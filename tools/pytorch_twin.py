"""Trains the network of a recipe in PyTorch, for tools/benchmark.py, which describes it in a folder.

    python tools/pytorch_twin.py FOLDER
    python tools/pytorch_twin.py FOLDER --compile

FOLDER holds network.json, the layers of the Keras model with its loss and the constants of its optimizer, and
arrays.npz, with its initial weights and the training examples. Here it is written as people who know PyTorch would:
data in main memory, augmented a batch at a time, channels last, fused AdamW, autocast where the recipe is in mixed
precision, and with --compile `torch.compile`.
Prints a line of JSON. Needs requirements-benchmark.txt.
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
    """A function as a layer."""

    def __init__(self, function: Callable):
        super().__init__()
        self.function = function

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """What the function gives."""
        return self.function(x)


class SumOfEvidence(nn.Module):
    """The text classifier behind its tokenizer: embeddings summed, by the root of how many there are."""

    def __init__(self, embeddings: np.ndarray):
        super().__init__()
        self.table = nn.Embedding.from_pretrained(torch.tensor(embeddings), freeze=False, padding_idx=0)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """Class scores [batch, classes] of tokens [batch, length]."""
        there = (tokens != 0).unsqueeze(-1)
        return (self.table(tokens) * there).sum(1) / torch.sqrt(there.sum(1) + 1.0)


def build(layers: list[dict], weights: list[np.ndarray]) -> nn.Module:
    """The network; a softmax at its end is left to the loss, as PyTorch has it."""
    if any(layer["kind"] == "Embedding" for layer in layers):
        return SumOfEvidence(weights[0])
    modules, left = [], [torch.tensor(weight) for weight in weights]
    for layer in layers:
        kind = layer["kind"]
        if kind == "Rescaling":
            scale, offset = layer["scale"], layer["offset"]
            modules.append(Lambda(lambda x, scale=scale, offset=offset: x.float() * scale + offset))
        elif kind == "Normalization":
            mean, variance, _ = left.pop(0), left.pop(0), left.pop(0)
            shape = (1, -1, 1, 1) if layer["images"] else (1, -1)
            mean, spread = mean.reshape(shape), variance.sqrt().clamp(min=1e-7).reshape(shape)
            if layer["invert"]:
                modules.append(Lambda(lambda x, mean=mean, spread=spread: x * spread + mean))
            else:
                modules.append(Lambda(lambda x, mean=mean, spread=spread: (x.float() - mean) / spread))
        elif kind == "Conv2D":
            kernel = left.pop(0).permute(3, 2, 0, 1)
            module = nn.Conv2d(
                *(kernel.shape[1], kernel.shape[0], kernel.shape[2]), padding=layer["padding"], bias=layer["use_bias"]
            )
            module.weight = nn.Parameter(kernel, requires_grad=layer["trainable"])
            if layer["use_bias"]:
                module.bias = nn.Parameter(left.pop(0))
            modules += [module, ACTIVATIONS[layer["activation"]]()]
        elif kind == "Dense":
            kernel = left.pop(0).T.contiguous()
            module = nn.Linear(kernel.shape[1], kernel.shape[0], bias=layer["use_bias"])
            module.weight = nn.Parameter(kernel)
            if layer["use_bias"]:
                module.bias = nn.Parameter(left.pop(0))
            modules += [module, ACTIVATIONS[layer["activation"]]()]
        elif kind == "BatchNormalization":
            gamma, beta, mean, variance = left.pop(0), left.pop(0), left.pop(0), left.pop(0)
            module = nn.BatchNorm2d(len(beta), eps=layer["epsilon"], momentum=1 - layer["momentum"])
            module.weight, module.bias = nn.Parameter(gamma), nn.Parameter(beta)
            module.running_mean, module.running_var = mean, variance
            modules.append(module)
        elif kind == "MaxPooling2D":
            modules.append(nn.MaxPool2d(2))
        elif kind == "GlobalMaxPooling2D":
            # Not amax: compiled in bfloat16, its gradient looks for the maximum in numbers not yet rounded, and is NaN.
            modules += [nn.AdaptiveMaxPool2d(1), nn.Flatten()]
        elif kind == "Flatten":
            modules.append(Lambda(lambda x: x.permute(0, 2, 3, 1).flatten(1)))
        elif kind == "Activation":
            modules.append(ACTIVATIONS[layer["activation"]]())
        elif kind != "InputLayer":
            raise SystemExit(f"error: no twin of the layer {kind}")
    if left:
        raise SystemExit(f"error: {len(left)} weights are left over")
    return nn.Sequential(*modules)


class Muon(torch.optim.AdamW):
    """The one of common/optimizers.py."""

    def __init__(self, parameters: list[nn.Parameter], constants: dict, **settings: Any):
        self.kernels = [parameter for parameter in parameters if parameter.ndim == 4]
        super().__init__([parameter for parameter in parameters if parameter.ndim != 4], **settings)
        self.velocities = [torch.zeros_like(kernel) for kernel in self.kernels]
        self.rate, self.decay = settings["lr"] * constants["kernel_speed"], settings["lr"] * settings["weight_decay"]
        self.momentum, self.unit_filters = constants["kernel_momentum"], constants["unit_filters"]

    @torch.no_grad()
    def step(self) -> None:
        """Changes all parameters."""
        super().step()
        for kernel, velocity in zip(self.kernels, self.velocities, strict=True):
            velocity.mul_(self.momentum).add_(kernel.grad)
            kernel.mul_(len(kernel) ** 0.5 / kernel.norm() if self.unit_filters else 1 - self.decay)
            step = orthogonal((kernel.grad + self.momentum * velocity).flatten(1))
            kernel.sub_(self.rate * step.view_as(kernel))

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forgets all gradients."""
        super().zero_grad(set_to_none)
        for kernel in self.kernels:
            kernel.grad = None


def orthogonal(matrix: torch.Tensor) -> torch.Tensor:
    """As in common/optimizers.py."""
    if matrix.shape[0] > matrix.shape[1]:
        return orthogonal(matrix.T).T
    matrix = matrix / (matrix.norm() + 1e-7)
    for _ in range(3):
        square = matrix @ matrix.T
        matrix = 3.4445 * matrix + (2.0315 * square @ square - 4.7750 * square) @ matrix
    return matrix


def optimizer_for(network: nn.Module, kind: str, constants: dict) -> torch.optim.Optimizer:
    """The optimizer with the constants of the Keras one; its learning rate stays at its peak."""
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


def augmented(images: torch.Tensor, shift: int, mirror: bool) -> torch.Tensor:
    """Random shift with reflection, and mirroring, of uint8 images [batch, channels, height, width], channels last."""
    count, _, height, width = images.shape
    images = images.permute(0, 2, 3, 1)
    if shift:
        rows, columns = (
            (torch.arange(size) + torch.randint(-shift, shift + 1, (count, 1))).abs() for size in (height, width)
        )
        rows = height - 1 - (height - 1 - rows).abs()
        columns = width - 1 - (width - 1 - columns).abs()
        if mirror:
            columns = torch.where(torch.rand(count, 1) < 0.5, columns, columns.flip(1))
        images = images[torch.arange(count)[:, None, None], rows[:, :, None], columns[:, None, :]]
    return images.permute(0, 3, 1, 2)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=pathlib.Path)
    parser.add_argument("--compile", action="store_true", help="with torch.compile")
    parser.add_argument("--seed", type=int, default=0, help="of order and augmentation (default: 0)")
    arguments = parser.parse_args()
    described = json.loads((arguments.folder / "network.json").read_text())
    torch.set_num_threads(described["threads"])
    torch.manual_seed(arguments.seed)
    with np.load(arguments.folder / "arrays.npz") as arrays:
        network = build(described["layers"], [arrays[f"weight_{number}"] for number in range(described["weights"])])
        inputs, targets = torch.from_numpy(arrays["inputs"]), torch.from_numpy(arrays["targets"])
    if inputs.ndim == 4:
        inputs = inputs.permute(0, 3, 1, 2)  # A view: the memory stays channels last.
        network = network.to(memory_format=torch.channels_last)
    optimizer = optimizer_for(network, described["optimizer"], described["constants"])
    smoothing, batch_size = described["label_smoothing"], min(described["batch_size"], len(inputs))

    def loss_of(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=described["precision"] == "mixed_bfloat16"):
            answers = network(x)
        if described["loss"] == "mse":
            return functional.mse_loss(answers.float(), y) * described["loss_weight"]
        return functional.cross_entropy(answers.float(), y, label_smoothing=smoothing)

    step_loss = torch.compile(loss_of) if arguments.compile else loss_of
    network.train()
    began, examples, losses = None, 0, []
    for _ in range(described["epochs"]):
        # All of one size, so that nothing is compiled twice.
        for batch in torch.randperm(len(inputs))[: len(inputs) // batch_size * batch_size].split(batch_size):
            x, y = inputs[batch], targets[batch]
            if x.ndim == 4:
                x = augmented(x, described["shift"], described["mirror"])
            optimizer.zero_grad(set_to_none=True)
            loss = step_loss(x, y)
            loss.backward()
            optimizer.step()
            losses.append(loss.detach())
            if began is None:  # The first step may compile, and does not count.
                first, began = time.time(), time.perf_counter()
                continue
            examples += len(batch)
        final = float(torch.stack(losses).mean())
        losses.clear()
    seconds = time.perf_counter() - began
    if not math.isfinite(final):
        raise SystemExit(f"error: the loss of the twin is {final}, so its speed means nothing")
    print(json.dumps({"examples_per_second": examples / seconds, "first_step": first, "loss": final}))


if __name__ == "__main__":
    main()
