"""A signal asks for a stop at the next step boundary, or ends what has nothing to save at once."""

import contextlib
import os
import signal
from collections.abc import Iterator

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)


class Stopped(KeyboardInterrupt):
    """A stop request where nothing need be saved. Libraries let a KeyboardInterrupt through."""


def hold() -> None:
    """Keep stop signals waiting until `StopRequest.listen`: importing torch takes seconds."""
    signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)


@contextlib.contextmanager
def held() -> Iterator[None]:
    """Keep stop signals waiting meanwhile; processes and threads begun here never get them."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


class StopRequest:
    """Set by SIGTERM, SIGINT, SIGUSR1 and a closed terminal's SIGHUP; read between steps.

    A second Ctrl-C ends the process where it is.
    """

    def __init__(self, at_second: str = "ended at once; the last checkpoint stands") -> None:
        self.at_second = at_second
        self.name: str | None = None  # of what asked
        self.is_saving_needed = False  # from the first step to the last
        self._raises = False

    def listen(self) -> None:
        """Take over these signals of this process, but not what nohup has it ignore."""
        for number in SIGNALS:
            if signal.getsignal(number) != signal.SIG_IGN:
                signal.signal(number, self._note)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)  # and take what came since `hold`

    def is_set(self, step: int) -> bool:
        """Whether to stop after `step`, the number of steps taken."""
        return self.name is not None

    @contextlib.contextmanager
    def at_once(self) -> Iterator[None]:
        """Within, a stop request raises Stopped wherever it comes, unless saving is needed."""
        before, wanted = self._raises, not self.is_saving_needed
        self._raises = wanted
        try:
            self._raise_if(wanted)
            yield
            self._raise_if(wanted)  # Python drops what is raised in a destructor
        except BaseException:
            self._raises = False  # what cleans up is not to be interrupted
            raise
        else:
            self._raises = before

    def _raise_if(self, wanted: bool) -> None:
        if wanted and self.name:
            self._raises = False
            raise Stopped(f"stopped by {self.name}; run the same command to go on")

    def _note(self, number: int, frame: object) -> None:
        if number == signal.SIGINT and self.name == "SIGINT":
            os.write(2, f"\n{self.at_second}\n".encode())
            os._exit(128 + number)
        self.name = signal.Signals(number).name
        self._raise_if(self._raises)


def ignore_in_worker(worker: int) -> None:
    """For DataLoader workers: torchrun and terminals signal them too, and the trainer decides."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
