"""Search, rerank, and answer: V2 is told how good the evidence is before it says a word.

python examples/evidence.py
"""

import torch

import bem
from bem.config import EVIDENCE_FEATURES
from bem.evidence.index import in_memory
from bem.evidence.passages import Passage
from bem.evidence.rerank import load_reranker
from bem.evidence.retriever import Retriever

index = in_memory(
    [
        Passage(
            "nobel", "The first Nobel Prize in Physics went to Wilhelm Conrad Röntgen in 1901."
        ),
        Passage("curie", "Marie Curie shared the Nobel Prize in Physics of 1903."),
        Passage("einstein", "Albert Einstein worked at the patent office in Bern until 1909."),
        Passage("otter", "The otter sleeps near the river and wakes at six o'clock."),
    ]
)
retriever = Retriever(index, load_reranker("tiny"), shown=2, timeout_ms=500)
question = "Who got the first Nobel Prize in Physics?"
found = retriever.retrieve(question)
for passage, score in zip(found.passages, found.record.scores, strict=False):
    print(f"{score:.2f}  {passage.shown}")
features = found.record.features()
print("  ".join(f"{n} {v:.2f}" for n, v in zip(EVIDENCE_FEATURES, features, strict=True)))

model, tokenizer = bem.load_base("bem-tiny")
attached = bem.attach(model, "v2", rank=8)  # untrained: it still says what the base says
prompt = "\n".join([*(p.shown for p in reversed(found.passages)), question])
ids = tokenizer.apply_chat_template(
    [{"role": "user", "content": prompt}],
    add_generation_prompt=True,
    return_tensors="pt",
    return_dict=True,
)
written = attached.model.generate(
    **ids, evidence=torch.tensor([features]), max_new_tokens=12, do_sample=False
)
print(tokenizer.decode(written[0, ids["input_ids"].shape[1] :], skip_special_tokens=True))
