"""Checkpoints of a distillation: write, check and load them."""

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from adapters import ModelAdaptersMixin
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from transformers.utils import logging

from .._compat import ADAPTER_CONFIG_NAME
from ..composition import AdapterDistillation
from ..method.distillation import distillation_of
from ..method.parameters import is_fusion
from ..method.weights import TeacherWeights
from ..student.digests import teacher_digests
from ..student.provenance import read_provenance
from ..student.saving import DIGESTS_NAME, file_digest, read_weights, save_weights

logger = logging.get_logger(__name__)

FUSION_WEIGHTS_NAME = "distillation_fusion.safetensors"
LOSS = "loss "  # and its number, before the names of the weights of a loss
WEIGHTS_BESIDE_NAME = "trained_beside_the_student.safetensors"
# In the metadata of the fusion.
STAGE_2_START, TEACHER_WEIGHTS, EXPLAINED = "first_distillation_step", "teacher_weights", "start_explained"


def save_student(
    model: ModelAdaptersMixin,
    student: str,
    folder: str,
    stage_2_start: int | None = None,
    safetensors: bool = True,
    explained: float | None = None,
) -> None:
    """Write the student with its head, as `save_adapter` does, and the fusion if it is on the model.

    In stage 2 `stage_2_start` is the number of its first step, for `stage_2_start`; `explained` is what
    `saved_explained` returns. Without `safetensors` the student is a pickle. The fusion never is: its metadata belong
    to the safetensors.
    """
    Path(folder).mkdir(parents=True, exist_ok=True)
    save_weights(model, student, str(Path(folder) / student), safetensors)
    if fusion := {key: value for key, value in model.state_dict().items() if is_fusion(key, student)}:
        noted = {STAGE_2_START: stage_2_start, EXPLAINED: explained}
        metadata = {key: str(value) for key, value in noted.items() if value is not None}
        if (weights := distillation_of(model, student).weights) is not None:
            metadata[TEACHER_WEIGHTS] = json.dumps(weights._asdict())
        save_file(fusion, Path(folder) / FUSION_WEIGHTS_NAME, metadata or None)


def stage_2_start(folder: str) -> int | None:
    """Return the number of the first step of stage 2 that a checkpoint was written in; None in stage 1."""
    first = _metadata(folder).get(STAGE_2_START)
    return None if first is None else int(first)


def saved_explained(folder: str) -> float | None:
    """Return the share of its teachers' mean update that the student of a checkpoint started with, if any."""
    explained = _metadata(folder).get(EXPLAINED)
    return None if explained is None else float(explained)


def saved_weights(folder: str) -> TeacherWeights | None:
    """Return the weights of the teachers in the training that a checkpoint belongs to, if there were any."""
    saved = _metadata(folder).get(TEACHER_WEIGHTS)
    return None if saved is None else TeacherWeights(**json.loads(saved))


def _metadata(folder: str) -> dict[str, str]:
    if not (path := Path(folder) / FUSION_WEIGHTS_NAME).is_file():  # for which `load_student` raises
        return {}
    with safe_open(path, "pt") as file:
        return file.metadata() or {}


def load_student(model: ModelAdaptersMixin, block: AdapterDistillation, folder: str) -> None:
    """Load the checkpoint that `save_student` wrote into a model on which `train_adapter` was called.

    Raises:
        ValueError: If the checkpoint is of another student, was made with other teachers, or lacks weights. The model
            is then unchanged.
    """
    saved, fusion = Path(folder) / block.student, Path(folder) / FUSION_WEIGHTS_NAME
    if not (saved / ADAPTER_CONFIG_NAME).is_file():
        raise ValueError(f"{saved} does not exist, so there is no checkpoint of {block.student!r} to resume.")
    _check_teachers(model, block, saved)
    if not fusion.is_file():
        raise ValueError(f"{fusion} does not exist; resume from a checkpoint-* folder of a distillation.")
    state = load_file(fusion)
    for path in (*saved.glob("*.safetensors"), *saved.glob("*.bin")):  # a pickle has no safetensors beside it
        state |= read_weights(path, block.student)
    current = model.state_dict()
    wrong = {name for name, value in state.items() if name not in current or current[name].shape != value.shape}
    wrong |= {name for name, p in model.named_parameters() if p.requires_grad and name not in state}
    if wrong:
        raise ValueError(
            f"The checkpoint {folder} does not fit {block.student!r}: {len(wrong)} weights "
            f"are missing, unknown or of another shape, {min(wrong)} the first; use the configs of that training."
        )
    # Straight into the parameters: adapters would replace the head that is trained by a new one.
    model.load_state_dict(state, strict=False)
    distillation_of(model, block.student).has_new_fusion = False
    # Adapters changes the memory layout of the bases of ReFT when it saves, and rounding depends on the layout.
    model.apply_to_adapter_layers(lambda i, layer: layer.pre_save_adapters())


def state_beside(
    model: nn.Module, inner: ModelAdaptersMixin, losses: Sequence[nn.Module] = ()
) -> dict[str, torch.Tensor]:
    """Return the trained parameters and the buffers of a model, and of losses, outside the model with adapters."""
    state: dict[str, torch.Tensor] = {}
    elsewhere = {id(value) for value in inner.state_dict(keep_vars=True).values()}
    for prefix, module in {"": model, **{f"{LOSS}{number}.": loss for number, loss in enumerate(losses)}}.items():
        values = module.state_dict(keep_vars=True)
        frozen = {id(parameter) for parameter in module.parameters() if not parameter.requires_grad}
        state |= {prefix + name: v.detach() for name, v in values.items() if id(v) not in elsewhere | frozen}
        elsewhere |= set(map(id, values.values()))
    return state


def save_beside(state: Mapping[str, torch.Tensor], folder: str) -> None:
    """Write a `state_beside`, unless it is empty."""
    if state:  # cloned, since safetensors refuses tensors that share their memory
        save_file(
            {name: value.clone(memory_format=torch.contiguous_format) for name, value in state.items()},
            Path(folder) / WEIGHTS_BESIDE_NAME,
        )


def load_beside(state: Mapping[str, torch.Tensor], folder: str) -> None:
    """Load what `save_beside` wrote into the tensors of a `state_beside`.

    Raises:
        ValueError: If weights are missing, unknown or of another shape.
    """
    path = Path(folder) / WEIGHTS_BESIDE_NAME
    saved = load_file(path) if path.is_file() else {}
    shapes, wanted = ({name: value.shape for name, value in each.items()} for each in (saved, state))
    wrong = {name for name, _ in shapes.items() ^ wanted.items()}
    if wrong and not any(name.startswith(LOSS) for name in saved):  # of an earlier version
        wrong = {name for name in wrong if not name.startswith(LOSS)}
        logger.warning(f"The checkpoint {folder} lacks the weights of the losses, which are those of now.")
    if wrong:
        raise ValueError(
            f"The checkpoint {folder} does not fit the model around the model with adapters: {min(wrong)!r} is "
            "missing, unknown or of another shape; use the model of that training."
        )
    for name in saved:
        state[name].copy_(saved[name])


def _check_teachers(model: ModelAdaptersMixin, block: AdapterDistillation, folder: Path) -> None:
    saved = {teacher.name: teacher.digest for teacher in read_provenance(folder).teachers}
    current = teacher_digests(model, block.teachers)
    if different := sorted({name for name, _ in saved.items() ^ current.items()}):
        raise ValueError(
            f"The checkpoint {folder} was made with other teachers than the model has now; different or missing: "
            f"{', '.join(different)}. Load the same teachers, or start again without resume_from_checkpoint."
        )


def write_digests(folder: str) -> None:
    """Write the SHA-256 digest of each file of a checkpoint, and delete its last file, `trainer_state.json`.

    Trainer writes that file after the digests. A checkpoint is whole once the file exists, whatever an earlier
    training has left in the folder.
    """
    (Path(folder) / TRAINER_STATE_NAME).unlink(missing_ok=True)
    files = sorted(path for path in Path(folder).rglob("*") if path.is_file() and path.name != DIGESTS_NAME)
    digests = {path.relative_to(folder).as_posix(): file_digest(path) for path in files}
    (Path(folder) / DIGESTS_NAME).write_text(json.dumps(digests, indent=2), encoding="utf-8")


def check_whole(folder: str) -> None:
    """Check that a checkpoint was written to its end and was not damaged since.

    Raises:
        ValueError: With the first file that is missing or damaged.
    """
    path = Path(folder) / DIGESTS_NAME
    try:
        digests = json.loads(path.read_text(encoding="utf-8"))
        for name, digest in digests.items():
            path = Path(folder) / name
            if file_digest(path) != digest:
                raise ValueError
        path = Path(folder) / TRAINER_STATE_NAME
        json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, AttributeError) as error:
        fault = "does not exist" if isinstance(error, FileNotFoundError) else "is damaged"
        raise ValueError(f"{folder} is no whole checkpoint: {path.relative_to(folder)} {fault}.") from None


def checkpoint_to_resume(asked: str | bool | None, output_dir: str) -> str | None:
    """Return the folder of the checkpoint that a training starts from, if any.

    `asked` is a folder, True for the newest whole checkpoint in `output_dir`, or None or False for none.

    Raises:
        ValueError: If the given checkpoint is not whole, or no whole one exists.
    """
    if asked is True:
        if (newest := newest_whole_checkpoint(output_dir)) is None:
            raise ValueError(f"{output_dir} has no whole checkpoint; leave out resume_from_checkpoint.")
        return newest
    if asked:
        check_whole(asked)
    return asked or None


def newest_whole_checkpoint(output_dir: str) -> str | None:
    """Return the folder of the newest whole checkpoint of a training, or None; a warning names each skipped one."""
    steps = {}
    for path in Path(output_dir).glob(f"{PREFIX_CHECKPOINT_DIR}-*"):
        if path.is_dir() and (match := re.fullmatch(rf"{PREFIX_CHECKPOINT_DIR}-(\d+)", path.name)):
            steps[int(match[1])] = str(path)
    for _, folder in sorted(steps.items(), reverse=True):
        try:
            check_whole(folder)
        except ValueError as error:
            logger.warning(f"{error} An older one is looked for; delete this folder to silence this warning.")
        else:
            return folder
    return None
