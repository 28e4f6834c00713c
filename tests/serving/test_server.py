"""`bem serve` as a process: it says where it listens, answers, and lets answers finish when it is told to stop."""

import re
import signal
import subprocess
import sys
from importlib import import_module

import pytest

from bem.config.serving import serving_config
from bem.errors import ConfigError, MissingExtra
from bem.serving import server as serving
from tests.serving.running import served
from tests.serving.test_api import complete


@pytest.mark.slow
def test_a_polite_kill_lets_answers_finish(micro_base, tmp_path):
    from openai import OpenAI

    command = [sys.executable, "-m", "bem", "serve", "--base", str(micro_base), "--port", "0"]
    process = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, text=True)
    try:
        lines = iter(process.stdout.readline, "")
        url = next(found[0] for line in lines if (found := re.search(r"http://\S+/v1", line)))
        api = OpenAI(base_url=url, api_key="none", max_retries=0)
        options = {"max_tokens": 300, "seed": 1, "extra_body": {"ignore_eos": True}}
        whole = complete(api, **options).choices[0].text
        stream = complete(api, stream=True, **options)
        pieces = [next(stream)]
        process.send_signal(signal.SIGTERM)
        pieces += list(stream)
        assert "".join(piece.choices[0].text for piece in pieces) == whole
        assert process.wait(60) == 0
    finally:
        process.kill()
        process.stdout.close()


def test_a_port_that_is_taken_is_named():
    with served() as running:
        port = running.socket.getsockname()[1]
        with pytest.raises(ConfigError, match=f":{port} cannot be listened on"):
            serving.Server(serving_config({"port": port}, None, None))


def test_what_is_not_installed_is_named_with_its_pip_line(monkeypatch):
    def missing(name):
        if name == "uvicorn":
            raise ImportError(name)
        return import_module(name)

    monkeypatch.setattr(serving, "import_module", missing)
    with pytest.raises(MissingExtra, match=r"pip install 'bem\[serve\]'"):
        serving.check_installed()


def test_options_become_a_config_and_typos_are_named():
    config = serving_config({"base": "x"}, ["3fa9=0.1"], ["slots=2", "log_prompts=true"])
    assert (config.slots, config.log_prompts, config.canary) == (2, True, {"3fa9": 0.1})
    for canary, settings, name in (
        (["3fa9"], None, "canary"),
        (["3fa9=2"], None, "canary"),
        (None, ["slot=2"], "slots"),
        (None, ["port=99999"], "port"),
    ):
        with pytest.raises(ConfigError, match=name):
            serving_config({}, canary, settings)
