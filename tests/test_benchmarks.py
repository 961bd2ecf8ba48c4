"""The benchmarks on a tiny model, and what they measure with."""

import json
import sys
from pathlib import Path

import pytest
import torch
from transformers import BertConfig

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

import inference  # noqa: E402
import measure  # noqa: E402
import report  # noqa: E402
import stage2_step  # noqa: E402


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
        assert row["ms"] > 0 and row["peak_mb"] > 0
        assert (row["time_ratio"], row["peak_ratio"]) == (1, 1) or row["method"] != "plain"
        assert f"{row['ms']:.1f}" in out
    peak = {row["method"]: row["peak_ratio"] for row in results["rows"] if row["teachers"] == 3}
    assert 1 < peak["student"] < peak["per teacher"] < peak["Fuse"]
    assert results["environment"]["torch"] == torch.__version__
    assert (tmp_path / "stage2_step.png").stat().st_size > 5000
    table = report.stage2_step(results).splitlines()
    assert len(table) == 4 and table[2].startswith("| tiny | 1 |") and table[0].count("|") == table[3].count("|")


def test_methods_that_need_too_much_memory_are_left_out(run):
    results, _ = run(
        stage2_step, *"--shapes tiny --teachers 1 8 --batch 2 --seq_len 8 --rounds 1 --max_gb 0.0001".split()
    )
    left = [row["method"] for row in results["rows"] if row["teachers"] == 8]
    assert left == ["plain", "student", "fused", "mixed"] and len(results["rows"]) == 10
    assert report.stage2_step(results).splitlines()[3].count("–") == 3


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
