"""Sections of the report on how the run was made, and how to make it again."""

import contextlib
import json
import os
import shlex
import stat
from collections import defaultdict
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import config
from files import read_json
from markup import Html, absent, facts, join, note, table, tag
from runlog import part
from view import View, figure, in_bytes

MAX_LISTED = 200  # settings, files


def configuration(view: View) -> Html:
    """Settings, those that are no defaults first; environment and files."""
    settings = part(view.history.start, "config")
    defaults = json.loads(json.dumps(config.flatten(config.Config())))
    rows = [
        (
            tag("code", name),
            tag("code", config.written(value)),
            tag("code", config.written(defaults.get(name))),
        )
        for name, value in list(settings.items())[:MAX_LISTED]
    ]
    changed = [
        row
        for row, (name, value) in zip(rows, settings.items(), strict=False)
        if name not in defaults or value != defaults[name]
    ]
    head = ("setting", "value", "default")
    parts = [absent("The log has no settings.")] if not settings else []
    if settings:
        parts.append(table(head, changed, words=range(3), caption="Settings that are no defaults"))
        all_ = table(head, rows, words=range(3))
        parts.append(tag("details", tag("summary", f"All {len(settings)} settings"), all_))
    files = islice(_files(view.run), MAX_LISTED)
    listed = table(("file", "size", "sha256"), files, words=(0, 2))
    parts += [facts(_environment(view)), tag("h3", "Files"), listed]
    return join(parts)


def _environment(view: View) -> Iterator[tuple[str, object]]:
    environment = part(view.history.start, "environment")
    versions = environment.get("versions")
    if isinstance(versions, dict):
        yield "Versions", ", ".join(f"{name} {v}" for name, v in versions.items())
    yield "Commit", environment.get("commit") or "unknown"
    yield "Device", environment.get("device") or "unknown"
    yield "Processes", figure(environment.get("world_size"), ".0f")
    yield "Threads of each", figure(environment.get("threads"), ".0f")
    yield "Starts", view.history.starts
    command = environment.get("command")
    if isinstance(command, list):
        yield "Last started as", tag("code", shlex.join(map(str, command)))
    weights = part(view.history.start, "class_weights").items()
    yield "Class weights", ", ".join(f"{k}: {figure(w, '.3f')}" for k, w in weights) or "n/a"
    plan = {k: figure(v, ",.0f") for k, v in part(view.history.start, "steps").items()}
    told = "{global_batch_size}, by {world_size} processes in passes of at most {micro_batch_size}"
    yield "Texts a step", told.format_map(defaultdict(lambda: "n/a", plan))


def _files(run: Path) -> Iterator[tuple[Html, str, str]]:
    """Name, size and, where a manifest has it, hash of each file but the report itself."""
    manifest = read_json(run / "best" / "manifest.json") or {}
    paths = [Path(folder, name) for folder, _, names in os.walk(run) for name in names]
    for path in sorted(paths):
        with contextlib.suppress(OSError):  # a trainer at work deletes old checkpoints
            found, name = path.lstat(), str(path.relative_to(run))
            if stat.S_ISREG(found.st_mode) and not path.name.startswith((".", "report.html")):
                entry = part(manifest, path.name) if path.parent == run / "best" else {}
                yield tag("code", name), in_bytes(found.st_size), str(entry.get("sha256", ""))[:16]


def repeat(view: View) -> Html:
    """The command that trains the same again, and what it needs to come out the same."""
    run, program = view.run.resolve(), Path(__file__).resolve().parent
    where = run.relative_to(program) if run.is_relative_to(program) else run
    command = f"./run_xlm_roberta_v2.sh {shlex.quote(str(where / 'config.yaml'))} run.resume=never"
    commit = part(view.history.start, "environment").get("commit")
    code = tag("code", commit) if commit else "an unknown commit"
    return join(
        [
            tag("pre", tag("code", command)),
            note(
                "A new run beside this one, with the same settings. With the same data, base "
                "weights, versions, device and number of processes it has the same metrics. The "
                "program was at ",
                code,
                "; a + behind it means that its files had been changed." if commit else ".",
            ),
        ]
    )
