"""One line for every step that counts, and no half lines."""

import errno
import json

import pytest

from bem.training.metrics import MetricsLog
from bem.training.trainer import StepResult


def row(step):
    return StepResult(step, 1.0 / step, 0.0, 1.0, 0.1, 10, 0.05, 0.1)


def lines(folder):
    text = (folder / "metrics.jsonl").read_text()
    return [StepResult(**json.loads(line)) for line in text.splitlines()]


def test_what_a_killed_run_wrote_behind_its_last_state_goes(tmp_path):
    log = MetricsLog(tmp_path, 0)
    for step in (1, 2, 3):
        log.add(row(step))
    log.close()
    resumed = MetricsLog(tmp_path, steps=1)
    resumed.add(row(2))
    resumed.close()
    assert lines(tmp_path) == [row(1), row(2)]


def test_a_line_is_written_whole_or_not_at_all(tmp_path):
    log = MetricsLog(tmp_path, 0)
    log.add(row(1))

    class Full:
        def __init__(self, file):
            self.file, self.tell, self.truncate = file, file.tell, file.truncate

        def write(self, content):
            self.file.write(content[:10])
            raise OSError(errno.ENOSPC, "No space left on device")

        def close(self):
            self.file.close()

    log._file = Full(log._file)
    with pytest.raises(OSError, match="No space left"):
        log.add(row(2))
    log.close()
    assert lines(tmp_path) == [row(1)]
