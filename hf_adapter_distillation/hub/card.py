"""Model card of a distilled student, filled from its provenance without unknown facts."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

from adapters import ModelAdaptersMixin
from huggingface_hub import EvalResult, ModelCard, ModelCardData

from .._compat import HEAD_CONFIG_NAME, STATIC_TO_FLEX_HEAD_MAP, heads_of
from ..analysis.plots import plot_teacher_attention
from ..downloads import is_repo_id, read_config_file
from ..method.distillation import distillation_of
from ..method.heads import head_config
from ..method.weights import MINIMAL_GAIN
from ..student.provenance import Provenance, provenance_of
from ..student.training_run import TrainingRun, finite_metrics

CARD_NAME = "README.md"
ATTENTION_NAME = "attention.png"
TEMPLATE = Path(__file__).with_name("card_template.md")

TASKS = {  # of the Hub, by the type of the head
    "classification": "text-classification",
    "multilabel_classification": "text-classification",
    "tagging": "token-classification",
    "question_answering": "question-answering",
    "multiple_choice": "multiple-choice",
    "causal_lm": "text-generation",
    "seq2seq_lm": "text2text-generation",
    "masked_lm": "fill-mask",
    "image_classification": "image-classification",
}


@dataclass(kw_only=True)
class CardOptions:
    """Text and facts from the user for the card of a student.

    Args:
        datasets_tag: The id of the data set on the Hub, or several; by default the id of the training data.
        language: The code of the language, or several.
        license: An identifier of the Hub.
        metrics: By default the metrics of the last evaluation.
        baseline: The metrics of a plain adapter on the same data, by the names that `trainer.evaluate()` gives them.
        architecture_training: Text about the training, below the settings.
        results: Text about the results, below the last evaluation.
        citation: Replaces the papers of AdapterDistillation and AdapterFusion.
        base_model: The id on the Hub; by default the name of the model, if that is an id.
        task: A task of the Hub; by default the task of the head.
        dataset_name: The name of the data set in the results; by default its id.
    """

    datasets_tag: str | Sequence[str] | None = None
    tags: str | Sequence[str] | None = None
    language: str | Sequence[str] | None = None
    license: str | None = None
    metrics: str | Sequence[str] | None = None
    baseline: Mapping[str, float] | None = None
    architecture_training: str = ""
    results: str = ""
    citation: str | None = None
    base_model: str | None = None
    task: str | None = None
    dataset_name: str | None = None
    dataset_config: str | None = None


class CardFacts(NamedTuple):
    """Facts about a student for its card, under the names that adapters saves.

    Args:
        peft_class: The class of transformers for which the student is saved in the format of PEFT; else None.
        num_labels: The number of labels of that class, where it has labels.
    """

    student: str
    model_type: str
    model_name: str | None
    head_type: str | None
    provenance: Provenance
    peft_class: str | None = None
    num_labels: int | None = None

    @classmethod
    def of_model(cls, model: ModelAdaptersMixin, student: str) -> "CardFacts":
        """Return the facts about a student on a model."""
        static = _static_head(type(model).__name__)  # empty for a model with flexible heads
        head = head_config(model, student) if student in heads_of(model) else static
        provenance = Provenance.of(model, distillation_of(model, student))
        return cls(student, model.config.model_type, model.model_name, head.get("head_type"), provenance)

    @classmethod
    def of_saved(cls, config: Mapping[str, Any], folder: Path) -> "CardFacts":
        """Return the facts about a saved student, from its adapter config and its head config in the folder."""
        head: Mapping[str, Any] = {}
        if (path := folder / HEAD_CONFIG_NAME).exists():
            saved = read_config_file(path)
            head = saved["config"] or _static_head(saved["model_class"])
        provenance = provenance_of(config, folder)
        return cls(config["name"], config["model_type"], config["model_name"], head.get("head_type"), provenance)


def write_card(facts: CardFacts, folder: str | Path, repo_id: str, options: CardOptions) -> None:
    """Write the card for a repository, `README.md`, to a folder; `options` win over `facts`.

    `attention.png`, the heat map of the attention, is written too if the attention was measured and matplotlib is
    installed.
    """
    run, name = facts.provenance.run, facts.model_name
    is_on_hub = name is not None and is_repo_id(name) and not os.path.exists(name)
    base_model = options.base_model or (name if is_on_hub else None)
    task = options.task or TASKS.get(facts.head_type or "")
    datasets = _listed(options.datasets_tag) or _listed(run.dataset)
    results = _results(run, task, datasets, options)
    library = "peft" if facts.peft_class else "adapter-transformers"
    data = ModelCardData(
        language=_listed(options.language) or None,
        license=options.license,
        library_name=library,
        tags=[library, "adapter-distillation", facts.model_type, *_listed(options.tags)],
        datasets=datasets or None,
        metrics=_listed(options.metrics) or list(dict.fromkeys(result.metric_type for result in results)) or None,
        base_model=base_model,
        base_model_relation="adapter" if base_model else None,
        pipeline_tag=task,
        model_name=repo_id.rpartition("/")[2],
        eval_results=results or None,
    )
    heat_map = ATTENTION_NAME if run.attention and find_spec("matplotlib") is not None else None
    if heat_map is not None:
        plot_teacher_attention(run.attention).savefig(Path(folder) / heat_map)
    ModelCard.from_template(  # by Jinja2, which torch requires
        data,
        template_path=str(TEMPLATE),
        **facts._asdict(),
        run=run,
        options=options,
        repo_id=repo_id,
        heat_map=heat_map,
        minimal_gain=MINIMAL_GAIN,
        evaluation=_evaluation_table(run.evaluation, finite_metrics(options.baseline or {})),
        losses=_loss_table(run.losses),
    ).save(Path(folder) / CARD_NAME)


def _static_head(model_class: str) -> Mapping[str, Any]:
    """Return the config that adapters gives the head of a class of transformers; empty without a head."""
    return STATIC_TO_FLEX_HEAD_MAP.get(model_class, {}).get("config", {})


def _listed(value: str | Sequence[str] | None) -> list[str]:
    return [value] if isinstance(value, str) else list(value or ())


def _results(run: TrainingRun, task: str | None, datasets: Sequence[str], options: CardOptions) -> list[EvalResult]:
    """Return the metrics for the Hub; none without a task and a data set, which the Hub needs."""
    if task is None or not datasets:
        return []
    metrics = {key.partition("_"): value for key, value in run.evaluation.items()}
    return [
        EvalResult(
            task_type=task,
            dataset_type=datasets[0],
            dataset_name=options.dataset_name or datasets[0],
            dataset_config=options.dataset_config,
            dataset_split=split if split != "eval" else None,
            metric_type=metric,
            metric_name=metric,
            metric_value=value,
        )
        for (split, _, metric), value in metrics.items()
        if metric != "loss"
    ]


def _evaluation_table(metrics: Mapping[str, float], baseline: Mapping[str, float]) -> tuple[list[str], list[Any]]:
    """Return the header and the rows of the last evaluation, with a column for the baseline if there is one."""
    if not baseline:
        return ["metric", "value"], list(metrics.items())
    rows = [[name, metrics.get(name, "-"), baseline.get(name, "-")] for name in {**metrics, **baseline}]
    return ["metric", "this adapter", "a plain adapter"], rows


def _loss_table(losses: Mapping[str, Mapping[str, float]]) -> tuple[list[str], list[Any]]:
    """Return the header and the rows of the last losses, a row for each stage."""
    terms = list(dict.fromkeys(term for stage in losses.values() for term in stage))
    return ["stage", *terms], [[stage, *(row.get(term, "-") for term in terms)] for stage, row in losses.items()]
