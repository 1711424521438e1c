"""A signal asks the loop to stop at the next step boundary; a second Ctrl-C ends at once."""

import os
import signal

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)


class StopRequest:
    """Set by SIGTERM, SIGINT, SIGUSR1 and a closed terminal's SIGHUP; read between steps."""

    def __init__(self) -> None:
        self.name: str | None = None

    def listen(self) -> None:
        """Take over these signals of this process, but not what nohup has it ignore."""
        for number in SIGNALS:
            if signal.getsignal(number) != signal.SIG_IGN:
                signal.signal(number, self._note)

    def is_set(self, step: int) -> bool:
        """Whether to stop after `step`, the number of steps taken."""
        return self.name is not None

    def _note(self, number: int, frame: object) -> None:
        if number == signal.SIGINT and self.name == "SIGINT":
            os.write(2, b"\nended at once; the last checkpoint stands\n")
            os._exit(128 + number)
        self.name = signal.Signals(number).name


def ignore_in_worker(worker: int) -> None:
    """For DataLoader workers: torchrun and terminals signal them too, and the trainer decides."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
