"""Push the student from its trainer: at each save, and by `push_to_hub`."""

from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from adapters import ModelAdaptersMixin
from huggingface_hub import CommitInfo, run_as_future, upload_folder
from torch import nn
from transformers import Trainer
from transformers.trainer_utils import HubStrategy, SaveStrategy
from transformers.utils import logging

from ..composition import AdapterDistillation
from ..method.wrappers import model_with_adapters
from ..teachers.projections import check_known_to_adapters
from .card import CardFacts, CardOptions, write_card
from .push import (
    PushOptions,
    check_push,
    checkpoint_to_share,
    push_errors,
    saved_student_folder,
    student_folder,
    upload,
)

logger = logging.get_logger(__name__)

CARD_OPTIONS = {  # by the arguments of `Trainer.create_model_card` with other names
    "finetuned_from": "base_model",
    "tasks": "task",
    "dataset_tags": "datasets_tag",
    "dataset": "dataset_name",
    "dataset_args": "dataset_config",
}


class StudentPushingTrainer(Trainer):
    """A trainer that pushes only the student.

    Its `model` is the model with adapters, or wraps it.
    """

    args: Any  # `DistillationArgumentsMixin` and training arguments
    model: Any
    state: Any
    hub_model_id: Any
    block: AdapterDistillation
    _pushes: Sequence[Future] = ()
    _may_push = False
    _found: tuple[nn.Module, ModelAdaptersMixin] | None = None

    @property
    def model_with_adapters(self) -> ModelAdaptersMixin:
        """The outermost model with adapters inside `model`, often `model` itself."""
        if self._found is None or self._found[0] is not self.model:  # `model_init` makes another
            self._found = self.model, model_with_adapters(self.model)
        return self._found[1]

    def _allow_pushing(self) -> None:
        """Let `init_hf_repo` create the repository, once the training is sure to start."""
        self._may_push = True
        if self.args.push_to_hub:
            self.init_hf_repo()

    def init_hf_repo(self, token: str | None = None) -> None:
        """Create the repository if it is missing; the token is by default `hub_token`, or that of `hf auth login`."""
        if not self._may_push or not self.is_world_process_zero():
            return
        name, token, student = self._hub_name(), token or self.args.hub_token, self.block.student
        check_known_to_adapters(student, self.model_with_adapters.adapters_config.get(student))
        check_push(student, name, token)
        with push_errors(student, name):
            super().init_hf_repo(token)

    def create_model_card(self, **kwargs: Any) -> None:  # type: ignore[override]
        """Write the card of the student to `output_dir`, with the heat map of the attention if it was measured.

        It takes the arguments of `transformers.Trainer.create_model_card`, and of `CardOptions`, such as `baseline`.
        """
        if self.is_world_process_zero():
            Path(self.args.output_dir).mkdir(parents=True, exist_ok=True)
            facts = CardFacts.of_model(self.model_with_adapters, self.block.student)
            write_card(facts, self.args.output_dir, self._hub_name(), _card_options(**kwargs))

    def push_to_hub(  # type: ignore[override]
        self,
        commit_message: str | None = "End of training",
        blocking: bool = True,
        token: str | None = None,
        revision: str | None = None,
        **kwargs: Any,
    ) -> CommitInfo | Future | None:
        """Push the student with its head, its card and the heat map of the attention in one commit.

        The heat map needs `push_to_hub=True` or `analysis=True` in the training arguments, and matplotlib.

        Token and revision are by default `hub_token` and `hub_revision`; the other arguments are those of
        `create_model_card`.

        Returns:
            The commit, or with `blocking=False` its future; None on processes other than the first.

        Raises:
            ValueError: If the name of the repository is not valid.
            OSError: If the Hub cannot be reached or refuses, as for `push_student`.
        """
        if not self.is_world_process_zero():
            return None
        student, token, revision = self.block.student, token or self.args.hub_token, revision or self.args.hub_revision
        options = PushOptions(commit_message=commit_message or "End of training", token=token, revision=revision)
        repo_id = check_push(student, self._hub_name(), token)
        with ExitStack() as stack:
            model, card_options = self.model_with_adapters, _card_options(**kwargs)
            folder = stack.enter_context(student_folder(model, student, repo_id, card_options))
            if self.hub_model_id is None:
                self.init_hf_repo(token)
            self._finish_current_push()
            files = stack.pop_all()  # until they are pushed

        def push() -> CommitInfo:
            with files, push_errors(student, self.hub_model_id):
                return upload(folder, student, self.hub_model_id, options)

        return push() if blocking else run_as_future(push)

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        """Push a saved student in the background, and its checkpoint if `hub_strategy` asks for it."""
        args, student = self.args, self.block.student
        running = [push for push in self._pushes if not push.done()]
        is_busy = running and not args.hub_always_push
        if is_busy or args.hub_strategy == HubStrategy.END or not self.is_world_process_zero():
            return
        in_steps = args.save_strategy == SaveStrategy.STEPS
        at = f"step {self.state.global_step}" if in_steps else f"epoch {int(self.state.epoch)}"
        message = f"Training in progress, {at}"
        names = {HubStrategy.CHECKPOINT: "last-checkpoint", HubStrategy.ALL_CHECKPOINTS: Path(checkpoint_folder).name}
        target = {"token": args.hub_token, "revision": args.hub_revision}

        def push(files: ExitStack, folder: Path, checkpoint: Path | None) -> None:
            with files, self._failure_as_warning():
                upload(folder, student, self.hub_model_id, PushOptions(commit_message=message, **target))
                if checkpoint is not None:
                    upload_folder(
                        repo_id=self.hub_model_id,
                        folder_path=checkpoint,
                        path_in_repo=names[args.hub_strategy],
                        commit_message=f"{message}, checkpoint",
                        **target,
                    )

        with self._failure_as_warning(), ExitStack() as stack:
            saved = Path(checkpoint_folder) / student
            folder, whole = stack.enter_context(saved_student_folder(saved, self.hub_model_id, CardOptions())), None
            if args.hub_strategy in names:
                whole = stack.enter_context(checkpoint_to_share(checkpoint_folder, student))
            self._pushes = [*running, run_as_future(push, stack.pop_all(), folder, whole)]

    @contextmanager
    def _failure_as_warning(self) -> Iterator[None]:
        try:
            with push_errors(self.block.student, self.hub_model_id):
                yield
        except OSError as error:
            logger.warning(f"{error} The training goes on, and the next save pushes again.")

    def _finish_current_push(self) -> None:
        for push in self._pushes:
            push.result()

    def _hub_name(self) -> str:
        return self.hub_model_id or self.args.hub_model_id or Path(self.args.output_dir).absolute().name


def _card_options(model_name: str | None = None, **kwargs: Any) -> CardOptions:
    """Return card options from the arguments of Trainer's card, without its name: the repository names the card."""
    options = {CARD_OPTIONS.get(name, name): value for name, value in kwargs.items()}
    for name in ("task", "dataset_name", "dataset_config"):  # Trainer takes several
        if isinstance(value := options.get(name), list):
            options[name] = next(iter(value), None)
    return CardOptions(**options)
