"""A detector in another process says what it says in this one; when it dies or hangs, that is an error."""

import os
import signal

import pytest

from bem.safety.detector import ViolationDetector
from bem.safety.worker import DetectorDown, DetectorProcess


@pytest.fixture(scope="module")
def process():
    detector = DetectorProcess(timeout_ms=30_000)
    yield detector
    detector.close()


def test_it_says_what_the_detector_says(process):
    here = ViolationDetector()
    for text in ("", "name a colour", "mail ada@example.org", "ü \u2028 \ud800\n", "x" * 200_001):
        assert process.check(text) == here.check(text)


def test_one_that_hangs_is_an_error_in_time_and_is_started_anew(process):
    process.check("a")
    first, process.timeout_s = process.pid, 0.3
    os.kill(first, signal.SIGSTOP)
    with pytest.raises(DetectorDown, match=r"within 0\.3 s"):
        process.check("b")
    assert not process.alive
    process.timeout_s = 30.0
    assert process.check("b").error == "" and process.pid != first


def test_one_that_was_killed_is_started_anew_and_one_that_cannot_start_is_an_error(process):
    process.check("a")
    os.kill(process.pid, signal.SIGKILL)
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
    assert process.check("b").error == ""
    broken = DetectorProcess("/nowhere")
    with pytest.raises(DetectorDown):
        broken.check("a")
    assert not broken.alive
