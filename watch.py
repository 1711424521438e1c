"""A thread in each of many ranks: it tells that its rank lives, and sees when it should not.

Through the store of the process group, beside the collectives, which are silent when they hang.
"""

import contextlib
import json
import os
import socket
import threading
import time
from collections.abc import Callable

from torch.distributed import PrefixStore, Store

from errors import CRASH
from signals import StopRequest

BEAT_S = 1.0
ANSWER_S = 5.0  # within which the store answers, if it does
LEAVE_S = 60.0  # to notice by itself that another rank crashed, as those in NCCL do not; to save


class Watch(threading.Thread):
    """Runs until `close`. Asks for a stop when whoever started this rank is gone."""

    def __init__(self, store: Store, rank: int, size: int, stop: StopRequest):
        super().__init__(daemon=True, name="watch")
        # A client of its own: the group's waits, in NCCL's set-up, keep others from answering.
        store = store.clone() if hasattr(store, "clone") else store
        self._store = PrefixStore("watch", store)
        self._rank, self._size, self._request = rank, size, stop
        self._seen: dict[int, str] = {}  # what was last posted, by rank
        self._has_store = True
        self._parents = [os.getppid()]
        if launcher := os.environ.get("LAUNCHER_PID"):
            self._parents.append(int(launcher))
        self._closed = threading.Event()

    def run(self) -> None:
        """The thread's body."""
        beats, failed_since = 0, None
        who = f"{socket.gethostname()} {os.getpid()}"
        while not self._closed.wait(BEAT_S if beats else 0):
            if os.getppid() != self._parents[0] or not all(map(_exists, self._parents)):
                self._request.name = self._request.name or "the end of its launcher"
            beats += 1
            try:
                if self._has_store:
                    self._store.set(f"rank {self._rank}", f"{beats} {who}")
                    failed = self._store.check(["failed"])
            except Exception:  # it went with its launcher; each further try would print a warning
                self._has_store, failed = False, False
            if failed:
                failed_since = failed_since or time.monotonic()
                if time.monotonic() - failed_since > LEAVE_S:
                    os._exit(CRASH)

    def tell_failure(self) -> None:
        """Let the other ranks know that this one has crashed."""
        _within(ANSWER_S, lambda: self._store.set("failed", str(self._rank)))

    def post(self, record: dict[str, object]) -> None:
        """Leave a record for rank 0, in place of this rank's last one."""
        text = json.dumps(record | {"posted": time.time()})
        if self._has_store:
            _within(ANSWER_S, lambda: self._store.set(f"record {self._rank}", text))

    def posts(self) -> list[dict[str, object]]:
        """The records that other ranks have posted since the last call."""
        found = _within(ANSWER_S, lambda: self._values("record")) if self._has_store else None
        texts = found or {}
        new = [text for rank, text in texts.items() if self._seen.get(rank) != text]
        self._seen |= texts
        return [json.loads(text) for text in new]

    def silent(self) -> list[str]:
        """The ranks without a sign of life, as "rank 1 (process 4711 on node3)"; takes seconds."""
        before = _within(ANSWER_S, self._beats)
        time.sleep(4 * BEAT_S)
        after = _within(ANSWER_S, self._beats)
        if before is None or after is None:
            return ["rank 0 or the torchrun beside it (the store of the group does not answer)"]
        return [
            f"rank {rank} (process {beat[2]} on {beat[1]})"
            for rank, beat in before.items()
            if rank != self._rank and after.get(rank) == beat
        ]

    def _beats(self) -> dict[int, list[str]]:
        return {rank: beat.split() for rank, beat in self._values("rank").items()}

    def _values(self, kind: str) -> dict[int, str]:
        """What the store has of each rank under its name of this kind."""
        names = {rank: f"{kind} {rank}" for rank in range(self._size)}
        there = {rank: name for rank, name in names.items() if self._store.check([name])}
        return {rank: self._store.get(name).decode() for rank, name in there.items()}

    def close(self) -> None:
        """End the thread, unless it waits for a store that does not answer."""
        self._closed.set()
        self.join(ANSWER_S)


def _within(seconds: float, ask: Callable[[], object]) -> object | None:
    """`ask()` of the store, or None if it fails or does not answer: a host may be cut off."""
    answers = []

    def run() -> None:
        with contextlib.suppress(Exception):
            answers.append(ask())

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(seconds)
    return answers[0] if answers else None


def _exists(pid: int) -> bool:
    try:
        os.kill(pid, 0)  # sends nothing
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True
