"""The layers of an ensemble of equal MLPs, relu between them: as batched products, and for a CPU also by hand, part by part.

A large ensemble's activations, megabytes for each layer, pass through memory once for every elementary operation; separate modules, whose
activations stay in the cache, are then faster than one batched product. By hand, a few members at a time go through all layers, relu works
in place, and gradients have the parameters' own layout, which makes Adam's passes over them twice as fast. Where everything fits the cache,
the call of a Python function costs more than that saves.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch

CACHED_VALUES = 1 << 16
"""Activations of one layer that are worked on together: 256 kB, and what is touched together fits a second-level cache of 1 MB."""

SMALL_VALUES = 4 * CACHED_VALUES
"""Up to here batched products are faster; measured at 2 to 48 members of 64-64 and 320 to 1280 pairs."""


def ensemble(x: torch.Tensor, weights: Sequence[torch.Tensor], biases: Sequence[torch.Tensor]) -> torch.Tensor:
    """Values of e MLPs.

    Args:
        x: (in, N), the same input for all of them, or (e, in, N).
        weights: Of each layer, (e, in, out); the last layer has one output.
        biases: Of each layer, (e, 1, out).

    Returns:
        (e, N).
    """
    activations = len(weights[0]) * _widest(weights) * x.shape[-1]
    if activations <= SMALL_VALUES or len(weights) == 1 or x.is_cuda or torch.compiler.is_compiling():
        return batched(x, weights, biases)
    return by_parts(x, weights, biases)


def batched(x: torch.Tensor, weights: Sequence[torch.Tensor], biases: Sequence[torch.Tensor]) -> torch.Tensor:
    """One product per layer, differentiated by autograd; arguments and result as `ensemble`."""
    # Pairs stand in the last dimension: one wide product for the first layer of all members, and larger ones behind it.
    (weight, bias), *hidden = ((w.transpose(1, 2), b.transpose(1, 2)) for w, b in zip(weights, biases, strict=True))
    shared = x.dim() == 2
    x = torch.addmm(bias.reshape(-1, 1), weight.reshape(-1, weight.shape[2]), x) if shared else torch.baddbmm(bias, weight, x)
    for weight, bias in hidden:
        members, _, width = weight.shape
        # In place and before the view, behind which autograd would copy; compiled, oneDNN fuses that with addmm, and takes 3 times as long.
        fusing = torch.compiler.is_compiling()
        x = torch.relu(x.view(members, width, -1)) if fusing else torch.relu_(x).view(members, width, -1)
        x = torch.baddbmm(bias, weight, x)  # (e, hidden, N)
    return x.view(len(weight), -1)


def by_parts(x: torch.Tensor, weights: Sequence[torch.Tensor], biases: Sequence[torch.Tensor]) -> torch.Tensor:
    """The same by hand, a few members at a time; at least two layers, cannot be differentiated twice."""
    values: torch.Tensor = _ByParts.apply(torch.is_grad_enabled(), x, *weights, *biases)  # type: ignore[no-untyped-call]  # torch does not type it
    return values


class _ByParts(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, keep: bool, x: torch.Tensor, *parameters: torch.Tensor) -> torch.Tensor:
        depth, num_pairs = len(parameters) // 2, x.shape[-1]
        weights, biases = parameters[:depth], parameters[depth:]
        size = _members(weights, num_pairs)
        hidden = _hidden(x, weights, len(weights[0]) if keep else size)  # without a backward pass all parts share one place
        values = x.new_empty(len(weights[0]), 1, num_pairs)
        turned = [weights[0].transpose(1, 2).contiguous(), *(weight.transpose(1, 2) for weight in weights[1:])]  # (e, out, in)
        columns = [bias.transpose(1, 2) for bias in biases]  # (e, out, 1)
        for number, (result, *part) in enumerate(_parts([values, *turned, *columns, *([x] if x.dim() == 3 else [])], size)):
            first = number * size if keep else 0
            below = part[-1] if x.dim() == 3 else x
            for layer in range(depth):
                above = hidden[layer][first : first + len(result)] if layer < depth - 1 else result
                if below.dim() == 2:
                    torch.mm(part[0].flatten(0, 1), x, out=above.view(-1, num_pairs))
                else:
                    torch.bmm(part[layer], below, out=above)
                above.add_(part[depth + layer])
                below = above.relu_() if layer < depth - 1 else above
        if keep:
            ctx.save_for_backward(x, *parameters, *hidden)
        return values[:, 0]

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, *saved = ctx.saved_tensors
        depth = (len(saved) + 1) // 3
        weights, biases, hidden = saved[:depth], saved[depth : 2 * depth], saved[2 * depth :]
        size = _members(weights, x.shape[-1])
        scratch = _hidden(x, weights, size)
        weight_gradients, bias_gradients = ([torch.empty_like(p) for p in group] for group in (weights, biases))
        x_gradient = torch.zeros_like(x) if ctx.needs_input_grad[1] else None
        inputs = x if x.dim() == 3 else x.expand(len(weights[0]), -1, -1)
        per_member = [gradient.unsqueeze(1), *weights, inputs, *hidden, *weight_gradients, *(b[:, 0] for b in bias_gradients)]
        for number, (last, *part) in enumerate(_parts(per_member, size)):
            above = last  # (members, out, N) gradient of a layer's result
            for layer in range(depth - 1, -1, -1):
                below = part[depth + layer]
                torch.bmm(below, above.transpose(1, 2), out=part[2 * depth + layer])
                torch.sum(above, 2, out=part[3 * depth + layer])
                if layer > 0:
                    inner = torch.bmm(part[layer], above, out=scratch[layer - 1][: len(above)])
                    above = torch.ops.aten.threshold_backward.grad_input(inner, below, 0, grad_input=inner)
            if x_gradient is not None and x.dim() == 3:
                torch.bmm(part[0], above, out=x_gradient[number * size : number * size + len(above)])
            elif x_gradient is not None:
                x_gradient.addmm_(part[0].transpose(0, 1).flatten(1), above.flatten(0, 1))
        return None, x_gradient, *weight_gradients, *bias_gradients


def _hidden(x: torch.Tensor, weights: Sequence[torch.Tensor], members: int) -> list[torch.Tensor]:
    """Room for the activations of the hidden layers, (members, hidden, N) each.

    In one allocation: the C library gives single ones of some megabytes back to the system at every step, and taking them again costs as
    much as the products.
    """
    widths = [weight.shape[2] for weight in weights[:-1]]
    room = x.new_empty(members * sum(widths) * x.shape[-1])
    pieces = torch.split_with_sizes(room, [members * width * x.shape[-1] for width in widths])
    return [piece.view(members, width, -1) for piece, width in zip(pieces, widths, strict=True)]


def _widest(weights: Sequence[torch.Tensor]) -> int:
    return max(weight.shape[2] for weight in weights)


def _members(weights: Sequence[torch.Tensor], num_pairs: int) -> int:
    """How many go through the layers together."""
    return min(len(weights[0]), max(1, CACHED_VALUES // (_widest(weights) * num_pairs)))


def _parts(tensors: Sequence[torch.Tensor], size: int) -> Iterable[tuple[torch.Tensor, ...]]:
    """The same members of each tensor (e, ...), `size` at a time."""
    return zip(*(torch.split(tensor, size) for tensor in tensors), strict=True)
