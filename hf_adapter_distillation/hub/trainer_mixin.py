"""The trainer's side of the Hub: `push_to_hub`, at the end and at each save."""

from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from adapters import AdapterTrainer
from huggingface_hub import CommitInfo, run_as_future, upload_folder
from transformers.trainer_utils import HubStrategy, SaveStrategy
from transformers.utils import logging

from ..composition import AdapterDistillation
from .card import save_card
from .push import Files, check_push, commit, student_files, told

logger = logging.get_logger(__name__)


class StudentPushingTrainer(AdapterTrainer):
    """An `AdapterTrainer` whose `push_to_hub` and `push_to_hub=True` push the student alone."""

    block: AdapterDistillation
    _pushes: Sequence[Future] = ()
    _may_push = False

    def _allow_pushing(self) -> None:
        """Called once all is checked: nothing is created on the Hub for a training that cannot start."""
        self._may_push = True
        if self.args.push_to_hub:
            self.init_hf_repo()

    def init_hf_repo(self, token: str | None = None) -> None:
        """Creates the repository, if it is missing.

        Args:
            token: A token, if not `hub_token` or that of `hf auth login`.
        """
        if not self._may_push or not self.is_world_process_zero():
            return
        name, token = self._hub_name(), token or self.args.hub_token
        check_push(self.block.student, name, token)
        with told(self.block.student, name):
            super().init_hf_repo(token)

    def _hub_name(self) -> str:
        return self.hub_model_id or self.args.hub_model_id or Path(self.args.output_dir).absolute().name

    def _files(self, repo_id: str, saved: str | None = None, **kwargs: Any) -> Files:
        return student_files(self.model, self.block.student, repo_id, saved, **_as_card(**kwargs))

    def create_model_card(self, **kwargs: Any) -> None:
        """Writes the card of the student, and the heat map of the attention if it is known, to `output_dir`.

        Args:
            **kwargs: As for `transformers.Trainer.create_model_card`, and `baseline`, the metrics of a plain adapter.
        """
        if self.is_world_process_zero():
            Path(self.args.output_dir).mkdir(parents=True, exist_ok=True)
            save_card(self.model, self.block.student, self.args.output_dir, self._hub_name(), **_as_card(**kwargs))

    def push_to_hub(
        self,
        commit_message: str | None = "End of training",
        blocking: bool = True,
        token: str | None = None,
        revision: str | None = None,
        **kwargs: Any,
    ) -> CommitInfo | Future | None:
        """Pushes the student with its head, its card and the heat map of the attention in one commit.

        The heat map is there with `push_to_hub=True` in the arguments, and where matplotlib is installed.

        Args:
            commit_message: The title of the commit.
            blocking: Whether to wait for the end.
            token: A token, if not `hub_token` or that of `hf auth login`.
            revision: The branch, which is created if it is missing; `hub_revision` by default.
            **kwargs: What the card says, as for `create_model_card`.

        Returns:
            The address of the commit, or with `blocking=False` its future; None on processes other than the first.

        Raises:
            ValueError: If the repository has no valid name.
            OSError: If the Hub cannot be reached or refuses. The repository then holds what it held before, or all of
                the push if its answer was lost; the same push again does no harm.
        """
        if not self.is_world_process_zero():
            return None
        token = token or self.args.hub_token
        files = self._files(check_push(self.block.student, self._hub_name(), token), **kwargs)
        if self.hub_model_id is None:
            self.init_hf_repo(token)
        self._finish_current_push()
        message, revision = commit_message or "End of training", revision or self.args.hub_revision

        def push() -> CommitInfo:
            with told(self.block.student, self.hub_model_id):
                return commit(self.hub_model_id, files, message, token=token, revision=revision)

        return push() if blocking else run_as_future(push)

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        args = self.args
        if not self.is_world_process_zero() or args.hub_strategy == HubStrategy.END:
            return
        running = [push for push in self._pushes if not push.done()]
        if running and not args.hub_always_push:
            return
        in_steps = args.save_strategy == SaveStrategy.STEPS
        at = f"step {self.state.global_step}" if in_steps else f"epoch {int(self.state.epoch)}"
        message = f"Training in progress, {at}"
        names = {HubStrategy.CHECKPOINT: "last-checkpoint", HubStrategy.ALL_CHECKPOINTS: Path(checkpoint_folder).name}
        to_hub = {"repo_id": self.hub_model_id, "token": args.hub_token, "revision": args.hub_revision}

        def push(files: Files) -> None:
            with self._failure_as_warning():
                commit(files=files, message=message, **to_hub)
                if name := names.get(args.hub_strategy):
                    title = f"{message}, checkpoint"
                    upload_folder(folder_path=checkpoint_folder, path_in_repo=name, commit_message=title, **to_hub)

        with self._failure_as_warning():
            files = self._files(self.hub_model_id, str(Path(checkpoint_folder) / self.block.student))
            self._pushes = [*running, run_as_future(push, files)]

    @contextmanager
    def _failure_as_warning(self) -> Iterator[None]:
        try:
            with told(self.block.student, self.hub_model_id):
                yield
        except OSError as error:
            logger.warning(f"{error} The training goes on, and the next save pushes again.")

    def _finish_current_push(self) -> None:
        for push in self._pushes:
            push.result()


def _as_card(
    language: str | list[str] | None = None,
    license: str | None = None,  # noqa: A002 - the name of Trainer's argument
    tags: str | list[str] | None = None,
    model_name: str | None = None,
    finetuned_from: str | None = None,
    tasks: str | list[str] | None = None,
    dataset_tags: str | list[str] | None = None,
    dataset: str | list[str] | None = None,
    dataset_args: str | list[str] | None = None,
    baseline: Mapping[str, float] | None = None,
) -> dict[str, Any]:
    """The arguments of Trainer's card in the words of `save_card`; the card is named like the repository."""

    def first(value: str | list[str] | None) -> str | None:
        return value if value is None or isinstance(value, str) else next(iter(value), None)

    return {
        "language": language,
        "license": license,
        "tags": tags,
        "base_model": finetuned_from,
        "task": first(tasks),
        "datasets_tag": dataset_tags,
        "dataset_name": first(dataset),
        "dataset_config": first(dataset_args),
        "baseline": baseline,
    }
