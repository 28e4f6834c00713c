"""Who is let in, and how often; what is written down of a key cannot be used as one."""

import stat

import pytest

from bem.errors import ConfigError, Refused
from bem.serving.keys import ANYBODY, Key, KeyRing, Quotas, add_key, read_keys, remove_key


def key(**limits) -> Key:
    return Key(name="ada", sha256="0" * 64, created="", **limits)


def test_a_key_opens_and_is_nowhere_written(tmp_path):
    path = tmp_path / "keys.json"
    secret = add_key(path, "ada")
    assert secret not in path.read_text()
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert KeyRing(path).owner(f"Bearer {secret}").name == "ada"


@pytest.mark.parametrize("header", [None, "", "Bearer", "Bearer x", "Basic {}", "{}", "Bearer {}x"])
def test_anything_else_does_not(tmp_path, header):
    secret = add_key(tmp_path / "keys.json", "ada")
    with pytest.raises(Refused) as refused:
        KeyRing(tmp_path / "keys.json").owner(header and header.format(secret))
    assert refused.value.status == 401


def test_without_a_file_nobody_needs_a_key():
    assert KeyRing(None).owner(None) is ANYBODY


def test_keys_come_and_go_while_the_server_runs(tmp_path):
    path = tmp_path / "keys.json"
    first = add_key(path, "ada")
    ring = KeyRing(path)
    second = add_key(path, "bob")
    assert ring.owner(f"Bearer {second}").name == "bob"
    remove_key(path, "ada")
    with pytest.raises(Refused):
        ring.owner(f"Bearer {first}")
    path.write_text("{")  # damaged: those from before hold
    assert ring.owner(f"Bearer {second}").name == "bob"


def test_names_are_taken_once_and_are_names(tmp_path):
    path = tmp_path / "keys.json"
    add_key(path, "ada")
    for wrong in ("ada", "", "a b", "../x"):
        with pytest.raises(ConfigError):
            add_key(path, wrong)
    with pytest.raises(ConfigError, match="no key 'eve'"):
        remove_key(path, "eve")
    assert [each.name for each in read_keys(path).keys] == ["ada"]
    with pytest.raises(ConfigError, match="bem keys add"):
        KeyRing(tmp_path / "none.json")


def test_a_minute_fills_evenly():
    now = [100.0]
    quotas, ada = Quotas(lambda: now[0]), key(requests_per_minute=2)
    for left in ("1", "0"):
        assert quotas.begin(ada)["x-ratelimit-remaining-requests"] == left
        quotas.end(ada)
    with pytest.raises(Refused) as refused:
        quotas.begin(ada)
    assert (refused.value.status, refused.value.retry_after_s) == (429, 30)
    now[0] += 29
    with pytest.raises(Refused):
        quotas.begin(ada)
    now[0] += 1
    quotas.begin(ada)


def test_so_many_at_once_and_no_more():
    quotas, ada = Quotas(lambda: 0.0), key(concurrent=2)
    quotas.begin(ada), quotas.begin(ada)
    with pytest.raises(Refused):
        quotas.begin(ada)
    quotas.end(ada)
    quotas.begin(ada)
