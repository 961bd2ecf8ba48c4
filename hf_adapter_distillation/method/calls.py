"""The calls of the base model in a forward pass: the padding masks and the number of sequences of each.

A model may call its base model several times in a forward pass, each time with another mask, as a bi-encoder does.
"""

from copy import copy
from typing import Any

import torch
from adapters import ModelAdaptersMixin

from .._compat import ForwardContext, named_arguments
from .heads import shifts_labels
from .layer_pass import current_pass


def number_of_sequences(named: dict[str, Any]) -> int:
    """Return the size of the batch of a call with named arguments."""
    return next((len(value) for value in named.values() if isinstance(value, torch.Tensor) and value.dim()), 1)


def masks_of(model: ModelAdaptersMixin, named: dict[str, Any], is_half: bool) -> dict[bool, torch.Tensor | None]:
    """Return the padding masks by `TeacherFusion.in_decoder`."""
    encoder, decoder, labels = (named.get(name) for name in ("attention_mask", "decoder_attention_mask", "labels"))
    if is_half:
        return {False: named.get("encoder_attention_mask", encoder), True: encoder}
    if decoder is not None or not model.config.is_encoder_decoder:
        return {False: encoder, True: decoder}
    if labels is not None and shifts_labels(model):
        decoder = labels != -100  # the decoder's inputs are the shifted labels
    elif encoder is not None and all(named.get(f"decoder_{name}") is None for name in ("input_ids", "inputs_embeds")):
        decoder = encoder  # ... the shifted inputs of the encoder, whose last token is cut off in the longest row
    return {False: encoder, True: decoder}


def begin_call(student: str, base_model: ModelAdaptersMixin, args: tuple, kwargs: dict[str, Any]) -> None:
    """Note a call of the base model, and give it its masks; a hook before its forward.

    A call with other masks than those of the model's arguments gets a forward context of its own, which gradient
    checkpointing keeps for its layers.
    """
    current = current_pass()
    if current is None or current.inputs.block.student != student:
        return
    named = named_arguments(base_model, args, kwargs)
    current.calls.append(number_of_sequences(named))
    outer, masks = current.inputs.masks, masks_of(base_model, named, is_half=False)
    if masks[True] is None:  # it was derived from the labels
        masks[True] = outer[True]
    if all(masks[in_decoder] is outer[in_decoder] for in_decoder in masks):
        return
    context = copy(ForwardContext.get_context())
    vars(context)["distillation_pass"] = current.for_call(masks)
    vars(context)["is_call"] = True
    ForwardContext.get_contexts().append(context)


def end_call(base_model: ModelAdaptersMixin, args: tuple, output: Any) -> None:
    """Leave the forward context of a call of the base model; a hook behind its forward."""
    if (context := ForwardContext.get_context()) is not None and "is_call" in vars(context):
        ForwardContext.get_contexts().pop()
        outer = vars(ForwardContext.get_context())
        outer |= {name: v for name, v in vars(context).items() if name not in ("distillation_pass", "is_call")}
