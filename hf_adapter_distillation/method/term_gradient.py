"""Gradient of the distillation terms, which joins that of any loss computed from a model's output.

The terms are not added to a loss. Each tensor of the output passes through a function that returns it unchanged. So
the backward pass of whatever is computed from one or several of them reaches the terms, exactly once.
"""

from typing import Any

import torch
from torch.autograd import Function


class _Terms(Function):
    """The terms of a forward pass behind a zero; their gradient is a factor, whatever reaches the zero."""

    @staticmethod
    def forward(
        ctx: Any, terms: torch.Tensor, factor: torch.Tensor, total: torch.Tensor, follows_loss: bool
    ) -> torch.Tensor:
        """Return a zero."""
        ctx.factor, ctx.total, ctx.follows_loss = factor, total, follows_loss
        return torch.zeros_like(terms)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        """Return the gradient of the model's loss, where the terms follow it and it was used, or else the factor."""
        factor = (ctx.factor / ctx.total).to(grad)  # other forward passes have added to the total since
        return torch.where(grad == 0, factor, grad) if ctx.follows_loss else factor, None, None, None


class _Carrier(Function):
    """Identity of a tensor, with the zero of the terms as a second input."""

    @staticmethod
    def forward(ctx: Any, tensor: torch.Tensor, zero: torch.Tensor) -> torch.Tensor:
        """Return the tensor unchanged."""
        ctx.is_loss, ctx.dtype, ctx.device = tensor.dim() == 0, zero.dtype, zero.device
        # Trainers change a loss in place, and poolings hidden states, which autograd forbids for a view.
        return tensor.clone() if ctx.is_loss else tensor.detach()

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        """Pass the gradient on, to the zero only that of a loss."""
        if ctx.is_loss:
            return grad, grad.to(ctx.device, ctx.dtype)
        return grad, torch.zeros((), dtype=ctx.dtype, device=ctx.device)


def carry(
    output: Any, terms: torch.Tensor, factor: torch.Tensor, total: torch.Tensor, *, follows_loss: bool
) -> tuple[Any, torch.Tensor]:
    """Let terms ride on all tensors of an output: a tensor, a mapping or a tuple, nested or not.

    Args:
        output: The output of a model; mappings are changed in place. A tensor without dimensions in it is a loss.
        terms: The sum of the terms, with its graph.
        factor: The gradient of the terms, a number in a tensor, times the total.
        total: A number in a tensor that may change until the backward pass.
        follows_loss: Whether the terms take the gradient of the output's own loss instead, where the backward pass
            uses that loss.

    Returns:
        The output, and the zero through which the backward pass reaches the terms.

    Raises:
        TypeError: If the output has no tensor with a gradient.
    """
    zero = _Terms.apply(terms, factor, total, follows_loss)
    output, n_carriers = _ride(output, zero)
    if not n_carriers:
        raise TypeError(
            f"The model's output, {type(output).__name__}, has no tensor that the distillation terms could join; "
            "return a tensor, a tuple, a dict or a ModelOutput whose tensors have gradients."
        )
    return output, zero


def _ride(value: Any, zero: torch.Tensor) -> tuple[Any, int]:
    """Return an output whose tensors carry the zero, and their number."""
    if isinstance(value, torch.Tensor) and value.requires_grad:
        return _Carrier.apply(value, zero), 1
    if isinstance(value, dict):
        ridden = {name: _ride(part, zero) for name, part in value.items()}
        for name, (part, _) in ridden.items():
            value[name] = part
        return value, sum(number for _, number in ridden.values())
    if isinstance(value, tuple | list):
        pairs = [_ride(part, zero) for part in value]
        parts = [part for part, _ in pairs]
        again = value._make(parts) if hasattr(value, "_make") else type(value)(parts)
        return again, sum(number for _, number in pairs)
    return value, 0
