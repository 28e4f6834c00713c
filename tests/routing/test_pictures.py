"""What a picture may change: decisions at chunk boundaries, and nothing where the gate is 0."""

import pytest
import torch

import bem
from bem.config import VISION_FEATURES
from bem.engine.engine import Engine
from bem.engine.request import Request
from bem.errors import AttachError
from bem.training.plain_policy import follow_reader
from tests.conftest import make_llama
from tests.engine.plain import prompts
from tests.routing.mounted import mounted

N = len(VISION_FEATURES)
RULES = {"spans": (1,), "plan_length": 9}
NOTHING, SEEN = torch.zeros(1, N), torch.linspace(1, 0.1, N)[None]


def routed():
    """A router whose choice a picture moves."""
    made = mounted(make_llama(), vision="colours@1", **RULES)
    with torch.no_grad():
        sight = made.router.policy.actor.sight
        sight.vote.weight.normal_(std=3.0, generator=torch.Generator().manual_seed(1))
        sight.asked.bias.fill_(3.0)  # every text leaves it to the picture
    follow_reader(made.router.policy, 1.0)  # so that hysteresis does not hold against it
    return made


def shaped():
    """V2, perturbed, whose controller reads a picture."""
    made = bem.attach(make_llama(), "v2", rank=4, chunk_size=8, vision="colours@1")
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return made


@pytest.fixture(scope="module", params=[routed, shaped], ids=["router", "v2"])
def subject(request):
    return request.param()


IDS = torch.tensor(prompts(40))


def logits(subject, **given):
    with torch.no_grad():
        return subject.model(input_ids=IDS, use_cache=False, **given).logits


def test_gate_zero_is_the_text_alone_to_the_bit(subject):
    assert torch.equal(logits(subject, vision=NOTHING), logits(subject))
    assert not torch.allclose(logits(subject, vision=SEEN), logits(subject), atol=1e-3)


def test_a_router_that_could_see_does_without_a_picture_what_one_does_that_cannot():
    seeing, blind = routed(), mounted(make_llama(), **RULES)
    own, other = seeing.router.policy, blind.router.policy
    reads = other.actor.net.read.weight.shape[1]
    keep = [c for c in range(own.actor.net.read.weight.shape[1]) if not 48 <= c < 48 + N]
    assert len(keep) == reads
    for mine, theirs in ((own.actor.net, other.actor.net), (own.critic.net, other.critic.net)):
        state = mine.state_dict()
        state["read.weight"] = state["read.weight"][:, keep[: theirs.read.weight.shape[1]]]
        theirs.load_state_dict(state)
    other.reader.load_state_dict(own.reader.state_dict())
    other.actor.expert_bias.load_state_dict(own.actor.expert_bias.state_dict())
    assert torch.allclose(logits(seeing, vision=NOTHING), logits(blind), atol=1e-6)


def test_a_picture_that_comes_later_changes_no_token_before_the_next_chunk(subject):
    by_token = torch.where((torch.arange(40) >= 19)[None, :, None], SEEN[:, None], NOTHING[:, None])
    late, never = logits(subject, vision=by_token), logits(subject)
    assert torch.equal(late[:, :24], never[:, :24])  # chunks of 8: the one that runs goes on
    assert not torch.allclose(late[:, 24:], never[:, 24:], atol=1e-3)


def test_generate_and_the_engine_agree_and_gate_zero_shares_the_chunks_of_the_text(
    subject, tokenizer
):
    engine = Engine(subject, tokenizer, slots=2, prefill_tokens=99)
    ids = IDS[0].tolist()

    def answer(vision):
        given = None if vision is None else vision[0].tolist()
        asked = Request(ids, max_new_tokens=12, ignore_eos=True, vision=given)
        (result,) = engine.generate([asked])
        return result

    alone, zero, seen, again = (answer(v) for v in (None, NOTHING, SEEN, SEEN))
    assert zero.token_ids == alone.token_ids and zero.cached_tokens == 39
    assert seen.cached_tokens == 0 and again.cached_tokens == 39
    assert seen.token_ids == again.token_ids
    subject.base.generation_config.eos_token_id = None
    with torch.no_grad():
        out = subject.model.generate(
            input_ids=IDS, attention_mask=torch.ones_like(IDS), vision=SEEN, max_new_tokens=12,
            do_sample=False, pad_token_id=0,
        )  # fmt: skip
    assert out[0, 40:].tolist() == list(seen.token_ids)


def test_what_was_saved_reads_the_same_tower_and_versions_without_one_keep_their_names(tmp_path):
    made = routed()
    loaded = bem.load_router(make_llama(), made.save(tmp_path / "r"))
    assert loaded.encoder == made.encoder == "colours@1" and loaded.version == made.version
    assert torch.equal(logits(loaded, vision=SEEN), logits(made, vision=SEEN))
    assert "vision" not in mounted(make_llama()).acting_config()["router"]
    assert shaped().encoder == "colours@1" and mounted(make_llama()).encoder == ""


def test_numbers_that_no_tower_gives_are_refused(subject):
    with pytest.raises(AttachError, match=r"VisionRecord.features"):
        logits(subject, vision=SEEN + 1)
    with pytest.raises(AttachError, match="twice"):
        logits(subject, vision=SEEN, conditioning={"vision": SEEN})
    with pytest.raises(AttachError, match="24"):
        logits(subject, vision=SEEN[:, :8])
