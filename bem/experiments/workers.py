"""Cells side by side: several processes, each with the base of its own, take cells from one list.

Cells are independent and small models leave cores idle, so on a CPU with n cores n processes of one
torch thread do nearly n times the work. A cell's result does not depend on the number of processes.
"""

from __future__ import annotations

import os
import signal
import traceback
from multiprocessing import get_context
from pathlib import Path
from queue import Empty
from typing import Any

from transformers.utils import logging

from bem.config import ExperimentConfig
from bem.errors import BemError, TrainingError
from bem.experiments import start
from bem.experiments.cell import CellRunner
from bem.experiments.events import Show
from bem.experiments.inputs import load_inputs
from bem.experiments.plan import plan_arms
from bem.runs.folder import RunFolder

SECONDS_TO_SAVE = 60
"""How long an interrupted process may take to save its state."""


def run_apart(
    config: ExperimentConfig,
    cells: list[tuple[str, int, int, int]],
    workers: int,
    show: Show,
) -> None:
    """Train and measure cells in `workers` processes.

    Args:
        cells: (arm, seed, number, number of all cells).
        show: gets the events of all of them.
    Raises:
        BemError: what stopped one of them; the others save their state and stop too.
        OSError: likewise, a full disk for one.
        TrainingError: a process died without a word (out of memory).
        KeyboardInterrupt: passed on after all have saved their state.
    """
    context = get_context("spawn")
    todo, messages = context.Queue(), context.Queue()
    for item in [*cells, *[None] * workers]:
        todo.put(item)
    processes = [
        context.Process(target=start.work, args=(config, todo, messages), daemon=True)
        for _ in range(workers)
    ]
    for process in processes:
        process.start()
    try:
        _listen(processes, messages, show)
    except BaseException:
        for process in processes:
            if process.is_alive() and process.pid:
                os.kill(process.pid, signal.SIGINT)
        raise
    finally:
        for process in processes:
            process.join(SECONDS_TO_SAVE)
            process.terminate()


def _listen(processes: list[Any], messages: Any, show: Show) -> None:
    """Pass on the processes' messages until all have ended."""
    running = len(processes)
    while running:
        try:
            kind, value = messages.get(timeout=2)
        except Empty:
            dead = [p.exitcode for p in processes if p.exitcode not in (None, 0)]
            if dead:
                raise TrainingError(
                    f"a training process died with exit code {dead[0]} (-9: out of memory?). "
                    "The same command goes on; --set workers=1 needs less memory."
                ) from None
            continue
        if kind == "event":
            show(value)
        elif kind == "ended":
            running -= 1
        elif kind == "refused":
            raise _rebuilt(*value)
        elif kind == "system":
            raise OSError(*value)
        else:
            raise RuntimeError(f"a training process failed:\n{value}")


def work(config: ExperimentConfig, todo: Any, messages: Any) -> None:
    """A process: cells from the list until it is empty."""
    # Behind nohup or in a script's background Ctrl-C is ignored, and children inherit that: without
    # this they would not hear the parent's request to save and stop.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    try:
        _cells(config, todo, lambda event: messages.put(("event", event)))
    except KeyboardInterrupt:
        pass
    except BemError as error:
        messages.put(("refused", (type(error), str(error))))
    except OSError as error:
        messages.put(("system", (error.errno, error.strerror, error.filename)))
    except Exception:  # a defect of ours: its traceback belongs in the parent's report
        messages.put(("failed", traceback.format_exc()))
    messages.put(("ended", None))


def _cells(config: ExperimentConfig, todo: Any, show: Show) -> None:
    config = config.model_copy(update={"threads": config.threads or 1})
    folder = RunFolder(Path(config.output) / config.name)
    inputs = load_inputs(config, folder, show)
    plans = {plan.arm.name: plan for plan in plan_arms(inputs.model, config)}
    runner = CellRunner(inputs, show)
    while (cell := todo.get()) is not None:
        arm, seed, number, of = cell
        runner.one_cell(plans[arm], seed, number, of)


def _rebuilt(kind: type[BemError], message: str) -> BemError:
    """An error as it was raised in another process (some have constructors of their own)."""
    error = kind.__new__(kind)
    error.args = (message,)
    return error
