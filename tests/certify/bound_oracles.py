"""What bounds are held against: exact minima by cases and linear programmes, exact fractions, and attacks."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from fractions import Fraction

import numpy as np
import torch
from scipy.optimize import linprog
from torch import Tensor, nn

from trivet.certify.bounds.interval import Ball
from trivet.certify.bounds.network import Network, margin_rows
from trivet.randomness import generator


def mlp(*widths: int, seed: int = 0, dtype: torch.dtype = torch.float32, scale: float = 1.0) -> nn.Sequential:
    """Dense layers with ReLU between them, weights about scale / sqrt(fan in) in size."""
    draw = generator(seed, "test mlp")
    layers: list[nn.Module] = []
    for inputs, outputs in itertools.pairwise(widths):
        layer = nn.Linear(inputs, outputs, dtype=dtype)
        layer.weight.data = torch.randn(outputs, inputs, generator=draw, dtype=dtype) * scale * (2 / inputs) ** 0.5
        layer.bias.data = torch.randn(outputs, generator=draw, dtype=dtype) * 0.1
        layers += [layer, nn.ReLU()]
    return nn.Sequential(*layers[:-1]).eval()


def images(n: int, *shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.rand(n, *shape, generator=generator(seed, "test images"), dtype=dtype)


def ball(x: Tensor, eps: float, norm: str = "Linf", clip: tuple[float, float] | None = (0.0, 1.0)) -> Ball:
    return Ball(x, torch.full((len(x),), eps, dtype=x.dtype), norm, clip)  # type: ignore[arg-type]


def layers_of(model: nn.Sequential) -> list[tuple[np.ndarray, np.ndarray]]:
    return [
        (each.weight.detach().double().numpy(), each.bias.detach().double().numpy())
        for each in model
        if isinstance(each, nn.Linear)
    ]


def exact_minimum(model: nn.Sequential, lower: np.ndarray, upper: np.ndarray, row: np.ndarray) -> float:
    """min <row, logits> over a box: the smallest of a linear programme for each pattern of active rectifiers."""
    layers = layers_of(model)
    hidden = [len(b) for _, b in layers[:-1]]
    best = np.inf
    for pattern in itertools.product((0.0, 1.0), repeat=sum(hidden)):
        gates = np.split(np.array(pattern), np.cumsum(hidden)[:-1])
        A, c = np.eye(len(lower)), np.zeros(len(lower))
        left, right = [], []
        for (W, b), gate in zip(layers[:-1], gates, strict=True):
            A, c = W @ A, W @ c + b
            side = np.where(gate > 0, -1.0, 1.0)  # active: z >= 0
            left.append(side[:, None] * A)
            right.append(-side * c)
            A, c = gate[:, None] * A, gate * c
        W, b = layers[-1]
        objective, constant = row @ W @ A, row @ (W @ c + b)
        found = linprog(objective, np.vstack(left), np.concatenate(right), bounds=list(zip(lower, upper, strict=True)))
        if found.status == 0:
            best = min(best, found.fun + constant)
    return float(best)


def triangle_minimum(
    model: nn.Sequential, lower: np.ndarray, upper: np.ndarray, row: np.ndarray, before: Sequence[tuple[Tensor, Tensor]]
) -> float:
    """The linear programme of Wong & Kolter: each unstable rectifier within its triangle over the bounds `before`."""
    layers = layers_of(model)
    sizes = [len(lower)] + [len(b) for _, b in layers[:-1]]
    total = sum(sizes)
    starts = np.cumsum([0, *sizes])
    limits = list(zip(lower, upper, strict=True)) + [(0.0, None)] * (total - len(lower))
    left, right, equal, fixed = [], [], [], []
    for k, ((W, b), (low, high)) in enumerate(zip(layers[:-1], before, strict=True)):
        for i in range(len(b)):
            z = np.zeros(total)
            z[starts[k] : starts[k + 1]] = W[i]
            h = np.zeros(total)
            h[starts[k + 1] + i] = 1
            bottom, top = float(low[i]), float(high[i])
            if bottom >= 0:
                equal.append(h - z)
                fixed.append(b[i])
            elif top <= 0:
                equal.append(h)
                fixed.append(0.0)
            else:
                slope = top / (top - bottom)
                left += [z - h, h - slope * z]
                right += [-b[i], slope * (b[i] - bottom)]
    W, b = layers[-1]
    objective = np.zeros(total)
    objective[starts[-2] :] = row @ W
    found = linprog(
        objective,
        np.array(left) if left else None,
        np.array(right) if left else None,
        np.array(equal) if equal else None,
        np.array(fixed) if equal else None,
        bounds=limits,
    )
    return float(found.fun + row @ b)


def exact_intervals(model: nn.Sequential, x: Tensor, eps: Fraction) -> list[list[tuple[Fraction, Fraction]]]:
    """Interval bound propagation of one input in exact fractions, before and after every rectifier."""
    box = [
        (max(Fraction(v) - eps, Fraction(0)), min(Fraction(v) + eps, Fraction(1)))
        for v in x.double().flatten().tolist()
    ]
    found = [box]
    for layer in model:
        if isinstance(layer, nn.Linear):
            weights = [[Fraction(w) for w in row] for row in layer.weight.double().tolist()]
            biases = [Fraction(b) for b in layer.bias.double().tolist()]
            box = [
                (
                    b + sum(w * (low if w > 0 else high) for w, (low, high) in zip(row, box, strict=True)),
                    b + sum(w * (high if w > 0 else low) for w, (low, high) in zip(row, box, strict=True)),
                )
                for row, b in zip(weights, biases, strict=True)
            ]
        else:
            box = [(max(low, Fraction(0)), max(high, Fraction(0))) for low, high in box]
        found.append(box)
    return found


def exactly(model: nn.Sequential, x: Sequence[Fraction]) -> list[Fraction]:
    """The network as a function of fractions."""
    values = list(x)
    for layer in model:
        if isinstance(layer, nn.Linear):
            rows, biases = layer.weight.double().tolist(), layer.bias.double().tolist()
            values = [
                Fraction(b) + sum(Fraction(w) * v for w, v in zip(row, values, strict=True))
                for row, b in zip(rows, biases, strict=True)
            ]
        else:
            values = [max(v, Fraction(0)) for v in values]
    return values


def in_float32(model: nn.Sequential, x: np.ndarray, order: Callable[[int], np.ndarray]) -> np.ndarray:
    """The network in float32, each sum taken one by one in the order given."""
    values = x.astype(np.float32)
    for layer in model:
        if isinstance(layer, nn.Linear):
            weight, bias = layer.weight.detach().numpy(), layer.bias.detach().numpy()
            places = order(len(values))
            total = np.zeros(len(bias), dtype=np.float32)
            for i in places:
                total = total + weight[:, i] * values[i]
            values = total + bias
        else:
            values = np.maximum(values, np.float32(0))
    return values


def points_in(x: Tensor, eps: float, norm: str, count: int, seed: int = 0) -> Tensor:
    """[count, N, ...] inputs of the ball and [0, 1]: corners, surfaces and insides."""
    draw = generator(seed, "points", norm)
    moves = torch.randn(count, *x.shape, generator=draw, dtype=x.dtype)
    if norm == "Linf":
        moves = torch.where(torch.rand(moves.shape, generator=draw, dtype=x.dtype) < 0.9, moves.sign(), moves.tanh())
    elif norm == "L2":
        moves = moves / moves.flatten(2).norm(dim=2).view(count, len(x), *[1] * (x.ndim - 1))
    else:
        places = torch.randint(x[0].numel(), (count, len(x), 1), generator=draw)
        signs = moves.flatten(2).gather(2, places).sign()
        moves = torch.zeros_like(moves.flatten(2)).scatter(2, places, signs).view(moves.shape)
    return (x + eps * (1 - 1e-6) * moves).clamp(0, 1)


def attacked(model: nn.Module, x: Tensor, eps: float, rows: Tensor, steps: int = 15) -> Tensor:
    """The smallest value found of each row of `rows` @ logits in the Linf ball, [N, S]: signed gradient descent."""
    worst = torch.full(rows.shape[:2], torch.inf, dtype=x.dtype)
    for s in range(rows.shape[1]):
        moved = x.clone()
        for step in range(steps):
            moved.requires_grad_()
            value = (rows[:, s] * model(moved)).sum(1)
            worst[:, s] = torch.minimum(worst[:, s], value.detach())
            (gradient,) = torch.autograd.grad(value.sum(), moved)
            size = eps * (1.0 if step < steps // 2 else 0.3)
            moved = (moved.detach() - size * gradient.sign()).clamp(x - eps, x + eps).clamp(0, 1)
    return worst


def least_found(model: nn.Module, x: Tensor, eps: float, norm: str, rows: Tensor, count: int = 200) -> Tensor:
    """The smallest value seen of each row, [N, S], by sampling and, for Linf, by gradients."""
    with torch.no_grad():
        logits = torch.stack([model(each) for each in points_in(x, eps, norm, count)])
        worst = torch.einsum("bsk,nbk->nbs", rows.to(logits.dtype), logits).amin(0)
    return torch.minimum(worst, attacked(model, x, eps, rows.to(x.dtype))) if norm == "Linf" else worst


def margins_of(model: nn.Module, x: Tensor, eps: float, method: str = "crown", **more: object) -> Tensor:
    """Bounds of all margins of the model's own answers, in the exact arithmetic of real numbers unless told."""
    norm, clip = more.pop("norm", "Linf"), more.pop("clip", (0.0, 1.0))
    network = Network.of(model, x.shape[1:])
    with torch.no_grad():
        labels = model(x).argmax(1)
    settings = {"arithmetic": "real", **more}
    return network.margins(ball(x, eps, norm, clip), labels, method=method, **settings)  # type: ignore[arg-type]


def rows_of(model: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        logits = model(x)
    return margin_rows(logits.argmax(1), logits.shape[1])
