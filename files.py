"""Files that others may have touched: read with care, replaced whole, held by one process.

Nothing here waits for a FIFO, follows a link to write, or reads more than it was asked to.
"""

import contextlib
import errno
import fcntl
import json
import os
import re
import shutil
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO, BinaryIO

from errors import CANNOT_WRITE, Refusal, printable

MAX_JSON = 1 << 30  # bytes; ours have kB, but for the confusion of hundreds of labels by slice
TEMPORARY = re.compile(r"\.[0-9a-f]{24}\.\w+")  # what `building` fills, beside what it is for
KINDS = (
    (stat.S_ISDIR, "is a folder"),
    (stat.S_ISLNK, "is a link"),
    (stat.S_ISFIFO, "is a FIFO"),
    (stat.S_ISSOCK, "is a socket"),
)


def open_regular(path: str | Path) -> BinaryIO:
    """A regular file to be read, or the null device, which is an empty one.

    Raises OSError, its `strerror` saying what the path is instead.
    """
    try:
        # Without O_NONBLOCK a FIFO would be waited for until somebody writes to it.
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except ValueError:  # a NUL in its name
        raise OSError(errno.EINVAL, "is no file name") from None
    found = os.fstat(descriptor)
    if not stat.S_ISREG(found.st_mode) and found.st_rdev != os.stat(os.devnull).st_rdev:
        os.close(descriptor)
        raise OSError(errno.EINVAL, f"{_kind(found.st_mode)}; expected a regular file")
    return open(descriptor, "rb")


def _kind(mode: int) -> str:
    return next((words for test, words in KINDS if test(mode)), "is a device")


def read_bytes(path: str | Path, limit: int) -> bytes:
    """A regular file's bytes; OSError if there are more than `limit` of them."""
    with open_regular(path) as file:
        raw = file.read(limit + 1)
    if len(raw) > limit:
        raise OSError(errno.EFBIG, f"has more than {limit:,} bytes")
    return raw


def read_json(path: Path) -> dict | None:
    """The object in a JSON file, or None if there is no such file or it holds something else."""
    try:
        value = json.loads(read_bytes(path, MAX_JSON))
    except (OSError, ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def open_own(path: Path, mode: str) -> IO:
    """A file of ours to be written, "w", "wb", "a" or "ab"; OSError if it is a link or no file."""
    flags = os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    flags |= os.O_APPEND if "a" in mode else os.O_TRUNC
    try:
        descriptor = os.open(path, flags, 0o666)
        found = os.fstat(descriptor).st_mode
    except OSError as error:
        try:
            found = os.lstat(path).st_mode  # a link and a FIFO cannot be opened so
        except OSError:
            raise error from None
        if stat.S_ISREG(found):
            raise
        raise OSError(errno.EINVAL, f"{_kind(found)}; expected a regular file") from None
    if not stat.S_ISREG(found):
        os.close(descriptor)
        raise OSError(errno.EINVAL, f"{_kind(found)}; expected a regular file")
    # The log counts on each write reaching the system, or failing, when it is made.
    options = {"buffering": 0} if mode == "ab" else {}
    return open(descriptor, mode, encoding=None if "b" in mode else "utf-8", **options)


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[IO[str]]:
    """A text file that takes the place of `path` once all is written, in one step and durably.

    It gets the permissions of what was there.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with open_own(temporary, "w") as file:
            with contextlib.suppress(OSError):  # none there, or a file of somebody else
                os.fchmod(file.fileno(), os.stat(path).st_mode & 0o777)
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise
    fsync_folder(path.parent)


def write_text(path: Path, text: str) -> None:
    """Replace a file: a reader sees the old one or the new one."""
    with replacing(path) as file:
        file.write(text)


def write_json(path: Path, value: object) -> None:
    """`write_text` of JSON."""
    write_text(path, json.dumps(value, indent=1, ensure_ascii=False) + "\n")


def publish(temporary: Path, folder: Path) -> None:
    """Rename a finished folder to its final name, durably."""
    fsync_folder(temporary)
    temporary.rename(folder)
    fsync_folder(folder.parent)


def fsync_folder(folder: Path) -> None:
    """Return once a folder's entries are on disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def writing(path: Path, *others: type[Exception]) -> Iterator[None]:
    """What goes wrong with the disk within is Refusal 73, naming `path`; `others` count as such."""
    try:
        yield
    except (OSError, *others) as error:
        reason = getattr(error, "strerror", None) or error
        raise Refusal(
            CANNOT_WRITE, f"{printable(path, 300)}: cannot be written: {reason}"
        ) from None


def refuse_links(folder: Path) -> None:
    """Refusal 73 if something in our `folder` is neither a file nor a folder: never written to."""
    for entry in os.scandir(folder):
        mode = entry.stat(follow_symlinks=False).st_mode
        if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
            where = printable(entry.path, 300)
            raise Refusal(CANNOT_WRITE, f"{where}: {_kind(mode)}, which is not written through")


def hold(path: Path) -> IO | None:
    """The file, locked by this process until it is closed; None if another process holds it.

    lockf, as flock would outlive us in forked workers. A path that was unlinked while it was locked
    would be nobody's: it is then made and locked anew. Raises OSError if it cannot be made.
    """
    while True:
        file = open_own(path, "a")
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.path.samestat(os.fstat(file.fileno()), os.stat(path)):
                return file
        except FileNotFoundError:
            pass
        except (BlockingIOError, PermissionError):  # which of the two depends on the system
            file.close()
            return None
        file.close()


@contextlib.contextmanager
def building(folder: Path) -> Iterator[Path]:
    """A new folder that becomes `folder`, whole, when the block ends; what was there goes first.

    It is filled in a temporary one, whose lock tells `sweep_builders` that its maker is alive.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary, lock = _locked_temporary(folder)
    try:
        with contextlib.suppress(FileNotFoundError):
            folder.rename(temporary / "old")
        (temporary / "new").mkdir()
        yield temporary / "new"
        try:
            publish(temporary / "new", folder)
        except OSError:
            if not folder.exists():  # else another builder of the same content was first
                raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        if lock:
            lock.close()


def _locked_temporary(folder: Path) -> tuple[Path, IO | None]:
    """A new folder beside `folder`, and its lock; None on a disk that cannot lock: no sweeps."""
    for _ in range(9):
        temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
        try:
            lock = hold(temporary / "lock")
        except FileNotFoundError:  # the sweep of another came between
            continue
        except OSError:
            return temporary, None
        if lock:
            return temporary, lock
        shutil.rmtree(temporary, ignore_errors=True)  # as it is about to do
    return Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent)), None


def sweep_builders(folder: Path) -> None:
    """Delete the temporary folders of builders that were killed: whose lock can be had.

    Never while `building`: a process is given its own locks, too.
    """
    for path in folder.glob(".*") if os.path.isdir(folder) else []:
        if TEMPORARY.fullmatch(path.name) and path.is_dir() and not path.is_symlink():
            with contextlib.suppress(OSError):
                if lock := hold(path / "lock"):
                    shutil.rmtree(path, ignore_errors=True)
                    lock.close()


def sweep(folder: Path) -> None:
    """Delete the `.name.pid` that a killed process left in a folder which only we write to."""
    for path in folder.glob(".*.[0-9]*"):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)
