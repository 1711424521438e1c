"""What the user sees of a run on rank 0: lines, also kept in train.log, and a bar on a terminal."""

import contextlib
import sys
from pathlib import Path

from tqdm import tqdm

from errors import printable
from files import open_own

MAX_LINE = 2000  # characters


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
            self._file = open_own(path, "ab")
            for line in self._early:
                self._write(line)

    def say(self, line: str) -> None:
        """One line for the user; what it quotes of data and names cannot steer the terminal."""
        if not self._speaks:
            return
        line = printable(line, MAX_LINE)
        with contextlib.suppress(OSError):  # the terminal may be gone; the run goes on
            tqdm.write(line, file=sys.stderr)
            sys.stderr.flush()
        if self._file is None:
            self._early.append(line)
        else:
            self._write(line)

    def end(self, text: str, *, is_shown: bool) -> None:
        """Why the program ends: in the file, and on the terminal if no other rank has said so."""
        text = "\n".join(printable(line, MAX_LINE) for line in text.split("\n"))
        with contextlib.suppress(OSError):  # it may not hide the exit code
            if is_shown:
                print(text, file=sys.stderr, flush=True)
        if self._file is not None:
            self._write(text)

    def _write(self, text: str) -> None:
        with contextlib.suppress(OSError):  # a full disk costs lines, not the run
            self._file.write(text.encode(errors="backslashreplace") + b"\n")

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
