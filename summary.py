"""A run in a few facts, from its log and files, whatever there is of them. No torch, no numpy."""

import hashlib
import json
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path

import config
from errors import Refusal, printable
from files import read_json
from history import LOG, Follower, History, status
from runlog import number, part, worked_s
from view import MISSING, figure

FILES = {LOG, "run_state.json", "results.json"}  # any of them makes a run
CONTENT = ("data.train", "data.validation", "data.test", "model.name")
UNTOLD = ("run.name", "run.dir", "run.resume", "data.cache_dir")  # where a run lies
MAX_SETTINGS = 500  # a log may hold as many as it likes
MAX_SAMPLED = 100_000  # training texts; of more TF-IDF sees some that the seed draws


@dataclass(frozen=True)
class Run:
    """A run as its files tell it; settings: full key to value in words; seconds: without pauses."""

    path: Path
    history: History
    state: dict
    results: dict
    settings: dict[str, str]
    seconds: float | None

    @property
    def name(self) -> str:
        """Its folder's name."""
        return printable(self.path.resolve().name, 200)

    @property
    def status(self) -> str:
        """See `history.status`."""
        return printable(self.state.get("status") or MISSING, 12)

    @property
    def metric(self) -> str | None:
        """evaluation.metric."""
        return self.settings.get("evaluation.metric")

    @property
    def seed(self) -> str:
        """run.seed."""
        return self.settings.get("run.seed", MISSING)

    @property
    def weights(self) -> str:
        """How they began."""
        told = self.history.start.get("from_scratch", self.results.get("from_scratch"))
        return "scratch" if told is True else "pretrained" if told is False else MISSING

    @property
    def best_step(self) -> str:
        """The step whose weights were kept."""
        return figure(self.results.get("best_step", self.history.best().get("step")), ".0f")

    @property
    def steps(self) -> str:
        """Done of planned ones; not every one is logged."""
        h = self.history
        known = [self.results.get("steps"), h.reached()]
        done = max((n for step in known if (n := number(step)) is not None), default=None)
        total = h.plan("total_steps")
        told = f"{figure(done, '.0f')}/{figure(total, '.0f')}"
        return MISSING if done is total is None else told

    def score(self, name: str, split: str = "validation") -> float | None:
        """A score at the best step, also the run's `metric` over slices; None if not known."""
        best = self.history.best() if split == "validation" else {}
        if "/" in name:
            return number(best.get("value", self.history.end.get("best")))
        final = self.results.get(split)
        return number((final if isinstance(final, dict) else best).get(name))

    @property
    def data(self) -> str:
        """Six digits that stand for its data: counts, labels, and how baselines score.

        Not the hash in run_state.json: that is one of the seed, too.
        """
        counts, baselines = (part(self.history.start, k) for k in ("data", "baselines"))
        labels = self.history.start.get("labels")
        told = [(str(name), figure(n, ".0f")) for name, n in counts.items()]
        told += [str(label) for label in labels] if isinstance(labels, list) else []
        is_whole = (number(counts.get("train")) or 0) <= MAX_SAMPLED
        for name in ("majority", "tfidf") if is_whole else ("majority",):
            scores = part(baselines, name)
            told += [figure(scores.get(score), ".6f") for score in ("accuracy", "f1_macro")]
        return hashlib.sha256(repr(told).encode(errors="replace")).hexdigest()[:6]

    @property
    def kind(self) -> str | None:
        """What runs share that are alike but for their seed; None where that is not known."""
        if not self.settings:
            return None
        told = {n: v for n, v in self.settings.items() if alters(n) and n != "run.seed"}
        if told.get("data.validation") in (None, "", "null") or told.get("data.limit") != "null":
            told["run.seed"] = self.seed  # it draws the validation texts
        return repr((sorted(told.items()), self.weights, self.data))


def alters(name: str) -> bool:
    """Whether a setting can change a result, by itself or by the content that it points to."""
    known = config.settings().get(name)
    return known is None or known.metadata["alters"] or name in CONTENT


def differing(runs: Iterable[Run]) -> list[str]:
    """The settings that runs differ in; runs of which none are known do not count."""
    known = [run.settings for run in runs if run.settings]
    names = dict.fromkeys(chain.from_iterable(known))
    return [n for n in names if n not in UNTOLD and len({s.get(n) for s in known}) > 1]


def find_runs(root: Path) -> Iterator[Path]:
    """The folders below `root`, or itself, that hold a run; none within another."""
    for folder, below, files in os.walk(root):
        if not FILES.isdisjoint(files):
            below.clear()
            yield Path(folder)
        below[:] = sorted(name for name in below if not name.startswith("."))


def read_run(path: Path) -> Run:
    """The run in a folder."""
    follower = Follower(path)
    seconds = worked_s(follower.new())
    history, results = follower.history, read_json(path / "results.json") or {}
    told = number(results.get("seconds"))
    told = seconds if told is None else told
    return Run(path, history, status(path, history), results, _settings(path, history), told)


def _settings(path: Path, history: History) -> dict[str, str]:
    """As the log's start has them, else the run's config.yaml."""
    found = history.start.get("config")
    if not isinstance(found, dict):
        try:
            found = config.flatten(config.load(path / "config.yaml"))
        except Refusal:
            return {}
    return {printable(k): _in_words(v) for k, v in islice(found.items(), MAX_SETTINGS)}


def _in_words(value: object) -> str:
    try:
        return printable(value if isinstance(value, str) else json.dumps(value), 200)
    except RecursionError:  # lists in lists in lists
        return MISSING
