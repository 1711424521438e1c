"""What the user sees of a run on rank 0: lines, also kept in train.log, and a bar on a terminal."""

import contextlib
import sys
from pathlib import Path

from tqdm import tqdm


class Console:
    """Lines and a progress bar on standard error; silent on ranks other than 0."""

    def __init__(self, speaks: bool):
        self._speaks = speaks
        self._bar: tqdm | None = None
        self._file = None
        self._early: list[str] = []

    def record(self, path: Path) -> None:
        """From now on keep the lines in `path` too, those said so far included."""
        if self._speaks and self._file is None:
            self._file = open(path, "a", encoding="utf-8")  # noqa: SIM115
            for line in self._early:
                self._write(line)

    def say(self, line: str) -> None:
        """One line for the user."""
        if not self._speaks:
            return
        with contextlib.suppress(OSError):  # the terminal may be gone; the run goes on
            tqdm.write(line, file=sys.stderr)
            sys.stderr.flush()
        if self._file is None:
            self._early.append(line)
        else:
            self._write(line)

    def end(self, line: str, *, is_shown: bool) -> None:
        """Why the program ends: in the file, and on the terminal if no other rank has said so."""
        with contextlib.suppress(OSError):  # neither may hide the exit code
            if is_shown:
                print(line, file=sys.stderr, flush=True)
        with contextlib.suppress(OSError):
            if self._file is not None:
                self._write(line)

    def _write(self, line: str) -> None:
        self._file.write(line + "\n")
        self._file.flush()

    def start_bar(self, done: int, total: int) -> None:
        """A bar over `total` steps where standard error is a terminal."""
        hidden = not (self._speaks and sys.stderr.isatty())
        self._bar = tqdm(
            total=total, initial=done, unit="step", disable=hidden, dynamic_ncols=True, leave=False
        )

    def advance(self) -> None:
        """One step more."""
        if self._bar is not None:
            self._bar.update()

    def show(self, line: str) -> None:
        """Numbers of the moment: on the bar, or as a line of its own where there is none."""
        if self._bar is None or self._bar.disable:
            self.say(line)
        else:
            self._bar.set_postfix_str(line, refresh=False)

    def stop_bar(self) -> None:
        """Take the bar away."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None
