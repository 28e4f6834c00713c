"""Pieces of a stream are its text, and nothing is ever taken back."""

import bem
from bem.serving.detokenizer import Detokenizer
from tests.conftest import make_tokenizer

TEXTS = [
    "the answer is 42.",
    "naïve café",
    "日本語のテキスト 🎉🎉 fin",
    "a\n\n  b\t",
    " , . ! it's",
    "",
]


def pieces(tokenizer, text, stops=()):
    stream, said = Detokenizer(tokenizer, stops), []
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    for token in ids:
        said.append(stream.push([token]))
    return ids, said, stream


def test_all_pieces_together_are_the_decoded_answer():
    for tokenizer in (make_tokenizer(), bem.load_base("bem-tiny")[1]):
        for text in TEXTS:
            ids, said, stream = pieces(tokenizer, text)
            whole = tokenizer.decode(ids, skip_special_tokens=True)
            assert whole.startswith("".join(said))
            assert "".join(said) + stream.finish(whole) == whole
            assert not any("\ufffd" in piece for piece in said)


def test_what_may_begin_a_stop_string_waits():
    tokenizer = make_tokenizer()
    _, said, stream = pieces(tokenizer, "one##two", stops=("###",))
    assert "".join(said) == "one##two"  # it was none
    _, said, stream = pieces(tokenizer, "one##", stops=("###",))
    assert "".join(said) == "one"
    assert stream.finish("one") == ""  # it was one


def test_half_a_character_waits_for_its_other_half():
    tokenizer = make_tokenizer()
    ids = tokenizer("🎉", add_special_tokens=False)["input_ids"]
    assert len(ids) > 1
    stream = Detokenizer(tokenizer)
    assert [stream.push([token]) for token in ids] == [""] * (len(ids) - 1) + ["🎉"]
