"""lm-eval's `local-completions` measures through HTTP what a forward pass gives in the process."""

import pytest
import torch

from tests.serving.running import base, served

pytest.importorskip("lm_eval")

PAIRS = [("User: name the", " function"), ("return", " the value that this"), ("a b c", " d")]


@pytest.mark.slow
def test_log_likelihoods_are_those_of_a_forward_pass(tmp_path):
    from lm_eval.api.instance import Instance
    from lm_eval.models.openai_completions import LocalCompletionsAPI

    model, tokenizer = base()
    tokenizer.save_pretrained(tmp_path)
    with served() as server:
        lm = LocalCompletionsAPI(
            base_url=f"{server.url}/v1/completions",
            model="bem",
            tokenizer=str(tmp_path),
            tokenizer_backend="huggingface",
            max_length=512,
            batch_size=2,
        )
        asked = [Instance("loglikelihood", {}, pair, i) for i, pair in enumerate(PAIRS)]
        found = lm.loglikelihood(asked, disable_tqdm=True)
    for (context, rest), (logprob, greedy) in zip(PAIRS, found, strict=True):
        before = tokenizer(context)["input_ids"]
        ids = tokenizer(context + rest)["input_ids"]
        assert ids[: len(before)] == before
        with torch.inference_mode():
            logits = model(torch.tensor([ids])).logits[0].log_softmax(-1)
        places = range(len(before), len(ids))
        expected = sum(float(logits[i - 1, ids[i]]) for i in places)
        assert logprob == pytest.approx(expected, abs=1e-3)
        assert greedy == all(int(logits[i - 1].argmax()) == ids[i] for i in places)
