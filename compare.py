"""Runs side by side: a folder of them ranked, or a few compared in detail. No torch.

Ranking needs no numpy. Text of logs is made printable before its length is taken.
"""

import statistics
from collections.abc import Collection, Iterable, Sequence
from pathlib import Path

from columns import aligned, blocks, fitting, shortened, wrapped
from errors import MISSING, USAGE, Refusal, printable
from history import LOG
from runlog import part
from summary import Run, alters, differing, find_runs, read_run
from view import MISSING as UNKNOWN
from view import figure

LOWER_IS_BETTER = ("loss", "calibration_error")  # as in metrics.py, which needs numpy
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"  # what runs are called beside each other
SPLITS = ("validation", "test")


# --- a folder of runs -----------------------------------------------------------------------------


def list_runs(root: Path, width: int | None) -> list[str]:
    """All runs below a folder as a table, the best by validation first; Refusal 66 without any.

    Runs alike but for their seed are one row. The test score is shown, but to rank by it would be
    to select on it. width: columns of the terminal, None for lines of any length.
    """
    runs = [read_run(path) for path in find_runs(root)]
    if not runs:
        raise Refusal(MISSING, f"{printable(root, 300)}: there is no run below it")
    metrics = {run.metric for run in runs} - {None}
    metric = metrics.pop() if len(metrics) == 1 else "f1_macro"
    groups = sorted(_groups(runs), key=lambda group: _rank(group, metric))
    names = [name for name in differing(runs) if alters(name) and name != "run.seed"]
    has_data = len({run.data for run in runs if run.settings}) > 1
    title = f"{printable(root, 200)}: {len(runs)} run{'s' * (len(runs) > 1)}, the best first. "
    title += f"score: validation {metric} at the best step"
    title += ", as their evaluation.metric differs" if metrics else ""
    title += "; sd: of the seeds; test: f1_macro, by which nothing is ranked."
    title += " Scores do not compare where data differs." if has_data else ""
    head = ("score", "sd", "seeds", "test", "best", "steps", "seconds", "weights", "status")
    rows = aligned([head, *(_row(group, metric) for group in groups)], left=2)
    lines = [*wrapped(title, width), "", rows[0]]
    for row, group in zip(rows[1:], groups, strict=True):
        lines += [row, *_named(group, metric, width)]
        lines += _settings(group[0], names, has_data, width)
    return fitting(lines, width)


def _groups(runs: Iterable[Run]) -> list[list[Run]]:
    groups: dict[str, list[Run]] = {}
    for run in sorted(runs, key=lambda run: (len(run.seed), run.seed, run.name)):
        groups.setdefault(run.kind or str(run.path), []).append(run)
    return list(groups.values())


def _scores(group: Sequence[Run], name: str, split: str = "validation") -> list[float]:
    """The mean of each seed: of completed runs, if any is."""
    runs = [run for run in group if run.status == "completed"] or group
    scores: dict[str, list[float]] = {}
    for run in runs:
        if (score := run.score(name, split)) is not None:
            scores.setdefault(run.seed, []).append(score)
    return [statistics.fmean(of_seed) for of_seed in scores.values()]


def _rank(group: Sequence[Run], metric: str) -> tuple:
    scores = _scores(group, metric)
    sign = 1 if metric.partition("/")[0] in LOWER_IS_BETTER else -1
    return (not scores, sign * _mean(scores) if scores else 0.0, group[0].name)


def _mean(values: Sequence[float]) -> float | None:
    return statistics.fmean(values) if values else None


def _row(group: Sequence[Run], metric: str) -> tuple[str, ...]:
    scores, seeds = _scores(group, metric), len({run.seed for run in group})
    return (
        figure(_mean(scores), ".4f"),
        figure(statistics.stdev(scores), ".4f") if len(scores) > 1 else "",
        str(seeds) if len(scores) == seeds else f"{len(scores)} of {seeds}",
        figure(_mean(_scores(group, "f1_macro", "test")), ".4f"),
        _shared(run.best_step for run in group),
        _shared(run.steps for run in group),
        figure(_mean([run.seconds for run in group if run.seconds is not None]), ",.0f"),
        group[0].weights,
        _shared(run.status for run in group) or "mixed",
    )


def _shared(values: Iterable[str]) -> str:
    first, *others = dict.fromkeys(values)
    return "" if others else first


def _named(group: Sequence[Run], metric: str, width: int | None) -> list[str]:
    """The run's name, or a line for each seed of several."""
    if len(group) == 1:
        return [f"    {shortened(group[0].name, width and width - 4)}"]
    cells = [
        (
            f"    seed {run.seed}",
            figure(run.score(metric), ".4f"),
            f"test {figure(run.score('f1_macro', 'test'), '.4f'):>6}",
            f"best {run.best_step}",
            "" if run.status == "completed" else run.status,
        )
        for run in group
    ]
    rows = aligned(cells, left=1)
    longest = max(map(len, rows))
    room = width and width - longest - 2
    named = zip(rows, (shortened(run.name, room) for run in group), strict=True)
    return [f"{row:<{longest}}  {name}" for row, name in named]


def _settings(run: Run, names: Sequence[str], has_data: bool, width: int | None) -> list[str]:
    told = [f"{name}={run.settings.get(name, UNKNOWN)}" for name in names]
    told += [f"data={run.data}"] if has_data else []
    return wrapped(" ".join(told), width, "    ") if told and run.settings else []


# --- a few runs -----------------------------------------------------------------------------------


def compare_runs(paths: Sequence[Path], width: int | None) -> list[str]:
    """Settings, scores with intervals, cost, and a paired test of each later run with the first.

    Raises Refusal 64 for fewer than two runs or one named twice, 66 for a folder without a log.
    """
    import evidence

    runs = dict(zip(LETTERS, _read(paths), strict=False))
    room = width and width - 16
    lines = [
        f"{x}  {shortened(printable(run.path, 300), room)}  {run.status}" for x, run in runs.items()
    ]
    lines += ["", *blocks([["setting", *runs], *_differences(runs.values())], width)]
    known = {split: evidence.read(runs, split) for split in SPLITS}
    for split, predictions in known.items():
        rows = evidence.scores(runs, predictions, split)
        if any(cell != UNKNOWN for row in rows for cell in row[1:]):
            lines += ["", *blocks([[split, *runs], *rows], width)]
    lines += ["", *blocks([["cost", *runs], *_cost(runs.values())], width), ""]
    told = [*evidence.paired_tests(runs, known["validation"]), "", *evidence.remarks(runs, known)]
    return fitting([*lines, *(line for text in told for line in wrapped(text, width))], width)


def _read(paths: Sequence[Path]) -> list[Run]:
    if not 2 <= len(paths) <= len(LETTERS):
        raise Refusal(USAGE, f"--compare: expected 2 to {len(LETTERS)} runs, found {len(paths)}")
    seen: set[Path] = set()
    for path in paths:
        if not path.is_dir():
            raise Refusal(MISSING, f"{printable(path, 300)}: there is no such folder")
        if not (path / LOG).is_file():
            raise Refusal(MISSING, f"{printable(path, 300)}: there is no {LOG} in it")
        if path.resolve() in seen:
            raise Refusal(USAGE, f"--compare: {printable(path, 300)} is named twice")
        seen.add(path.resolve())
    return [read_run(path) for path in paths]


def _differences(runs: Collection[Run]) -> list[list[str]]:
    """A row for each setting that differs; how the weights began, in any case."""
    rows = [["weights", *(run.weights for run in runs)]]
    if len({run.data for run in runs}) > 1:
        rows.append(["data", *(run.data for run in runs)])
    names = differing(runs)
    return rows + [[name, *(run.settings.get(name, UNKNOWN) for run in runs)] for name in names]


def _cost(runs: Iterable[Run]) -> list[list[str]]:
    rows = [["seconds"], ["steps"], ["best step"], ["peak GiB"], ["examples/s"], ["tokens/s"]]
    rows.append(["device"])
    for run in runs:
        steps = run.history.steps
        peak = max((v for v in steps["peak_memory_gib"] if v == v), default=None)
        cells = [figure(run.seconds, ",.1f"), run.steps, run.best_step, figure(peak, ".1f")]
        for name in ("examples_per_s", "tokens_per_s"):
            known = [v for v in steps[name] if v == v]  # not NaN
            cells.append(figure(statistics.median(known) if known else None, ",.0f"))
        cells.append(_device(run))
        for row, cell in zip(rows, cells, strict=True):
            row.append(cell)
    return rows


def _device(run: Run) -> str:
    told = part(run.history.start, "environment")
    return f"{figure(told.get('world_size'), '.0f')} x {printable(told.get('device') or UNKNOWN)}"
