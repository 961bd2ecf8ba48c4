"""What Trainer reads of a model at its construction."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn
from transformers import PreTrainedModel


@contextmanager
def shown_to_trainer(model: nn.Module | None, counts_items: bool | None) -> Iterator[None]:
    """Let Trainer take a quantized model, whose adapters it does not see, and tell it whether the loss counts items.

    Adapters hides the signature by which Trainer decides this; a wrong answer scales the gradients.

    Args:
        counts_items: Whether the loss of the model is normalised by `num_items_in_batch`; None leaves it to Trainer. A
            model with an attribute `accepts_loss_kwargs` says it itself.
    """
    shown: dict[str, Any] = {}
    if isinstance(model, PreTrainedModel) and vars(model).get("is_quantized"):
        shown["is_quantized"] = False
    if counts_items is not None:
        shown["accepts_loss_kwargs"] = counts_items and getattr(model, "accepts_loss_kwargs", True)
    own = {} if model is None else vars(model)
    before = {name: own[name] for name in shown if name in own}
    own.update(shown)
    try:
        yield
    finally:
        for name in shown:
            del own[name]
        own.update(before)
