"""Who is served when, how requests end, and that nothing is left behind."""

import pytest

import bem
from bem.adapters import checks_probe as probe
from bem.adapters.checks_models import tiny_model
from bem.config import EVIDENCE_FEATURES
from bem.engine.engine import Engine
from bem.engine.request import Request, Sampling
from bem.engine.runner import Piece
from bem.engine.scheduler import Waiting, batches
from bem.engine.sequence import Sequence, Spans
from bem.errors import AttachError, EngineError, QueueFull
from tests.conftest import make_llama
from tests.engine.plain import plain, prompts


class Clock:
    """Seconds that go on when told to."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def waiting(*keys: str) -> list[Sequence]:
    return [Sequence(i, Request([3], key=key), [3], 1, 0.0) for i, key in enumerate(keys)]


@pytest.fixture(scope="module")
def subject():
    return probe.perturbed(bem.attach(tiny_model("llama"), "v2", rank=4, chunk_size=8))


def asked(ids, new=10, **fields) -> Request:
    return Request(ids, **{"max_new_tokens": new, "ignore_eos": True, **fields})


def test_keys_are_served_in_turn_however_much_each_asks():
    queue = Waiting(10)
    for sequence in waiting("a", "a", "a", "a", "b", "c", "b"):
        queue.add(sequence)
    assert len(queue) == 7
    assert [queue.take().id for _ in range(7)] == [0, 4, 5, 1, 6, 2, 3]
    assert queue.take() is None


def test_a_full_queue_says_so_and_takes_requests_again_later(subject, tokenizer):
    engine = Engine(subject, tokenizer, slots=1, queue=2)
    for _ in range(2):
        engine.submit(asked([3, 4]))
    with pytest.raises(QueueFull, match="2 requests wait, the queue holds 2"):
        engine.submit(asked([3, 4]))
    engine.step()
    engine.submit(asked([3, 4]))
    assert len(engine.generate([[5, 6]] * 5, max_new_tokens=2)) == 5  # waits for room by itself


def test_chunks_begin_at_turns_and_every_chunk_size_tokens_after():
    spans = Spans(20, (5,), 6)
    assert spans.starts == [0, 5, 11, 17, 19]
    spans.grow(26)
    assert spans.starts == [0, 5, 11, 17, 19, 25]
    assert [spans.finished(n) for n in (0, 4, 5, 16, 17, 19, 24, 25, 31)] == [
        0,
        0,
        1,
        2,
        3,
        4,
        4,
        5,
        6,
    ]
    assert spans.span(3) == (17, 19) and spans.span(5) == (25, 31)
    assert [spans.filled(n) for n in (0, 1, 5, 6, 18, 19, 20)] == [6, 1, 5, 1, 1, 2, 1]
    assert Spans(1, (), 6).starts == [0] and Spans(13, (), 6).starts == [0, 6, 12]


def test_pieces_that_are_alike_in_length_share_a_pass(subject, tokenizer):
    pieces = [Piece(s, n) for s, n in zip(waiting("a", "b", "c", "d"), (40, 3, 38, 4), strict=True)]
    assert [[p.tokens for p in batch] for batch in batches(pieces)] == [[40, 38], [4, 3]]


def test_a_long_prompt_is_read_in_pieces_while_answers_go_on(subject, tokenizer):
    engine = Engine(subject, tokenizer, slots=2, prefill_tokens=8)
    short, long = prompts(3, 41)
    engine.submit(asked(short, new=30))
    engine.step()
    engine.submit(asked(long, new=4))
    steps = [engine.step() for _ in range(6)]
    assert [s.prefilled for s in steps] == [8, 8, 8, 8, 8, 1]
    assert [s.decoded for s in steps] == [
        1,
        1,
        1,
        1,
        1,
        3,
    ]  # the last prompt token gives one, and both decode


def test_a_cancelled_request_hands_out_what_it_has_and_gives_back_what_it_holds(subject, tokenizer):
    engine = Engine(subject, tokenizer, slots=1)
    first, second, third = (engine.submit(asked(ids)) for ids in prompts(20, 5, 6))
    engine.step()
    assert engine.cancel(first) and engine.cancel(second) and not engine.cancel(99)
    results = {r.id: r for r in engine.step().finished}
    assert results[first].finish_reason == results[second].finish_reason == "cancelled"
    assert list(results[first].token_ids) == plain(subject, prompts(20, 5, 6)[0], 2)
    assert results[second].token_ids == () and results[second].first_token_s is None
    while engine.busy:
        results |= {r.id: r for r in engine.step().finished}
    assert results[third].finish_reason == "length" and not engine.cancel(third)
    _nothing_is_held(engine)


def _nothing_is_held(engine: Engine) -> None:
    assert engine._rows == [None] * engine.slots and not len(engine.waiting)
    assert len(engine._runner.control.state._free) == engine.slots
    assert not any(block.users for block in engine.store.blocks.values())


def test_a_deadline_ends_a_request_wherever_it_is(subject, tokenizer):
    clock = Clock()
    engine = Engine(subject, tokenizer, slots=1, clock=clock)
    ids = [
        engine.submit(asked(p, new=50, timeout_s=t))
        for p, t in zip(prompts(4, 5), (5, 9), strict=True)
    ]
    engine.step()
    clock.now = 5.0
    (result,) = engine.step().finished
    assert (result.id, result.finish_reason, result.seconds) == (ids[0], "deadline", 5.0)
    assert len(result.token_ids) == 2 and result.first_token_s == 0.0
    clock.now = 9.0
    (result,) = engine.step().finished
    assert (result.id, result.finish_reason) == (ids[1], "deadline")
    _nothing_is_held(engine)


def test_answers_end_where_they_should(tokenizer):
    subject = probe.perturbed(bem.attach(make_llama(), "s0", rank=4))
    text = "name the function"
    free = Engine(subject, tokenizer).generate([text], max_new_tokens=30, ignore_eos=True)[0]
    assert free.finish_reason == "length" and len(free.token_ids) == 30
    token = free.token_ids[7]
    (ended,) = Engine(subject, tokenizer).generate(
        [text], max_new_tokens=30, stop_token_ids=(token,)
    )
    first = free.token_ids.index(token)
    assert ended.token_ids == free.token_ids[:first] and ended.finish_reason == "stop"
    stop = free.text[8:10]
    (cut,) = Engine(subject, tokenizer).generate(
        [text], max_new_tokens=30, stop=("never", stop), ignore_eos=True
    )
    assert cut.text == free.text[: free.text.index(stop)] and cut.finish_reason == "stop"
    assert cut.token_ids == free.token_ids[: len(cut.token_ids)] and len(cut.token_ids) < 30


def test_a_seed_gives_one_answer_whatever_runs_beside(subject, tokenizer):
    hot = Sampling(temperature=2.0, seed=7)
    ids, *others = prompts(9, 4, 17)
    alone = Engine(subject, tokenizer).generate([asked(ids, sampling=hot)])[0]
    beside = Engine(subject, tokenizer, slots=2).generate(
        [*(asked(o, sampling=Sampling(temperature=1.0)) for o in others), asked(ids, sampling=hot)]
    )[-1]
    assert alone.token_ids == beside.token_ids != tuple(plain(subject, ids, 10))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"prompt": []}, "has no token"),
        ({"prompt": [3] * 120}, "120 prompt tokens and max_new_tokens 10"),
        ({"prompt": [3, 64]}, "token ids 3 to 64: the model has 64 entries"),
        ({"turn_starts": (5,)}, r"turn_starts \[5\] are outside"),
        ({"route": "a"}, "names an expert, and none are mounted"),
    ],
)
def test_what_can_never_be_served_is_refused_when_it_is_asked_for(
    fields, message, subject, tokenizer
):
    engine = Engine(subject, tokenizer)
    with pytest.raises(EngineError, match=message):
        engine.submit(asked(fields.pop("prompt", [3, 4]), **fields))
    assert not engine.busy


def test_evidence_that_cannot_be_used_is_refused_before_it_waits(subject, tokenizer):
    engine = Engine(subject, tokenizer)
    with pytest.raises(AttachError, match="outside"):
        engine.submit(asked([3], evidence=[2.0] * len(EVIDENCE_FEATURES)))
    with pytest.raises(EngineError, match="the adapter reads"):
        engine.submit(asked([3], evidence=[0.5]))
    assert not engine.busy


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"max_new_tokens": 0}, "at least 1, got 0"),
        ({"stop": ("",)}, "empty string"),
        ({"timeout_s": 0}, "> 0, got 0"),
        ({"logprobs": -1}, "at least 0, got -1"),
    ],
)
def test_requests_that_make_no_sense_are_refused(values, message):
    with pytest.raises(EngineError, match=message):
        Request([3], **values)


def test_generate_that_ends_in_an_error_leaves_nothing_behind(subject, tokenizer):
    engine = Engine(subject, tokenizer, slots=1)
    other = engine.submit(asked(prompts(9)[0]))
    with pytest.raises(EngineError, match="the prompt has no token"):
        engine.generate([asked(ids) for ids in prompts(5, 7)] + [asked([])])
    assert [s.id for s in (*engine.waiting, *engine.running)] == [other]
    results = [r for _ in range(12) for r in engine.step().finished]
    assert [r.id for r in results] == [other] and not engine.busy
