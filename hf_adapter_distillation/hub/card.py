"""The model card of a distilled student, filled from its run; what is not known is left out."""

import os
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

from adapters import ModelAdaptersMixin
from huggingface_hub import EvalResult, ModelCard, ModelCardData
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from .._compat import STATIC_TO_FLEX_HEAD_MAP
from ..analysis.plots import plot_teacher_attention
from ..method.distillation import distillations
from ..student.provenance import provenance
from ..student.summary import measured

CARD_NAME = "README.md"
ATTENTION_NAME = "attention.png"
NO_SETTINGS = ("method", "teachers", "versions", "dataset", "losses", "evaluation", "attention")

TASKS = {  # of the types of heads, as the Hub calls them
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

CITATION = """```bibtex
@inproceedings{wang-etal-2023-adapterdistillation,
  title = "AdapterDistillation: Non-Destructive Task Composition with Knowledge Distillation",
  author = "Wang, Junjie and Chen, Yicheng and Zhang, Wangshu and Hu, Sen and Xu, Teng and Zheng, Jing",
  booktitle = "Proceedings of EMNLP 2023: Industry Track",
  year = "2023",
  url = "https://arxiv.org/abs/2312.16261"
}

@inproceedings{pfeiffer-etal-2021-adapterfusion,
  title = "AdapterFusion: Non-Destructive Task Composition for Transfer Learning",
  author = "Pfeiffer, Jonas and others",
  booktitle = "Proceedings of EACL 2021",
  year = "2021",
  url = "https://arxiv.org/abs/2005.00247"
}
```"""


class Described(NamedTuple):
    """What a card is written from, whether the student is on a model or in a folder.

    Args:
        student: The name of the student.
        model_type: The type of the base model.
        model_name: Where the base model came from.
        head: The config of the head; empty if there is none.
        run: The provenance.
    """

    student: str
    model_type: str
    model_name: str | None
    head: Mapping[str, Any]
    run: dict[str, Any]


def save_card(model: ModelAdaptersMixin, student: str, folder: str | Path, repo_id: str, **card: Any) -> None:
    """Writes the card of a student that is on a model.

    Args:
        model: The model.
        student: The name of the student.
        folder: The folder of the saved student.
        repo_id: The repository that it is pushed to.
        **card: What else is known, as for `write_card`.
    """
    run = provenance(model, distillations(model.adapters_config)[student])
    if hasattr(model, "heads"):
        head = model.heads[student].config if student in model.heads else {}
    else:
        head = static_head(type(model).__name__)
    described = Described(student, model.config.model_type, model.model_name, head, run)
    write_card(described, folder, repo_id, **card)


def static_head(model_class: str) -> dict[str, Any]:
    """The config that adapters gives the head of a class of transformers; empty if it has none."""
    return STATIC_TO_FLEX_HEAD_MAP.get(model_class, {}).get("config", {})


def write_card(
    described: Described,
    folder: str | Path,
    repo_id: str,
    *,
    datasets_tag: str | Sequence[str] | None = None,
    tags: str | Sequence[str] | None = None,
    language: str | Sequence[str] | None = None,
    license: str | None = None,  # noqa: A002 - the name of adapters' argument
    metrics: Sequence[str] | None = None,
    baseline: Mapping[str, float] | None = None,
    architecture_training: str = "",
    results: str = "",
    citation: str = CITATION,
    base_model: str | None = None,
    task: str | None = None,
    dataset_name: str | None = None,
    dataset_config: str | None = None,
) -> None:
    """Writes `README.md`, and the heat map of the attention where it is known and matplotlib is installed.

    Args:
        described: The student.
        folder: The folder of the saved student.
        repo_id: The repository that it is pushed to.
        datasets_tag: The id of its data set on the Hub, or ids; what was trained on, if that came from the Hub.
        tags: More tags.
        language: Its language, as a code, or several.
        license: Its license, as an identifier of the Hub.
        metrics: The metrics it was evaluated with; those of the last evaluation.
        baseline: What a plain adapter on the same data reaches, if you measured it: metrics by the names that
            `trainer.evaluate()` gives them.
        architecture_training: Text about the training, below the settings.
        results: Text about the results, below those of the run.
        citation: What to cite.
        base_model: The id of the base model on the Hub; where the model came from, if that is an id.
        task: The task, as the Hub calls it; that of the head.
        dataset_name: How the data set is called in the results; its id.
        dataset_config: The configuration of the data set.
    """
    student, run = described.student, described.run
    name = described.model_name
    base_model = base_model or (name if name and _is_hub_id(name) else None)
    task = task or TASKS.get(described.head.get("head_type", ""))
    datasets = _listed(datasets_tag) or _listed(run.get("dataset"))
    results_of_run = _evaluation(run, task, datasets, dataset_name, dataset_config)
    data = ModelCardData(
        language=_listed(language) or None,
        license=license,
        library_name="adapter-transformers",
        tags=["adapter-transformers", "adapter-distillation", described.model_type, *_listed(tags)],
        datasets=datasets or None,
        metrics=_listed(metrics) or list(dict.fromkeys(result.metric_type for result in results_of_run)) or None,
        base_model=base_model,
        base_model_relation="adapter" if base_model else None,
        pipeline_tag=task,
        model_name=repo_id.rpartition("/")[2],
        eval_results=results_of_run or None,
    )
    plotted = "attention" in run and find_spec("matplotlib") is not None
    if plotted:
        plot_teacher_attention(run["attention"]).savefig(Path(folder) / ATTENTION_NAME)
    teachers = "\n".join(_teacher(teacher, run.get("attention", {})) for teacher in run["teachers"])
    sections = {
        "Teachers": _paragraphs(teachers, f"![Attention over teachers by layer]({ATTENTION_NAME})" if plotted else ""),
        "Usage": _usage(base_model, repo_id),
        "Training": _paragraphs(_settings(run), architecture_training),
        "Results": _paragraphs(_metrics(run, baseline or {}), _losses(run), results),
        "Citation": citation,
    }
    body = [f"## {title}\n\n{text}" for title, text in sections.items() if text]
    title = f"# Adapter `{student}` for `{base_model}`" if base_model else f"# Adapter `{student}`"
    intro = _introduction(described.model_type, base_model, task, datasets, dataset_name, len(run["teachers"]))
    ModelCard(f"---\n{data.to_yaml()}\n---\n\n{_paragraphs(title, intro, *body)}\n").save(Path(folder) / CARD_NAME)


def _listed(value: str | Sequence[str] | None) -> list[str]:
    return [value] if isinstance(value, str) else list(value or ())


def _paragraphs(*texts: str) -> str:
    return "\n\n".join(filter(None, texts))


def _table(header: Sequence[str], rows: Any) -> str:
    lines = [f"| {' | '.join(map(str, row))} |" for row in rows]
    return "\n".join([f"| {' | '.join(header)} |", f"|{' --- |' * len(header)}", *lines]) if lines else ""


def _is_hub_id(name: str) -> bool:
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return not os.path.exists(name)


def _evaluation(
    run: dict[str, Any], task: str | None, datasets: list[str], name: str | None, config: str | None
) -> list[EvalResult]:
    """The metrics as the Hub shows them; it wants to know the task and the data set of each."""
    results: list[EvalResult] = []
    if task is None or not datasets:
        return results
    for key, value in run.get("evaluation", {}).items():
        split, _, metric = key.partition("_")
        if metric != "loss":
            results.append(
                EvalResult(
                    task_type=task,
                    dataset_type=datasets[0],
                    dataset_name=name or datasets[0],
                    dataset_config=config,
                    dataset_split=split if split != "eval" else None,
                    metric_type=metric,
                    metric_name=metric,
                    metric_value=value,
                )
            )
    return results


def _introduction(
    model_type: str,
    base_model: str | None,
    task: str | None,
    datasets: list[str],
    dataset_name: str | None,
    n_teachers: int,
) -> str:
    base = f"[{base_model}](https://huggingface.co/{base_model})" if base_model else f"a {model_type} model"
    head = f" with a head for {task.replace('-', ' ')}" if task else ""
    named = [f"[{dataset_name or tag}](https://huggingface.co/datasets/{tag})" for tag in datasets]
    trained = f", trained on {', '.join(named) or dataset_name}" if named or dataset_name else ""
    return (
        f"An [adapter](https://adapterhub.ml) for {base}{head}{trained}, distilled from {n_teachers} teacher "
        f"adapters with [AdapterDistillation](https://arxiv.org/abs/2312.16261)."
    )


def _teacher(teacher: dict[str, Any], attention: dict[str, dict[str, float]]) -> str:
    source, revision = teacher["source"], teacher["revision"]
    if revision:  # a folder on somebody's disk is of no use to others
        repo = source.partition("@")[0]
        line = f"- [{source}](https://huggingface.co/{repo}/tree/{revision}) at `{revision[:8]}`"
    else:
        line = f"- `{teacher['name']}`"
    if not attention:
        return line
    mean = sum(row[teacher["name"]] for row in attention.values()) / len(attention)
    return f"{line}, mean attention {mean:.2f}"


def _usage(base_model: str | None, repo_id: str) -> str:
    return f"""It loads as any adapter does, without the package that trained it:

```python
from adapters import AutoAdapterModel

model = AutoAdapterModel.from_pretrained("{base_model or "path/to/the/base/model"}")
model.load_adapter("{repo_id}", set_active=True, use_safetensors=True)
```"""


def _settings(run: dict[str, Any]) -> str:
    settings = [f"- {key}: {value}" for key, value in run.items() if key not in NO_SETTINGS and value is not None]
    versions = ", ".join(f"{package} {version}" for package, version in run["versions"].items())
    return _paragraphs("\n".join(settings), f"With {versions}.")


def _metrics(run: dict[str, Any], baseline: Mapping[str, float]) -> str:
    found, of_plain = run.get("evaluation", {}), measured(baseline)
    if not of_plain:
        return _paragraphs("The last evaluation:", _table(["metric", "value"], found.items())) if found else ""
    rows = [[name, found.get(name, "-"), of_plain.get(name, "-")] for name in found | of_plain]
    return _paragraphs("The last evaluation:", _table(["metric", "this adapter", "a plain adapter"], rows))


def _losses(run: dict[str, Any]) -> str:
    losses = run.get("losses", {})
    terms = list(dict.fromkeys(term for stage in losses.values() for term in stage))
    rows = [[stage, *(values.get(term, "-") for term in terms)] for stage, values in losses.items()]
    return _paragraphs("The last losses of each stage:", _table(["stage", *terms], rows)) if rows else ""
