"""The attention over teachers in one layer: the trainable query, key and value of stage 2."""

import torch
from torch import nn


class TeacherFusion(nn.Module):
    r"""Fuses the teachers' updates at one bottleneck location.

    .. math::
        q = Q h, \quad k_n = K u_n, \quad v_n = V u_n, \quad a = \mathrm{softmax}_n(q \cdot k_n), \quad
        \mathrm{fused} = \sum_n a_n v_n

    with h the input of the layer's adapters and u_n the update of teacher n. The key has no bias: it would add the
    same number to each score and vanish in the softmax. The value starts at the identity, so that the first fused
    output is a convex combination of the updates. The size of the module does not depend on the number of teachers.

    Sources: Wang et al., https://arxiv.org/abs/2312.16261 (Q_l, K_l, V_l of each layer); AdapterFusion,
    https://arxiv.org/abs/2005.00247 (the form of the attention).

    Args:
        hidden_size: The width d of the layer.
        location: The name of the bottleneck layer in the base model, for logs and plots.
        in_decoder: Whether the layer belongs to the decoder of an encoder-decoder model, where padding follows the
            decoder's own mask.
        device: The device of the weights.
        dtype: The data type of the weights.
    """

    def __init__(
        self,
        hidden_size: int,
        location: str = "",
        in_decoder: bool = False,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.location = location
        self.in_decoder = in_decoder
        self.query = nn.Linear(hidden_size, hidden_size, device=device, dtype=dtype)
        self.key = nn.Linear(hidden_size, hidden_size, bias=False, device=device, dtype=dtype)
        self.value = nn.Linear(hidden_size, hidden_size, bias=False, device=device, dtype=dtype)
        nn.init.normal_(self.query.weight, std=0.02)
        nn.init.zeros_(self.query.bias)
        nn.init.normal_(self.key.weight, std=0.02)
        nn.init.eye_(self.value.weight)

    def forward(self, hidden_states: torch.Tensor, updates: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Computes the fused update.

        Args:
            hidden_states: The input of the layer's adapters, (batch, seq_len, hidden).
            updates: What each teacher adds to the residual, (batch, seq_len, n_teachers, hidden).

        Returns:
            The fused output, (batch, seq_len, hidden), and the detached attention over teachers,
            (batch, seq_len, n_teachers), each row of which sums to 1.
        """
        # q . (K u_n) = (K^T q) . u_n, and sum_n a_n V u_n = V sum_n a_n u_n: one product with K and V, not N.
        query = self.query(hidden_states) @ self.key.weight  # (B, T, d)
        scores = torch.einsum("btd,btnd->btn", query, updates.to(query.dtype))  # (B, T, N)
        attention = scores.softmax(dim=-1, dtype=torch.promote_types(scores.dtype, torch.float32))  # (B, T, N)
        fused_update = torch.einsum("btn,btnd->btd", attention.to(updates.dtype), updates)  # (B, T, d)
        return self.value(fused_update), attention.detach()  # (B, T, d), (B, T, N)
