"""A release acts on its base as the checkpoint did from which it came, and on no other."""

import pytest
import torch

import bem
from bem.errors import BaseMismatch
from bem.routing.mount import blank_expert, mount
from bem.runs.loading import attach_release, base_of, load_current
from bem.runs.release import read_content
from bem.runs.store import Store
from tests.conftest import make_llama
from tests.runs.contents import make_grounds


@pytest.fixture
def store(tmp_path):
    return Store(tmp_path / "store")


def logits(attached):
    with torch.inference_mode():
        return attached.model(torch.arange(40)[None]).logits


def trained(variant: str):
    """An adapter that changes something."""
    attached = bem.attach(make_llama(), variant, rank=2)
    with torch.no_grad():
        for parameter in attached.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return attached


@pytest.mark.parametrize("variant", ["s0", "v1"])
def test_an_adapter_comes_back_bit_for_bit(store, tmp_path, variant):
    attached = trained(variant)
    content = read_content(attached.save(tmp_path / "saved"))
    release = store.promote(content, make_grounds(tmp_path))
    back, taken = load_current(store, make_llama())
    assert taken.release == release and back.version == attached.version
    assert release.version == attached.version.digest
    assert torch.equal(logits(back), logits(attached))


def test_a_router_comes_back_and_shares_experts_with_the_next(store, tmp_path):
    experts = [blank_expert(make_llama(), name, 2) for name in ("sql", "json", "chat")]
    for expert in experts:
        for update in expert.updates.values():
            update.u.add_(torch.randn_like(update.u) * 0.1)
    mounted = mount(make_llama(), experts)
    first = read_content(mounted.save(tmp_path / "first"))
    other = mount(make_llama(), [*experts[:2], blank_expert(make_llama(), "chat", 3)])
    second = read_content(other.save(tmp_path / "second"))
    for content in (first, second):
        store.promote(content, make_grounds(tmp_path))
    for name in ("sql", "json"):
        weights = f"experts/{name}/adapter_model.safetensors"
        assert first.files[weights] == second.files[weights]
    kept = len(list(store.shelf.objects.iterdir()))
    assert kept < len(first.files) + len(second.files)
    back = attach_release(store, store.find(first.version), make_llama())
    assert isinstance(back, bem.Mounted) and back.version == mounted.version
    ids = torch.arange(40)[None]
    with torch.inference_mode():
        routed = [m.model(ids, route=ids * 0 + 1).logits for m in (back, mounted)]
    assert torch.equal(*routed)


def test_another_base_is_refused_and_left_as_it_was(store, tmp_path):
    store.promote(read_content(trained("s0").save(tmp_path / "saved")), make_grounds(tmp_path))
    (release,) = [store.current()]
    for model in (make_llama(hidden_size=64), make_llama().bfloat16()):
        before = dict(model.named_modules())
        with pytest.raises(BaseMismatch, match="made for a base with digest"):
            load_current(store, model)
        with pytest.raises(BaseMismatch, match=f"release {release.short} was made for a base"):
            attach_release(store, release, model)
        assert dict(model.named_modules()) == before


def test_while_nothing_is_promoted_or_after_a_rollback_to_it_the_bare_base_is_taken(
    store, tmp_path
):
    content = read_content(trained("s0").save(tmp_path / "saved"))
    store.add(content, "saved")
    assert load_current(store, make_llama())[0] is None
    store.promote(content, make_grounds(tmp_path))
    assert load_current(store, make_llama())[0] is not None
    store.rollback(reason="x")
    attached, taken = load_current(store, make_llama())
    assert attached is None and taken.why == "entry 3 put it into use"


def test_the_base_is_that_of_what_is_in_use_or_of_what_was_put_in_last(store, tmp_path):
    bases = {"first": "somewhere/small", "second": "somewhere/large", "nameless": ""}
    contents = {}
    for name, base in bases.items():
        attached = trained("v1" if name == "second" else "s0")
        attached.base.name_or_path = base
        contents[name] = read_content(attached.save(tmp_path / name))
    store.add(contents["nameless"], "nameless")
    assert base_of(store) is None
    store.add(contents["first"], "first")
    assert base_of(store) == ("somewhere/small", "float32")
    store.promote(contents["second"], make_grounds(tmp_path))
    store.add(contents["first"], "again")
    assert base_of(store) == ("somewhere/large", "float32")
