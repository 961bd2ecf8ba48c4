"""Retrieval by the command line, against plain embeddings of a stock adapter."""

import json
import re
from pathlib import Path

import adapters
import pytest
import torch
from adapters import AutoAdapterModel
from command_line import QUICK, all_say_why, run, write_csv
from sentence_transformers import SentenceTransformer
from tiny_models import noisy
from torch.nn.functional import cosine_similarity, cross_entropy
from transformers import set_seed

from hf_adapter_distillation.cli import retrieval
from hf_adapter_distillation.cli.retrieval import CandidateLoss, load_encoder, ranking_metrics
from hf_adapter_distillation.student.provenance import read_provenance

QUERIES = ["my card is gone", "when does the train leave", "what do i pay for the parcel", "how is the weather"]
FAQS = ["the card", "the train", "the parcel", "the weather"]
TRAIN = [
    "train", "--task=retrieval", "--teachers", "adapters/banking", "adapters/travel", "--student=insurance",
    "--adapter_config=seq_bn[reduction_factor=4]", "--dataset=faq.csv", *QUICK,
]  # fmt: skip
FIND = ["predict", "--task=retrieval", "--adapter=out/insurance"]


@pytest.fixture(scope="module")
def world(tmp_path_factory, tiny_encoder):
    """A folder with teachers, data, and a student that the command line has trained."""
    folder = tmp_path_factory.mktemp("retrieval")
    set_seed(0)
    model = AutoAdapterModel.from_pretrained(tiny_encoder)
    for name in ("banking", "travel"):
        model.add_adapter(name, config="seq_bn[reduction_factor=4]")
        noisy(model, name)
        (folder / "adapters").mkdir(exist_ok=True)
        model.save_adapter(str(folder / "adapters" / name), name)
    write_csv(folder / "faq.csv", {"id": [1, 2, 3, 4], "query": QUERIES, "faq": FAQS}, n=20)
    write_csv(folder / "titles.csv", {"title": [*FAQS, "the card"][:4]})
    return folder


@pytest.fixture
def here(world, monkeypatch):
    monkeypatch.chdir(world)


def embedded(model, texts):
    return model.encode(texts, convert_to_tensor=True).cpu()


def test_a_student_is_trained_ranks_finds_and_is_pushed(here, capsys, hub, tiny_encoder):
    train = [*TRAIN, f"--model={tiny_encoder}", "--max_steps=30", "--learning_rate=3e-2", "--logging_steps=1"]
    code, out, _ = run(capsys, *train, "--eval_split=0.2", "--output_dir=out", "--overwrite_output_dir")
    assert code == 0
    assert re.search(r"^eval_accuracy_at_1 +[\d.]+\neval_mrr +[\d.]+$", out, re.M)
    assert re.search(r"^teacher banking +weight", out, re.M)
    run_ = read_provenance("out/insurance").run
    assert {"eval_loss", "eval_accuracy_at_1", "eval_mrr"} <= run_.evaluation.keys()

    lines = re.search(r"^loaded by +(.*)\n +(.*)\n +(.*)$", out, re.M).groups()
    names = {"SentenceTransformer": SentenceTransformer, "adapters": adapters}
    exec("\n".join(lines), names)
    model = names["model"]
    assert list(model[0].auto_model.adapters_config) == ["insurance"]
    scores = cosine_similarity(embedded(model, QUERIES)[:, None], embedded(model, sorted(FAQS))[None], dim=-1)
    order = [sorted(FAQS).index(faq) for faq in FAQS]

    test = ["--task=retrieval", "--adapter=out/insurance", "--dataset=faq.csv", "--output=r.json"]
    code, out, _ = run(capsys, "eval", *test)
    result = json.loads(Path("r.json").read_text())
    ranks = [1 + sum(row > row[right]).item() for row, right in zip(scores, order, strict=True)]
    assert result["accuracy_at_1"] == pytest.approx(sum(rank == 1 for rank in ranks) / 4)
    assert result["mrr"] == pytest.approx(sum(1 / rank for rank in ranks) / 4)
    assert (result["examples"], result["candidates"]) == (20, 4)
    assert re.search(r"^candidates +4$", out, re.M)
    model[0].auto_model.set_active_adapters(None)
    frozen = cosine_similarity(embedded(model, QUERIES)[:, None], embedded(model, sorted(FAQS))[None], dim=-1)
    losses = [cross_entropy(20 * each, torch.tensor(order)).item() for each in (frozen, scores)]
    assert losses[1] < losses[0] - 0.3, "the training has taught it"

    for candidates in ("--candidates=faq.csv", "--candidates=titles.csv"):
        out = run(capsys, *FIND, candidates, "--text", *QUERIES, "--top_k=2")[1]
        for line, query, row in zip(out.splitlines(), QUERIES, scores, strict=True):
            found, best = json.loads(line), row.topk(2)
            assert list(found["scores"]) == [sorted(FAQS)[number] for number in best.indices]
            assert list(found["scores"].values()) == pytest.approx(best.values.tolist(), abs=1e-4)
            assert (found["text"], found["label"], found["score"]) == (query, *next(iter(found["scores"].items())))
    rows = run(capsys, *FIND, "--candidates=titles.csv", "--dataset=faq.csv", "--format=csv")[1].splitlines()
    assert rows[0] == "query,label,score"
    assert rows[1].startswith(f"{QUERIES[0]},{sorted(FAQS)[scores[0].argmax()]},")
    assert len(rows) == 21
    rows = run(capsys, *FIND, "--candidates=faq.csv", "--text", "train", "--format=csv", "--top_k=3")[1].splitlines()
    assert len(rows) == 4

    assert run(capsys, "inspect", "out/insurance")[0] == 0
    assert run(capsys, "push", "out/insurance", "me/faq")[0] == 0
    assert {"adapter_config.json", "adapter.safetensors", "pytorch_adapter.bin"} <= hub.repos["me/faq"].files.keys()
    code, out, _ = run(capsys, "eval", *test[:1], "--adapter=me/faq", *test[2:])
    assert (code, json.loads(Path("r.json").read_text())["mrr"]) == (0, result["mrr"])


def test_ranks_are_counted_against_ties():
    scores = torch.tensor([[0.9, 0.1, 0.2], [0.5, 0.5, 0.1], [0.1, 0.3, 0.2]])
    assert ranking_metrics(scores, [0, 1, 0]) == {
        "accuracy_at_1": pytest.approx(1 / 3),
        "mrr": pytest.approx((1 + 1 / 2 + 1 / 3) / 3),
    }


def test_the_loss_is_the_softmax_over_all_candidates_or_some_with_the_right_ones(tiny_encoder, monkeypatch):
    model = load_encoder(tiny_encoder, 128).eval()
    loss = CandidateLoss(model, FAQS)
    features = dict(model.tokenizer(QUERIES[:3], padding=True, return_tensors="pt"))
    labels = torch.tensor([2, 0, 2])

    def plain(numbers):
        cosines = cosine_similarity(
            embedded(model, QUERIES[:3])[:, None], embedded(model, [FAQS[n] for n in numbers])[None], dim=-1
        )
        return cross_entropy(20 * cosines, torch.tensor([numbers.index(label) for label in labels.tolist()]))

    torch.testing.assert_close(loss([features], labels).detach(), plain([0, 1, 2, 3]), rtol=1e-5, atol=1e-6)
    for most, sizes in ((3, {3}), (1, {2})):
        monkeypatch.setattr(retrieval, "MOST_CANDIDATES", most)
        chosen = []
        monkeypatch.setattr(CandidateLoss, "_choose", keeping(chosen, CandidateLoss._choose))
        for _ in range(8):
            value = loss([features], labels).detach()
            torch.testing.assert_close(value, plain(chosen[-1]), rtol=1e-5, atol=1e-6)
        assert {len(numbers) for numbers in chosen} == sizes
        assert all({0, 2} <= {*numbers} for numbers in chosen)
        assert len({*map(tuple, chosen)}) == (2 if most == 3 else 1)


def keeping(kept, function):
    def choose(self, labels):
        kept.append(function(self, labels).tolist())
        return torch.tensor(kept[-1])

    return choose


def test_what_does_not_fit_is_told_before_a_model_is_loaded(here, capsys, monkeypatch):
    monkeypatch.setattr(retrieval, "load_encoder", None)
    write_csv(Path("same.csv"), {"query": QUERIES, "faq": ["a"] * 4})
    write_csv(Path("numbers.csv"), {"query": QUERIES, "faq": [1, 2, 3, 4]})
    find, train = [*FIND, "--text", "a"], [*TRAIN, "--model=x/y", "--output_dir=new"]
    columns = "'id', 'query', 'faq'"
    cases = [
        ([*train, "--text_pair_column=faq"], "text_pair_column='faq' is not for --task retrieval; leave it out."),
        ([*train, "--dataset=same.csv"], "Column 'faq' holds only one text, 'a'; a ranking needs at least two."),
        ([*train, "--dataset=numbers.csv"], "Column 'faq' holds no texts that a retrieval could find; choose a *"),
        ([*train, "--dataset=titles.csv"], "The columns 'title' do not say which one is the label_column; pass *"),
        (find, "task='retrieval' finds texts among candidates; pass --candidates, a file of them."),
        ([*find, "--candidates=no.csv"], "The dataset no.csv does not exist; *"),
        ([*find, "--candidates=faq.csv", "--candidates_column=x"], f"candidates_column='x' is not * {columns}."),
        ([*find, "--candidates=same.csv", "--candidates_column=faq"], "Column 'faq' holds only one text, 'a'; *"),
        ([*find, "--candidates=faq.csv", "--top_k=0"], "top_k=0 is out of range; it must be at least 1."),
        (
            [*find, "--candidates=faq.csv", "--text_column=score"],
            "text_column='score' is also the name of a result; *",
        ),
        (["predict", "--adapter=a", "--text=b", "--sep=;"], "sep=';' is for --dataset; leave it out."),
        (["predict", "--adapter=a", "--encoding=latin-1"], "encoding='latin-1' is for --dataset; leave it out."),
        (["predict", "--adapter=a", "--candidates=b"], "candidates='b' is for --task retrieval; leave it out."),
        (["eval", "--task=tokens", "--adapter=a", "--dataset=b"], "argument --task: invalid choice: 'tokens' *"),
    ]
    all_say_why(capsys, [(2, argv, message) for argv, message in cases])
    assert not Path("new").exists()
