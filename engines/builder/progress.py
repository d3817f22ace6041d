"""A build's progress, and its end at Ctrl-C."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

Progress = Callable[[str, int, int | None], None]
"""Called with a phase's name, the steps done, and how many there are; None for the number when the phase is over."""


def make_monitor(trt: Any, on_progress: Progress | None, stop: threading.Event) -> Any:
    """Return a progress monitor that passes progress on, and ends the build once `stop` is set.

    Where nobody wants to know, the monitor is still what makes a build interruptible.
    """
    say: Progress = on_progress or (lambda _phase, _done, _total: None)

    class Monitor(trt.IProgressMonitor):
        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)
            self._steps: dict[str, int] = {}

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            self._steps[phase_name] = num_steps
            say(phase_name, 0, num_steps)

        def step_complete(self, phase_name: str, step: int) -> bool:
            say(phase_name, step + 1, self._steps.get(phase_name, step + 1))
            return not stop.is_set()

        def phase_finish(self, phase_name: str) -> None:
            say(phase_name, self._steps.pop(phase_name, 0), None)

    return Monitor()


def run_interruptibly(work: Callable[[], Any], stop: threading.Event) -> Any:
    """Run `work` in a thread, so that Ctrl-C reaches this one; it then ends at the monitor's next step.

    An exception raised inside TensorRT's callbacks would cross C++ frames that do not expect one.
    """
    results: list[Any] = []
    failures: list[BaseException] = []
    done = threading.Event()

    def run() -> None:
        try:
            results.append(work())
        except BaseException as error:
            failures.append(error)
        finally:
            done.set()

    thread = threading.Thread(target=run, name="builder")
    thread.start()
    interrupted = False
    # an event, not join(): Python 3.11 takes a thread for ended whose join() was interrupted
    while not done.is_set():
        try:
            done.wait(0.1)
        except KeyboardInterrupt:
            interrupted = True
            stop.set()
    thread.join()
    if interrupted:
        raise KeyboardInterrupt
    if failures:
        raise failures[0]
    return results[0]
