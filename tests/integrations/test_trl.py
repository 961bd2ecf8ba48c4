"""The SFTTrainer of trl with distillation: each loss and each form of a batch against a plain reference in float64."""

from dataclasses import dataclass
from pathlib import Path

import adapters
import pytest
import torch
from adapters import AdapterSetup, LoRAConfig, SeqBnConfig, Stack
from chats import chat_tokenizer, chats
from datasets import Dataset
from model_state import changed, snapshot
from sft_reference import STUDENT, terms
from tiny_models import CONFIGS, TEACHERS, make_model, make_student
from torch.nn.functional import cross_entropy
from trainings import StopAt
from transformers import AutoModelForSequenceClassification, TrainerCallback
from without_package import run_without_package

import hf_adapter_distillation as had

trl = pytest.importorskip("trl")

from hf_adapter_distillation.integrations.trl import SFTDistillationConfig, SFTDistillationTrainer  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore:.*deprecated.*:FutureWarning:hf_adapter_distillation.*")
LORA = LoRAConfig(r=4, attn_matrices=["q", "v"], intermediate_lora=True, output_lora=True)
BOTTLENECK = SeqBnConfig(reduction_factor=2)
CHUNKED = pytest.param("chunked_nll", marks=pytest.mark.filterwarnings("ignore:.*chunked_nll.*:FutureWarning"))


def student_model(config=LORA, noise=0.1, **kwargs):
    """A tiny Llama with a student whose weights, and whose fusion's, differ from those at its start."""
    model = make_student(make_model("llama", "causal_lm"), config=config, head=None, **kwargs).double()
    torch.manual_seed(1)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += noise * torch.randn_like(parameter)
    return model


@pytest.fixture
def sft_args(tmp_path):
    def make(**kwargs):
        defaults = {
            "output_dir": str(tmp_path / "training"), "per_device_train_batch_size": 4, "max_steps": 1,
            "learning_rate": 0.0, "max_grad_norm": 0.0, "distillation_start": 0.0, "distillation_weight": 0.7,
            "keep_fusion": True, "bf16": False, "report_to": [], "save_strategy": "no", "disable_tqdm": True,
            "use_cpu": True, "dataloader_pin_memory": False, "logging_steps": 1,
        }  # fmt: skip
        return SFTDistillationConfig(**{**defaults, **kwargs})

    return make


class RecordingTrainer(SFTDistillationTrainer):
    """Keeps each micro-batch with the number of items in its step, and the gradients of the last step."""

    def __init__(self, *args, **kwargs):
        self.micro_batches, self.gradients = [], {}
        super().__init__(*args, processing_class=chat_tokenizer(), **kwargs)
        self.add_callback(Grab(self))

    def training_step(self, model, inputs, num_items_in_batch=None):
        self.micro_batches.append((dict(inputs), num_items_in_batch))
        return super().training_step(model, inputs, num_items_in_batch)


class Grab(TrainerCallback):
    def __init__(self, trainer):
        self.trainer = trainer

    def on_pre_optimizer_step(self, *args, **kwargs):
        parameters = self.trainer.model.named_parameters()
        self.trainer.gradients.update({name: p.grad.clone() for name, p in parameters if p.grad is not None})


def train(model, args, dataset=None, **kwargs):
    trainer = RecordingTrainer(model, args, train_dataset=chats() if dataset is None else dataset, **kwargs)
    trainer.train()
    return trainer


def assert_gradients_equal_the_reference(trainer):
    """The gradients of one step: of trl's own loss of the student alone, and of the plainly computed terms."""
    model, args = trainer.model, trainer.args
    model.zero_grad()
    model.gradient_checkpointing_disable()
    model.train_adapter(STUDENT)
    for inputs, n_items in trainer.micro_batches:
        with AdapterSetup(Stack(STUDENT)):
            loss = trl.SFTTrainer.compute_loss(trainer, model, dict(inputs), num_items_in_batch=n_items)
            (loss if n_items is not None else loss / len(trainer.micro_batches)).backward()
        of_batch = terms(model, inputs, args.distillation_weight, args.fusion_regularization)
        (of_batch / len(trainer.micro_batches)).backward()
    expected = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    assert expected.keys() == trainer.gradients.keys()
    assert {name.split(".")[-3] for name in expected} >= {"distillation_fusion"} or len(expected) > 10
    for name, gradient in expected.items():
        assert gradient.abs().max() > 1e-6, name
        torch.testing.assert_close(trainer.gradients[name], gradient, rtol=0, atol=1e-8, msg=name)


def test_defaults_for_adapters(tmp_path):
    args = SFTDistillationConfig(str(tmp_path), bf16=False, use_cpu=True)
    assert (args.learning_rate, args.logging_steps) == (2e-4, 0.05)
    args = SFTDistillationConfig(str(tmp_path), bf16=False, use_cpu=True, learning_rate=2e-5, logging_steps=10)
    assert (args.learning_rate, args.logging_steps) == (2e-5, 10)


# Gradients


@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpointing"])
@pytest.mark.parametrize("accumulation", [1, 4])
@pytest.mark.parametrize("loss_type", ["nll", CHUNKED])
def test_gradients(loss_type, accumulation, checkpointing, sft_args):
    args = sft_args(
        loss_type=loss_type, gradient_accumulation_steps=accumulation, gradient_checkpointing=checkpointing,
        per_device_train_batch_size=2 if accumulation > 1 else 4,
    )  # fmt: skip
    trainer = train(student_model(student_start="random"), args)
    assert len(trainer.micro_batches) == accumulation
    assert_gradients_equal_the_reference(trainer)


def test_gradients_of_bottlenecks(sft_args):
    args = sft_args(gradient_accumulation_steps=2)
    assert_gradients_equal_the_reference(train(student_model(BOTTLENECK, student_start="random"), args))


@pytest.mark.parametrize(
    "settings",
    [
        {"packing": True, "max_length": 40},
        {"packing": True, "max_length": 12, "packing_strategy": "bfd_split"},
        {"packing": True, "max_length": 12, "packing_strategy": "wrapped"},
        {"padding_free": True, "max_length": None},
        {"assistant_only_loss": True},
        {"assistant_only_loss": True, "packing": True, "max_length": 40},
        {"loss_type": "dft"},
        {"loss_type": "nll", "label_smoothing_factor": 0.1},
    ],
    ids=lambda settings: "-".join(f"{name}={value}" for name, value in settings.items()),
)
def test_forms_of_a_batch(settings, sft_args):
    trainer = train(student_model(student_start="random"), sft_args(gradient_accumulation_steps=2, **settings))
    batch, _ = trainer.micro_batches[0]
    is_flat = settings.get("packing") and settings.get("packing_strategy") != "wrapped"
    assert ("attention_mask" in batch) != bool(is_flat or settings.get("padding_free"))
    assert_gradients_equal_the_reference(trainer)


def test_a_loss_function(sft_args):
    def loss(outputs, labels, num_items_in_batch=None):
        labels = labels[:, 1:].flatten()
        return cross_entropy(outputs.logits[:, :-1].flatten(0, 1), labels, reduction="sum") / num_items_in_batch

    args = sft_args(gradient_accumulation_steps=2, loss_type="nll")
    assert_gradients_equal_the_reference(train(student_model(student_start="random"), args, compute_loss_func=loss))


def test_padding_changes_nothing(sft_args):
    gradients = [
        train(student_model(student_start="random"), sft_args(pad_to_multiple_of=multiple)).gradients
        for multiple in (None, 64)
    ]
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, rtol=0, atol=1e-8, msg=name)


def test_the_loss_is_the_cross_entropy_of_the_labels(sft_args):
    """The loss of trl, which the reference takes from it, without distillation."""
    trainer = train(student_model(student_start="random"), sft_args(distillation_start=1.0))
    ((inputs, n_items),) = trainer.micro_batches
    logits = trainer.model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]).logits
    labels = inputs["labels"][:, 1:].flatten()
    expected = cross_entropy(logits[:, :-1].flatten(0, 1), labels, ignore_index=-100, reduction="sum") / n_items
    assert trainer.state.log_history[0]["loss"] == pytest.approx(expected.item(), abs=1e-4)


def test_only_the_assistants_tokens_have_labels(sft_args):
    trainer = train(student_model(student_start="random"), sft_args(assistant_only_loss=True), chats(4))
    ((inputs, _),) = trainer.micro_batches
    tokenizer, labels = trainer.processing_class, inputs["labels"]
    decoded = {" ".join(tokenizer.convert_ids_to_tokens(row[row != -100])) for row in labels}
    said = chats(4)["messages"]
    assert decoded == {" ".join(f"{m['content']} </s>" for m in chat if m["role"] == "assistant") for chat in said}


QUESTIONS = chats(6).map(lambda row: {"messages": row["messages"][:1]})
LONG = Dataset.from_dict({"prompt": [" ".join(["w1"] * 40), "w2 w3"], "completion": [" w4", " w5"]})


@pytest.mark.parametrize(
    ("dataset", "settings"),
    [(QUESTIONS, {"assistant_only_loss": True}), (LONG, {"max_length": 16, "completion_only_loss": True})],
    ids=["no answers", "cut before the answers"],
)
def test_examples_without_labels_need_no_answers(dataset, settings, sft_args):
    train_dataset = LONG if "prompt" in dataset.column_names else chats()
    trainer = train(student_model(), sft_args(**settings), train_dataset, distillation_dataset=dataset)
    assert trainer._unlabelled.size == len(dataset)
    assert trainer.completion_only_loss is ("prompt" in dataset.column_names)
    assert not trainer._unlabelled.next(0, 2, 1).keys() & {"labels", "completion_mask"}


def test_unlabelled_chats(sft_args):
    trainer = train(student_model(student_start="random"), sft_args(), chats(4), distillation_dataset=chats(4, seed=5))
    assert set(trainer._unlabelled.dataset.column_names) == {"input_ids", "labels"}
    model, args = trainer.model, trainer.args
    model.zero_grad()
    model.train_adapter(STUDENT)
    ((inputs, n_items),) = trainer.micro_batches
    with AdapterSetup(Stack(STUDENT)):
        trl.SFTTrainer.compute_loss(trainer, model, dict(inputs), num_items_in_batch=n_items).backward()
    unlabelled = trainer._unlabelled.collator(list(trainer._unlabelled.dataset))
    for batch in (inputs, unlabelled):
        (terms(model, batch, args.distillation_weight, args.fusion_regularization) / 2).backward()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            torch.testing.assert_close(trainer.gradients[name], parameter.grad, rtol=0, atol=1e-8, msg=name)


# A whole training


@pytest.mark.parametrize("settings", [{}, {"packing": True, "max_length": 32}], ids=["padded", "packed"])
def test_a_training(settings, sft_args):
    model = make_student(make_model("llama", "causal_lm"), config=LORA, head=None)
    before = snapshot(model)
    args = sft_args(
        max_steps=6, learning_rate=1e-2, distillation_start=0.5, keep_fusion=False, per_device_train_batch_size=2,
        save_strategy="steps", save_steps=3, eval_strategy="steps", eval_steps=3, **settings,
    )  # fmt: skip
    trainer = train(model, args, chats(16), eval_dataset=chats(4, seed=1))
    logs = [log for log in trainer.state.log_history if "loss" in log]
    assert [log["stage"] for log in logs] == [1, 1, 1, 2, 2, 2]
    assert all({"mean_token_accuracy", "num_tokens", "task_loss"} <= log.keys() for log in logs)
    assert all(("distillation_loss" in log) == (log["stage"] == 2) for log in logs)
    assert {f"attention/{teacher}" for teacher in TEACHERS} <= logs[-1].keys()
    moved = changed(model, before)
    assert moved
    assert all(f".{STUDENT}." in name for name in moved), "base model and teachers stay"
    assert not any("distillation_fusion" in name for name, _ in model.named_parameters())
    provenance = had.distillation_of(model, STUDENT).run
    assert provenance.evaluation["eval_loss"] == pytest.approx(trainer.evaluate()["eval_loss"], abs=1e-6)
    card = Path(args.output_dir, "README.md").read_text()
    assert "distil" in card
    assert "base_model" in card or STUDENT in card
    for step in (3, 6):
        files = {path.name for path in Path(args.output_dir, f"checkpoint-{step}").rglob("*.safetensors")}
        assert files == {"adapter.safetensors"} | {"distillation_fusion.safetensors"}, "nor the head of the base model"


def test_resume(sft_args, tmp_path):
    settings = {"max_steps": 4, "learning_rate": 1e-2, "distillation_start": 0.5, "save_strategy": "steps"}
    settings |= {"save_steps": 1, "per_device_train_batch_size": 2}

    def model():
        return make_student(make_model("llama", "causal_lm"), config=LORA, head=None)

    unbroken = train(model(), sft_args(output_dir=str(tmp_path / "unbroken"), **settings | {"save_strategy": "no"}))
    for step in (1, 3):  # in each stage
        args = sft_args(output_dir=str(tmp_path / f"broken{step}"), **settings)
        train(model(), args, callbacks=[StopAt(step)])
        resumed = RecordingTrainer(model(), args, train_dataset=chats())
        resumed.train(resume_from_checkpoint=True)
        assert len(resumed.micro_batches) == 4 - step
        assert changed(resumed.model, snapshot(unbroken.model)) == set()


LOAD = """
    import adapters, torch, transformers
    folder = sys.argv[1]
    model = transformers.AutoModelForCausalLM.from_pretrained(folder + "/base")
    adapters.init(model)
    model.load_adapter(folder + "/student", set_active=True)
    with torch.no_grad():
        torch.save(model.eval()(torch.arange(3, 23)[None]).logits, folder + "/logits.pt")
"""


def test_the_saved_student_needs_no_package(sft_args, tmp_path):
    model = make_student(make_model("llama", "causal_lm"), config=LORA, head=None)
    make_model("llama", "causal_lm").save_pretrained(tmp_path / "base")
    train(model, sft_args(max_steps=3, learning_rate=1e-2, keep_fusion=False))
    model.save_adapter(str(tmp_path / "student"), STUDENT, with_head=False)
    run_without_package(LOAD, str(tmp_path))
    with torch.no_grad():
        logits = model.eval()(torch.arange(3, 23)[None]).logits
    assert torch.equal(torch.load(tmp_path / "logits.pt", weights_only=True), logits)


def test_push(sft_args, hub, monkeypatch):
    monkeypatch.setenv("HF_HUB_DISABLE_TELEMETRY", "1")
    model = make_student(make_model("llama", "causal_lm"), config=LORA, head=None)
    trainer = train(model, sft_args(hub_model_id="me/support", learning_rate=1e-2, keep_fusion=False))
    trainer.push_to_hub(dataset_name="chats")
    files = hub.repos["me/support"].files
    assert "adapter.safetensors" in files
    assert not [name for name in files if name.startswith("model")]
    assert "chats" in files["README.md"].decode()


def test_reading_before_and_after_the_steps(sft_args):
    """The choice of teachers, the fit of the start, and the analysis."""
    pytest.importorskip("matplotlib")
    model = make_student(make_model("llama", "causal_lm"), config=LORA, head=None, teacher_selection=2)
    trainer = train(model, sft_args(analysis=True, max_steps=2, learning_rate=1e-2), eval_dataset=chats(4, seed=1))
    assert len(trainer.block.teachers) == 2
    found = {path.stem for path in Path(trainer.args.output_dir, "analysis").iterdir()}
    assert found == {"teacher_attention", "student_distance", "leave_one_teacher_out"}


def test_the_fit_of_the_start_needs_few_logits(sft_args):
    model, shapes = make_student(make_model("llama", "causal_lm"), config=BOTTLENECK, head=None), []
    trainer = RecordingTrainer(model, sft_args(), train_dataset=chats())
    handle = model.lm_head.register_forward_hook(lambda module, args, output: shapes.append(output.shape[1]))
    before = snapshot(model)
    trainer.fit_start()
    handle.remove()
    assert changed(model, before)
    assert set(shapes) == {1}


# What does not go with distillation


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"use_liger_kernel": True}, "use_liger_kernel=True replaces layers of the model; leave it out."),
        ({"chat_template_path": "org/chat"}, "chat_template_path='org/chat' would add tokens to the frozen base"),
        ({"packing": True, "pad_to_multiple_of": 8}, "pad_to_multiple_of=8 pads packed batches, which have no mask"),
        ({"padding_free": True, "pad_to_multiple_of": 8}, "pad_to_multiple_of=8 pads packed batches"),
    ],
)
def test_settings_that_do_not_go_with_distillation(settings, message, sft_args):
    with pytest.raises(ValueError, match=message) as caught:
        sft_args(**settings)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("model", "kwargs", "error", "message"),
    [
        (lambda: "org/model", {}, TypeError, "model='org/model' is a name; load the model, call adapters.init"),
        (student_model, {"peft_config": object()}, ValueError, "peft_config would add an adapter of peft"),
        (student_model, {"args": trl.SFTConfig("out", bf16=False)}, TypeError, "args must be .* not SFTConfig"),
        (lambda: student_model(carrier="dual"), {}, ValueError, "The carrier 'dual' needs the model's own loss"),
        (
            lambda: student_model(objective={"cosine": 1.0, "logits": 1.0}),
            {},
            ValueError,
            "The objective 'logits' needs the logits, which trl does not compute; use DistillationTrainer",
        ),
        (
            lambda: student_model(objective="similarity"),
            {},
            ValueError,
            "The objective 'similarity' is for models of embeddings, .*; choose 'features' or 'cosine'",
        ),
        (lambda: make_student(make_model("llama"), head="causal_lm"), {}, ValueError, "LlamaAdapterModel has heads"),
    ],
)
def test_models_that_do_not_go_with_distillation(model, kwargs, error, message, sft_args):
    kwargs.setdefault("args", sft_args())
    with pytest.raises(error, match=message) as caught:
        SFTDistillationTrainer(model(), train_dataset=chats(), **kwargs)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("settings", [{"packing": True}, {"padding_free": True, "max_length": None}])
@pytest.mark.parametrize("config", ["loreft", LoRAConfig(r=4, use_gating=True)], ids=["reft", "gate"])
def test_adapters_that_take_a_row_for_a_sequence(config, settings, sft_args):
    model = make_student(make_model("llama", "causal_lm"), config=config, head=None, student_start="random")
    with pytest.raises(
        ValueError, match="several sequences into one row, but 'insurance' has ReFT or a gate"
    ) as caught:
        SFTDistillationTrainer(model, sft_args(**settings), train_dataset=chats(), processing_class=chat_tokenizer())
    assert "\n" not in str(caught.value)
    SFTDistillationTrainer(model, sft_args(), train_dataset=chats(), processing_class=chat_tokenizer())


def test_chats_weigh_their_teachers(sft_args):
    """The metrics that trl logs are those of the training alone."""
    logs = []
    for start in ("weighted", "average"):
        model = make_student(make_model("llama", "causal_lm"), config=LORA, head=None, student_start=start)
        args = sft_args(eval_strategy="steps", eval_steps=1, weighing_steps=4)
        trainer = RecordingTrainer(model, args, train_dataset=chats(), eval_dataset=chats(4, seed=1))
        before = snapshot(model)
        if start == "weighted":
            trainer.fit_start()
            assert not any(trainer._metrics[mode] for mode in ("train", "eval"))
            weights = trainer.distillation.weights
            assert len({round(weight, 6) for weight in weights.mean().values()}) == 3
            assert all(".insurance." in name for name in changed(model, before))
        trainer.train()
        logs.append(next(log for log in trainer.state.log_history if "eval_num_tokens" in log))
    assert logs[0]["eval_num_tokens"] == logs[1]["eval_num_tokens"]


class Rewarding(had.DistillationMixin, trl.RewardTrainer):
    """Both."""


def test_other_trainers_of_trl_log_the_metrics_of_the_training_alone(tmp_path):
    @dataclass
    class Arguments(had.DistillationArgumentsMixin, trl.RewardConfig):
        """Both."""

    model = AutoModelForSequenceClassification.from_config(CONFIGS["llama"](num_labels=1))
    adapters.init(model)
    model = make_student(model, head=None, student_start="weighted")
    args = Arguments(str(tmp_path), bf16=False, report_to=[], use_cpu=True, disable_tqdm=True, weighing_steps=4)
    sides = {"chosen": chats()["messages"], "rejected": chats(seed=1)["messages"]}
    dataset = Dataset.from_dict(sides)
    trainer = Rewarding(model, args, train_dataset=dataset, processing_class=chat_tokenizer())
    trainer.fit_start()
    assert trainer.distillation.weights is not None
    assert not any(trainer._metrics[mode] for mode in ("train", "eval"))
