"""The bundled data, the retrieval metric, and the example on a tiny model."""

import io
import json
import re
import sys
from itertools import combinations

import pytest
import torch
from datasets import ClassLabel, Dataset, Features, Value
from messages import one_line
from paths import ROOT

EXAMPLES = ROOT / "examples"
sys.path.insert(0, str(EXAMPLES))

import faq_table  # noqa: E402
from embedding_rows import Rows  # noqa: E402
from faq_data import BUNDLED, Faq, Tenant, hold_out, load_tenants, make_pairs  # noqa: E402
from faq_embeddings import EmbeddingPlatform, labelled_queries  # noqa: E402
from retrieval_metric import RetrievalMetric  # noqa: E402
from transformers import AutoTokenizer  # noqa: E402

TENANTS = json.loads(BUNDLED.read_text())["tenants"]


def plain(text):
    return " ".join(re.findall(r"[a-z0-9]+", text.lower()))


FAQ = {"question": "where", "queries": ["a", "b", "c", "d"]}
FAQS = [FAQ, FAQ | {"question": "when"}]


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
    message = (
        "--shots 10 is out of range: .* has 14 queries in all, 4 for validation and one to test among them; lower"
    )
    with pytest.raises(ValueError, match=message):
        hold_out(load_tenants(str(BUNDLED), seed=1)[0], 10, n_validation=4)


def test_an_faq_with_test_queries_of_its_own_may_give_all_others_but_those_for_validation():
    def tenant(n_queries):
        return Tenant("bank", [Faq("where", train=[f"query {i}" for i in range(n_queries)], test=["where is it"])])

    few = tenant(6)
    hold_out(few, 50, n_validation=4, at_most=True)
    assert [len(part) for part in (few.faqs[0].train, few.faqs[0].validation, few.faqs[0].test)] == [2, 4, 1]
    for shots, n_validation, at_most in ((7, 0, False), (3, 4, False), (50, 6, True)):
        with pytest.raises(ValueError, match=f"--shots {shots} is out of range: 'where' has 6 queries in all"):
            hold_out(tenant(6), shots, n_validation, at_most=at_most)
    hold_out(tenant(6), 6)


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
    unlabelled = split.remove_columns("intent")
    for loaded, message in (
        ({"train": unlabelled, "test": unlabelled}, "needs one class column and a text column; it has text"),
        ({"validation": split}, "has the splits validation; it needs train and test"),
    ):
        monkeypatch.setattr("faq_data.datasets.load_dataset", lambda *args, loaded=loaded: loaded)
        with pytest.raises(ValueError, match=f"^--data me/other {message}"):
            load_tenants("me/other", seed=1)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "does not exist; give a JSON file"),
        ({"x": 1}, "has neither"),
        ({"tenants": []}, "has no tenants; give it some"),
        ({"tenants": {}}, "data.json, 'tenants': it is of another form .a dict in place of a list.; see faq_tenants"),
        ({"tenants": ["a"]}, "data.json, tenant 1: it is of another form"),
        ([1], "data.json holds no JSON object; write it as faq_tenants.json is"),
        ("{", "data.json is no JSON .Expecting property name"),
        ("[" * 100_000, "data.json is no JSON"),
    ],
)
def test_bad_data(content, message, tmp_path):
    path = tmp_path / "data.json"
    if content is not None:
        path.write_text(content if isinstance(content, str) else json.dumps(content))
    with pytest.raises(ValueError, match=message) as caught:
        load_tenants(str(path), seed=1)
    assert "\n" not in str(caught.value)


def test_a_folder_of_damaged_files_is_named_in_one_line(tmp_path):
    (tmp_path / "tenants.json").write_text('{"a": ')
    with pytest.raises(ValueError, match=one_line(start=f"--data {tmp_path} cannot be read (")):
        load_tenants(str(tmp_path), seed=1)


@pytest.mark.parametrize(
    ("splits", "domains", "message"),
    [
        ({"train": [["a"]], "test": []}, {"bank": ["pay"]}, "is not of the form of CLINC150"),
        ({"train": [], "val": 5, "test": []}, {"bank": ["pay"]}, "is not of the form of CLINC150"),
        ({"train": [], "test": []}, {"bank": 5}, "is not of the form of CLINC150"),
        ({"train": [], "test": []}, ["bank"], "domains.json holds no JSON object; take the file of CLINC150"),
        ({"train": [], "test": []}, {"bank": ["pay"]}, "FAQ 'pay' of tenant 'bank' has no queries"),
    ],
)
def test_damaged_clinc150(splits, domains, message, tmp_path):
    (tmp_path / "data_full.json").write_text(json.dumps(splits))
    (tmp_path / "domains.json").write_text(json.dumps(domains))
    with pytest.raises(ValueError, match=message):
        load_tenants(str(tmp_path), seed=1)


def test_a_mark_at_the_begin_of_a_file_is_no_damage(tmp_path):
    (tmp_path / "data.json").write_text("\ufeff" + json.dumps({"tenants": [{"name": "bank", "faqs": [FAQ]}]}))
    assert [tenant.name for tenant in load_tenants(str(tmp_path / "data.json"), seed=1)] == ["bank"]


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


SHORT = [
    "--quick",
    "--new_tenant",
    "bank",
    "--test_queries",
    "1",
    "--shots",
    "1",
    "--steps",
    "2",
    "--teacher_steps",
    "1",
]
CROSS_ENCODER = ["plain adapter", "AdapterFusion", "teachers' average", "AdapterDistillation"]
EMBEDDINGS = [
    "frozen encoder", "frozen centroid", "logistic regression", "plain adapter", "teachers' average", "AdapterFusion",
    "AdapterDistillation, untrained", "AdapterDistillation",
]  # fmt: skip


def run_short(monkeypatch, capsys, model, out, *arguments):
    """Runs the example with few steps; returns the printed rows, all that is printed, and the results."""
    run_example(monkeypatch, "--model", model, "--output_dir", str(out), *SHORT, *arguments)
    captured = capsys.readouterr()
    assert captured.err == ""
    assert not re.search(r"^$", captured.out.rstrip("\n"), flags=re.M), "no empty lines"
    rows = re.findall(r"^(\S.*?)  +([\d. ]+)$", captured.out, flags=re.M)
    return (
        {method: cells.split() for method, cells in rows},
        captured.out,
        json.loads((out / "results.json").read_text()),
    )


def test_example_on_embeddings(tiny_encoder, tmp_path, monkeypatch, capsys):
    asked = ["--ask", "my card is gone"]
    rows, printed, results = run_short(monkeypatch, capsys, tiny_encoder, tmp_path, *asked)
    assert list(rows) == list(results["rows"]) == EMBEDDINGS
    for method, row in results["rows"].items():
        keys = ("accuracy_at_1", "mrr", "auc", "queries_per_s", "MB", "onboard_s")
        assert [float(cell) for cell in rows[method]] == pytest.approx([row[key] for key in keys], abs=0.5)
        assert 0 <= row["accuracy_at_1"] <= row["mrr"] <= 1
        assert row["onboard_s"] > 0
        assert row["queries_per_s"] > 0
    stored = {method: row["MB"] for method, row in results["rows"].items()}
    assert max(stored, key=stored.get) == "AdapterFusion"
    assert stored["frozen encoder"] < stored["plain adapter"] == pytest.approx(stored["teachers' average"], abs=1e-3)
    assert list(results["weights"]) == ["airline", "mobile", "shop"]
    assert 0 < sum(results["weights"].values()) < 1  # the rest belongs to the null teacher
    assert "  Q: my card is gone\n  -> " in printed
    assert (tmp_path / "onboarding.png").stat().st_size > 10_000
    assert (tmp_path / "adapters" / "AdapterDistillation" / "bank" / "adapter_config.json").is_file()


def test_example_with_the_cross_encoder(tiny_encoder, tmp_path, monkeypatch, capsys):
    arguments = ["--architecture", "cross-encoder", "--ask", "my card is gone"]
    rows, printed, results = run_short(monkeypatch, capsys, tiny_encoder, tmp_path, *arguments)
    assert list(rows) == list(results["rows"]) == CROSS_ENCODER
    for method, row in results["rows"].items():
        keys = ("accuracy_at_1", "mrr", "auc", "ms", "MB", "train_s")
        assert [float(cell) for cell in rows[method]] == pytest.approx([row[key] for key in keys], abs=0.06)
    assert "  Q: my card is gone\n  -> " in printed
    assert (tmp_path / "teacher_attention.png").stat().st_size > 10_000
    assert (tmp_path / "adapters" / "AdapterDistillation" / "bank" / "adapter_config.json").is_file()


def test_rows_of_the_table_are_the_cosines_with_questions_and_centroids(tiny_encoder, tmp_path):
    platform = EmbeddingPlatform(tiny_encoder)
    tenant = Tenant(
        "bank", [Faq("my card", train=["the train", "a card"], test=["card"]), Faq("pay", test=["pay it"])]
    )
    labelled, test = (labelled_queries(tenant, split, 2) for split in ("train", "test"))
    table = Rows(platform, tenant, test, tmp_path)
    table.add_cosine("titles", 1.0, None)
    table.add_cosine("centroids", 2.0, labelled)
    table.take_times()
    embedded = {
        text: torch.tensor(platform.encoder.encode(text)) for text in ("my card", "the train", "a card", "pay")
    }
    embedded = {text: embedding / embedding.norm() for text, embedding in embedded.items()}
    card = embedded["my card"] + embedded["the train"] + embedded["a card"]
    query = torch.tensor(platform.encoder.encode("card"))
    for method, first in (("titles", embedded["my card"]), ("centroids", card)):
        wanted = torch.stack([torch.cosine_similarity(query, faq, dim=0) for faq in (first, embedded["pay"])])
        assert torch.allclose(table.ways[method].scores(["card"])[0], wanted, atol=1e-5)
        assert table.rows[method]["MB"] == pytest.approx(2 * 16 * 4 / 1e6, abs=2e-4)
    assert 1 < table.rows["titles"]["onboard_s"] < 2 < table.rows["centroids"]["onboard_s"]


def test_quality_of_a_row_by_hand(tiny_encoder, tmp_path):
    tenant = Tenant("bank", [Faq("a"), Faq("b")])
    test = Dataset.from_dict({"query": ["x", "y"], "label": [1, 0]})
    scores = torch.tensor([[0.1, 0.9], [0.2, 0.3]])  # the first query is right, the second has its FAQ second
    quality = Rows(EmbeddingPlatform(tiny_encoder), tenant, test, tmp_path).quality(scores)
    assert quality == {"accuracy_at_1": 0.5, "mrr": 0.75, "auc": 0.75}


def test_labels_of_the_picture_cover_no_point_and_no_other_label():
    points = {f"way number {n}": {"onboard_s": 10.0 + n % 3, "accuracy_at_1": 0.8 + 0.001 * n} for n in range(7)}
    points["no training"] = {"onboard_s": 0.1, "accuracy_at_1": 0.5}
    figure = faq_table.draw(points, {"bank": 0.75, "shop": 0.25}, "city")
    figure.savefig(io.BytesIO())
    axes, renderer = figure.axes[0], figure.canvas.get_renderer()
    boxes = [text.get_window_extent(renderer) for text in axes.texts if text.get_text()]
    assert len(boxes) == 8
    assert not any(one.overlaps(other) for one, other in combinations(boxes, 2))
    places = axes.transData.transform([(row["onboard_s"], row["accuracy_at_1"]) for row in points.values()])
    assert not any(box.contains(*place) for box in boxes for place in places)
    lengths = [bar.get_width() for bar in figure.axes[1].patches]
    assert lengths == pytest.approx([-0.25, 0.25]), "from the mean weight"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--new_tenant", "zoo"], "--new_tenant zoo is not in the data; choose one of bank, airline"),
        (["--shots", "0"], "--shots 0 leaves nothing to train on and is out of range; it must be at least 1"),
        (["--shots", "99"], "--shots 99 is out of range: .* has 14 queries in all, one to test among them; lower it"),
        (["--learning_rate", "inf"], "--learning_rate inf is out of range; it must be above 0 and finite"),
        (["--seed", "-1"], "--seed -1 is out of range; it must be from 0 to 4294967295"),
        (["--ask", "half \ud800"], "--ask 'half .ud800' is not valid Unicode; type it again"),
        (["--output_dir", "/proc/nowhere"], "--output_dir /proc/nowhere cannot be written"),
        (["--output_dir", ""], "--output_dir is empty; give a folder"),
        (["--data", "missing.json"], "--data missing.json does not exist"),
        (["--architecture", "bert"], "--architecture bert is unknown; choose one of embeddings, cross-encoder"),
        (["--learning_rate", "0"], "--learning_rate 0.0 is out of range; it must be above 0"),
        (["--model", "no/such/model"], "--model no/such/model cannot be loaded .*; give the folder or Hub id"),
    ],
)
def test_bad_arguments_cost_no_training(arguments, message, monkeypatch):
    monkeypatch.setattr("demo_embeddings.train_teachers", None)
    with pytest.raises(SystemExit, match=message) as caught:
        run_example(monkeypatch, *arguments)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("tenants", "message"),
    [
        ([("one", FAQS)], "has 1 tenant; at least two are needed"),
        ([("one", FAQS), ("two", [])], "Tenant 'two' has no FAQs; give it some"),
        ([("one", FAQS), ("two", [FAQ])], "Tenant 'two' has 1 FAQ; a ranking needs at least two"),
        ([("one", [FAQ]), ("two", FAQS)], "Tenant 'one' has 1 FAQ; a ranking needs at least two"),
        ([("one", FAQS), ("one", FAQS)], "Two tenants are named 'one'; rename one"),
        ([("one", FAQS), ("a.b", FAQS)], "Tenant 'a.b' would be named 'a.b'; rename the tenant"),
        ([(1, FAQS), ("two", FAQS)], "Tenant 1 is named 1; give it a name"),
        ([("one", FAQS), ("two", [FAQ | {"queries": []}])], "FAQ 'where' of tenant 'two' has no queries; give"),
        ([("one", [FAQ | {"queries": ["a", " "]}]), ("two", FAQS)], "FAQ 'where' of tenant 'one' has an empty query"),
        (
            [("one", [FAQ | {"queries": ["a", 5]}]), ("two", FAQS)],
            "tenant 'one' has a query that is no text, 5; remove",
        ),
        ([("one", [FAQ | {"question": ""}]), ("two", FAQS)], "FAQ 1 of tenant 'one' has the question ''; write one"),
        ([("one", [FAQ, FAQ]), ("two", FAQS)], "Two FAQs of tenant 'one' have the question 'where'; join them"),
        ([("one", [{"question": "where"}]), ("two", FAQS)], "data.json, tenant 1, FAQ 1: 'queries' is missing"),
        (
            [("one", [FAQ | {"queries": "abc"}]), ("two", FAQS)],
            "FAQ 1: it is of another form .a str in place of a list",
        ),
        ([("one", [*FAQS, FAQ | {"question": "\ud800"}]), ("two", FAQS)], r"'.ud800' is not valid Unicode; write the"),
    ],
)
def test_bad_tenants_cost_no_training(tenants, message, tmp_path, monkeypatch):
    path = tmp_path / "data.json"
    path.write_text(json.dumps({"tenants": [{"name": name, "faqs": faqs} for name, faqs in tenants]}))
    monkeypatch.setattr("demo_embeddings.train_teachers", None)
    with pytest.raises(SystemExit, match=message) as caught:
        run_example(monkeypatch, "--data", str(path))
    assert "\n" not in str(caught.value)
