"""The tangent kernel of a network: how a step of gradient descent on one record moves the outputs at another."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.func import functional_call, jacrev, vmap

from trivet.errors import require
from trivet.models.modes import evaluating
from trivet.randomness import generator

LIMIT = 2**31
"""The bytes that Jacobians, or the products of one kernel, may take unless told otherwise."""


@dataclass(frozen=True)
class Factor:
    """The Jacobian by one linear layer, which has rank one for each record and output: never formed.

    Attributes:
        inputs: [N, I] of the layer.
        backward: [N, R, O] of the network's (projected) outputs by the layer's.
        weight, bias: whether derivatives are taken by them.
    """

    inputs: Tensor
    backward: Tensor
    weight: bool
    bias: bool


@dataclass(frozen=True)
class Linearization:
    """A network near its parameters, at some records.

    Attributes:
        outputs: [N, C], not projected.
        factors: the Jacobian by the linear layers that see each record once, by the layer's name.
        rows: the Jacobian [N, R, ...] by each of the other parameters, by its name.
    """

    outputs: Tensor
    factors: Mapping[str, Factor]
    rows: Mapping[str, Tensor]


def linearize(
    model: nn.Module,
    x: Tensor,
    parameters: Mapping[str, Tensor] | None = None,
    *,
    project: Tensor | None = None,
    create_graph: bool = False,
    limit: int = LIMIT,
) -> Linearization:
    """The outputs of `model` in eval mode at `x` [N, ...], and their Jacobian by `parameters`.

    Args:
        parameters: by name, the values to differentiate by and at; None: those of `model` that learn. The others
            keep the model's values.
        project: [C, R]; the Jacobian is that of outputs @ project. None: of the C outputs themselves.
        create_graph: whether the result can be differentiated in the parameters; detached if not.
        limit: bytes the rows may take. Linear layers that are given [N, I], once, need none: their Jacobian has a
            closed form. All other parameters (convolutions, norms, weights that are shared or computed from others)
            need N * R * (number of parameters) numbers.

    Raises:
        BadValue: above the limit; the sentence says how many random projections would fit.
    """
    learnt = {name: value for name, value in model.named_parameters() if value.requires_grad}
    given = learnt if parameters is None else parameters
    at = {name: value if value.requires_grad else value.detach().requires_grad_() for name, value in given.items()}
    seen: dict[str, list[tuple[Tensor, Tensor]]] = {}
    with torch.enable_grad(), evaluating(model):
        with _watched(model, at, seen):
            outputs: Tensor = functional_call(model, at, (x,))
        wanted = outputs if project is None else outputs @ project
        once = {name: calls[0] for name, calls in seen.items() if len(calls) == 1 and calls[0][0].ndim == 2}
        backward = _backward(wanted, [out for _, out in once.values()], create_graph)
        factors = {
            name: Factor(inputs, each, f"{name}.weight" in at, f"{name}.bias" in at)
            for (name, (inputs, _)), each in zip(once.items(), backward, strict=True)
        }
        covered = {f"{name}.{kind}" for name in factors for kind in ("weight", "bias")}
        others = {name: value for name, value in at.items() if name not in covered}
        require_memory(
            x.element_size() * len(x) * sum(value.numel() for value in others.values()), wanted.shape[1], limit
        )

        def one(moved: dict[str, Tensor], record: Tensor) -> Tensor:
            found: Tensor = functional_call(model, {**at, **moved}, (record[None],))[0]
            return found if project is None else found @ project

        rows: dict[str, Tensor] = vmap(jacrev(one), (None, 0), randomness="error")(others, x) if others else {}
    if create_graph:
        return Linearization(outputs, factors, rows)
    return Linearization(
        outputs.detach(),
        {
            name: Factor(each.inputs.detach(), each.backward.detach(), each.weight, each.bias)
            for name, each in factors.items()
        },
        {name: each.detach() for name, each in rows.items()},
    )


def tangent_kernel(
    here: Linearization, there: Linearization, masks: Mapping[str, Tensor] | None = None, *, limit: int = LIMIT
) -> Tensor:
    """K[i, j, c, d] = sum_p m_p^2 * (d f_c(x_i) / d theta_p) * (d f_d(x'_j) / d theta_p), of shape [N, N', R, R'].

    With x' adversarial for x this is the mixed kernel. Where `here` and `there` are at other inputs it is neither
    symmetric nor positive semi-definite. Of a linear layer with inputs a and backward factors D (Jacot et al.,
    NeurIPS 2018, for the kernel; the sum below is the chain rule)

        K_l[i, j, c, d] = sum_o D_i[c, o] D'_j[d, o] * ( sum_k m[o, k]^2 a_i[k] a'_j[k] + 1[bias] ).

    Args:
        masks: by the parameter's name, shaped as it is; parameters without one count in full. With the masks of a
            sparse network, it is the kernel its training follows: dropped weights do not move.
        limit: bytes the products may take.

    Raises:
        BadValue: above the limit.
    """
    masks = masks or {}
    _require_room(here, there, masks, limit)
    n, m = len(here.outputs), len(there.outputs)
    parts: list[Tensor] = []
    for name, one in here.factors.items():
        other = there.factors[name]
        mask = masks.get(f"{name}.weight")
        # [N, N', O], or [N, N', 1] where all outputs of the layer share it.
        inner: Tensor | float = 0.0
        if one.weight:
            inner = (one.inputs @ other.inputs.T)[..., None]
            if mask is not None:
                inner = (one.inputs[:, None] * other.inputs) @ mask.to(one.inputs).square().T
        if one.bias:
            among = masks.get(f"{name}.bias")
            inner = inner + (1.0 if among is None else among.to(one.inputs).square())
        if isinstance(inner, Tensor) and inner.shape[-1] > 1:
            # [N', N R, O] @ [N', O, R']: a few large products are several times faster than N N' small ones.
            scaled = (one.backward * inner.transpose(0, 1)[:, :, None]).flatten(1, 2)
            parts.append((scaled @ other.backward.mT).unflatten(1, (n, -1)).transpose(0, 1))
        else:  # one number for each pair of records
            pairs = torch.einsum("ico,jdo->ijcd", one.backward, other.backward)
            parts.append(pairs * (inner[..., None] if isinstance(inner, Tensor) else inner))
    for name, row in here.rows.items():
        mask = masks.get(name)
        left = row if mask is None else row * mask.to(row).square()
        flat = left.flatten(2).flatten(0, 1) @ there.rows[name].flatten(2).flatten(0, 1).T
        parts.append(flat.view(n, row.shape[1], m, -1).transpose(1, 2))
    require(bool(parts), "the kernel needs at least one parameter to differentiate by.")
    return torch.stack(parts).sum(0)


def as_matrix(kernel: Tensor) -> Tensor:
    """[N R, N' R'] of a kernel [N, N', R, R']: rows and columns are (record, output)."""
    n, m, r, s = kernel.shape
    return kernel.transpose(1, 2).reshape(n * r, m * s)


def signs(outputs: int, count: int, seed: int, *purpose: str | int) -> Tensor:
    """Random signs / sqrt(outputs), [outputs, count]: what outputs are projected on where all are too many.

    With v and w drawn apart, the square of v^T D w is, in expectation, the mean square of the entries of D: the mean
    square of a kernel projected on two such matrices estimates that of the kernel without bias.
    """
    drawn = torch.randint(0, 2, (outputs, count), generator=generator(seed, "signs", *purpose))
    return (2.0 * drawn - 1.0) / outputs**0.5


def relative_distance(kernel: Tensor, reference: Tensor) -> Tensor:
    """The mean square of their difference over that of `reference`: kernels grow with width, this does not."""
    return (kernel - reference).square().mean() / reference.square().mean()


def require_memory(bytes_of_one: int, projections: int, limit: int) -> None:
    """Refuse what needs more than `limit` bytes, at `bytes_of_one` for each output or projection."""
    fits = limit // max(bytes_of_one, 1)
    mend = f"project the outputs on {fits} random sign vectors (sketches={fits})" if fits else "take fewer records"
    require(
        bytes_of_one * projections <= limit,
        f"the tangent kernel would need {bytes_of_one * projections / 2**30:.3g} GiB for its {projections} outputs, "
        f"above the limit of {limit / 2**30:.3g} GiB; {mend}.",
    )


def _require_room(here: Linearization, there: Linearization, masks: Mapping[str, Tensor], limit: int) -> None:
    pairs, projections, numbers = len(here.outputs) * len(there.outputs), 1, 0
    for name, each in here.factors.items():
        projections = each.backward.shape[1]
        masked = f"{name}.weight" in masks or f"{name}.bias" in masks
        numbers += each.backward.shape[2] if masked else projections
    for row in here.rows.values():
        projections = row.shape[1]
    require_memory(here.outputs.element_size() * pairs * numbers, projections, limit)


@contextmanager
def _watched(
    model: nn.Module, parameters: Mapping[str, Tensor], seen: dict[str, list[tuple[Tensor, Tensor]]]
) -> Iterator[None]:
    """Inside, `seen` gets what every plain linear layer is given and hands on, call by call."""
    owners = Counter(id(value) for _, value in model.named_parameters(remove_duplicate=False))

    def watch(name: str) -> object:
        def hook(_: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
            seen.setdefault(name, []).append((inputs[0], output))
            return output.clone()  # a rectifier that works in place would otherwise change what is kept

        return hook

    handles = []
    for name, layer in model.named_modules():
        tied = any(owners[id(value)] > 1 for value in layer.parameters(recurse=False))
        learns = f"{name}.weight" in parameters or f"{name}.bias" in parameters
        if type(layer) is nn.Linear and learns and not tied:
            handles.append(layer.register_forward_hook(watch(name)))  # type: ignore[arg-type]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _backward(outputs: Tensor, values: list[Tensor], create_graph: bool) -> list[Tensor]:
    """The derivatives [N, R, O] of outputs [N, R] by each of `values` [N, O]: records do not see each other."""
    if not values:
        return []
    n, r = outputs.shape
    each = torch.eye(r, dtype=outputs.dtype, device=outputs.device)[:, None].expand(r, n, r)
    found = torch.autograd.grad(
        outputs, values, each, is_grads_batched=True, create_graph=create_graph, retain_graph=True, allow_unused=True
    )
    # A layer whose output nothing uses has no part in the kernel.
    return [
        value.new_zeros(n, r, value.shape[1]) if gradient is None else gradient.transpose(0, 1)
        for value, gradient in zip(values, found, strict=True)
    ]
