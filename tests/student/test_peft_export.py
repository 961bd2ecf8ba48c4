"""Students and plain LoRA as PEFT saves them, read by PEFT where this package cannot be imported."""

import json
from pathlib import Path

import adapters
import peft
import pytest
import torch
import transformers
from adapters import AutoAdapterModel, LoRAConfig
from messages import exactly, one_line
from model_state import snapshot
from sentence_transformers import SentenceTransformer
from tiny_models import CONFIGS, STATIC, VOCABULARY, make_batch, make_dataset, make_model, make_student, noisy
from transformers import (
    AutoModelForMaskedLM,
    AutoModelForQuestionAnswering,
    CLIPConfig,
    EncoderDecoderConfig,
    EncoderDecoderModel,
    set_seed,
)
from without_package import run_without_package

import hf_adapter_distillation as had
from hf_adapter_distillation.student import digests, peft_export
from hf_adapter_distillation.teachers.loading import load_saved_adapter

READ = """
    import json, torch, transformers, peft
    from sentence_transformers import SentenceTransformer
    out, cases = json.loads(sys.argv[1])
    results = {}
    for name, base, num_labels in cases:
        folder = f"{out}/{name}"
        read = json.load(open(folder + "/adapter_config.json"))
        cls = getattr(transformers, read["auto_mapping"]["base_model_class"])
        labels = {} if num_labels is None else {"num_labels": num_labels}
        load = lambda: cls.from_pretrained(base, **labels)
        batch = torch.load(f"{out}/{name}.pt", weights_only=True)
        by_transformers = load()
        by_transformers.load_adapter(folder)
        for reader, model in (("peft", peft.PeftModel.from_pretrained(load(), folder)), ("load", by_transformers)):
            with torch.no_grad():
                results[name, reader] = model.double().eval()(**batch)[0]
    encoder = SentenceTransformer(f"{out}/encoder", device="cpu")
    encoder.load_adapter(f"{out}/embeddings")
    results["embeddings", "load"] = encoder.encode("my card is gone", convert_to_tensor=True)
    torch.save(results, out + "/results.pt")
"""
FULL = LoRAConfig(attn_matrices=["q", "k", "v"], intermediate_lora=True, output_lora=True, r=3, alpha=7, dropout=0.1)
ALL = ["q", "k", "v", "o_proj", "gate_proj", "attn.c_proj", "o", "attention.output.dense"]  # of several models
WITH_HEAD = ("classification", "masked_lm", "qa")
HEAD = {"num_labels": 3, "layers": 1, "use_pooler": True}
PLAIN = STATIC | {"masked_lm": AutoModelForMaskedLM, "qa": AutoModelForQuestionAnswering}
CASES = {  # family, kind of model, LoRA, flexible head
    "bert": ("bert", "classification", FULL, None),
    "bert-left-out": ("bert", "base", LoRAConfig(leave_out=[0]), None),
    "roberta": ("roberta", "classification", FULL, None),
    "distilbert": ("distilbert", "classification", FULL, None),
    "gpt2": ("gpt2", "causal_lm", FULL, None),
    "gpt2-merged": ("gpt2", "base", LoRAConfig(attn_matrices=["k", "v"], r=2), None),
    "gpt2-classes": ("gpt2", "classification", LoRAConfig(attn_matrices=["v"], output_lora=True), None),
    "llama": ("llama", "causal_lm", FULL, None),
    "gemma3": ("gemma3", "causal_lm", FULL, None),
    "gemma3-classes": ("gemma3", "classification", FULL, None),
    "llama-all": ("llama", "causal_lm", FULL.replace(attn_matrices=ALL), None),
    "gpt2-all": ("gpt2", "causal_lm", FULL.replace(attn_matrices=ALL), None),
    "t5-all": ("t5", "seq2seq_lm", FULL.replace(attn_matrices=ALL), None),
    "bert-all": ("bert", "classification", FULL.replace(attn_matrices=ALL), None),
    "deberta": ("deberta", "classification", FULL, None),
    "modernbert": ("modernbert", "classification", FULL, None),
    "t5": ("t5", "seq2seq_lm", FULL, None),
    "bart": ("bart", "seq2seq_lm", FULL, None),
    "bert-masked": ("bert", "masked_lm", FULL, None),
    "roberta-masked": ("roberta", "masked_lm", FULL, None),
    "distilbert-masked": ("distilbert", "masked_lm", FULL, None),
    "t5-qa": ("t5", "qa", FULL, None),
    "bert-flex": ("bert", "flex", FULL, ("classification", HEAD)),
    "bert-flex-labels": ("bert", "flex", FULL, ("classification", HEAD | {"multilabel": True})),
    "bert-flex-headless": ("bert", "flex", FULL, None),
    "roberta-flex": ("roberta", "flex", FULL, ("tagging", {"num_labels": 3})),
    "distilbert-flex": ("distilbert", "flex", FULL, ("qa", {"num_labels": 2, "layers": 1})),
    "gpt2-flex": ("gpt2", "flex", FULL, ("causal_lm", {"head_type": "causal_lm"})),
    "t5-flex-qa": ("t5", "flex", FULL, ("qa", {"num_labels": 2, "layers": 1})),
    "llama-flex": ("llama", "flex", FULL, ("causal_lm", {"head_type": "causal_lm"})),
}


def with_lora(base, kind, lora=FULL, head=None):
    if kind == "flex":
        model = AutoAdapterModel.from_pretrained(base)
    else:
        model = PLAIN[kind].from_pretrained(base)
        adapters.init(model)
    model.add_adapter("bank", config=lora)
    noisy(model, "bank")
    if head and "head_type" in head[1]:
        model.add_prediction_head_from_config("bank", head[1])
    elif head:
        getattr(model, f"add_{head[0]}_head")("bank", **head[1])
    elif kind in WITH_HEAD:
        output, beside = model.get_output_embeddings(), head_modules(model)
        frozen = set() if output is None else {*output.parameters()}
        for parameter in [each for module in beside for each in module.parameters() if each not in frozen]:
            parameter.data = torch.randn_like(parameter)
    model.set_active_adapters("bank")
    return model


def head_modules(model):
    """The modules beside the base model, which a T5 for questions is itself."""
    of_base = {"shared", "encoder", "decoder", "shared_parameters", "prefix_tuning", model.base_model_prefix}
    return [module for name, module in model.named_children() if name not in of_base]


def logits(model, batch):
    with torch.no_grad():
        return model.double().eval()(**batch)[0]


@pytest.fixture(scope="module")
def read(tmp_path_factory, tiny_encoder):
    """The folder of the exports, and what the adapters and their readers compute, by case and reader."""
    out, cases, expected = tmp_path_factory.mktemp("exports"), [], {}
    for name, (family, kind, lora, head) in CASES.items():
        set_seed(0)
        base = str(out / f"base-{name}")
        PLAIN["base" if kind == "flex" else kind].from_config(CONFIGS[family]()).save_pretrained(base)
        model = with_lora(base, kind, lora, head)
        had.save_adapter_as_peft(model, "bank", out / name)
        batch = make_batch(labels="tokens" if family in ("t5", "bart") else None)
        if "labels" in batch:
            batch["decoder_input_ids"] = batch.pop("labels").clamp(min=0)
        torch.save(batch, out / f"{name}.pt")
        cases.append([name, base, head[1].get("num_labels") if head else None])
        expected[name] = logits(model, batch)
    encoder = SentenceTransformer(tiny_encoder, device="cpu")
    encoder.save(str(out / "encoder"))
    model = encoder[0].auto_model
    adapters.init(model)
    model.add_adapter("bank", config=FULL)
    noisy(model, "bank")
    model.set_active_adapters("bank")
    had.save_adapter_as_peft(model, "bank", out / "embeddings")
    expected["embeddings"] = encoder.encode("my card is gone", convert_to_tensor=True)
    run_without_package(READ, json.dumps([str(out), cases]))
    return out, expected, torch.load(out / "results.pt", weights_only=True)


def test_peft_transformers_and_sentence_transformers_read_the_same(read):
    out, expected, results = read
    assert len(results) == 2 * len(CASES) + 1
    for (name, reader), result in results.items():
        tolerance = 1e-6 if name in ("embeddings", "t5-flex-qa") else 1e-9  # in float32; a factor that rounds
        torch.testing.assert_close(
            result, expected[name], rtol=tolerance, atol=tolerance, msg=lambda m, at=(name, reader): f"{at}: {m}"
        )


@pytest.mark.parametrize("name", CASES)
def test_an_export_is_a_teacher_again(read, name):
    out, expected, _ = read
    family, kind, lora, head = CASES[name]
    model = with_lora(str(out / f"base-{name}"), kind, lora, head)
    load_saved_adapter(model, out / name, "again")
    batch = torch.load(out / f"{name}.pt", weights_only=True)
    for place in adapters_of(model, "again"):
        assert place.lora_A.shape[0] % lora.r == 0, "merged projections do not grow"
    own = [place.lora_A.shape for place in adapters_of(model, "bank")]
    assert {place.lora_A.shape for place in adapters_of(model, "again")} == {*own}
    if head or kind in WITH_HEAD:
        return  # a head is left out
    model.set_active_adapters("again")
    torch.testing.assert_close(logits(model, batch), expected[name], rtol=1e-12, atol=1e-12)


def adapters_of(model, name):
    return [module.loras[name] for module in model.modules() if name in getattr(module, "loras", ())]


def test_the_config_says_what_peft_asks_for(read):
    out, _, _ = read
    config = json.loads((out / "gpt2" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(out / "base-gpt2")
    assert (config["task_type"], config["r"], config["lora_alpha"], config["lora_dropout"]) == ("CAUSAL_LM", 3, 7, 0.1)
    assert config["target_modules"] == ["c_attn", "c_fc", "mlp.c_proj"]
    assert (config["rank_pattern"], config["alpha_pattern"]) == ({"c_attn": 9}, {"c_attn": 21})
    assert config["fan_in_fan_out"] is True
    config = json.loads((out / "bert-left-out" / "adapter_config.json").read_text())
    assert config["target_modules"] == ["1.attention.self.query", "1.attention.self.value"]
    for name, modules in {
        "distilbert": ["classifier", "pre_classifier"],
        "llama-flex": ["lm_head"],
        "gpt2-flex": None,
        "llama": None,
        "gemma3": None,
        "gemma3-classes": ["score"],
        "t5": None,
        "bert-masked": ["cls.predictions.transform"],
        "roberta-masked": ["lm_head.dense", "lm_head.layer_norm"],
        "distilbert-masked": ["vocab_layer_norm", "vocab_transform"],
        "t5-qa": ["qa_outputs"],
    }.items():
        assert json.loads((out / name / "adapter_config.json").read_text())["modules_to_save"] == modules, name


@pytest.mark.parametrize(("kind", "plain"), [("classification", "BertModel"), ("masked_lm", "BertForMaskedLM")])
def test_an_export_without_a_static_head_is_for_the_base_or_the_language_model(kind, plain, tmp_path):
    PLAIN[kind].from_config(CONFIGS["bert"]()).save_pretrained(tmp_path / "base")
    model = with_lora(str(tmp_path / "base"), kind)
    had.save_adapter_as_peft(model, "bank", tmp_path / "peft", with_head=False)
    config = json.loads((tmp_path / "peft" / "adapter_config.json").read_text())
    assert config["auto_mapping"]["base_model_class"] == plain
    assert config["modules_to_save"] is None
    read = peft.PeftModel.from_pretrained(getattr(transformers, plain)(model.config), tmp_path / "peft")
    loaded = read.get_submodule(f"base_model.model.{'bert.' if kind == 'masked_lm' else ''}encoder.layer.0")
    query = loaded.attention.self.query
    own = adapters_of(model, "bank")[0]
    torch.testing.assert_close(query.lora_A.default.weight, own.lora_A)


def test_an_encoder_decoder_model_is_its_own_base(tmp_path):
    parts = CONFIGS["bert"](), CONFIGS["bert"](is_decoder=True, add_cross_attention=True)
    model = EncoderDecoderModel(EncoderDecoderConfig.from_encoder_decoder_configs(*parts))
    adapters.init(model)
    model.add_adapter("bank", config=FULL)
    noisy(model, "bank")
    had.save_adapter_as_peft(model, "bank", tmp_path / "peft")
    load_saved_adapter(model, tmp_path / "peft", "again")
    for own, again in zip(adapters_of(model, "bank"), adapters_of(model, "again"), strict=True):
        torch.testing.assert_close(again.lora_B @ again.lora_A, own.lora_B @ own.lora_A)


@pytest.mark.parametrize("kind", ["CLIPModel", "CLIPTextModel"])
def test_a_model_without_an_argument_of_peft_has_no_task(kind, tmp_path):
    size = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 37}
    text = size | {"vocab_size": VOCABULARY, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    config = CLIPConfig(text_config=text, vision_config=size | {"image_size": 16, "patch_size": 8}, projection_dim=16)
    model_class = getattr(transformers, kind)
    base = model_class(config if kind == "CLIPModel" else config.text_config)
    base.save_pretrained(tmp_path / "base")
    adapters.init(base)
    base.add_adapter("bank", config="lora")
    noisy(base, "bank")
    base.set_active_adapters("bank")
    had.save_adapter_as_peft(base, "bank", tmp_path / "peft")
    batch = make_batch(labels=None) | ({"pixel_values": torch.randn(4, 3, 16, 16)} if kind == "CLIPModel" else {})
    read = peft.PeftModel.from_pretrained(model_class.from_pretrained(tmp_path / "base"), tmp_path / "peft")
    with torch.no_grad():  # in float32: CLIP masks with the smallest number, which is no float in float64
        torch.testing.assert_close(read.eval()(**batch)[0], base.eval()(**batch)[0], rtol=1e-5, atol=1e-5)


def test_output_embeddings_that_peft_trained_are_exported(tmp_path):
    base = PLAIN["causal_lm"].from_config(CONFIGS["llama"]())
    base.save_pretrained(tmp_path / "base")
    given = peft.get_peft_model(base, peft.LoraConfig(target_modules=["q_proj"], modules_to_save=["lm_head"]), "bank")
    for parameter in filter(lambda each: each.requires_grad, given.parameters()):
        parameter.data += torch.randn_like(parameter)
    batch = make_batch(labels=None)
    expected = logits(given, batch)
    had.save_adapter_as_peft(had.from_peft(given), "bank", tmp_path / "peft")
    read = peft.PeftModel.from_pretrained(PLAIN["causal_lm"].from_pretrained(tmp_path / "base"), tmp_path / "peft")
    torch.testing.assert_close(logits(read, batch), expected, rtol=1e-9, atol=1e-9)


def test_a_student_keeps_its_provenance_its_type_and_any_scaling(tmp_path, trainer_args):
    model = make_student(make_model(kind="classification"), config=LoRAConfig(r=7, alpha=1.3))
    had.DistillationTrainer(model, trainer_args(max_steps=2), train_dataset=make_dataset()).train()
    model.base_model.to(torch.bfloat16)
    had.save_adapter_as_peft(model, "insurance", tmp_path / "peft")
    assert sorted(path.name for path in tmp_path.iterdir() if path.name != "training") == ["peft"]
    assert sorted(path.name for path in (tmp_path / "peft").iterdir()) == sorted(peft_export.PEFT_FILES)
    saved = json.loads((tmp_path / "peft" / "distillation.json").read_text())
    assert [teacher["name"] for teacher in saved["teachers"]] == ["bank", "travel", "work"]
    assert json.loads((tmp_path / "peft" / "adapter_config.json").read_text())["lora_alpha"] == 1.3
    load_saved_adapter(model, tmp_path / "peft", "again")
    assert digests.value_digest(model, "again") == digests.value_digest(model, "insurance")
    model.add_adapter("plain", config="lora")
    had.save_adapter_as_peft(model, "plain", tmp_path / "peft")
    assert not (tmp_path / "peft" / "distillation.json").exists()


NO_FORM = "has no form in PEFT; only a plain LoRA is exported (save_adapter saves it)."


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ("seq_bn", f"Adapter 'bank' is a SeqBnConfig, which {NO_FORM}"),
        ("mam", f"Adapter 'bank' is a MAMConfig, which {NO_FORM}"),
        ("prefix_tuning", f"Adapter 'bank' is a PrefixTuningConfig, which {NO_FORM}"),
        ("ia3", f"Adapter 'bank' is a scaling LoRA (IA3), which {NO_FORM}"),
        (LoRAConfig(composition_mode="scale", r=1), f"Adapter 'bank' is a scaling LoRA (IA3), which {NO_FORM}"),
        ("vera", f"Adapter 'bank' is VeRA, which {NO_FORM}"),
        (LoRAConfig(use_gating=True), f"Adapter 'bank' is a LoRA with gates, which {NO_FORM}"),
        (LoRAConfig(vera_d=0.1, vera_b=0.0), f"Adapter 'bank' is VeRA, which {NO_FORM}"),
        (
            LoRAConfig(use_dora=True),
            f"Adapter 'bank' is a DoRA, whose norm PEFT computes in another way, which {NO_FORM}",
        ),
    ],
)
def test_an_adapter_without_a_form_in_peft_is_named(config, message, tmp_path):
    model = make_model()
    model.add_adapter("bank", config=config)
    with pytest.raises(ValueError, match=exactly(message)):
        had.save_adapter_as_peft(model, "bank", tmp_path / "peft")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("wrap", [lambda base: base, lambda base: peft.get_peft_model(base, peft.LoraConfig())])
def test_a_model_without_adapters_is_named(wrap, tmp_path):
    model = wrap(PLAIN["base"].from_config(CONFIGS["bert"]()))
    message = (
        f"save_adapter_as_peft takes a model with adapters, not a {type(model).__name__}; call adapters.init, or "
        "save_pretrained of a PeftModel."
    )
    with pytest.raises(TypeError, match=exactly(message)):
        had.save_adapter_as_peft(model, "default", tmp_path / "peft")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("file", [*peft_export.PEFT_FILES, None])
def test_a_target_that_cannot_be_replaced_is_named_before_anything_is_written(file, tmp_path):
    model, folder = make_model(), tmp_path / "peft"
    model.add_adapter("bank", config="lora")
    if file is None:
        folder.symlink_to(tmp_path / "missing")
        message = f"{folder} is a link to {tmp_path / 'missing'}, which is not there; give a folder."
    else:
        had.save_adapter_as_peft(model, "bank", folder)
        (folder / file).unlink(missing_ok=True)
        (folder / file).mkdir()
        message = f"{folder / file} is a folder in the place of a file; remove it, or give another folder."
    before = {path: path.is_file() and path.read_bytes() for path in tmp_path.rglob("*")}
    noisy(model, "bank")
    with pytest.raises(ValueError, match=exactly(message)):
        had.save_adapter_as_peft(model, "bank", folder)
    assert {path: path.is_file() and path.read_bytes() for path in tmp_path.rglob("*")} == before


def test_heads_names_and_folders_that_do_not_fit_are_named(tmp_path, monkeypatch):
    model = make_model()
    model.add_adapter("bank", config="lora")
    model.add_classification_head("bank", num_labels=3)
    before = snapshot(model)
    message = (
        "Adapter 'bank' has a head for classification that no bert of transformers has (a "
        "BertForSequenceClassification has layers=1, activation_function=None, use_pooler=True); export it without "
        "the head, by save_adapter_as_peft(with_head=False) or adapter-distill export --no_head."
    )
    with pytest.raises(ValueError, match=exactly(message)):
        had.save_adapter_as_peft(model, "bank", tmp_path / "peft")
    with pytest.raises(ValueError, match=exactly("There is no adapter 'bnk' to export; did you mean 'bank'?")):
        had.save_adapter_as_peft(model, "bnk", tmp_path / "peft")
    model.save_adapter(str(tmp_path / "stock"), "bank")
    with pytest.raises(
        ValueError, match=one_line(part="holds an adapter that save_adapter wrote; give another folder")
    ):
        had.save_adapter_as_peft(model, "bank", tmp_path / "stock", with_head=False)
    had.save_adapter_as_peft(model, "bank", tmp_path / "peft", with_head=False)
    files = {path.name: path.read_bytes() for path in (tmp_path / "peft").iterdir()}

    def full_disk(*args, **kwargs):
        Path(args[1]).write_bytes(b"half")
        raise OSError("no space left")

    monkeypatch.setattr(peft_export, "save_file", full_disk)
    noisy(model, "bank")
    for folder in ("peft", "other"):
        with pytest.raises(OSError, match="no space left"):
            had.save_adapter_as_peft(model, "bank", tmp_path / folder, with_head=False)
    assert {path.name: path.read_bytes() for path in (tmp_path / "peft").iterdir()} == files
    assert sorted(path.name for path in tmp_path.iterdir()) == ["peft", "stock"], "nothing is left of a failed export"
    assert snapshot(model).keys() == before.keys()
