"""Attach V1 to the shipped base, train it a little on one pattern, save it, load it again.

python examples/attach.py
"""

import tempfile

import torch

import bem

model, tokenizer = bem.load_base("bem-tiny")
attached = bem.attach(model, "v1", rank=8)
print(
    f"{attached.price().parameters:,} trainable parameters beside {model.num_parameters():,} frozen"
)

prompt, answer = "User: Which colour is the sky?\nAssistant:", " It is blue."
ids = torch.tensor([tokenizer(prompt + answer, add_special_tokens=False)["input_ids"]])
labels = ids.clone()
labels[
    :, : len(tokenizer(prompt, add_special_tokens=False)["input_ids"])
] = -100  # learn the answer

optimizer = torch.optim.AdamW(attached.parameters(), lr=5e-3)
for step in range(30):
    loss = attached.model(input_ids=ids, labels=labels).loss + attached.penalty()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    attached.after_step()
    if step % 10 == 9:
        print(f"step {step + 1}: loss {loss.item():.3f}")

with tempfile.TemporaryDirectory() as folder:
    attached.save(folder)
    attached.detach()  # the base is itself again, bit for bit
    again = bem.load(model, folder)

question = tokenizer(prompt, return_tensors="pt", add_special_tokens=False)
written = again.model.generate(**question, max_new_tokens=8, do_sample=False)
print(tokenizer.decode(written[0], skip_special_tokens=True))
