"""A router is trained, asked, and turned into static LoRAs from the command line."""

import io
import json

import pytest
import torch
from peft import PeftModel

import bem
from bem.bases.load import load_base
from bem.cli.route import conversation
from bem.errors import DataError
from tests.conftest import make_llama, make_tokenizer
from tests.routing.mounted import mounted
from tests.test_cli import bem_command, problem

LONG = "name the function that this docstring describes and return the value of it"
IDS = torch.arange(2, 34)[None]
RADIUS = 0.1
"""Of the trust region: it binds at every site."""


@pytest.fixture(scope="module")
def router(micro_base, tmp_path_factory):
    """Folder of a router over three experts, on the micro base."""
    folder = tmp_path_factory.mktemp("routers") / "mine"
    return mounted(load_base(str(micro_base))[0], trust_radius=RADIUS).save(folder)


@pytest.fixture
def asked(capsys, router, micro_base):
    """Run `bem route explain` on the router; what it printed as JSON."""

    def ask(text, *options):
        where = ("--router", router, "--base", micro_base, "--json")
        code, out, _ = bem_command(capsys, "route", "explain", text, *where, *options)
        assert code == 0
        return json.loads(out)

    return ask


# -- what a text says


def test_a_plain_text_is_one_turn_of_the_user():
    row, answered = conversation(" why?\nuser: is no role here ")
    assert (row.input, row.history, answered) == ("why?\nuser: is no role here", (), False)


def test_lines_that_name_a_role_begin_turns():
    row, answered = conversation("User: one\nmore\nassistant: two\nuser:\n three")
    assert (row.history, row.input, answered) == ((("one\nmore", "two"),), "three", False)
    row, answered = conversation("user: one\nassistant: two")
    assert (row.input, row.references, answered) == ("one", ("two",), True)
    row, answered = conversation("user: one\nassistant:")  # the answer is yet to come
    assert (row.input, answered) == ("one", False)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("  ", "Turn 1 of the text says nothing"),
        ("assistant: a", "Turn 1 of the text is the assistant's, not the user's"),
        ("user: a\nuser: b", "Turn 2 of the text is the user's, not the assistant's"),
        ("user: a\nassistant:\nuser: b", "Turn 2 of the text says nothing"),
    ],
)
def test_turns_that_do_not_alternate_are_named(text, message):
    with pytest.raises(DataError, match=message):
        conversation(text)


# -- explain


def test_explain_shows_every_chunk_and_the_one_that_begins_the_answer(asked):
    found = asked(LONG)["chunks"]
    assert [c["chunk"] for c in found] == list(range(1, len(found) + 1))
    assert [c["stop"] for c in found[:-1]] == [c["start"] for c in found[1:]]
    assert found[-1]["turn"] and not any(c["turn"] for c in found[:-1])
    assert "".join(c["text"] for c in found) == f"User: {LONG}\nAssistant:"
    for chunk in found:
        assert chunk["expert"] in ("base", "a", "b", "c") and chunk["why"]
        assert sum(chunk["probabilities"].values()) == pytest.approx(1)


def test_explain_reads_a_conversation_from_standard_input(asked, monkeypatch):
    text = f"user: {LONG}\nassistant: {LONG}\nuser: again"
    monkeypatch.setattr("sys.stdin", io.StringIO(text))
    turns = [c for c in asked("-")["chunks"] if c["turn"]]
    assert len(turns) == 2
    assert asked(text)["chunks"] == asked(text)["chunks"]
    closed = [c for c in asked(f"user: {LONG}\nassistant: {LONG}")["chunks"] if c["turn"]]
    assert len(closed) == 1


def test_the_route_of_the_answer_is_the_one_under_which_it_was_generated(asked, router, micro_base):
    found = asked(LONG, "--answer", "--new-tokens", "20")
    model, tokenizer = load_base(str(micro_base))
    loaded = bem.load_router(model, router)
    ids = tokenizer(f"User: {LONG}\nAssistant:", return_tensors="pt")
    with loaded.router.watched() as tape:
        out = loaded.model.generate(
            input_ids=ids["input_ids"], max_new_tokens=20, do_sample=False, pad_token_id=0
        )
    said = out[0, ids["input_ids"].shape[1] :]
    assert found["answer"] == tokenizer.decode(said, skip_special_tokens=True).strip()
    records = [step.record[0] for step in tape if bool(step.real[0])]
    names = [loaded.router.space.name(int(record[0])) for record in records]
    assert [c["expert"] for c in found["chunks"]][: len(names)] == names
    assert found["chunks"][-1]["stop"] > ids["input_ids"].shape[1]


def test_explain_prints_a_table(capsys, router, micro_base, monkeypatch):
    monkeypatch.setenv("COLUMNS", "120")
    where = ("--router", router, "--base", micro_base)
    code, out, _ = bem_command(capsys, "route", "explain", "[b]hi[/b]", *where, "--answer")
    assert code == 0
    for what in ("expert", "strength", "why", "the conversation begins", "█", "[b]hi", "answer:"):
        assert what in out


def test_what_cannot_be_explained_is_one_message(capsys, router, micro_base, tmp_path):
    def said(text, folder, base, *options):
        return problem(
            capsys, "route", "explain", text, "--router", folder, "--base", base, *options
        )

    assert "No router at" in said("hi", tmp_path / "none", micro_base)
    assert "not a router" in said("hi", tmp_path, micro_base)
    assert "No base model 'nothing/here'" in said("hi", router, "nothing/here")
    assert "No device 'tpu' here" in said("hi", router, micro_base, "--device", "tpu")
    text = "user: hi\nassistant: ho"
    assert "ends with an answer" in said(text, router, micro_base, "--answer")
    other = make_llama()
    other.model.norm.weight.data += 1
    other.save_pretrained(tmp_path / "other")
    make_tokenizer().save_pretrained(tmp_path / "other")
    assert "was made for a base with digest" in said("hi", router, tmp_path / "other")


# -- export


@pytest.mark.parametrize("gates", [{"b": 1.0}, {"a": 0.5, "c": 1.0}])
def test_an_exported_lora_says_what_the_stack_says(capsys, router, micro_base, tmp_path, gates):
    one = ("--expert", "b") if len(gates) == 1 else ("--gates", json.dumps(gates))
    out = tmp_path / "lora"
    code, printed, _ = bem_command(
        capsys, "route", "export", router, "--base", micro_base, "--out", out, *one
    )
    assert code == 0 and f"rank {sum({'a': 4, 'b': 4, 'c': 2}[n] for n in gates)}" in printed
    base = load_base(str(micro_base))[0]
    bare = base(input_ids=IDS).logits
    changed = load_base(str(micro_base))[0]
    loaded = bem.load_router(load_base(str(micro_base))[0], router)
    parts = {name: loaded.updates_of(name) for name in gates}
    for site in parts[next(iter(gates))]:  # densely, by hand
        delta = sum(g * parts[n][site].u @ parts[n][site].v for n, g in gates.items())
        assert delta.norm() > RADIUS
        changed.get_submodule(site).weight.data += delta * RADIUS / delta.norm()
    said = PeftModel.from_pretrained(base, out)(input_ids=IDS).logits
    moved = float((bare - said).detach().abs().max())
    off = float((changed(input_ids=IDS).logits - said).detach().abs().max())
    assert moved > 1e-3 and off < 0.01 * moved  # controls are quantised
    if len(gates) == 1:
        route = torch.full_like(IDS, loaded.router.space.option("b"))
        wanted = loaded.model(input_ids=IDS, route=route).logits
        torch.testing.assert_close(said, wanted, rtol=1e-4, atol=1e-5)
    lora = json.loads((out / "adapter_config.json").read_text())
    assert lora["peft_type"] == "LORA" and lora["base_model_name_or_path"] == str(micro_base)
    again = ("route", "export", router, "--base", micro_base, "--out", out, *one)
    assert "exists already" in problem(capsys, *again)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ((), "Name either --expert NAME or --gates JSON"),
        (("--expert", "a", "--gates", '{"a": 1}'), "Name either"),
        (("--expert", "aa"), "No expert 'aa'. Did you mean 'a'? Experts: a, b, c."),
        (("--gates", "{a: 1}"), "--gates is not JSON"),
        (("--gates", '{"a": "full"}'), "--gates must give experts numbers"),
        (("--gates", "[1]"), "--gates must give experts numbers"),
        (("--gates", "{}"), "--gates must give experts numbers"),
        (("--gates", '{"a": 0}'), "no update to write"),
    ],
)
def test_what_cannot_be_exported_is_one_message(
    capsys, router, micro_base, tmp_path, options, message
):
    command = ("route", "export", router, "--base", micro_base, "--out", tmp_path / "x", *options)
    assert message in problem(capsys, *command)
    assert not (tmp_path / "x").exists()


# -- train router, distill


@pytest.fixture
def config(tmp_path, micro_base):
    """Conversations between two skills, a router over two experts, few steps of everything."""
    for task, answer in (("say", "yes"), ("tell", "the value")):
        for part, first in (("train", 0), ("dev", 12)):
            rows = [
                {"input": f"{task} it {i}", "references": [answer], "group": f"doc{i}"}
                for i in range(first, first + 12)
            ]
            lines = "".join(json.dumps(row) + "\n" for row in rows)
            (tmp_path / f"{task}.{part}.jsonl").write_text(lines)
    tasks = ", ".join(
        f"{{name: {t}, train: {tmp_path}/{t}.train.jsonl, dev: {tmp_path}/{t}.dev.jsonl, max_new_tokens: 3}}"
        for t in ("say", "tell")
    )
    path = tmp_path / "routing.yaml"
    path.write_text(f"""
name: small
output: {tmp_path}/runs
base: {micro_base}
seeds: [3]
data: {{tasks: [{tasks}], conversations: {{turns: 2}}}}
adapters: {{rank: 2}}
arms: [{{name: s0, role: baseline}}, {{name: ar1, route: ar1}}]
training: {{steps: 4, batch_size: 4, max_length: 128, checkpoint_every: 2}}
routing:
  expert_rank: 2
  router: {{chunk_size: 8}}
  cloning: {{rows: 10, epochs: 2, rounds: 0}}
  policy_gradient: {{iterations: 2, episodes: 4, batch_size: 4, max_new_tokens: 3}}
""")
    return path


def test_a_router_is_trained_step_by_step_and_found_again(capsys, config, tmp_path):
    folder = tmp_path / "runs" / "small" / "routing" / "seed-3"
    code, out, err = bem_command(capsys, "train", "router", config, "--stage", "ar0")
    assert (code, err) == (0, "") and f"Router: {folder / 'ar0'}" in out
    assert "policy gradient" not in out and not (folder / "ar1").exists()
    code, out, _ = bem_command(capsys, "train", "router", config)
    assert code == 0 and f"Router: {folder / 'ar1'}" in out
    assert "training experts" not in out  # they are there
    for number in (1, 2):
        assert f"policy gradient {number}/2 reward" in out
    for head in ("expert", "span", "rank", "strength", "expert at answers"):
        assert head in out
    assert "majority" in out and "bem route explain TEXT --router" in out
    assert "Seed 0 is none" in problem(capsys, "train", "router", config, "--seed", "0")
    assert "ar7" in problem(capsys, "train", "router", config, "--stage", "ar7")


def test_a_router_is_distilled_into_a_lora(capsys, router, config, tmp_path):
    out = tmp_path / "student"
    command = ("route", "distill", router, config, "--out", out, "--rank", "3")
    code, printed, err = bem_command(capsys, *command)
    assert (code, err) == (0, "") and "KL to the teacher on held-out rows" in printed
    base = bem.config.load(config).base
    ids = torch.arange(2, 20)[None]
    said = bem.load(load_base(base)[0], out / "adapter").model(input_ids=ids).logits
    plain = PeftModel.from_pretrained(load_base(base)[0], out / "lora")(input_ids=ids).logits
    torch.testing.assert_close(plain, said, rtol=1e-4, atol=1e-5)
    adapter = json.loads((out / "lora" / "adapter_config.json").read_text())
    assert adapter["r"] == 3
    assert bem_command(capsys, *command)[0] == 0  # nothing is left to do
    other = problem(capsys, *command[:-1], "2")
    assert "adapter.rank was 3, is 2" in other and "more. Set them back" in other
    again = ("route", "distill", out / "adapter", config, "--out", tmp_path / "x", "--rank", "1")
    assert bem_command(capsys, *again)[0] == 0  # any adapter can be a teacher
    assert "No router or adapter" in problem(
        capsys, "route", "distill", tmp_path / "none", config, "--out", tmp_path / "y"
    )
