"""Each form of answer has its own idea of equal; numbers here are computed by hand."""

import json

import pytest

from bem.tasks.scoring import FORMS, normal_sql, overlap, score, slots


def test_json_is_compared_parsed_and_scored_by_slots():
    gold = '{"intent": "Play", "slots": {"artist": "abba", "year": "1976"}}'
    same = '{"slots":{"year":"1976","artist":"abba"},"intent":"Play"}'
    near = '{"intent": "Play", "slots": {"artist": "abba", "album": "Arrival"}}'
    assert score("em", "json", same, [gold]) == 1.0
    assert score("em", "json", near, [gold]) == 0.0
    assert score("f1", "json", near, [gold]) == pytest.approx(2 * 2 / (3 + 3))
    broken = gold[:-1]
    assert [score(m, "json", broken, [gold]) for m in ("em", "f1", "validity")] == [0, 0, 0]
    assert score("em", "json", broken, [broken]) == 0.0
    assert score("f1", "json", "{}", ["{}"]) == 1.0
    assert slots('{"a": [1, {"b": "x"}]}') == [(".a[]", "1"), (".a[].b", '"x"')]


def test_sql_ignores_case_and_spacing_but_not_content():
    gold = 'SELECT school/club_team WHERE no. = 21 AND x = "a b"'
    assert score("em", "sql", 'select  school/club_team where no.=21 and x="a b";', [gold]) == 1.0
    assert score("em", "sql", "select school/club_team where no.=22", [gold]) == 0.0
    assert normal_sql("SELECT count( a , b ) ;") == "select count(a,b)"
    assert score("validity", "sql", gold, [gold]) == 1.0
    assert score("validity", "sql", 'SELECT a WHERE b = "c', [gold]) == 0.0
    assert score("f1", "sql", "select a where b=1", ["select a where b=2"]) == 0.75


@pytest.mark.parametrize(
    ("form", "answer", "gold", "em", "f1", "valid"),
    [
        ("name", "name_file_get", "get_file_name", 0, 1.0, 1),
        ("name", " get_name ", "get_name", 1, 1.0, 1),
        ("name", "get name", "get_name", 0, 1.0, 0),
        ("name", "Get_name", "get_name", 0, 0.5, 1),
        ("label", "Card_Arrival", "card_arrival", 1, 1.0, 1),
        ("label", "card_linking", "card_arrival", 0, 0.5, 1),
        ("label", "yes\nno", "yes", 0, 2 / 3, 0),
        ("number", "1,200", "1200", 1, 1.0, 1),
        ("number", "$12.0", "12", 1, 1.0, 1),
        ("number", "twelve", "12", 0, 0.0, 0),
        ("call", "f( a,b )", "f(a, b)", 1, 1.0, 1),
        ("call", "f(a, c)", "f(a, b)", 0, 2 / 3, 1),
        ("call", "f(a, b", "f(a, b)", 0, 1.0, 0),
        ("names", "a,b", "a, b", 1, 1.0, 1),
        ("shell", "ls  -l", "ls -l", 1, 1.0, 1),
        ("shell", "ls -L", "ls -l", 0, 0.5, 1),
        ("shell", "echo 'a", "echo 'a'", 0, 0.5, 0),
        ("text", "The Beatles.", "beatles", 1, 1.0, 1),
        ("text", "", "x", 0, 0.0, 0),
        ("code", "x = 1\n    y", "x = 1 y", 0, 1.0, 1),
    ],
)
def test_forms(form, answer, gold, em, f1, valid):
    assert score("em", form, answer, [gold]) == em
    assert score("f1", form, answer, [gold]) == pytest.approx(f1)
    assert score("validity", form, answer, [gold]) == valid


def test_a_call_may_use_any_acceptable_value_and_leave_out_what_is_optional():
    allowed = {"area": {"base": [10, 10.0], "height": [5], "unit": ["cm", ""]}}
    refs = [json.dumps({"area": {"base": 10, "height": 5, "unit": "cm"}}), json.dumps(allowed)]

    def em(call):
        return score("em", "tool", json.dumps(call), refs)

    assert em({"area": {"base": 10, "height": 5, "unit": "cm"}}) == 1
    assert em({"area": {"height": 5, "base": 10}}) == 1
    assert em({"area": {"base": 10}}) == 0  # height is not optional
    assert em({"area": {"base": 10, "height": 5, "colour": 1}}) == 0
    assert em({"volume": {"base": 10, "height": 5}}) == 0
    assert score("em", "tool", "none", ["none"]) == score("validity", "tool", "none", ["none"]) == 1
    assert score("em", "tool", "none", refs) == 0


def test_the_best_reference_counts():
    for form in FORMS:
        assert score("em", form, "{}", ["[1]", "{}"]) == 1.0
        assert score("f1", form, "{}", ["[1]", "{}"]) >= score("f1", form, "{}", ["[1]"])


def test_overlap_counts_with_multiplicity():
    assert overlap("aab", "ab") == pytest.approx(2 * 2 / 5)
    assert overlap([], []) == 1.0 and overlap([], ["a"]) == 0.0


DEEP = "[" * 900 + "]" * 900
BABBLE = [
    "", " ", "\n", "\0", "\ud800", "\u2028", "NaN", "nan", "-inf", "1e999", "-0", "'", '"', "`", "none",
    "[" * 3000, DEEP, '{"a":' * 900 + "1" + "}" * 900, "(" * 5000, "select " + "(" * 5000,
    "1" * 5000, '{"a": ' + "1" * 5000 + "}", "1e" + "9" * 5000, f'[1e{"9" * 5000}]', '{"a": 1e-999999}',
    '{"a": 1, "a": 2}', '{"a": NaN}', '{"\\ud800": 1}', "'" * 999, '"' * 999, "\\" * 999, "a'b" * 500,
    "--" * 999, "/*" * 999, '"""' * 333, " " * 5000, "\n" * 5000, "1," * 999, "if a:\n\tb\n  c",
]  # fmt: skip


@pytest.mark.parametrize("form", FORMS)
def test_every_form_survives_any_text_on_either_side(form):
    """A model babbles, and references hold what people write."""
    for text in BABBLE:
        assert 0.0 <= score("validity", form, text, ["x"]) <= 1.0
        for metric in ("em", "f1"):
            for other in ("x", '{"f": {"x": [1]}}', '{"f": [1]}', '{"f": 3}', text):
                assert 0.0 <= score(metric, form, text, [other]) <= 1.0
                assert 0.0 <= score(metric, form, other, [text]) <= 1.0
            assert 0.0 <= score(metric, form, text, []) <= 1.0


@pytest.mark.parametrize("metric", ["chrf", "bleu"])
def test_corpus_metrics_survive_any_text_too(metric):
    for text in BABBLE:
        for references in (["x"], [], [text]):
            assert 0.0 <= score(metric, "text", text, references) <= 100.0


@pytest.mark.parametrize(
    ("answer", "reference", "right"),
    [
        ('{"a": true}', '{"a": 1}', 0),
        ('{"a": false}', '{"a": 0}', 0),
        ('{"a": null}', '{"a": 0}', 0),
        ('{"a": "1"}', '{"a": 1}', 0),
        ('{"a": 1}', '{"a": 1.0}', 1),
        ('{"a": 100}', '{"a": 1e2}', 1),
        ('{"a": 0.10}', '{"a": 1E-1}', 1),
        ('{"a": -0}', '{"a": 0.0}', 1),
        ('{"a": 1e400}', '{"a": 1e999}', 0),  # both infinite as floats
        ('{"a": 1e-400}', '{"a": 0}', 0),  # zero as a float
        ('{"a": 9007199254740993}', '{"a": 9007199254740992.0}', 0),  # equal as floats
        ('{"a": ' + "1" * 5000 + "}", '{"a": 1}', 0),
        ('{"a": ' + "1" * 5000 + "}", '{"a": ' + "1" * 5000 + "}", 1),
        ('{"a": 1e' + "9" * 5000 + "}", '{"a": 1e' + "9" * 5000 + "}", 1),
        ('{"a": 1, "a": 2}', '{"a": 2}', 0),  # what it says depends on the reader
        ('{"a": 2}', '{"a": 1, "a": 2}', 0),
        ('{"a": NaN}', '{"a": NaN}', 0),
        ('{"a": []}', '{"a": {}}', 0),
        ("[]", "{}", 0),
        ("[1, 2]", "[2, 1]", 0),
        ('{"a": {"b": [{}, []]}, "c": 1}', '{"c": 1, "a": {"b": [{}, []]}}', 1),
        ('{"a.b": 1}', '{"a": {"b": 1}}', 0),
        ('{"a[0]": 1}', '{"a": [1]}', 0),
        ('{"a": "caf\\u00e9"}', '{"a": "cafe\u0301"}', 1),
        (DEEP, DEEP, 1),
        (DEEP, DEEP[1:-1], 0),
    ],
)
def test_json_equals_what_says_the_same(answer, reference, right):
    for form in ("json", "tool"):
        assert score("em", form, answer, [reference]) == right
        assert score("em", form, f'{{"x": {answer}}}', [f'{{"x": {reference}}}']) == right
    if right:
        assert score("f1", "json", answer, [reference]) == 1.0


def test_a_call_takes_only_what_is_acceptable_and_of_its_type():
    def em(given, acceptable):
        return score(
            "em", "tool", f'{{"f": {{"x": {given}}}}}', [f'{{"f": {{"x": [{acceptable}]}}}}']
        )

    assert em("true", "1") == em("1", "true") == em('"1"', "1") == em("1e400", "1e999") == 0
    assert (
        em("1.0", "1") == em("true", "1, true") == em('{"b": 1, "a": 2}', '{"a": 2, "b": 1}') == 1
    )
    assert score("em", "tool", '{"f": {"x": 1, "x": 2}}', ['{"f": {"x": [2]}}']) == 0


@pytest.mark.parametrize(
    ("answer", "number"),
    [
        ("1,200", "1200"), ("$1,200.50", "1200.5"), ("-$5", "-5"), ("$-5", "-5"), ("+7", "7"),
        ("007", "7"), ("1e3", "1000"), (".5", "0.50"), ("5.", "5"), ("-0", "0"), ("１２", "12"),
        ("1" * 5000, "1" * 5000),
    ],
)  # fmt: skip
def test_a_number_is_the_same_however_it_is_written(answer, number):
    assert (
        score("em", "number", answer, [number])
        == score("validity", "number", answer, [number])
        == 1
    )
    assert score("em", "number", answer, ["123456789"]) == 0


@pytest.mark.parametrize(
    "text", ["nan", "NaN", "-inf", "Infinity", "12,34", "1,2", "1_000", "e5", "."]
)
def test_what_is_no_number_is_neither_valid_nor_equal_to_one(text):
    assert score("validity", "number", text, ["1"]) == 0
    assert score("em", "number", text, ["12"]) == score("em", "number", text, ["1000"]) == 0
    assert score("em", "number", text, [text]) == 1  # the same text


def test_numbers_that_differ_beyond_a_floats_reach_are_not_equal():
    assert score("em", "number", "1e400", ["1e999"]) == 0
    assert score("em", "number", "1" * 400, ["1" * 399 + "2"]) == 0
    assert score("em", "number", "1e-400", ["0"]) == 0


@pytest.mark.parametrize(
    "query",
    [
        "SELECT\n  a FROM t",
        "select\ta\nfrom t\n;",
        "WITH x AS (SELECT 1) SELECT * FROM x",
        "with recursive x(n) as (\n  values (1) union select n + 1 from x\n) select n from x",
        "(SELECT a FROM t) UNION (SELECT b FROM u)",
        "SELECT*FROM t",
        "select(1)",
        "-- newest first, don't sort\nSELECT a FROM t /* it's fine ( */ ORDER BY b",
        "SELECT men's doubles WHERE women's singles = \"x (\"",
        "SELECT a WHERE b = 'it''s ) here'",
        "SELECT a WHERE b = N'x'",
        "INSERT INTO t VALUES (1)",
        "UPDATE t SET a = 1",
        "DELETE FROM t",
    ],
)
def test_a_query_is_valid_over_several_lines_and_with_its_subqueries(query):
    assert score("validity", "sql", query, ["x"]) == 1


@pytest.mark.parametrize(
    "text",
    ["", "SELECT", "select ;", "selected items", "please select a", "WITH x AS (SELECT 1)",
     "SELECT a WHERE b = 'c", 'SELECT a WHERE b = "c', "SELECT (a", "SELECT a)(", "update me please",
     "with pleasure"],
)  # fmt: skip
def test_what_is_no_query_is_not_valid(text):
    assert score("validity", "sql", text, ["x"]) == 0


@pytest.mark.parametrize(
    ("form", "one", "other", "same"),
    [
        ("sql", "SELECT a FROM t WHERE b = 'Bob'", "select a from t where b = 'bob'", 0),
        ("sql", "SELECT a WHERE b = 'x  y'", "SELECT a WHERE b = 'x y'", 0),
        ("sql", "SELECT a WHERE b = 'x = y'", "SELECT a WHERE b = 'x=y'", 0),
        ("sql", 'SELECT "A" FROM t', 'SELECT "a" FROM t', 0),
        ("sql", "SELECT a WHERE b = 'Bob'", "select  A where b='Bob' ;", 1),
        ("sql", "SELECT a -- why\nFROM t", "SELECT a\nFROM t", 1),
        ("sql", "SELECT a WHERE b = '--x'", "SELECT a WHERE b = '--y'", 0),
        ("sql", "SELECT Men's doubles", "select men's  DOUBLES", 1),
        ("shell", "echo 'a  b'", "echo 'a b'", 0),
        ("shell", 'echo "a  b"', 'echo "a b"', 0),
        ("shell", "echo a\\ \\ b", "echo a\\ b", 0),
        ("shell", "echo   'a  b'  c", "echo 'a  b' c", 1),
        ("shell", "ls \\\n  -l", "ls -l", 1),
        ("shell", "ls\npwd", "ls pwd", 0),
        ("shell", "ls\n\n  pwd\n", "ls\npwd", 1),
        ("shell", "echo '$HOME'", 'echo "$HOME"', 0),
        ("call", "f('a b')", "f('ab')", 0),
        ("call", "f(not x)", "f(notx)", 0),
        ("call", "f( a,\n  'b c' )", "f(a, 'b c')", 1),
        ("code", "if a:\n    b()\nc()", "if a:\n    b()\n    c()", 0),
        ("code", "if a:\n    b()\n", "if a:\n\n    b()  ", 1),
        ("code", "x  =  1", "x = 1", 1),
        ("code", "print('a  b')", "print('a b')", 0),
        ("code", 'x = """a\n  b"""', 'x = """a\nb"""', 0),
        ("code", "# don't\nx  = 1", "# don't\nx = 1", 1),
        ("code", "a\r\nb", "a\nb", 1),
        ("code", "a b", "a\nb", 0),
        ("text", "caf\u00e9", "cafe\u0301", 1),
        ("label", "Caf\u00e9", "cafe\u0301", 1),
        ("name", "\u00e9", "e\u0301", 1),
    ],
)
def test_only_spacing_and_case_that_mean_nothing_are_ignored(form, one, other, same):
    assert score("em", form, one, [other]) == score("em", form, other, [one]) == same


def test_a_command_is_one_line_whose_quotes_are_closed():
    valid = ["ls -l", "echo 'two\nlines'", "ls \\\n -l", "  ls  "]
    wrong = ["ls\npwd", "echo 'a", 'echo "a', "echo a\\", ""]
    assert [score("validity", "shell", text, ["x"]) for text in valid] == [1] * len(valid)
    assert [score("validity", "shell", text, ["x"]) for text in wrong] == [0] * len(wrong)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("references", [[], [""], ["something", " "]])
def test_an_empty_answer_is_right_where_an_empty_one_is_asked_for(form, references):
    for metric, top in (("em", 1), ("f1", 1), ("validity", 1), ("chrf", 100), ("bleu", 100)):
        assert score(metric, form, " ", references) == top
    if form != "text":  # SQuAD's rules ignore punctuation
        assert score("em", form, "?!", references) == score("f1", form, "?!", references) == 0
    for metric in ("em", "f1", "chrf", "bleu"):
        assert score(metric, form, "jqk", references) == 0
        assert score(metric, form, "", ["something"]) == 0


@pytest.mark.parametrize(
    ("form", "answer", "reference"),
    [
        ("sql", "SELECT $$A b$$", "select $$a b$$"),
        ("sql", "SELECT $t$A  b$t$", "SELECT $t$A b$t$"),
        ("sql", r"SELECT E'\'A'", r"select E'\'a'"),
        ("shell", "cat <<E\na  b\nE", "cat <<E\na b\nE"),
        ("shell", "cat <<-'END'\na\n\nb\nEND", "cat <<-'END'\na\nb\nEND"),
    ],
)
def test_what_is_quoted_in_other_ways_is_data_too(form, answer, reference):
    assert score("em", form, answer, [reference]) == 0.0
    assert score("em", form, answer, [answer]) == 1.0
    assert (
        score("em", form, answer.replace("SELECT", "select ").replace("cat", "cat "), [answer])
        == 1.0
    )
