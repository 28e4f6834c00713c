"""Exit code 1 means REJECT and nothing else: no crash, kill or broken pipe may end with it."""

import os
import subprocess
import sys

import pytest

from bem.cli import DEFECT, INTERRUPTED, PROBLEM, UNREAD, main


class Panic(BaseException):
    """As pyo3's, which is no Exception."""


def exit_of(arguments=("doctor",)):
    with pytest.raises(SystemExit) as stopped:
        main(list(arguments))
    return stopped.value.code


@pytest.fixture
def doctor_raises(monkeypatch):
    """`bem doctor` ends in this error."""

    def raising(error):
        def stop(*_, **__):
            raise error

        monkeypatch.setattr("bem.cli.doctor.examine", stop)

    return raising


@pytest.mark.parametrize(
    "error",
    [
        ZeroDivisionError("division by zero"),
        RecursionError("too deep"),
        MemoryError(),
        UnicodeEncodeError("ascii", "\u2212", 0, 1, "no"),
        EOFError(),
        Panic("rust"),
        GeneratorExit(),
        SystemExit(1),
        SystemExit(2),
        SystemExit("a library gave up"),
    ],
)
def test_a_defect_is_told_with_its_traceback_and_never_exits_as_a_verdict(
    capsys, doctor_raises, error
):
    doctor_raises(error)
    assert exit_of() == DEFECT
    assert "Traceback" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (KeyboardInterrupt(), INTERRUPTED),
        (SystemExit(0), 0),
        (SystemExit(None), 0),
        (PermissionError(13, "Permission denied", "scores.csv"), PROBLEM),
        (BrokenPipeError(), UNREAD),
    ],
)
def test_what_is_no_defect_has_a_code_of_its_own(capsys, doctor_raises, error, code):
    doctor_raises(error)
    assert exit_of() == code
    assert "Traceback" not in capsys.readouterr().err


def test_a_broken_installation_is_no_verdict():
    block = "import sys; sys.modules['rich.console'] = None; from bem.cli import main; main()"
    done = subprocess.run([sys.executable, "-c", block, "doctor"], capture_output=True, text=True)
    assert done.returncode == DEFECT and "ModuleNotFoundError" in done.stderr


@pytest.mark.parametrize("stream", ["stdout", "stderr"])
def test_a_reader_that_leaves_makes_no_verdict(stream):
    reader, writer = os.pipe()
    os.close(reader)
    arguments = ["--help"] if stream == "stdout" else ["validatee"]
    code = "from bem.cli import main; main()"
    pipes = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL, stream: writer}
    done = subprocess.run([sys.executable, "-c", code, *arguments], timeout=300, **pipes)
    os.close(writer)
    assert done.returncode == (UNREAD if stream == "stdout" else PROBLEM)


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full here")
def test_a_full_disk_behind_the_output_is_no_verdict(tmp_path):
    (tmp_path / "a.csv").write_text("id,em\nq1,1\n")
    code = "from bem.cli import main; main()"
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, "-c", code, "validate", "a.csv", "a.csv"],
            cwd=tmp_path, stdout=full, stderr=full, timeout=300, env={**os.environ, "PYTHONPATH": os.getcwd()},
        )  # fmt: skip
    assert done.returncode not in (0, 1, 2)
