"""The bundled data, the retrieval metric, and the example on a tiny model."""

import json
import re
import sys
from itertools import combinations

import pytest
from datasets import ClassLabel, Dataset, Features, Value
from paths import ROOT

EXAMPLES = ROOT / "examples"
sys.path.insert(0, str(EXAMPLES))

from faq_data import BUNDLED, hold_out, load_tenants, make_pairs  # noqa: E402
from retrieval_metric import RetrievalMetric  # noqa: E402
from transformers import AutoTokenizer  # noqa: E402

TENANTS = json.loads(BUNDLED.read_text())["tenants"]


def plain(text):
    return " ".join(re.findall(r"[a-z0-9]+", text.lower()))


def test_bundled_data_is_what_it_says():
    assert len(TENANTS) == 10
    assert all(len(tenant["faqs"]) == 12 for tenant in TENANTS)
    faqs = [faq for tenant in TENANTS for faq in tenant["faqs"]]
    assert all(len(faq["queries"]) == 14 and faq["question"] and faq["answer"] for faq in faqs)
    queries = [plain(query) for faq in faqs for query in faq["queries"]]
    assert len(set(queries)) == len(queries) == 1680


def test_each_added_tenant_has_a_relative():
    """A pair shares 6 to 9 FAQs by id, in words of its own; no other tenants share any. The last one is of a pair."""
    faqs = {tenant["name"]: {faq["id"]: faq for faq in tenant["faqs"]} for tenant in TENANTS}
    assert all(len(of_tenant) == 12 for of_tenant in faqs.values()), "an id stands for one FAQ"
    assert list(faqs)[:6] == ["bank", "airline", "mobile", "shop", "insurer", "city"]
    relatives = {"prepaid": "mobile", "island_air": "airline", "electronics": "shop", "credit_union": "bank"}
    assert list(faqs)[6:] == list(relatives)
    for one, other in combinations(faqs, 2):
        shared = faqs[one].keys() & faqs[other].keys()
        assert 6 <= len(shared) <= 9 if relatives.get(other) == one else not shared, (one, other)
        for name in shared:
            texts = [[plain(faqs[tenant][name][part]) for part in ("question", "answer")] for tenant in (one, other)]
            assert not set(texts[0]) & set(texts[1]), name


def test_no_query_is_nearly_another_one_of_its_tenant_or_the_relative():
    """Two of five words or more have at most three quarters of their words in common."""
    topics = ({"bank", "credit_union"}, {"airline", "island_air"}, {"mobile", "prepaid"}, {"shop", "electronics"})
    for topic in (*topics, {"insurer"}, {"city"}):
        faqs = [faq for tenant in TENANTS if tenant["name"] in topic for faq in tenant["faqs"]]
        words = [set(plain(query).split()) for faq in faqs for query in faq["queries"]]
        long = [query for query in words if len(query) >= 5]
        near = [pair for pair in combinations(long, 2) if len(pair[0] & pair[1]) > 0.75 * len(pair[0] | pair[1])]
        assert near == []


def test_split_has_no_query_twice():
    for tenant in load_tenants(str(BUNDLED), seed=1):
        hold_out(tenant, 3)
        for faq in tenant.faqs:
            assert (len(faq.train), len(faq.test)) == (3, 11)
            assert not set(faq.train) & set(faq.test)


def test_validation_queries_are_held_out_where_there_is_no_split():
    tenant = load_tenants(str(BUNDLED), seed=1)[0]
    whole = set(tenant.faqs[0].train)
    hold_out(tenant, 3, n_validation=4)
    parts = [tenant.faqs[0].train, tenant.faqs[0].validation, tenant.faqs[0].test]
    assert [len(part) for part in parts] == [3, 4, 7]
    assert whole == set().union(*parts)
    with pytest.raises(ValueError, match="10 training queries are too many"):
        hold_out(load_tenants(str(BUNDLED), seed=1)[0], 10, n_validation=4)


def test_pairs(tiny_encoder):
    tokenizer = AutoTokenizer.from_pretrained(tiny_encoder)
    tenant = load_tenants(str(BUNDLED), seed=1)[0]
    hold_out(tenant, 10)
    train = make_pairs(tenant, "train", tokenizer, n_queries=3, n_wrong=2, seed=1)
    assert len(train) == 12 * 3 * 3
    assert sum(train["labels"]) == 36
    test = make_pairs(tenant, "test", tokenizer, n_queries=4, n_wrong=None, seed=1)
    assert len(test) == 12 * 4 * 12
    assert sum(test["labels"]) == 48
    assert sorted(set(test["query_ids"])) == list(range(48))
    first = tokenizer.decode(train[0]["input_ids"])
    assert train[0]["labels"] == 1
    assert first.count("[SEP]") == 2


def test_clinc150_form(tmp_path):
    rows = [[f"{intent} query {i}", intent] for intent in ("pay_bill", "book_hotel", "oos") for i in range(3)]
    splits = {"train": rows, "val": rows[1:2], "test": rows[:1] + rows[3:4]}
    (tmp_path / "data_full.json").write_text(json.dumps(splits))
    (tmp_path / "domains.json").write_text(json.dumps({"small bank": ["pay_bill"], "travel": ["book_hotel"]}))
    for data in (tmp_path, tmp_path / "data_full.json"):
        bank, travel = load_tenants(str(data), seed=1)
        assert (bank.name, travel.name) == ("small_bank", "travel")
        (faq,) = bank.faqs
        assert (faq.question, len(faq.train), faq.test) == ("pay bill", 3, ["pay_bill query 0"])
        assert faq.validation == ["pay_bill query 1"]
    orders = {tuple(load_tenants(str(tmp_path), seed)[0].faqs[0].train) for seed in range(9)}
    assert len(orders) > 1, "a seed draws its own training queries"


def test_hub_form(monkeypatch):
    label = ClassLabel(names=["oos", *(f"intent_{i}" for i in range(20))])
    rows = {"text": [f"query {i}" for i in range(21)], "intent": list(range(21))}
    split = Dataset.from_dict(rows, features=Features({"text": Value("string"), "intent": label}))
    asked = []

    def load_dataset(*args):
        asked.append(args)
        return {"train": split, "test": split}

    monkeypatch.setattr("faq_data.datasets.load_dataset", load_dataset)
    first, second = load_tenants("clinc/clinc_oos", seed=1)
    assert asked == [("clinc/clinc_oos", "plus")]
    assert (len(first.faqs), len(second.faqs)) == (15, 5)
    assert (first.faqs[0].question, first.faqs[0].train, first.faqs[0].test) == ("intent 0", ["query 1"], ["query 1"])
    assert first.faqs[0].validation == []
    monkeypatch.setattr("faq_data.datasets.load_dataset", lambda *args: {"train": split.remove_columns("intent")})
    with pytest.raises(ValueError, match="needs one class column, a text column and the splits train and test"):
        load_tenants("me/no-classes", seed=1)


@pytest.mark.parametrize(
    ("content", "message"),
    [(None, "does not exist; give a JSON file"), ({"x": 1}, "has neither"), ({"tenants": []}, "has 0 tenants")],
)
def test_bad_data(content, message, tmp_path):
    path = tmp_path / "data.json"
    if content is not None:
        path.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=message):
        load_tenants(str(path), seed=1)


def test_metric_by_hand():
    # query 0: the right FAQ is first; query 1: second of three; query 2: tied with a wrong one, so second
    scores = [0.9, 0.1, 0.2, 0.5, 0.8, 0.3, 0.4, 0.4, 0.0]
    right = [1, 0, 0, 1, 0, 0, 0, 1, 0]
    result = RetrievalMetric().compute(predictions=scores, references=right, query_ids=[0] * 3 + [1] * 3 + [2] * 3)
    assert result["accuracy_at_1"] == pytest.approx(1 / 3)
    assert result["mrr"] == pytest.approx((1 + 1 / 2 + 1 / 2) / 3)
    # of the 18 pairs of a right and a wrong score: .9 beats 6, .5 beats 5 of 6, .4 beats 4 and ties with 1
    assert result["auc"] == pytest.approx((6 + 5 + 4.5) / 18)


def test_metric_refuses_a_query_with_two_right_faqs():
    with pytest.raises(ValueError, match="Query 7 has 2 right FAQs"):
        RetrievalMetric().compute(predictions=[0.1, 0.2], references=[1, 1], query_ids=[7, 7])


def run_example(monkeypatch, *arguments):
    import faq_retrieval

    monkeypatch.setattr(sys, "argv", ["faq_retrieval.py", *arguments])
    faq_retrieval.main()


def test_example_runs_on_a_tiny_model(tiny_encoder, tmp_path, monkeypatch, capsys):
    out = tmp_path / "out"
    run_example(
        monkeypatch, "--model", tiny_encoder, "--quick", "--output_dir", str(out), "--new_tenant", "bank",
        "--test_queries", "1", "--shots", "1", "--ask", "my card is gone", "--carrier", "mixed",
    )  # fmt: skip
    printed = capsys.readouterr().out
    for method in ("plain adapter", "AdapterFusion", "teachers' average", "AdapterDistillation"):
        assert re.search(
            rf"^{method} +0\.\d{{3}} +[01]\.\d{{3}} +0\.\d{{3}} +\d+\.\d +\d+\.\d\d +\d+\.\d$", printed, re.M
        )
    assert "Q: my card is gone" in printed
    assert (out / "teacher_attention.png").stat().st_size > 10_000
    assert (out / "adapters" / "AdapterDistillation" / "bank" / "adapter_config.json").is_file()
    results = json.loads((out / "results.json").read_text())
    assert set(results["rows"]) == {"plain adapter", "AdapterFusion", "teachers' average", "AdapterDistillation"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--new_tenant", "zoo"], "--new_tenant zoo is not in the data; choose one of bank, airline"),
        (["--shots", "0"], "--shots 0 is out of range"),
        (["--shots", "99"], "99 training queries are too many: .* has 14 in all"),
        (["--data", "missing.json"], "--data missing.json does not exist"),
        (["--carrier", "both"], "carrier='both' is not supported"),
        (["--model", "no/such/model"], "no/such/model"),
    ],
)
def test_bad_arguments_cost_no_training(arguments, message, monkeypatch):
    import faq_retrieval

    monkeypatch.setattr(faq_retrieval, "train_teachers", None)
    with pytest.raises(SystemExit, match=message) as caught:
        run_example(monkeypatch, *arguments)
    assert "\n" not in str(caught.value)
