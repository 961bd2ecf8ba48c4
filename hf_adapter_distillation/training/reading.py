"""The examples that a trainer reads beside its steps, as inputs of the model with adapters."""

from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import datasets
import torch
from accelerate.utils import send_to_device
from adapters import AdapterSetup, Stack
from torch import nn
from torch.utils.data import DataLoader, Dataset, IterableDataset

from .._compat import forward_arguments, heads_of
from ..composition import running_setup
from ..method.predictions import without_dropout
from ..method.wrappers import accepted_inputs, noting_inputs
from ..student.blocks import live_block
from .data import Examples, Labelled, draw_examples, halves
from .preparation import choose, fit_student, select_teachers, weigh
from .steps import TwoStageTrainer

LIBRARIES = ("transformers", "sentence_transformers", "trl")  # whose trainers load the data that they are given


class ReadingTrainer(TwoStageTrainer):
    """Trainer that reads examples before its first step and after its last one."""

    _signature_columns: Any

    def fit_start(self) -> None:
        """Move a student that is still at the average of its teachers' weights to the average of their updates.

        Before, teachers are chosen (`teacher_selection`), and with `student_start="weighted"` their weights are
        learned. `train` does all this before the first step, or keeps what this method has done. A student with a gate
        or a norm behind its up-projections stays at the average of the weights.
        """
        model, examples = self.model_with_adapters, self._examples()
        self.block = choose(model, live_block(model, self.block), examples, self.accelerator, None, show=False)
        self.block = select_teachers(model, self.block, examples, self.accelerator, show=False)
        self.block = weigh(model, self.block, examples, self.accelerator, show=False)
        explained = fit_student(model, self.block.student, examples, self.accelerator)
        if explained is not None:
            self.distillation.explained = explained

    def _examples(self) -> Examples:
        reads_loader = self.train_dataset is None and not _is_stream(self.get_train_dataloader())
        return Examples(
            self.train_dataset,
            self._unlabelled,
            self.args.seed,
            self._batches,
            self._batches_of_loader if reads_loader else None,
            self._model_inputs,
            self._autocast,
            self._labelled,
        )

    def _labelled(self) -> Labelled | None:
        """Return as many training examples as the weighing reads; None where they are not read twice, or too few."""
        drawn = draw_examples(self.train_dataset, self.args.weighing_steps * self._examples_per_step, self.args.seed)
        both = halves(drawn, self.args.seed)
        if both is None:
            return None
        loaders = [self._loader_of(half) for half in both]
        if any(_is_stream(loader) for loader in loaders):
            return None
        # The same number in each process, so that none waits alone.
        n_batches = torch.tensor([[len(loader) for loader in loaders]], device=self.accelerator.device)
        least = self.accelerator.gather(n_batches).reshape(-1, 2).amin(dim=0).tolist()
        if not all(least):
            return None
        outside = {id(parameter) for parameter in self.model_with_adapters.parameters()}
        modules = [self.model, *self._losses]
        beside = {id(p): p for module in modules for p in module.parameters() if p.requires_grad}
        return Labelled(
            [partial(_first_batches, loader, number) for loader, number in zip(loaders, least, strict=True)],
            self._task_loss,
            self.args.weighing_steps,
            self.args.gradient_accumulation_steps,
            [parameter for key, parameter in beside.items() if key not in outside],
        )

    def _loader_of(self, half: Any) -> DataLoader:
        """Return a loader of some training examples.

        Loaders and samplers of the user's own may be for the whole data set, so those of the library take their place.
        """
        own = vars(self).copy()  # with the data, and perhaps its loader
        try:
            self.train_dataset = type(own["train_dataset"])(half) if isinstance(half, dict) else half
            for name in ("get_train_dataloader", "_get_train_sampler"):
                vars(self)[name] = partial(_of_library(type(self), name), self)
            return self.get_train_dataloader()
        finally:
            vars(self).clear()
            vars(self).update(own)

    @property
    def _losses(self) -> list[nn.Module]:
        """The losses outside the model, which may have weights of their own."""
        return []

    def _task_loss(self, inputs: dict[str, Any]) -> torch.Tensor:
        self._check_labels(inputs)
        inputs = dict(self._prepare_inputs(inputs))
        n_items: Any = self._get_num_items_in_batch([inputs], self.args.device)
        if n_items is not None:  # a batch without a labelled token adds 0, as in a step with others
            n_items = torch.as_tensor(n_items).clamp(min=1)
        with ExitStack() as stack:
            for module in (self.model, *self._losses):
                stack.enter_context(without_dropout(module))
            stack.enter_context(self._autocast())
            stack.enter_context(self._unlogged())
            return self.compute_loss(self.model, inputs, num_items_in_batch=n_items)

    @contextmanager
    def _unlogged(self) -> Iterator[None]:
        """Leave what a `compute_loss` collects for the next log as it is, as those of trl do in `_metrics`."""
        metrics: Any = vars(self).get("_metrics")
        is_of_trl = isinstance(metrics, dict) and all(isinstance(part, defaultdict) for part in metrics.values())
        if is_of_trl:
            vars(self)["_metrics"] = {mode: defaultdict(list) for mode in metrics}
        try:
            yield
        finally:
            if is_of_trl:
                vars(self)["_metrics"] = metrics

    @contextmanager
    def _autocast(self) -> Iterator[None]:  # the precision of the training, before accelerate wraps the model
        with self.accelerator.autocast(), self.compute_loss_context_manager():
            yield

    def _set_signature_columns_if_needed(self) -> None:
        """Take the columns that the model takes, also where its signature does not name them.

        Adapters hides the signature of some models, such as T5, and a wrapper may pass on whatever it gets.
        """
        super()._set_signature_columns_if_needed()
        if self._gives_inputs_to_inner:
            accepted = forward_arguments(self.model_with_adapters)
            self._signature_columns = list(dict.fromkeys([*self._signature_columns, *accepted]))

    def _without_unused_columns(self, dataset: Dataset) -> tuple[Dataset, Callable]:
        """Return a data set and a collator without the columns that the model does not take."""
        if isinstance(dataset, datasets.Dataset):
            return self._remove_unused_columns(dataset, "distillation"), self.data_collator
        return dataset, self._get_collator_with_removed_columns(self.data_collator, "distillation")

    def _batches(self, dataset: Dataset | dict[str, Dataset]) -> Iterator[dict[str, Any]]:
        """Yield one or more data sets as inputs of the model with adapters, on its device."""
        for part in dataset.values() if isinstance(dataset, dict) else [dataset]:
            examples, collator = self._without_unused_columns(part)
            for inputs in DataLoader(examples, self.args.eval_batch_size, collate_fn=collator):
                yield from self._own_inputs(inputs)

    def _batches_of_loader(self) -> Iterator[dict[str, Any]]:
        """Yield the batches of `get_train_dataloader` as inputs of the model with adapters."""
        for inputs in self.get_train_dataloader():
            yield from self._own_inputs(inputs)

    def _own_inputs(self, inputs: dict[str, Any]) -> list[dict[str, Any]]:
        """Return a batch as the inputs of each call of the model with adapters."""
        inputs, inner = self._prepare_inputs(inputs), self.model_with_adapters
        if inner is self.model and not self._computes_own_loss:
            return [inputs]
        if inner is self.model and inner.main_input_name in inputs:  # other columns are for the loss
            return [accepted_inputs(inner, inputs)]
        calls: list[dict[str, Any]] = []
        n_items: Any = self._get_num_items_in_batch([inputs], self.args.device)
        with torch.no_grad(), without_dropout(self.model), self._active_student(), self._autocast():
            with noting_inputs(inner, calls.append), self._unlogged():
                self.compute_loss(self.model, dict(inputs), num_items_in_batch=n_items)
        if not calls:
            raise ValueError(
                f"The loss of {type(self).__name__} does not run the model with adapters ({type(inner).__name__}), so "
                "it cannot distil; compute it from the model's outputs."
            )
        return calls

    @contextmanager
    def _active_student(self) -> Iterator[None]:
        student, model = self.block.student, self.model_with_adapters
        setup, head = running_setup(model.adapters_config), student if student in heads_of(model) else None
        is_active = isinstance(setup, Stack) and list(setup) == list(self.block.children)
        if is_active and AdapterSetup.get_context() is None and (head is None or model.active_head == head):
            yield
        else:
            with AdapterSetup(Stack(*self.block.children), head_setup=head):
                yield


def _of_library(trainer: type, name: str) -> Callable:
    """Return a method of a trainer without what the user's own classes make of it."""
    holders = (holder for holder in trainer.__mro__ if name in vars(holder))
    return next(vars(holder)[name] for holder in holders if holder.__module__.partition(".")[0] in LIBRARIES)


def _first_batches(loader: DataLoader, number: int) -> list[Any]:
    """Read a new pass over a loader to its end, and return its first batches in main memory."""
    return [send_to_device(batch, "cpu") for batch in loader][:number]


def _is_stream(loader: Any) -> bool:
    """Return whether a loader may give its examples only once."""
    return not isinstance(loader, DataLoader) or isinstance(loader.dataset, IterableDataset)
