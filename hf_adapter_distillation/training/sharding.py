"""The frozen base model in shards, one in each process; all that belongs to adapters stays whole."""

import torch
from adapters import ModelAdaptersMixin
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from ..method.distillation import active_block
from ..method.parameters import parameter_roles


def shard_base_model(model: ModelAdaptersMixin) -> None:
    """Shard the layers of the frozen base model over all processes with FSDP2.

    A process keeps its part of each layer, and gathers the whole layer while this runs. Student, teachers, fusions and
    heads stay whole in each process, and so do the embeddings. The trainer then takes the model like any other:
    DistributedDataParallel averages the gradients of what is trained, and leaves the shards alone.

    Call it after `train_adapter`, and after the training arguments have started the processes. All processes must
    hold the same weights, and must run the model equally often.

    Raises:
        RuntimeError: If the processes have not been started.
        ValueError: If no distilled student is active, a base model's layer is trained, or the model is sharded.
    """
    block = active_block(model)
    if not torch.distributed.is_initialized():
        raise RuntimeError(
            "The processes have not been started; run the script with torchrun or accelerate launch, and create the "
            "training arguments first."
        )
    if is_sharded(model):
        raise ValueError("The base model is sharded already; call shard_base_model once.")
    roles = parameter_roles(model, block)
    named = dict(model.named_parameters())
    trained = next((name for name, p in named.items() if roles[name] == "base model" and p.requires_grad), None)
    if trained is not None:
        raise ValueError(f"{trained!r} of the base model is trained, but shards are frozen; call train_adapter first.")
    whole = {parameter for name, parameter in named.items() if roles[name] != "base model"}
    for _, layer in model.iter_layers():
        fully_shard(layer, ignored_params=whole)
    shards = [name for name, parameter in model.named_parameters() if isinstance(parameter, DTensor)]
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, shards)


def is_sharded(model: torch.nn.Module) -> bool:
    """Return whether a part of the model lies in shards."""
    return any(isinstance(parameter, DTensor) for parameter in model.parameters())
