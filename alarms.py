"""What may be wrong with a run: pure functions over its history, each naming cause and evidence.

A rule fires on what is almost surely a fault; the thresholds stand where healthy runs never came.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass

from history import History
from runlog import baseline, number, part
from schedule import lr_factor

POINTS = 1000  # of a curve that are looked at
WINDOW = 5  # logged steps at least whose mean counts as a level of the loss
STALLED_S = 120.0  # without progress, or ten times the longest that it has taken
STARTING_S = 3600.0  # the same before the first step, which loads, compiles and allocates
RECENT = 20  # logged steps
LOOKS = 6  # at a GPU, in a row
IDLE_PERCENT = 20.0
WAITING_SHARE = 0.3
LOW_GIB = 1.0
HUGE = 1e50


@dataclass(frozen=True)
class Alarm:
    """One thing that seems wrong: `cause` and `advice` are ours, `evidence` quotes the run."""

    code: str
    cause: str
    evidence: str
    advice: str


def check(history: History, state: dict, *, now: float, machine: dict | None = None) -> list[Alarm]:
    """The alarms of a run, the gravest first; of one that has ended only what it was about.

    state: of `history.status`. now: unix seconds. machine: a look at the machine that trains, where
    it is this one; else the last one in the log is taken.
    """
    rules = [ended_badly(state), nonfinite(history), diverging(history), collapsed(history)]
    rules += [plateau(history, state) or useless(history, state)]
    rules += [overfitting(history), off_schedule(history)]
    if state.get("status") == "running":
        rules += [stalled(history, state, now), idle_gpu(history), starved(history)]
        rules += [disk_low(history, machine)]
    return [alarm for alarm in rules if alarm]


# --- training -------------------------------------------------------------------------------------


def nonfinite(history: History) -> Alarm | None:
    """Some step's loss or gradient norm was infinite or no number."""
    steps, skipped = history.nonfinite, history.last("skipped") or 0
    if not steps and not skipped:
        return None
    last = f", the last of them {steps[-1]:.0f}" if steps else ""
    return Alarm(
        "nonfinite",
        "the loss or the gradient was not finite",
        f"{len(steps)} logged steps{last}; {skipped:.0f} updates were skipped",
        "lower optimizer.lr; set train.precision=fp32; look for broken weights in model.name",
    )


def diverging(history: History) -> Alarm | None:
    """The loss is far above where it began, or has climbed most of the way back.

    By medians, and only if nearly all of the last losses are up: with a rare class of large weight
    the loss of a single step says little. Below log K, what guessing costs, nothing has diverged.
    """
    losses, labels = _finite(history.steps.thinned("loss", POINTS)), history.start.get("labels")
    width = max(2 * WINDOW, len(losses) // 10)
    if len(losses) < 2 * width:
        return None
    starts = range(len(losses) % width, len(losses) - width + 1, width)  # the last one is whole
    windows = [sorted(losses[i : i + width]) for i in starts]
    levels = [window[width // 2] for window in windows]
    begun = next(filter(math.isfinite, history.steps["loss"]))
    guess = math.log(len(labels)) if isinstance(labels, list) and len(labels) > 1 else begun
    first = max(guess, min(levels[0], begun))  # the first steps may already be the worst
    last, lowest = levels[-1], min(levels)
    least, most = windows[-1][width // 5], windows[levels.index(lowest)][-1 - width // 5]
    is_up = last > 1.5 * first or (last > 2 * lowest and last > first)
    if least < guess or not (last > 3 * first or (is_up and least > most)):
        return None
    return Alarm(
        "diverging",
        "the training loss is diverging",
        f"it began near {first:.3g}, was {lowest:.3g} at its lowest, and is at {last:.3g}",
        "lower optimizer.lr, raise schedule.warmup_ratio, keep train.max_grad_norm at 1",
    )


def plateau(history: History, state: dict) -> Alarm | None:
    """Half of the steps and three evaluations, and neither loss nor score has gained anything."""
    losses = _finite(history.steps.thinned("loss", POINTS))
    done, total, third = history.last("step"), history.plan("total_steps"), len(losses) // 3
    if third < WINDOW or not done or not total:
        return None
    if state.get("status") != "completed" and done < total / 2:
        return None
    early, late = losses[:third], losses[-third:]
    (first, early_spread), (last, late_spread) = map(_mean_and_variance, (early, late))
    noise = math.sqrt((early_spread + late_spread) / third)
    best, floor = _best_score(history), baseline(history.start, "majority", "f1_macro")
    if best is None or floor is None or len(history.evaluations()) < 3:
        return None
    has_fallen = first - last > max(0.02 * first, 2 * noise) or last < 0.9 * first
    if best > floor + 0.02 or has_fallen:
        return None
    return Alarm(
        "plateau",
        "the model is not learning",
        f"mean training loss {first:.4g} in the first third and {last:.4g} in the last; "
        f"best validation f1_macro {best:.3f}, majority {floor:.3f}",
        "raise optimizer.lr or train.epochs; check that labels and texts belong together",
    )


def useless(history: History, state: dict) -> Alarm | None:
    """Finished, and never better than to say the commonest label always."""
    best, floor = _best_score(history), baseline(history.start, "majority", "f1_macro")
    if state.get("status") != "completed" or best is None or floor is None or best > floor:
        return None
    return Alarm(
        "useless",
        "the model is no better than guessing",
        f"best validation f1_macro {best:.3f}; {floor:.3f} for saying the commonest label always",
        "raise train.epochs or optimizer.lr; check that labels and texts belong together",
    )


def overfitting(history: History) -> Alarm | None:
    """The validation loss is half above its lowest and worse than guessing, the training loss low.

    Growing confidence raises the validation loss of good models, too; so the score must not have
    risen meanwhile, and the loss be above that of the classes' shares alone.
    """
    evals = [e for e in history.evaluations() if number(e.get("loss")) is not None]
    if len(evals) < 3:
        return None
    lowest = min(evals, key=lambda e: e["loss"])
    last, levels = evals[-1]["loss"], _levels(history)
    since = [e for e in evals if e["step"] > lowest["step"]]
    guess = baseline(history.start, "majority", "loss")
    if (
        len(since) < 2
        or any(e.get("best") is True for e in since[-2:])
        or last < 1.5 * lowest["loss"]
        or (guess is not None and last < guess)
        or not levels
        or levels[-1] > 0.5 * levels[0]
    ):
        return None
    return Alarm(
        "overfitting",
        "the model learns its training texts by heart",
        f"validation loss {lowest['loss']:.3f} at step {lowest['step']:.0f} and {last:.3f} now, "
        f"while the training loss fell from {levels[0]:.3f} to {levels[-1]:.3f}",
        "more or cleaner labels, fewer train.epochs, a lower optimizer.lr, train.label_smoothing; "
        "the best checkpoint is kept in any case",
    )


def collapsed(history: History) -> Alarm | None:
    """The last two evaluations predicted one class for all but every text; at the end, the best.

    Not early in a run: many begin so.
    """
    ended = part(history.end, "validation")
    if "collapse" in ended:
        why = ended["collapse"]
        return _collapse(history, ended, "") if why and isinstance(why, str) else None
    evals = history.evaluations()[-2:]
    shares = [max(s) for e in evals if (s := shares_of(e))]
    warmup, total = history.plan("warmup_steps"), history.plan("total_steps")
    balance = baseline(history.start, "majority", "accuracy")
    if len(shares) < 2 or min(shares) < 0.99:
        return None
    if (balance or 0) > 0.97 and not all(e.get("collapse") for e in evals):
        return None
    if evals[0]["step"] <= (warmup or 0) or evals[1]["step"] < 0.4 * (total or 0):
        return None
    return _collapse(history, evals[-1], f", {shares[-2]:.1%} before")


def _collapse(history: History, scores: dict, before: str) -> Alarm:
    """The alarm over an evaluation; "collapse" of the trainer, who saw the logits, says why."""
    labels, why = history.start.get("labels"), scores.get("collapse")
    shares = shares_of(scores) or [1.0]
    place = shares.index(max(shares))
    name = labels[place] if isinstance(labels, list) and place < len(labels) else place
    usual = "train.class_weights=balanced; another optimizer.lr, higher if the loss does not move, "
    usual += "lower if it jumps; more train.epochs"
    return Alarm(
        "collapsed",
        "the model predicts one class",
        f"'{name}' for {max(shares):.1%} of the validation texts{before}",
        why if isinstance(why, str) and why.strip() else usual,
    )


def off_schedule(history: History) -> Alarm | None:
    """A logged learning rate is not the one that the settings give for its step."""
    peak, floor = map(number, map(history.setting, ("optimizer.lr", "schedule.min_lr_ratio")))
    warmup, total = history.plan("warmup_steps"), history.plan("total_steps")
    if None in (peak, floor, warmup, total):
        return None
    steps, rates = (history.steps.thinned(name, 50) for name in ("step", "lr"))
    for step, rate in zip(steps, rates, strict=True):
        # The rate of the update that became step number `step`.
        factor = lr_factor(step - 1, warmup_steps=warmup, total_steps=total, min_lr_ratio=floor)
        if abs(rate - peak * factor) > 1e-3 * peak:
            return Alarm(
                "off_schedule",
                "the learning rate is off its schedule",
                f"{rate:.3g} at step {step:.0f}, where {peak * factor:.3g} is due",
                "the log is of other settings than it says, or the program was changed; "
                "begin anew with run.resume=never",
            )
    return None


# --- the trainer and its machine ------------------------------------------------------------------


def ended_badly(state: dict) -> Alarm | None:
    """The run failed, or its trainer is gone without a word."""
    reason = str(state.get("reason") or "no reason given")
    if state.get("status") == "dead":
        return Alarm(
            "dead",
            "the trainer is gone",
            f"process {state.get('pid')} does not exist; it was killed, or the machine restarted",
            "run the same command again: it goes on from the newest checkpoint",
        )
    if state.get("status") == "failed":
        code = state.get("exit_code")
        advice = "train.log has the whole message; mend what it names and run the same command"
        return Alarm("failed", "the run has failed", f"exit code {code}: {reason}", advice)
    return None


def stalled(history: History, state: dict, now: float) -> Alarm | None:
    """The trainer is held, or has made no progress for very long."""
    if state.get("is_stopped"):
        return Alarm(
            "stalled",
            "the trainer is held",
            f"process {state.get('pid')} is stopped (Ctrl-Z or SIGSTOP)",
            f"kill -CONT {state.get('pid')} lets it go on",
        )
    if history.moved_at is None:
        return None
    has_begun, every = history.has_begun, number(history.setting("log.every")) or 1
    between_s = every * (history.last("step_s") or 0)
    limit = max(STALLED_S, 10 * history.longest_s, 10 * between_s, _scoring_s(history))
    limit = limit if has_begun else max(limit, STARTING_S)
    quiet_s = now - history.moved_at
    if quiet_s < limit:
        return None
    usual = f"; at most {history.longest_s:.0f} s so far" if has_begun else ", not one step yet"
    return Alarm(
        "stalled",
        "the trainer makes no progress",
        f"nothing for {quiet_s / 60:.0f} min{usual}",
        "see train.log, and that its machine is not out of memory; a rank that hangs is named once "
        "run.timeout_s is over. If this is a copy of the run, it is only old",
    )


def _scoring_s(history: History) -> float:
    """Seconds that scoring all splits surely takes no longer than: twice that at training's pace.

    Nothing is logged meanwhile, neither at the first evaluation nor at the end.
    """
    counts, pace = part(history.start, "data"), history.last("examples_per_s")
    texts = sum(number(counts.get(name)) or 0 for name in ("validation", "test"))
    return 2 * texts / pace if pace and pace > 0 else 0.0


def idle_gpu(history: History) -> Alarm | None:
    """A GPU of this run did next to nothing in the last looks while steps were taken."""
    if history.setting("run.device") == "cpu":
        return None
    began = number(history.start.get("time")) or -math.inf
    stepping = [t for t in history.steps["time"][-RECENT:] if t >= began]
    for uuid, series in history.gpus.items():
        recent = zip(series["time"][-60:], series["util_percent"][-60:], strict=True)
        during = [p for t, p in recent if stepping and stepping[0] <= t <= stepping[-1]]
        looks = _finite(during)
        if len(looks) < LOOKS:
            continue
        mean = sum(looks) / len(looks)
        if mean < IDLE_PERCENT:
            return Alarm(
                "idle_gpu",
                "a GPU is idle",
                f"{uuid} was busy {mean:.0f} % of the time in {len(looks)} looks during training",
                "raise train.micro_batch_tokens and train.global_batch_size; see whether it waits "
                "for data; check run.device and CUDA_VISIBLE_DEVICES",
            )
    return None


def starved(history: History) -> Alarm | None:
    """Steps wait for their texts."""
    shares = _finite(history.steps["data_wait_share"][-RECENT:])
    if len(shares) < WINDOW or (mean := sum(shares) / len(shares)) < WAITING_SHARE:
        return None
    return Alarm(
        "starved",
        "training waits for data",
        f"{mean:.0%} of the time in the last {len(shares)} logged steps",
        "raise data.workers; put data.cache_dir on a local disk; free the cores of other work",
    )


def disk_low(history: History, machine: dict | None = None) -> Alarm | None:
    """Less is free than the next two checkpoints need, or than a GiB."""
    records = [machine] if machine else list(history.hardware.values())
    known = [free for r in records if (free := number(r.get("disk_free_gib"))) is not None]
    size = number(history.checkpoints[-1].get("bytes")) if history.checkpoints else None
    needed = max(LOW_GIB, 2 * (size or 0) / (1 << 30))
    if not known or min(known) >= needed:
        return None
    return Alarm(
        "disk_low",
        "the disk is nearly full",
        f"{min(known):.2f} GiB are free, {needed:.2f} are wanted for two checkpoints and the log",
        "delete finished runs or their checkpoints (checkpoint.py RUN --prune 1), or set "
        "checkpoint.keep=1",
    )


# --- helpers --------------------------------------------------------------------------------------


def shares_of(evaluation: dict) -> list[float]:
    """The share of each class among the predictions of an evaluation; empty if unknown."""
    shares = evaluation.get("predicted_share")
    values = [number(s) for s in shares] if isinstance(shares, list) else []
    return [] if None in values else values


def _levels(history: History) -> list[float]:
    """Means of the training loss over a twentieth of the run each, WINDOW logged steps at least."""
    losses = _finite(history.steps.thinned("loss", POINTS))
    width = max(WINDOW, len(losses) // 20)
    # From the end, so that the last one is whole.
    starts = range(len(losses) % width, len(losses) - width + 1, width)
    return [sum(losses[i : i + width]) / width for i in starts]


def _finite(values: Iterable[float]) -> list[float]:
    """Those that are numbers, none so large that its square is not."""
    return [max(-HUGE, min(HUGE, v)) for v in values if math.isfinite(v)]


def _mean_and_variance(values: list[float]) -> tuple[float, float]:
    mean = sum(values) / len(values)  # not of module statistics, whose fractions take milliseconds
    return mean, sum((v - mean) ** 2 for v in values) / (len(values) - 1)


def _best_score(history: History) -> float | None:
    scores = [number(e.get("f1_macro")) for e in history.evaluations()]
    return max((s for s in scores if s is not None), default=None)
