"""How the program ends: exit codes, and the exception that carries a refusal to the user."""

# sysexits.h where it has a fitting code; 75 (EX_TEMPFAIL) tells schedulers to run the job again.
OK = 0
USAGE = 64
BAD_DATA = 65
MISSING = 66  # data, weights or a valid checkpoint that cannot be had
UNAVAILABLE = 69  # run held by another trainer, unusable GPU, missing package
CRASH = 70
CANNOT_WRITE = 73
STOPPED = 75
NON_FINITE = 76
BAD_CONFIG = 78


class Refusal(Exception):
    """An end that is not a crash: one line for the user and the exit code of the process.

    `is_agreed`: every rank raises it, so that none is left waiting; see ddp.World.agree.
    """

    def __init__(self, exit_code: int, message: str, *, is_agreed: bool = False):
        self.exit_code = exit_code
        self.is_agreed = is_agreed
        self.message = printable(message, limit=2000)  # it may quote names and data
        super().__init__(self.message)


def printable(text: object, limit: int = 80) -> str:
    """`text` on one line of at most `limit` characters, control and bidirectional marks escaped."""
    shown = str(text)[: limit + 1]
    line = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in shown)
    return line if len(line) <= limit else line[: limit - 3] + "..."
