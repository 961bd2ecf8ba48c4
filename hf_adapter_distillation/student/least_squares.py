"""Least squares for an up-projection: distillation from a fixed target in closed form."""

from collections.abc import Callable

import torch

from ..method.losses import in_float64

# Pull of the solution towards the present weights, relative to the mean square of a feature: it keeps the weights of
# features that never fire, and makes small data solvable.
RIDGE = 1e-3


class UpProjectionFit:
    r"""Fit of one adapter's up-projection, which maps its bottleneck features to given updates.

    .. math::
        \min_{W, b} \sum_t \lVert W z_t + b - u_t \rVert^2 + \lambda \lVert (W, b) - (W_0, b_0) \rVert^2

    with the features z of the adapter, its wanted updates u, and its present weights. Tokens are added batch by batch;
    only the sums of the normal equations are kept, in float64.
    """

    def __init__(self) -> None:
        self.gram = torch.zeros(())  # (m + 1, m + 1)
        self.moment = torch.zeros(())  # (m + 1, d)
        self.square = torch.zeros(())

    def reduce(self, reduce: Callable[[torch.Tensor], torch.Tensor]) -> None:
        """Replace each sum, for instance by the sum over all processes."""
        self.gram, self.moment, self.square = reduce(self.gram), reduce(self.moment), reduce(self.square)

    def add(self, features: torch.Tensor, target: torch.Tensor, mask: torch.Tensor) -> None:
        """Add tokens: features (batch, seq_len, m), updates (batch, seq_len, hidden), mask (batch, seq_len)."""
        counted = mask > 0
        z = in_float64(features[counted])  # (n, m)
        z = torch.cat([z, torch.ones_like(z[:, :1])], dim=1)  # (n, m + 1), the last for the bias
        u = in_float64(target[counted])  # (n, d)
        self.gram = z.T @ z + self.gram
        self.moment = z.T @ u + self.moment
        self.square = u.square().sum() + self.square

    def solve(self, weight: torch.Tensor, bias: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return new weights and biases from the present ones, (hidden, m) and (hidden,), in their data type.

        The third result is the unexplained share of the target's squares, a scalar; 0 of a target of zeros.
        """
        old = in_float64(torch.cat([weight, bias.unsqueeze(1)], dim=1).T)  # (m + 1, d)
        ridge = RIDGE * self.gram.diagonal().mean().clamp(min=torch.finfo(torch.float32).tiny)
        gram = self.gram + ridge * torch.eye(len(self.gram), dtype=torch.float64, device=self.gram.device)
        new = torch.linalg.solve(gram, self.moment + ridge * old)  # (m + 1, d)
        error = self.square - 2 * (new * self.moment).sum() + (new * (self.gram @ new)).sum()
        unexplained = torch.where(self.square > 0, error / self.square, 0)
        return new[:-1].T.to(weight), new[-1].to(bias), unexplained
