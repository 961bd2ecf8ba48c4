"""The benchmarks on a tiny model, and what they measure with."""

import json
import random
import re
import subprocess
import sys
from importlib.util import find_spec

import numpy as np
import pytest
import torch
from matplotlib.text import Text
from paths import ROOT
from sentence_transformers import SentenceTransformer
from transformers import AutoModelForCausalLM, BertConfig, LlamaConfig

from hf_adapter_distillation.student.choosing import choose_from_pool
from hf_adapter_distillation.training import preparation

BENCHMARKS = ROOT / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

import adapter_memory  # noqa: E402
import classifier_runs  # noqa: E402
import embedding_runs  # noqa: E402
import inference  # noqa: E402
import measure  # noqa: E402
import onboarding_platform  # noqa: E402
import pool  # noqa: E402
import pools  # noqa: E402
import quality  # noqa: E402
import quality_embeddings  # noqa: E402
import report  # noqa: E402
import serving  # noqa: E402
import stage2_step  # noqa: E402
import streaming_tenants  # noqa: E402
import tenant_jobs  # noqa: E402
from faq_embeddings import EmbeddingPlatform, TenantSoftmaxLoss  # noqa: E402
from onboarding_cross_encoder import METHODS  # noqa: E402
from onboarding_frozen import FROZEN_METHODS  # noqa: E402
from tenant_jobs import Arguments  # noqa: E402


def tiny():
    return BertConfig(
        vocab_size=60, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=128, num_labels=2
    )


@pytest.fixture
def run(monkeypatch, tmp_path, capsys):
    monkeypatch.setitem(measure.SHAPES, "tiny", tiny)

    def main(module, *arguments):
        output = tmp_path / f"{module.__name__}.json"
        monkeypatch.setattr(sys, "argv", [module.__name__, *arguments, "--output", str(output)])
        module.main()
        return json.loads(output.read_text()), capsys.readouterr().out

    return main


def test_stage2_step(run, tmp_path):
    results, out = run(stage2_step, *"--shapes tiny --teachers 1 3 --batch 2 --seq_len 8 --rounds 2".split())
    methods = ["plain", "student", "fused", "mixed", "per teacher", "Fuse"]
    assert [(row["teachers"], row["method"]) for row in results["rows"]] == [(n, m) for n in (1, 3) for m in methods]
    for row in results["rows"]:
        assert row["ms"] > 0
        assert row["peak_mb"] > 0
        assert (row["time_ratio"], row["peak_ratio"]) == (1, 1) or row["method"] != "plain"
        assert f"{row['ms']:.1f}" in out
    peak = {row["method"]: row["peak_ratio"] for row in results["rows"] if row["teachers"] == 3}
    assert 1 < peak["student"] < peak["per teacher"] < peak["Fuse"]
    assert results["environment"]["torch"] == torch.__version__
    assert (tmp_path / "stage2_step.png").stat().st_size > 5000
    table = report.stage2_step(results).splitlines()
    assert len(table) == 4
    assert table[2].startswith("| tiny | 1 |")
    assert table[0].count("|") == table[3].count("|")


def test_methods_that_need_too_much_memory_are_left_out(run):
    results, _ = run(
        stage2_step, *"--shapes tiny --teachers 1 8 --batch 2 --seq_len 8 --rounds 1 --max_gb 0.0001".split()
    )
    left = [row["method"] for row in results["rows"] if row["teachers"] == 8]
    assert left == ["plain", "student", "fused", "mixed"]
    assert len(results["rows"]) == 10
    assert report.stage2_step(results).splitlines()[3].count("–") == 3


def test_a_method_can_be_sparse_and_narrow(run):
    methods = ["rank 2", "every 2", "rank 2 every 2"]
    arguments = "--shapes tiny --teachers 2 --batch 2 --seq_len 8 --rounds 1 --methods".split()
    results, _ = run(stage2_step, *arguments, *methods)
    total = {row["method"]: row["total_mb"] for row in results["rows"]}
    assert list(total) == ["plain", *methods]
    assert total["rank 2"] == total["rank 2 every 2"] < total["every 2"]
    assert [stage2_step.steps_of(method) for method in methods] == [1, 2, 2]


def test_the_state_of_a_method_has_no_part_of_the_others(monkeypatch):
    monkeypatch.setitem(measure.SHAPES, "tiny", tiny)
    settings = {"shapes": ["tiny"], "batch": 2, "seq_len": 8}
    alone = stage2_step.Steps(stage2_step.Arguments(**settings, methods=["student"]), "tiny", 2)
    among = stage2_step.Steps(stage2_step.Arguments(**settings, methods=["rank 2", "student", "Fuse"]), "tiny", 2)
    for method in ("plain", "student"):
        assert alone.state_bytes(method) == among.state_bytes(method)
    assert alone.state_bytes("plain") < alone.state_bytes("student")
    assert among.state_bytes("rank 2") < among.state_bytes("Fuse")


def test_inference(run, tmp_path):
    results, out = run(inference, *"--shapes tiny --teachers 3 --batches 1 4 --seq_len 8 --rounds 2".split())
    methods = ["base model", "plain adapter", "distilled student", "Fuse of 3 + own"]
    assert [(row["batch"], row["method"]) for row in results["rows"]] == [(b, m) for b in (1, 4) for m in methods]
    row = {row["method"]: row for row in results["rows"] if row["batch"] == 4}
    for key in ("parameters", "peak_mb"):
        assert row["distilled student"][key] == row["plain adapter"][key] < row["Fuse of 3 + own"][key]
    assert row["distilled student"]["stored_mb"] == pytest.approx(row["plain adapter"]["stored_mb"], rel=0.3)
    assert "bitwise the same logits" in out
    assert (tmp_path / "inference.png").stat().st_size > 5000
    assert len(report.inference(results).splitlines()) == 6


def test_a_student_whose_logits_changed_fails_the_benchmark(run, monkeypatch):
    logits = inference.Platform.logits
    monkeypatch.setattr(inference.Platform, "logits", lambda self, batch: logits(self, batch) + 1)
    with pytest.raises(SystemExit, match="the reloaded student of tiny has other logits"):
        run(inference, *"--shapes tiny --teachers 1 --batches 1 --seq_len 8 --rounds 1".split())


def test_adapter_memory(run, tmp_path):
    shape = {"hidden_size": 24, "intermediate_size": 40, "num_attention_heads": 3, "num_key_value_heads": 1}
    config = LlamaConfig(vocab_size=60, num_hidden_layers=1, **shape)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "llama")
    results, _ = run(adapter_memory, *f"--loras 1 3 --model {tmp_path / 'llama'}".split())
    one, three = results["rows"]
    size = 8 * ((24 + 24) + 2 * (24 + 8) + 2 * (24 + 40)) * 4  # q, k and v, up and down, float32
    assert (one["lora"], three["lora"]) == (size, size)
    assert three["shared"] == three["base"] + 3 * size
    assert three["separate"] == 3 * one["shared"]
    assert one["resident"] > 0
    assert len(report.adapter_memory(results).splitlines()) == 4


def test_a_number_of_loras_below_one_is_refused(run):
    with pytest.raises(SystemExit, match="adapter_memory.py: --loras 0 is out of range; it must be at least 1."):
        run(adapter_memory, *"--loras 0".split())


def test_pool(run, tiny_encoder):
    results, _ = run(pool, *f"--sizes 12 --k 3 --steps 2 --teacher_steps 2 --model {tiny_encoder}".split())
    (row,) = results["rows"]
    assert row["adapters"] == 12
    assert 1 <= row["place_of_relative"] <= 12
    assert row["all_bytes"] == 4 * row["loaded_bytes"]
    assert len(row["best"]) == 5
    assert preparation.choose_from_pool is choose_from_pool
    assert len(report.pool(results).splitlines()) == 3


def test_serving(run, tiny_encoder):
    short = "--tenants 4 --in_batch 2 --batches 2 4 --rounds 2 --compared 30"
    results, out = run(serving, *f"{short} --model {tiny_encoder}".split())
    ways = [serving.MIXED, serving.BATCH_SPLIT, serving.PLAIN, serving.COPIES, serving.FUSION]
    assert [(row["batch"], row["method"]) for row in results["rows"]] == [(n, way) for n in (2, 4) for way in ways]
    rows = {row["method"]: row for row in results["rows"] if row["batch"] == 4}
    assert [rows[way]["passes"] for way in ways] == [1, 1, 1, 2, 2]
    assert rows[serving.PLAIN]["rate_ratio"] == 1
    for row in results["rows"]:
        assert row["rate_ratio"] > 0
        assert 0 < row["p50_ms"] <= row["p99_ms"]
        assert f"{row['queries_per_s']:.1f}" in out
    answers = results["answers"]
    assert (answers["compared"], answers["wrong"]) == (30, 0)
    assert answers["largest_difference"] < serving.TOLERANCE
    assert results["environment"]["torch"] == torch.__version__
    table = report.serving(results).splitlines()
    assert len(table) == 12
    assert table[2].startswith("| 2 | mixed batches |")
    assert len({line.count("|") for line in table}) == 1
    assert report.serving_answers(results).splitlines()[2].startswith("| 30 | 0 | ")


def test_the_ways_to_serve_answer_what_they_say(tiny_encoder, tmp_path):
    args = serving.Arguments(tenants=4, in_batch=2, batches=[4], model=tiny_encoder)
    base = EmbeddingPlatform(tiny_encoder)
    setting = serving.Setting(args, base, tmp_path / "students")
    batches = setting.draw(4, random.Random(0))
    asked = [question.tenant for batch in batches for question in batch]
    assert sorted(asked) == sorted(setting.names * 2)
    assert all(len({question.tenant for question in batch}) == 2 for batch in batches)
    seen = []
    for encoder in [*setting.copies, setting.fused, setting.mixed.encoder, setting.split.encoder]:
        encoder.register_forward_hook(lambda module, args, output: seen.append(module))
    wanted = {
        serving.MIXED: [setting.mixed.encoder],
        serving.BATCH_SPLIT: [setting.split.encoder],
        serving.PLAIN: [setting.split.encoder],
        serving.COPIES: [setting.copies[setting.number(of)] for of in setting.passes(serving.COPIES, batches[0])],
        serving.FUSION: [setting.fused] * 2,
    }
    for way, encoders in wanted.items():
        for of_pass in setting.passes(way, batches[0]):
            setting.answer[way](of_pass)
        assert seen == encoders, way
        seen.clear()
    memory, size = setting.memory(), serving.bytes_of([base.model])
    adapter = memory[serving.PLAIN] - size
    assert memory[serving.MIXED] == size + 4 * adapter
    assert memory[serving.COPIES] == 4 * size
    assert memory[serving.FUSION] > memory[serving.MIXED] > size


def test_a_wrong_answer_of_a_mixed_batch_is_counted(tiny_encoder, tmp_path):
    args = serving.Arguments(tenants=2, in_batch=2, batches=[4], compared=8, model=tiny_encoder)
    setting = serving.Setting(args, EmbeddingPlatform(tiny_encoder), tmp_path / "students")
    setting.mixed.pool.adapters.activate = lambda rows: type(setting.mixed.pool.adapters).activate(
        setting.mixed.pool.adapters, rows[::-1]
    )
    answers = serving.compare_answers(setting)
    assert answers["wrong"] > 0
    assert answers["largest_difference"] > serving.TOLERANCE


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--tenants", "0"], "--tenants 0 is out of range; it must be at least 1"),
        (["--tenants", "9"], "--tenants 9 is out of range; it must be a multiple of --in_batch"),
        (["--batches", "8", "9"], "--batches 9 is out of range; it must be a multiple of --in_batch"),
        (["--rounds", "-1"], "--rounds -1 is out of range; it must be at least 0"),
        (["--model", "no/such/model"], "--model no/such/model cannot be loaded .*; give the folder or Hub id"),
    ],
)
def test_wrong_arguments_of_serving_in_one_line(run, arguments, message, monkeypatch):
    monkeypatch.setattr(serving, "Setting", None)
    with pytest.raises(SystemExit, match=f"^serving.py: .*{message}") as caught:
        run(serving, *arguments)
    assert "\n" not in str(caught.value)


def test_onboarding_platform(run, tiny_encoder, monkeypatch):
    for name in ("PYTHONPATH", "RAY_worker_niceness"):  # the benchmark sets them
        monkeypatch.setenv(name, "")
    monkeypatch.setattr(onboarding_platform, "TEACHER_STEPS", 1)
    short = "--tenants 3 --teachers 2 --alone 2 --shots 1 --steps 2 --long_steps 3 --workers 0"
    results, out = run(onboarding_platform, *f"{short} --model {tiny_encoder}".split())
    assert [(row["way"], row["steps"], row["students"]) for row in results["rows"]] == [
        ("one process, before", 2, 1), ("Ray", 2, 3), ("one process, after", 2, 1), ("one process, usual steps", 3, 1)
    ]  # fmt: skip
    for row in results["rows"]:
        assert 0 < row["cpu_s_in_worker"]
        assert 0 < row["busy"] <= 1
        assert str(row) in out
    assert results["faqs"] == 40
    assert results["student_mb"] > 0
    assert len(report.onboarding_platform(results).splitlines()) == 6
    assert len(report.onboarding_on_paper(results).splitlines()) == 6
    monkeypatch.setattr(onboarding_platform, "files", lambda folder: [str(folder)])
    with pytest.raises(RuntimeError, match="The student of tenant0 differs on Ray and in one process"):
        run(onboarding_platform, *f"{short} --model {tiny_encoder}".split())


def test_the_paper_of_onboarding_by_hand():
    ray = {"way": "Ray", "steps": 6, "cpu_s_in_worker": 3.6, "busy": 0.5, "worker_mb": [900, 1000]}
    usual = {"way": "one process, usual steps", "steps": 50, "cpu_s_in_worker": 36.0, "busy": 1.0}
    table = report.onboarding_on_paper({"rows": [ray, usual], "student_mb": 1.2}).splitlines()
    assert table[0].startswith("| workers, a core each | hours, 6 steps | hours, 50 steps |")
    assert table[2] == "| 2 | 10.0 | 100.0 | 2.0 | 12.0 |"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--workers -1", "--workers -1 is out of range; it must be at least 0"),
        ("--tenants 3 --alone 4", "--alone 4 is more than --tenants 3; lower it"),
        ("--tenants 61", "--tenants 61 need two FAQs each, and the data has 120; lower it"),
    ],
)
def test_wrong_arguments_of_onboarding_in_one_line(run, arguments, message, monkeypatch):
    monkeypatch.setattr(onboarding_platform, "measure", None)
    with pytest.raises(SystemExit, match=f"^onboarding_platform.py: {message}"):
        run(onboarding_platform, *arguments.split())


@pytest.mark.parametrize("module", [adapter_memory, pool, stage2_step])
def test_an_output_that_cannot_be_written_is_refused_before_the_measuring(module, tmp_path, monkeypatch):
    monkeypatch.setattr(measure, "environment", None)
    for output, why in ((tmp_path, "is a folder; give a file."), ("/proc/no/x.json", "cannot be written (No such")):
        monkeypatch.setattr(sys, "argv", [f"{module.__name__}.py", "--output", str(output)])
        with pytest.raises(SystemExit, match=re.escape(f"{module.__name__}.py: --output {output} {why}")):
            module.main()


@pytest.mark.parametrize("steps", [1, 2, 5])
def test_adapter_fusion_takes_as_many_steps_as_the_others(steps):
    first, second = tenant_jobs.halves(steps)
    assert min(first, second) >= 1
    assert first + second == max(2, steps)


def test_queries_without_labels_are_refused_by_the_loss(tiny_encoder):
    loss = TenantSoftmaxLoss(SentenceTransformer(tiny_encoder, device="cpu"), ["a card", "a loan"])
    with pytest.raises(ValueError, match="The queries have no labels; add a column 'label' with the number"):
        loss([loss.model.tokenize(["my card"])], None)


@pytest.mark.parametrize("module", [stage2_step, inference])
def test_an_unknown_shape_is_refused(run, module):
    with pytest.raises(SystemExit, match="--shapes huge is unknown; choose of minilm, bert-base, gpt2"):
        run(module, "--shapes", "huge")


def test_peak_memory():
    def call():
        first = torch.ones(1000, 250)  # 10^6 bytes
        second = first + 1
        del first
        return second + 1

    assert measure.peak_bytes(call, "cpu") == pytest.approx(2e6, rel=0.01)


def test_methods_take_turns():
    calls = []
    tasks = {name: (lambda: None, lambda name=name: calls.append(name)) for name in "ab"}
    times = measure.compare(tasks, rounds=3, device="cpu")
    assert [sorted(calls[i : i + 2]) for i in range(0, 8, 2)] == [["a", "b"]] * 4
    assert {name: len(values) for name, values in times.items()} == {"a": 3, "b": 3}
    assert measure.ratio([2.0, 9.0, 6.0], [1.0, 3.0, 1.0]) == 3.0


def test_arithmetic_by_hand():
    """One layer, no gradient below its adapter; T = 16 tokens, d = 32, two teachers of width 4, M = 10."""
    config = BertConfig(hidden_size=32, num_hidden_layers=1)
    plain = 16 * (12 * 32**2 + 2 * 8 * 32 + 6 * 4 * 32)
    teachers = 16 * 32 * (8 + 4 * 10)
    query_key = 5 * 10 * 32**2  # h (Q^T (K W))
    value = 2 * 10 * 32**2 + 16 * 10 * 32  # (V W) (a z)
    wanted = (plain + teachers + query_key + value) / plain
    assert report.arithmetic(config, batch=2, seq_len=8, n_teachers=2, reduction_factor=8) == pytest.approx(wanted)
    teachers = 16 * 32 * (2 * 68 + 4 * 85)  # seventeen teachers in two chunks
    wanted = (plain + teachers + 5 * 16 * 32**2 + 3 * 16 * 32**2) / plain  # K^T (Q h) and V (W (a z))
    assert report.arithmetic(config, batch=2, seq_len=8, n_teachers=17, reduction_factor=8) == pytest.approx(wanted)


# The streaming tenants

EMBEDDINGS = ("--architecture", "embeddings")
OTHER_STARTS = ("untrained", "paper", "uniform", "random start", "average start")


@pytest.fixture
def benchmark(monkeypatch, tmp_path, capsys, tiny_encoder):
    """Runs the benchmark on three tenants of two FAQs; returns its lines and what it printed."""
    embedding_runs._platform.cache_clear()
    learn = preparation.learn_weights
    monkeypatch.setattr(preparation, "learn_weights", lambda *args, **kwargs: learn(*args, **kwargs | {"steps": 4}))
    queries = [f"how is the {thing}" for thing in "card train parcel weather day pay".split()]
    faqs = [{"question": f"what is {name}", "queries": queries} for name in ("my card", "the weather")]
    data = tmp_path / "data.json"
    data.write_text(json.dumps({"tenants": [{"name": name, "faqs": faqs} for name in ("bank", "rail", "post")]}))

    def main(*arguments):
        output = tmp_path / "lines.jsonl"
        short = "--shots 1 --steps 2 --batch_size 3 --n_wrong 1 --test_queries 1 --search_queries 1 --seeds 1"
        teachers = f"--teacher_queries 2 --teacher_epochs 1 --teachers_dir {tmp_path / 'teachers'}"
        command = f"{short} {teachers} --data {data} --model {tiny_encoder} --output {output}".split()
        command += ["--architecture", "cross-encoder"]
        monkeypatch.setattr(sys, "argv", ["streaming_tenants.py", *command, *arguments])
        streaming_tenants.main()
        return report.read(output), capsys.readouterr().out

    return main


def test_every_method_onboards_a_tenant(benchmark):
    lines, out = benchmark("--tenants", "post", "--search_tenants", "0")
    assert [line["method"] for line in lines] == [name for name in METHODS if name != "SetFit" or find_spec("setfit")]
    for line in lines:
        assert (line["tenant"], line["seed"], line["teachers"]) == ("post", 1, 2)
        assert all(0 <= line[key] <= 1 for key in ("auc", "accuracy_at_1", "mrr"))
        is_frozen = line["method"] in FROZEN_METHODS
        assert is_frozen or (line["ms_ratio"] > 0 and line["MB"] > 0)
        assert (line["seconds"] > 0) == (line["method"] != "teachers' average, untrained")
        assert line["environment"]["torch"] == torch.__version__
        assert line["arguments"]["shots"] == 1
        attention = line.get("attention", {})
        assert bool(attention) == (line["method"].startswith("AdapterDistillation"))
        is_weighted = bool(attention) and not any(start in line["method"] for start in OTHER_STARTS)
        assert ("weights" in line) == is_weighted
        assert all(set(row) >= {"bank", "rail"} for row in attention.values()) or "weights" in line
    sizes = {line["method"]: line["MB"] for line in lines}
    assert sizes["full fine-tuning"] > sizes["AdapterFusion"] > sizes["plain adapter"]
    assert sizes["AdapterDistillation"] == pytest.approx(sizes["plain adapter"], rel=0.3)
    table = report.streaming_tenants(lines).splitlines()
    assert len(table) == 2 + sum(":" not in line["method"] for line in lines)
    assert len({line.count("|") for line in table}) == 1
    assert table[2].endswith("| – | 0.00 | 0 |"), "the frozen encoder has no time of a query"
    of_objectives = set(quality.OBJECTIVES)
    assert of_objectives < set(METHODS)
    assert len(report.variants(lines).splitlines()) == 3 + sum(":" in name for name in set(METHODS) - of_objectives)
    assert len(report.objectives(lines).splitlines()) == 4 + len(of_objectives)


def test_every_method_onboards_a_tenant_of_an_embedding_model(benchmark):
    lines, _ = benchmark(*EMBEDDINGS, "--tenants", "post", "--search_tenants", "0", "--steps", "4", "--latency")
    methods = embedding_runs.METHODS
    assert [line["method"] for line in lines] == [name for name in methods if name != "SetFit" or find_spec("setfit")]
    for line in lines:
        assert (line["tenant"], line["seed"], line["teachers"]) == ("post", 1, 2)
        assert all(0 <= line[key] <= 1 for key in ("auc", "accuracy_at_1", "mrr", "title_accuracy_at_1"))
        assert min(line["seconds"], line["cpu_seconds"], line["ms_ratio"]) > 0
        assert (line["MB"] > 0) == (line["method"] not in FROZEN_METHODS or line["method"] == "linear map")
        if "weights" in line:
            assert set(line["weights"]) == {"bank", "rail"}
            assert 0 < sum(line["weights"].values()) <= 1 + 1e-6
            assert line["gain"] < 1
    weighted = {line["method"].removeprefix("AdapterDistillation: ") for line in lines if "weights" in line}
    assert weighted == {
        "AdapterDistillation", "weights alone", "weighted start", "best 3 teachers", "similarity",
        "lean", "exact", "weights per layer", "weight 1",
    }  # fmt: skip
    sizes = {line["method"]: line["MB"] for line in lines}
    assert sizes["full fine-tuning"] > sizes["AdapterFusion"] > sizes["plain adapter"]
    assert sizes["AdapterDistillation"] == pytest.approx(sizes["plain adapter"], rel=0.3)
    table = report.embeddings(lines[::-1]).splitlines()
    assert [row.split(" | ")[0].removeprefix("| ") for row in table[2:]] == [line["method"] for line in lines]


@pytest.mark.parametrize("pool", ["relatives", "random"])
def test_every_method_onboards_a_tenant_of_a_classifier(pool, benchmark, distinct):
    setting = ("--architecture", "classifier", "--pool", pool, "--data", distinct)
    lines, _ = benchmark(*setting, "--tenants", "post", "--search_tenants", "0", "--steps", "4")
    methods = classifier_runs.METHODS
    assert [line["method"] for line in lines] == [name for name in methods if name != "SetFit" or find_spec("setfit")]
    for line in lines:
        assert (line["tenant"], line["seed"], line["teachers"]) == ("post", 1, 3 if pool == "relatives" else 2)
        assert all(0 <= line[key] <= 1 for key in ("auc", "accuracy_at_1", "mrr"))
        assert min(line["seconds"], line["cpu_seconds"]) > 0
        assert ("weights" in line) == (line["method"] == "AdapterDistillation")
    sizes = {line["method"]: line["MB"] for line in lines}
    assert sizes["full fine-tuning"] > sizes["AdapterFusion"] > sizes["plain adapter"]
    assert sizes["AdapterDistillation"] == pytest.approx(sizes["plain adapter"], rel=0.3)


def test_a_classifier_has_an_example_more_than_queries_and_a_class_for_each_faq(benchmark, monkeypatch):
    seen = []
    fit = classifier_runs.Onboarding.fit
    monkeypatch.setattr(
        classifier_runs.Onboarding, "fit", lambda run, *args, **kw: (seen.append(run), fit(run, *args, **kw))
    )
    benchmark(
        "--architecture", "classifier", "--tenants", "post", "--search_tenants", "0", "--methods", "plain adapter"
    )
    *teachers, run = seen
    assert [len(teacher.labelled) for teacher in teachers] == [6, 6, 6]
    assert run.labelled["label"][:] == [0, 0, 1, 1]
    assert run.labelled["query"][0] == "what is my card"
    assert run.model.heads["new"].config["label2id"] == {"what is my card": 0, "what is the weather": 1}
    assert run.logits(["how is the card"]).shape == (1, 2)


def test_without_labels_only_the_methods_that_need_none_run(benchmark):
    lines, _ = benchmark(*EMBEDDINGS, "--tenants", "post", "--shots", "0", "--search_tenants", "0")
    free = [name for name, method in embedding_runs.METHODS.items() if not method.needs_labels]
    assert [line["method"] for line in lines] == free
    assert all(line["accuracy_at_1"] == line["title_accuracy_at_1"] for line in lines)


def test_methods_search_their_rates_and_variants_take_them(benchmark):
    methods = ("linear map", "multi-task adapter")
    lines, out = benchmark(*EMBEDDINGS, "--tenants", "post", "--search_tenants", "1", "--methods", *methods)
    searched = [(line["method"], line["learning_rate"]) for line in lines if line["queries"] == "validation"]
    assert searched == [
        (name, rate) for name in ("linear map", "plain adapter") for rate in embedding_runs.METHODS[name].rates
    ]
    rates = streaming_tenants.chosen_rates(embedding_runs.METHODS, list(methods), lines)
    tests = {line["method"]: line["learning_rate"] for line in lines if line["queries"] == "test"}
    assert tests == rates
    assert f"Learning rates: linear map {rates['linear map']:g}, multi-task adapter" in out


@pytest.mark.parametrize(
    ("architecture", "fast"),
    [
        ("cross-encoder", "teachers' average, untrained"),
        ("embeddings", "teachers' average, untrained"),
        ("classifier", "frozen centroid"),
    ],
)
def test_a_rerun_goes_on_where_the_first_stopped(architecture, fast, benchmark, tmp_path, monkeypatch):
    methods = ["--methods", "plain adapter", fast, "--search_tenants", "0"]
    methods += ["--architecture", architecture]
    first, _ = benchmark(*methods, "--tenants", "bank")
    assert [(line["method"], line["tenant"]) for line in first] == [(m, "bank") for m in methods[1:3]]
    with (tmp_path / "lines.jsonl").open("a") as file:
        file.write('{"method": "plain adapter", "tena')  # killed while it wrote
    monkeypatch.setattr(streaming_tenants.RUNS[architecture], "train_teacher", None)  # they are kept
    second, _ = benchmark(*methods)
    assert second[:2] == first
    assert len(second) == 6
    third, _ = benchmark(*methods)
    assert third == second


def test_streaming_takes_the_tenants_before_as_teachers(benchmark):
    methods = ("--methods", "teachers' average, untrained")
    lines, _ = benchmark(*methods, "--pool", "streaming", "--search_tenants", "0", "--bf16")
    assert [(line["tenant"], line["teachers"]) for line in lines] == [("rail", 1), ("post", 2)]


@pytest.fixture
def distinct(tmp_path):
    """Data of three tenants of three FAQs, each with sixteen queries of its own."""
    things, tenants = "card train parcel weather day pay gone leave when".split(), []
    for number, name in enumerate(("bank", "rail", "post")):
        mine = things[3 * number : 3 * number + 3]
        faqs = [{"question": f"what is {t}", "queries": [f"how is {'e' * n} {t}" for n in range(16)]} for t in mine]
        tenants.append({"name": name, "faqs": faqs})
    path = tmp_path / "distinct.json"
    path.write_text(json.dumps({"tenants": tenants}))
    return str(path)


def test_a_relative_shares_faqs_and_no_query(distinct):
    args = Arguments(data=distinct, pool="relatives", shots="2", search_queries=1, teacher_queries=4)
    teacher = pools.teacher_tenant(args, "post_relative")
    assert [len(faq.train) for faq in teacher.faqs] == [4, 4]
    theirs = {query for faq in teacher.faqs for query in (*faq.train, *faq.validation, *faq.test)}
    assert len(theirs) == 16
    for seed in (1, 2):
        came = pools.arrival(args, "post", seed)
        assert came.teachers == ["bank", "rail", "post_relative"]
        assert {faq.question for faq in teacher.faqs} < {faq.question for faq in came.tenant.faqs}
        assert {len(faq.train) for tenant in (came.tenant, *came.others) for faq in tenant.faqs} == {2}
        own = [query for faq in came.tenant.faqs for query in (*faq.train, *faq.validation, *faq.test)]
        assert len(own) == len(set(own)) == 3 * 8
        assert theirs.isdisjoint([*own, *came.unlabelled])
        assert {query for faq in came.others[-1].faqs for query in faq.train} <= theirs
    assert pools.arrival(args, "post", 1).tenant != pools.arrival(args, "post", 2).tenant


@pytest.mark.parametrize("pool", ["unrelated", "relatives"])
def test_no_seed_is_tested_on_queries_that_chose_a_learning_rate(distinct, pool):
    args = Arguments(data=distinct, pool=pool, shots="2", search_queries=2)
    new = [pools.arrival(args, "post", seed).tenant for seed in (streaming_tenants.SEARCH_SEED, 1, 2)]
    chosen_by, *others = [{query for faq in tenant.faqs for query in faq.validation} for tenant in new]
    assert len(chosen_by) == 3 * 2
    assert others == [chosen_by, chosen_by]
    for tenant in new:
        assert chosen_by.isdisjoint(query for faq in tenant.faqs for query in (*faq.train, *faq.test))


def test_relatives_are_trained_for_the_new_tenants_alone(benchmark, distinct, tmp_path):
    methods = ("--methods", "teachers' average, untrained")
    arguments = ("--data", distinct, "--pool", "relatives", "--tenants", "post", "--search_tenants", "0")
    (line,), _ = benchmark(*EMBEDDINGS, *methods, *arguments)
    assert (line["tenant"], line["teachers"]) == ("post", 3)
    names = {path.name for path in (tmp_path / "teachers").iterdir()}
    assert names == {"bank", "rail", "post", "post_relative"}


def test_random_teachers_keep_the_norms_and_depend_on_the_key_alone():
    first, second = ([torch.nn.Parameter(values * torch.ones(4, 8)) for values in (2.0, 0.0, -1.0)] for _ in range(2))
    norms = [parameter.norm().item() for parameter in first]
    pools.randomize(first, "bank 1")
    assert [parameter.norm().item() for parameter in first] == pytest.approx(norms)
    assert len(first[0].unique()) == 32
    assert not torch.allclose(first[0] / first[0].norm(), -first[2] / first[2].norm())
    pools.randomize(second, "bank 2")
    assert not torch.allclose(first[0], second[0])
    pools.randomize(second, "bank 1")
    for parameter, other in zip(first, second, strict=True):
        torch.testing.assert_close(parameter, other)


def test_a_run_after_others_in_a_process_is_the_same_as_alone(benchmark, distinct, tmp_path, monkeypatch):
    measured, adapters = embedding_runs.measured, []

    def noting(args, job, came, run, method):
        results = measured(args, job, came, run, method)
        parameters = pools.adapter_parameters(run.platform.model, embedding_runs.NEW)
        adapters.append(torch.cat([parameter.detach().flatten() for parameter in parameters]))
        return results

    monkeypatch.setattr(embedding_runs, "measured", noting)

    def run(*arguments):
        del adapters[:]
        fixed = ("--data", distinct, "--search_tenants", "0", "--pool", "random", "--tenants", "bank")
        lines, _ = benchmark(*EMBEDDINGS, *fixed, *arguments)
        return {(line["method"], line["seed"]): found for line, found in zip(lines, adapters, strict=True)}

    methods = ["plain adapter", "AdapterDistillation: weights alone"]
    after = run("--seeds", "1", "2", "--methods", "AdapterFusion", *methods)
    for method in methods:
        (tmp_path / "lines.jsonl").unlink()
        embedding_runs._platform.cache_clear()
        alone = run("--seeds", "2", "--methods", method)
        torch.testing.assert_close(alone, {(method, 2): after[method, 2]}, atol=1e-5, rtol=0)
        assert (after[method, 1] - after[method, 2]).abs().max() > 1e-3


@pytest.mark.slow
def test_processes_change_nothing_but_the_time(benchmark, tmp_path):
    arguments = ("--methods", "AdapterDistillation", "--search_tenants", "0", "--tenants", "bank", "rail")
    alone, _ = benchmark(*arguments)
    (tmp_path / "lines.jsonl").unlink()
    together, _ = benchmark(*arguments, "--processes", "2")
    together.sort(key=lambda line: line["tenant"])
    for line, other in zip(alone, together, strict=True):
        assert (line["tenant"], line["mrr"]) == (other["tenant"], other["mrr"])
        assert line["auc"] == pytest.approx(other["auc"])
        assert other["environment"]["threads"] == 1


def test_each_method_takes_its_best_learning_rate():
    def line(method, rate, mrr):
        return {"method": method, "learning_rate": rate, "mrr": mrr, "queries": "validation"}

    lines = [line("plain adapter", 1e-3, 0.5), line("plain adapter", 1e-3, 0.7), line("plain adapter", 2e-3, 0.61)]
    lines.append({"method": "plain adapter", "learning_rate": 1e-3, "mrr": 0.0, "queries": "test"})
    rates = streaming_tenants.chosen_rates(METHODS, ["plain adapter", "multi-task adapter", "AdapterFusion"], lines)
    assert rates == {
        "plain adapter": 2e-3,
        "multi-task adapter": 2e-3,
        "AdapterFusion": METHODS["AdapterFusion"].rates[0],
    }


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--methods", "magic"], "--methods 'magic' is unknown; choose of 'frozen encoder', 'frozen centroid'"),
        (["--tenants", "zoo"], "--tenants zoo is not in the data; choose of bank, rail, post"),
        (["--pool", "streaming", "--tenants", "bank"], "--tenants bank is the first to arrive and has no teachers"),
        (["--shots", "-1"], "--shots -1 is out of range"),
        (
            ["--shots", "6"],
            "--shots 6 is out of range: .* has 6 queries in all, 1 for validation and one to test among",
        ),
        (["--shots", "all"], "--shots all needs data with test queries of their own, as CLINC150 has; give a number."),
        (["--teacher_queries", "6"], "--teacher_queries 6 is out of range: .* has 6 queries in all"),
        (["--teacher_epochs", "0"], "--teacher_epochs 0 is out of range; it must be at least 1"),
        (["--teacher_learning_rate", "nan"], "--teacher_learning_rate nan is out of range; it must be above 0"),
        (["--seeds", "1", "-1"], "--seeds -1 is out of range; it must be from 0"),
        (["--model", "no/such/model"], "--model no/such/model cannot be loaded .*; give the folder or Hub id"),
        (["--output", "/proc/nowhere/lines.jsonl"], "The folder of --output, /proc/nowhere cannot be written"),
        (["--output", "/tmp"], "--output /tmp is a folder; give a file."),
        (
            [*EMBEDDINGS, "--batch_size", "2", "--methods", "AdapterDistillation: similarity"],
            "--batch_size 2 is too small to compare queries by similarity; raise it to 3.",
        ),
        (["--teachers_dir", "/proc/nowhere"], "--teachers_dir /proc/nowhere cannot be written"),
        (["--shots", "0", "--methods", "plain adapter"], "--methods 'plain adapter' needs labelled queries"),
        ([*EMBEDDINGS, "--methods", "SetFit"], "--methods 'SetFit' needs its package; install it with pip install"),
        ([*EMBEDDINGS, "--architecture", "fast"], "--architecture fast is unknown; choose of embeddings"),
        (["--architecture", "classifier", "--latency"], "--architecture classifier knows no --latency; leave it out"),
        (
            ["--architecture", "classifier", "--shots", "0"],
            "--architecture classifier knows no --shots 0; leave it out",
        ),
        (["--pool", "friends"], "--pool friends is unknown; choose of unrelated, relatives, streaming, random"),
        (["--steps", "0"], "--steps 0 is out of range"),
        (["--processes", "0"], "--processes 0 is out of range"),
        (["--device", "cuda"], "--device cuda finds no GPU"),
        (["--data", "missing.json"], "--data missing.json does not exist"),
    ],
)
def test_bad_arguments_train_nothing(arguments, message, benchmark, monkeypatch):
    monkeypatch.setattr(streaming_tenants, "run_all", None)
    monkeypatch.setattr(streaming_tenants, "find_spec", lambda name: None)
    with pytest.raises(SystemExit, match=message) as caught:
        benchmark(*arguments)
    assert "\n" not in str(caught.value)


def test_results_and_teachers_of_other_arguments_are_refused(benchmark, tmp_path):
    methods = ["--methods", "teachers' average, untrained", "--tenants", "bank"]
    benchmark(*methods)
    with pytest.raises(SystemExit, match="lines.jsonl holds runs with --steps 2, not 3; choose another --output"):
        benchmark(*methods, "--steps", "3")
    (tmp_path / "lines.jsonl").unlink()
    with pytest.raises(SystemExit, match="was made with --teacher_epochs 1, not 2; choose another --teachers_dir"):
        benchmark(*methods, "--teacher_epochs", "2")
    (tmp_path / "teachers" / "rail" / "made_with.json").unlink()
    with pytest.raises(
        SystemExit, match="teachers/rail is no teacher of this benchmark; choose another --teachers_dir"
    ):
        benchmark(*methods)


@pytest.mark.parametrize(
    ("content", "line"),
    [("notes", "The last line"), ("notes\n", "Line 1"), ("5\n", "Line 1"), ('{"arguments": [1]}\n', "Line 1")],
)
def test_a_file_of_the_users_stays_as_it_is(content, line, benchmark, tmp_path, monkeypatch):
    monkeypatch.setattr(streaming_tenants, "run_all", None)
    (tmp_path / "lines.jsonl").write_text(content)
    with pytest.raises(SystemExit, match=f"{line} of .*lines.jsonl is no run of this benchmark; choose another file"):
        benchmark()
    assert (tmp_path / "lines.jsonl").read_text() == content


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["bank", "bank"], "Two tenants are named 'bank'; rename one of them"),
        (["bank", "a/x"], "Tenant 'a/x' would be named 'a/x'; rename the tenant"),
        (["bank", "new"], "Tenant 'new' has a name that the benchmark gives itself; rename the tenant"),
        (["bank"], "has 1 tenant; at least two are needed"),
    ],
)
def test_tenants_that_cannot_be_compared(names, message, benchmark, tmp_path, monkeypatch):
    monkeypatch.setattr(streaming_tenants, "run_all", None)
    content = json.loads((tmp_path / "data.json").read_text())
    content["tenants"] = [content["tenants"][0] | {"name": name} for name in names]
    (tmp_path / "data.json").write_text(json.dumps(content))
    with pytest.raises(SystemExit, match=message):
        benchmark()


def runs(method, accuracies, **kwargs):
    """Lines of two tenants and two seeds."""
    cells = [(tenant, seed) for tenant in ("bank", "rail") for seed in (1, 2)]
    costs = {"ms": 80.0, "ms_ratio": 2.0, "MB": 1.5, "seconds": 7.0, "learning_rate": 0.001, "queries": "test"}
    return [
        {"method": method, "tenant": tenant, "seed": seed, "auc": a, "accuracy_at_1": a, "mrr": a, **costs, **kwargs}
        for (tenant, seed), a in zip(cells, accuracies, strict=True)
    ]


def test_the_tables_by_hand():
    lines = runs("plain adapter", [0.5, 0.5, 0.7, 0.7]) + runs("AdapterDistillation", [0.6, 0.6, 0.7, 0.6])
    lines += runs("AdapterDistillation", [0, 0, 0, 0], queries="validation")
    lines += runs("AdapterDistillation: mixed", [0.7, 0.6, 0.7, 0.6])[:2]
    header, _, plain, student = report.streaming_tenants(lines).splitlines()
    cells = [cell.strip() for cell in student.strip("|").split("|")]
    assert cells[:3] == ["AdapterDistillation", "0.001", "4"]
    assert cells[9:] == ["1 / 1", "80 (2.00)", "1.50", "7"]
    assert cells[4].startswith("0.625 [0.307, 0.943]")
    assert cells[6] == "+2.5 [-92.8, +97.8]"
    assert cells[7] == "–", "there is no run of the average"
    assert cells[8] == cells[6], "AUC is accuracy here"
    assert "| +0.0 [+0.0, +0.0] |" in plain
    assert "0 / 0" in plain
    _, _, defaults, mixed = report.variants(lines).splitlines()
    assert defaults == "| the defaults | 0.001 | 2 | 0.600 | 0.600 | 0.600 | – | – | 7 |"
    assert mixed == "| mixed | 0.001 | 2 | 0.650 | 0.650 | 0.650 | +5.0 | +5.0 | 7 |", "of one tenant"
    assert report.tenants(lines).splitlines()[2:] == ["| bank | 0.500 | 0.600 |", "| rail | 0.700 | 0.650 |"]


def of_embeddings(method, accuracies, **kwargs):
    """Lines of runs on embeddings whose queries were not timed."""
    about = {"title_accuracy_at_1": 0.25, "cpu_seconds": 3.0, "shots": 3, "arguments": {"steps": 90}}
    lines = runs(method, accuracies, **(about | kwargs))
    return [{key: value for key, value in line.items() if key not in ("ms", "ms_ratio", "MB")} for line in lines]


def test_the_table_of_embeddings_by_hand():
    lines = of_embeddings("AdapterDistillation", [0.6, 0.6, 0.7, 0.6], cpu_seconds=4.0)
    lines += of_embeddings("plain adapter", [0.5, 0.5, 0.7, 0.7], cpu_seconds=2.0)
    lines += of_embeddings("a method of old", [0.5, 0.5, 0.7, 0.7])[:1]
    lines += of_embeddings("frozen centroid", [0.4, 0.5, 0.7, 0.7])
    lines += of_embeddings("plain adapter", [0, 0, 0, 0], queries="validation")
    rows = [[cell.strip() for cell in row.strip("|").split("|")] for row in report.embeddings(lines).splitlines()]
    header, _, centroid, plain, student, old = rows
    assert [row[0] for row in rows[2:]] == [
        "frozen centroid",
        "plain adapter",
        "AdapterDistillation",
        "a method of old",
    ]
    assert student[1:3] == ["4", "0.001"]
    assert student[3].startswith("0.625 [0.307, 0.943]")
    assert student[4:7] == ["0.250", "0.625", "0.625"]
    above = {name: n for n, name in enumerate(header) if name.startswith("points above")}
    assert list(above) == ["points above frozen centroid", "points above plain"], "the others did not run"
    assert student[above["points above frozen centroid"]].startswith("+5.0 [")
    assert student[above["points above plain"]].startswith("+2.5 [")
    assert student[-2:] == ["-5.0 (rail)", "4.0"]
    assert plain[above["points above plain"]] == plain[-2] == centroid[above["points above frozen centroid"]] == "–"
    assert old[1:4] == ["1", "0.001", "0.500"]
    assert old[above["points above plain"]] == "+0.0", "one run has no interval"


@pytest.mark.parametrize("method", ["plain adapter", "AdapterDistillation", "AdapterDistillation: uniform"])
def test_no_table_needs_costs_or_the_other_methods(method):
    lines = of_embeddings(method, [0.6, 0.6, 0.7, 0.6]) + of_embeddings("frozen encoder", [0.5, 0.5, 0.7, 0.7])
    for name in ("streaming_tenants", "variants", "objectives", "training_costs", "tenants", "training_data"):
        assert report.TABLES[name](lines).splitlines()[2:] or ":" in method or method == "plain adapter", name
    axes = quality.draw_cost(lines).axes[0]
    assert axes.get_yticklabels()[-1].get_text() in (method, "frozen encoder")
    places = [bar[0].get_xdata()[0] for bar in axes.containers]
    assert places == pytest.approx({"plain adapter": [0, -2.5], "AdapterDistillation": [0, -2.5]}.get(method, [0]))


def test_the_plots_of_embeddings(tmp_path, monkeypatch, capsys):
    files = {
        "few": of_embeddings("plain adapter", [0.5, 0.5, 0.7, 0.7])
        + of_embeddings("AdapterFusion", [0.4, 0.5, 0.7, 0.7])
        + of_embeddings("AdapterDistillation", [0.6, 0.6, 0.7, 0.6]),
        "none": of_embeddings("frozen encoder", [0.5, 0.5, 0.7, 0.7])
        + of_embeddings("AdapterDistillation", [0.7, 0.7, 0.9, 0.9]),
    }
    for name, lines in files.items():
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"method": "cut')
    monkeypatch.setattr(sys, "argv", ["report.py", "embeddings", *(str(tmp_path / f"{name}.jsonl") for name in files)])
    report.main()
    out = capsys.readouterr().out
    assert [report.embeddings(lines) in out for lines in files.values()] == [True, True]
    for plot in ("differences", "cost"):
        assert (tmp_path / f"few_{plot}.png").stat().st_size > 10_000
    left, right = quality_embeddings.draw_differences(files).axes
    names = [label.get_text() for label in left.get_yticklabels()]
    assert names == ["frozen encoder", "AdapterFusion", "plain adapter", "AdapterDistillation"], "from the bottom"
    drawn = [{names[int(bar[0].get_ydata()[0])]: bar[0].get_xdata()[0] for bar in a.containers} for a in (left, right)]
    assert drawn[0] == pytest.approx({"plain adapter": 0, "AdapterFusion": -2.5, "AdapterDistillation": 2.5})
    assert drawn[1] == pytest.approx({"frozen encoder": 0, "AdapterDistillation": 20}), "there is no plain adapter"
    assert left.get_xlabel().endswith("above the plain adapter")
    assert right.get_xlabel().endswith("above the frozen encoder")


def test_labels_of_the_plot_of_costs_cover_nothing():
    lines = [
        line
        for number in range(20)
        for line in of_embeddings(
            f"method {number} of many", [0.7 + number % 4 / 100] * 4, cpu_seconds=30 + number / 5
        )
    ]
    axes = quality_embeddings.draw_cost({"crowded": lines}).axes[0]
    boxes = [Text.get_window_extent(text) for text in axes.texts]
    assert [text.get_text() for text in axes.texts] != []
    assert len(boxes) == 20
    assert sum(box.count_overlaps(boxes) - 1 for box in boxes) == 0
    dots = [axes.transData.transform((30 + number / 5, 0.7 + number % 4 / 100)) for number in range(20)]
    assert not any(box.contains(*dot) for box in boxes for dot in dots)


def test_the_tables_of_objectives_by_hand():
    lines = runs("plain adapter", [0.5, 0.5, 0.7, 0.7], seconds=2.0)
    lines += runs("AdapterDistillation", [0.6, 0.6, 0.7, 0.6], seconds=3.0)
    lines += runs("AdapterDistillation: weight 3", [1, 1, 1, 1])[:1]
    lines += runs("AdapterDistillation: cosine", [0.7, 0.6, 0.8, 0.6], seconds=5.0)[:3]
    plain, defaults, cosine = report.objectives(lines).splitlines()[2:]
    assert plain.startswith("| plain adapter | 3 | 0.567 | 0.567 | 0.567 | -5.0 [-68.5, +58.5] |")
    assert defaults == "| features (the defaults) | 3 | 0.633 | 0.633 | 0.633 | – | – | – |"
    assert cosine.startswith("| cosine | 3 | 0.700 | 0.700 | 0.700 | +7.5 [-24.3, +39.3] |")
    assert "| weight 3 | 0.001 | 1 |" in report.variants(lines)
    assert "cosine" not in report.variants(lines)
    assert report.training_costs(lines).splitlines()[-1] == "| AdapterDistillation: cosine | 3 | 5.0 | 2.50 |"


def test_the_table_of_answers_by_hand():
    """With the rows that there are, and without the values that are not shown."""
    answer = {"exact_match": 0.25, "setting": 0.25, "tokens_per_s": 7.4, "MB": 2.5, "train_s": 3.04, "searched": {}}
    header, _, merge = report.llm_answers({"rows": {"answers": {"merge: svd": answer}}}).splitlines()
    assert header == "|  | exact match | rate/weight | tokens/s | MB | train s |"
    assert merge == "| merge: svd | 0.250 | 0.25 | 7 | 2.50 | 3.0 |"


def test_the_plots(tmp_path, monkeypatch, capsys):
    table = {f"layer {layer}": {"rail": 0.3, "post": 0.7} for layer in range(3)}
    lines = runs("plain adapter", [0.5, 0.5, 0.7, 0.7])
    lines += runs("AdapterDistillation", [0.6, 0.6, 0.7, 0.6], attention=table)
    path = tmp_path / "lines.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    monkeypatch.setattr(sys, "argv", ["report.py", "streaming_tenants", str(path)])
    report.main()
    assert capsys.readouterr().out.strip() == report.streaming_tenants(lines)
    for plot in ("cost", "attention"):
        assert (tmp_path / f"lines_{plot}.png").stat().st_size > 10_000


def test_the_table_and_the_plot_by_training_data(tmp_path, monkeypatch, capsys):
    few = {"shots": 3, "arguments": {"steps": 90, "pool": "unrelated"}}
    all_queries = {"shots": 0, "arguments": {"steps": 375, "shots": 0, "streaming": False}}  # as they once were
    files = {
        "all": runs("plain adapter", [0.9, 0.9, 0.8, 0.8], **all_queries),
        "few": runs("plain adapter", [0.5, 0.5, 0.7, 0.7], **few),
    }
    files["all"] += runs("AdapterDistillation", [0.9, 0.9, 0.8, 0.7], **all_queries)
    files["few"] += runs("AdapterDistillation", [0.6, 0.6, 0.7, 0.8], **few)
    files["few"] += runs("AdapterFusion", [0.6, 0.6, 0.7, 0.7], **few)
    for name, lines in files.items():
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    paths = [str(tmp_path / f"{name}.jsonl") for name in files]
    monkeypatch.setattr(sys, "argv", ["report.py", "training_data", *paths])
    report.main()
    rows = [[cell.strip() for cell in row.strip("|").split("|")] for row in capsys.readouterr().out.splitlines()[2:]]
    assert [row[:3] for row in rows] == [
        ["3", "90", "plain adapter"],
        ["3", "90", "AdapterDistillation"],
        ["all", "375", "plain adapter"],
        ["all", "375", "AdapterDistillation"],
    ], "the least data first, and only the methods that are compared by it"
    assert [row[5] for row in rows] == ["0.600", "0.675", "0.850", "0.825"]
    assert rows[1][8].startswith("+7.5 [")
    assert rows[3][9].startswith("-2.5 [")
    assert [row[-1] for row in rows] == ["+0.0", "+5.0", "+0.0", "-5.0"], "the lowest tenant, mean over its seeds"
    assert (tmp_path / "training_data.png").stat().st_size > 10_000


def test_the_interval_covers_the_mean_of_tenants():
    generator = np.random.default_rng(0)

    def drawn():  # tenants differ from each other more than their seeds do
        means = enumerate(generator.normal(size=5))
        return {(str(tenant), seed): mean + 0.1 * generator.normal() for tenant, mean in means for seed in range(3)}

    covered = [low <= 0 <= high for _, low, high in (quality.interval(drawn()) for _ in range(200))]
    assert 180 <= sum(covered) <= 199
    mean, low, high = quality.interval({("bank", 1): 0.25, ("bank", 2): 0.75})
    assert mean == 0.5
    assert np.isnan(low)
    assert np.isnan(high)


def test_a_step_of_lora(monkeypatch):
    monkeypatch.setitem(measure.SHAPES, "tiny", tiny)
    args = stage2_step.Arguments(methods=["student"], config="lora[r=2]", batch=2, seq_len=8)
    steps = stage2_step.Steps(args, "tiny", 2)
    assert {config["architecture"] for config in steps.model.adapters_config.config_map.values()} == {"lora"}
    for method in ("plain", "student"):
        steps.prepare(method)
        steps.step(method)


def test_the_gpu_script_names_what_it_does_not_know():
    done = subprocess.run(["bash", ROOT / "benchmarks" / "gpu.sh", "--help"], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "gpu.sh: --help is unknown; leave it out, or give --dry-run\n"
