"""A terminal that is drawn on, and given back as it was however the program ends."""

import contextlib
import os
import select
import signal
import sys
import termios

ENTER = "\x1b[?1049h\x1b[?25l"  # the other screen, without a cursor
LEAVE = "\x1b[?25h\x1b[?1049l"
ENDING = (signal.SIGTERM, signal.SIGHUP)


class Terminal:
    """Standard output as a picture, within a `with` block.

    A process beside this one waits for its end and gives the terminal back where this one could
    not, as after SIGKILL. Ctrl-Z shows the shell's screen, `fg` this one again.
    """

    def __enter__(self) -> "Terminal":
        self._input = _input()
        self._before = termios.tcgetattr(self._input) if self._input is not None else None
        self._farewell = self._guard()
        self._woken, waker = os.pipe()
        for end in (self._woken, waker):
            os.set_blocking(end, False)
        signal.set_wakeup_fd(waker, warn_on_full_buffer=False)
        for number in ENDING:
            signal.signal(number, _leave)
        signal.signal(signal.SIGWINCH, lambda *_: None)  # only so that `wait` is woken
        signal.signal(signal.SIGTSTP, self._suspend)
        self._take()
        return self

    def __exit__(self, *_: object) -> None:
        signal.set_wakeup_fd(-1)
        with contextlib.suppress(OSError, termios.error):  # the terminal may be gone
            self._give_back()
        with contextlib.suppress(OSError):
            os.write(self._farewell, b"!")
        os.close(self._farewell)

    @property
    def size(self) -> tuple[int, int]:
        """Columns and rows, at this moment."""
        columns, rows = os.get_terminal_size(sys.stdout.fileno())
        return columns or 80, rows or 24

    def draw(self, lines: list[str]) -> None:
        """Show these lines from the top, in place of what was shown."""
        text = "".join(f"{line}\x1b[K\r\n" for line in lines[:-1]) + "".join(lines[-1:])
        sys.stdout.write(f"\x1b[H{text}\x1b[K\x1b[J")
        sys.stdout.flush()

    def wait(self, seconds: float) -> str:
        """Until a key, a resize, a signal or so many seconds; the keys pressed."""
        sources = [self._woken] + ([self._input] if self._input is not None else [])
        ready, _, _ = select.select(sources, [], [], seconds)
        if self._woken in ready:
            os.read(self._woken, 4096)
        if self._input is None or self._input not in ready:
            return ""
        try:
            keys = os.read(self._input, 64)
        except OSError:
            keys = b""
        if not keys:  # it was closed, and would be ready for ever
            self._input = None
        return keys.decode(errors="replace")

    def _take(self) -> None:
        if self._before is not None:
            quiet = [*self._before[:3], self._before[3] & ~(termios.ECHO | termios.ICANON)]
            termios.tcsetattr(self._input, termios.TCSADRAIN, [*quiet, *self._before[4:]])
        sys.stdout.write(ENTER)
        sys.stdout.flush()

    def _give_back(self) -> None:
        if self._before is not None and self._input is not None:
            termios.tcsetattr(self._input, termios.TCSADRAIN, self._before)
        sys.stdout.write(LEAVE)
        sys.stdout.flush()

    def _suspend(self, number: int, frame: object) -> None:
        self._give_back()
        os.kill(os.getpid(), signal.SIGSTOP)  # held here until `fg`
        self._take()

    def _guard(self) -> int:
        """Start the process that waits; what is written to the descriptor lets it go in peace."""
        waits, farewell = os.pipe()
        if os.fork():
            os.close(waits)
            return farewell
        try:
            os.setsid()  # out of reach of the terminal's signals, and of whoever kills our group
            os.close(farewell)
            if os.read(waits, 1) != b"!":
                os.write(sys.stdout.fileno(), LEAVE.encode())
                if self._before is not None:
                    termios.tcsetattr(self._input, termios.TCSANOW, self._before)
        finally:
            os._exit(0)


def _leave(number: int, frame: object) -> None:
    raise SystemExit(128 + number)


def _input() -> int | None:
    """Standard input, if it is the terminal and we are who it listens to."""
    try:
        descriptor = sys.stdin.fileno()
        in_front = os.isatty(descriptor) and os.tcgetpgrp(descriptor) == os.getpgrp()
    except (AttributeError, OSError, ValueError):
        return None
    return descriptor if in_front else None
