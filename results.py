"""What a run leaves: its directory, its start, its final files, how it failed."""

import contextlib
import hashlib
import json
import os
import platform
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch

import card
import checkpoint
import config
import metrics
import rundir
import savings
import scoring
from console import Console
from corpus import TokenisedSplit
from ddp import World
from decision import FILE, Decision, Inference, as_json
from errors import CANNOT_WRITE, CRASH, MISSING, NON_FINITE, OK, STOPPED, Refusal, printable
from files import read_json, replacing, write_json, write_text, writing
from model import weights_key
from prepare import Job, named_weights
from progress import Progress
from rundir import RunDir
from runlog import RunLog, lines, worked_s
from signals import Stopped

# --- the directory of a run -----------------------------------------------------------------------


def open_directory(job: Job) -> RunDir:
    """This run's directory, held, with room for its checkpoints; Refusal 69, 73 or 78."""
    who = rundir.identity(job.cfg, data_key=job.corpus.key, model_key=weights_key(job.source))
    run = rundir.open_run(job.cfg, who)
    if finished_line(run):
        return run
    keep = job.cfg.checkpoint.keep
    kept = 3 if keep == "all" else 2 * keep + 1  # each with its best, and the one being written
    parameters = sum(p.numel() for p in job.model.parameters())
    there = sum(p.lstat().st_size for p in run.checkpoints.glob("step-*/*"))
    needed = max(0, parameters * checkpoint.BYTES_PER_PARAMETER * kept - there)
    free = shutil.disk_usage(run.path).free
    if free < needed:
        run.remove_if_new()
        raise Refusal(
            CANNOT_WRITE,
            f"{run.path}: {free / 1e9:.1f} GB free, but checkpoints need {needed / 1e9:.1f} GB",
        )
    return run


def probe_directory(job: Job) -> str:
    """Open and leave this run's directory as a start would; a line on what a start would do."""
    root = Path(job.cfg.run.dir)
    was_there = root.is_dir()
    run = open_directory(job)
    try:
        return finished_line(run) or (
            f"run {run.path}: " + ("would go on" if checkpoint.listed(run.checkpoints) else "new")
        )
    finally:
        run.remove_if_new()
        if not was_there:
            with contextlib.suppress(OSError):  # another run is in it by now
                root.rmdir()


def finished_line(run: RunDir) -> str | None:
    """What to say of a run that is finished already, or None; Refusal 66 if its scores are lost."""
    if run.state().get("status") != "completed":
        return None
    final = read_json(run.path / "results.json")
    if final is None:
        raise Refusal(
            MISSING,
            f"{printable(run.path, 300)} is finished, but its results.json cannot be read; "
            "run.resume=never begins anew beside it",
        )
    return f"{run.path} is finished: {_headline(final)}; run.resume=never begins a new one"


def start(job: Job, run: RunDir, log: RunLog, console: Console, world: World) -> None:
    """Write what this run is: the files, the log's start event, and the lines on the terminal."""
    begun = run.state().get("status")
    with writing(run.path):
        console.record(run.path / "train.log")
        run.set_state("running")
        write_text(run.path / "config.yaml", config.dump(job.cfg))
        write_json(run.path / "data_report.json", job.corpus.report)
    _warn_of_changes(job, run, log, console, world)
    scores = scoring.score_baselines(job, job.corpus.validation)
    counts = _counts(job)
    trained, parameters = _parameters(job)
    log.write(
        "start",
        run=run.path.name,
        host=socket.gethostname(),
        config=config.flatten(job.cfg),
        from_scratch=job.source.is_scratch,
        environment=environment(world),
        data=counts,
        texts_sha256={name: job.corpus.report[name]["texts_sha256"] for name in counts},
        labels=job.corpus.label_names,
        positive_label=_positive(job),
        class_weights=named_weights(job),
        steps=asdict(job.steps),
        parameters=parameters,
        trained_parameters=trained,
        baselines={n: s | {"value": scoring.deciding(job, s)} for n, s in scores.items()},
    )
    console.say(f"run {run.path} ({'going on' if begun else 'new'})")
    for line in told(job, world):
        console.say(f"  {line}")
    held = ", ".join(f"{name} {scoring.deciding(job, s):.4f}" for name, s in scores.items())
    console.say(f"  to beat: validation {job.cfg.evaluation.metric} {held}")


def told(job: Job, world: World) -> Iterator[str]:
    """What is trained, on what and how, a line each."""
    trained, parameters = _parameters(job)
    rest = f", {trained / 1e6:.1f} M of them trained" if trained < parameters else ""
    place = f"{world.size} x {device_name(world.device)}, {torch.get_num_threads()} threads"
    size = f"{parameters / 1e6:.1f} M parameters{rest}, {job.cfg.train.precision}"
    yield f"model {job.source.name}, {size} on {place}"
    listed = ", ".join(f"{name} {n:,}" for name, n in _counts(job).items())
    weights = ", ".join(f"{k}: {v:.3f}" for k, v in named_weights(job).items())
    yield f"data {listed}; class weights {weights}"
    if job.positive is not None:
        yield f"positive label '{_positive(job)}'"
    if slices := job.corpus.validation.slices:
        yield "scores by " + ", ".join(printable(column, 30) for column in slices)
    yield str(job.steps)
    yield f"lr {job.cfg.optimizer.lr:g} at step {job.steps.warmup_steps}, then down a cosine"


def _counts(job: Job) -> dict[str, int]:
    named = {"train": job.corpus.train} | job.corpus.evaluated()
    return {name: len(split) for name, split in named.items()}


def _parameters(job: Job) -> tuple[int, int]:
    """Those that are trained, and all of the model."""
    trained = sum(p.numel() for p in job.model.parameters())
    return trained, trained + savings.idle_parameters(job.model)


def _positive(job: Job) -> str | None:
    return None if job.positive is None else job.corpus.label_names[job.positive]


def _warn_of_changes(job: Job, run: RunDir, log: RunLog, console: Console, world: World) -> None:
    """Say what differs from the run's last start: what alters the bytes, and what does not."""
    starts = [e for e in lines(run.path / "metrics.jsonl") if e["event"] == "start"]
    if not starts:
        return
    kept = [starts[-1].get(name) for name in ("environment", "config")]
    before, settings = (value if isinstance(value, dict) else {} for value in kept)
    # These alter the dropout masks; what else alters a result was refused by the identity.
    names = ("speed.padding", "speed.first_position")
    names += ("train.micro_batch_size", "train.micro_batch_tokens")
    cfg = config.flatten(job.cfg)
    now = environment(world) | {name: cfg.pop(name) for name in names}
    before |= {name: settings.get(name) for name in names}
    known = ("device", "world_size", "threads", "versions", *names)
    told = [
        ("environment", "going on otherwise, so the bytes may differ", known, now, before),
        ("settings", "going on with other settings, same result", cfg, cfg, settings),
    ]
    for code, what, compared, new, old in told:
        changed = [
            f"{name} {printable(old.get(name))} -> {printable(new[name])}"
            for name in compared
            if json.dumps(old.get(name)) != json.dumps(new[name])
        ]
        if changed:
            message = f"{what}: {', '.join(changed)}"
            console.say(f"  {message}")
            log.write("warning", code=code, message=message)


def device_name(device: torch.device) -> str:
    """The name of a GPU, or CPU."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"


def environment(world: World) -> dict[str, object]:
    """What the bytes of a run may depend on beside its settings."""
    import transformers

    versions = {"python": platform.python_version(), "torch": torch.__version__}
    versions |= {"transformers": transformers.__version__, "numpy": np.__version__}
    return {
        "versions": versions,
        "commit": _commit(),
        "command": [Path(sys.argv[0]).name, *sys.argv[1:]],
        "device": device_name(world.device),
        "world_size": world.size,
        "threads": torch.get_num_threads(),
    }


def code_key() -> str:
    """A hash of this program's source, which is to be the same on every machine of a run."""
    digest = hashlib.sha256()
    for path in sorted(Path(__file__).resolve().parent.glob("*.py")):
        digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()


def _commit() -> str | None:
    """The commit of this program, with + for changed files; None outside a repository."""
    folder = Path(__file__).resolve().parent
    try:
        described = subprocess.run(
            ["git", "-C", str(folder), "describe", "--always", "--dirty=+", "--abbrev=12"],
            capture_output=True,
            text=True,
            timeout=10,
            env={**os.environ, "GIT_DIR": str(folder / ".git")},
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return described.stdout.strip() or None


# --- the end --------------------------------------------------------------------------------------


def finish(
    job: Job,
    run: RunDir,
    log: RunLog,
    console: Console,
    progress: Progress,
    *,
    reason: str,
    logits: dict[str, np.ndarray],
) -> None:
    """Write the final files from the best model, which job.model holds, and its logits by split.

    Here the test set is scored, for the first time.
    """
    if run.identity["model"] != weights_key(job.source):
        raise Refusal(
            MISSING,
            f"model.name: {printable(job.source.folder, 200)} has other weights than when the run "
            "began; put the first ones back and run the same command to finish",
        )
    _refuse_nonfinite(logits)
    savings.restore(job.model, job.base_model)
    events = [*lines(run.path / "metrics.jsonl"), {"event": "now", "time": time.time()}]
    final = {
        "best_step": progress.best_step,
        "metric": job.cfg.evaluation.metric,
        "steps": progress.step,
        "skipped_steps": progress.skipped,
        "reason": reason,
        "from_scratch": job.source.is_scratch,
        "seconds": round(worked_s(events), 1),
    }
    decision = scoring.fit_decision(job, logits["validation"])
    for name, split in job.corpus.evaluated().items():
        final[name] = scoring.final_scores(job, split, logits[name], decision)
    with writing(run.path):
        _write_files(job, run.path, final, decision, logits)
        log.write(
            "end",
            status="completed",
            reason=reason,
            best=metrics.natural(job.cfg.evaluation.metric, progress.best),
            best_step=progress.best_step,
            seconds=final["seconds"],
            results=final,
        )
        log.sync()
        run.set_state("completed", exit_code=OK, reason=reason)
    if job.cfg.checkpoint.keep != "all":  # last: a run killed here is complete already
        with contextlib.suppress(OSError):  # and one that cannot delete is no less so
            checkpoint.delete(run.checkpoints)
            (run.path / "best.json").unlink(missing_ok=True)
    console.say(f"done: {reason}; best at step {progress.best_step}")
    for name in job.corpus.evaluated():
        for line in scoring.split_lines(name, final[name]):
            console.say(f"  {line}")
    if final["validation"]["collapse"]:
        console.say(f"  the model predicts one class: {final['validation']['collapse']}")
    console.say(f"  model in {run.path / 'best'}, scores in {run.path / 'results.json'}")


def _refuse_nonfinite(logits: Mapping[str, np.ndarray]) -> None:
    for name, found in logits.items():
        if not np.isfinite(found).all():
            told = f"the best model's logits on {name} are not finite"
            raise Refusal(NON_FINITE, f"{told}; lower optimizer.lr or use fp32")


def _write_files(
    job: Job,
    folder: Path,
    final: Mapping[str, object],
    decision: Decision,
    logits: Mapping[str, np.ndarray],
) -> None:
    beside = {FILE: as_json(inference(job, decision)), "README.md": card.write(job, final)}
    checkpoint.export(job.model.eval(), job.tokenizer, folder / "best", beside)
    (folder / "predictions").mkdir(exist_ok=True)
    for name, split in job.corpus.evaluated().items():
        _write_predictions(folder / "predictions" / f"{name}.jsonl", job, split, logits[name])
    write_json(folder / "results.json", final)
    wrong = checkpoint.fault(folder / "best")
    if wrong:
        raise Refusal(CANNOT_WRITE, f"{folder / 'best'}: {wrong}")


def inference(job: Job, decision: Decision) -> Inference:
    """What a user of the model needs beside its weights."""
    names = job.corpus.label_names
    positive = job.positive if decision.positive is None else decision.positive
    return Inference(
        labels=names,
        positive_label=None if positive is None else names[positive],
        max_length=job.cfg.data.max_length,
        truncation=job.cfg.data.truncation,
        precision=job.cfg.train.precision,
        temperature=decision.temperature,
        threshold=decision.threshold,
    )


def _headline(final: Mapping[str, object]) -> str:
    name = "test" if "test" in final else "validation"
    return f"{name} macro-F1 {scoring.figure(final.get(name), 'f1_macro')}"


def _write_predictions(path: Path, job: Job, split: TokenisedSplit, logits: np.ndarray) -> None:
    """A line a text: row of the file, label, prediction, probabilities, tokens, slices.

    Tokens are the text's own, before it is cut.
    """
    names = job.corpus.label_names
    probability = metrics.softmax(logits)
    tokens = np.diff(split.offsets)
    with replacing(path) as file:
        for i in range(len(split)):
            record = {
                "row": int(split.rows[i]),
                "label": names[split.labels[i]],
                "predicted": names[int(logits[i].argmax())],
                "probabilities": [round(float(p), 7) for p in probability[i]],
                "tokens": int(tokens[i]),
            }
            record["slices"] = {c: names_[codes[i]] for c, (codes, names_) in split.slices.items()}
            file.write(json.dumps(record, ensure_ascii=False) + "\n")


def record_failure(run: RunDir, log: RunLog, error: BaseException) -> None:
    """Leave the reason in the log and in run_state.json; whatever else failed, keep quiet here."""
    code = STOPPED if isinstance(error, Stopped) else getattr(error, "exit_code", CRASH)
    status = "preempted" if code == STOPPED else "failed"
    reason = str(error).strip().split("\n")[0] or type(error).__name__
    try:
        run.check_held()
        log.write("end", status=status, reason=reason, exit_code=code)
        run.set_state(status, exit_code=code, reason=reason)
    except OSError:
        pass  # a full disk, or another run in its place, must not hide the first error
