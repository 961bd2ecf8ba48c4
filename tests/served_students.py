"""Tiny students of three tenants, as the service reads them, and what each of them answers alone."""

import json
import shutil
import sys

import torch
from paths import ROOT
from tiny_models import noisy
from torch.nn.functional import normalize as normalized
from transformers import BertModel, set_seed

EXAMPLES = ROOT / "examples"
sys.path[:0] = [str(EXAMPLES), str(EXAMPLES / "platform")]

from faq_embeddings import EmbeddingPlatform  # noqa: E402
from student_folder import Question  # noqa: E402

FAQS = {
    "bank": ["is my card gone", "what do i pay", "how is the card"],
    "post": ["when does the parcel leave"],
    "rail": ["when does the train leave", "<b>how is the weather</b>"],
}
QUESTIONS = [
    Question("rail", "the train"),
    Question("bank", "card gone"),
    Question("rail", "weather how is the weather when does the train leave the parcel"),
    Question("post", "parcel"),
    Question("bank", "pay"),
]
LABELLED = {"bank": {1: ["pay the parcel", "pay"]}}  # queries of some FAQs


def uneven_encoder(tiny_encoder, folder):
    """Writes the tiny BERT with weights that make its embeddings depend on the texts."""
    shutil.copytree(tiny_encoder, folder, dirs_exist_ok=True)
    set_seed(0)
    model = BertModel.from_pretrained(tiny_encoder)
    for parameter in model.parameters():
        parameter.data += 0.3 * torch.randn_like(parameter)
    model.save_pretrained(folder)
    return str(folder)


def write_student(folder, encoder, tenant, config="double_seq_bn", faqs=None, seed=None):
    """Writes a student of a tenant, told apart by its weights."""
    platform = encoder if isinstance(encoder, EmbeddingPlatform) else EmbeddingPlatform(encoder)
    set_seed(sum(map(ord, tenant)) if seed is None else seed)
    platform.model.add_adapter(tenant, config=config)
    noisy(platform.model, tenant, 1.0)
    (folder / tenant).mkdir(parents=True, exist_ok=True)
    platform.model.save_adapter(str(folder / tenant), tenant)
    faqs = FAQS.get(tenant, ["what is it"]) if faqs is None else faqs
    rows = [{"question": f, "queries": LABELLED.get(tenant, {}).get(i, [])} for i, f in enumerate(faqs)]
    (folder / tenant / "faqs.json").write_text(json.dumps(rows))


def write_students(folder, encoder, configs=None):
    """Writes a student for each tenant."""
    platform = EmbeddingPlatform(encoder)
    for tenant, config in (configs or dict.fromkeys(FAQS, "double_seq_bn")).items():
        write_student(folder, platform, tenant, config)
    return folder


def alone(students, encoder, questions, dtype=torch.float64):
    """The cosines of each question with the FAQs of its tenant by FAQ; each text is alone, without padding."""
    platform = EmbeddingPlatform(encoder)
    tokenizer, centroids, answers = platform.encoder.tokenizer, {}, []
    for tenant in {question.tenant for question in questions}:
        platform.model.load_adapter(str(students / tenant), load_as=tenant)
    platform.encoder.to(dtype).eval()

    @torch.no_grad()
    def embed(tenant, text):
        platform.model.set_active_adapters(tenant)
        return normalized(platform.encoder(dict(tokenizer(text, return_tensors="pt")))["sentence_embedding"])[0]

    for tenant, text in questions:
        faqs = json.loads((students / tenant / "faqs.json").read_text())
        if tenant not in centroids:
            texts = [[faq["question"], *faq["queries"]] for faq in faqs]
            means = [torch.stack([embed(tenant, text) for text in of_faq]).mean(0) for of_faq in texts]
            centroids[tenant] = normalized(torch.stack(means))
        scores = (centroids[tenant] @ embed(tenant, text)).tolist()
        answers.append(dict(zip([faq["question"] for faq in faqs], scores, strict=True)))
    return answers
