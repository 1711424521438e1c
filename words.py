"""A run in sentences: for pipes, files, `--once` and screen readers. No bars, no columns."""

from errors import printable
from history import gpus_of
from runlog import number, part
from view import MISSING, SCORES, View, figure, in_words, memory, reasons

MAX_LINE = 300  # characters of a line of an event
MAX_TOLD = 1000  # of one that is all ours but for names


def tell(view: View) -> list[str]:
    """All that is known of a run, a fact or two a line."""
    lines = [*_what(view), *_progress(view), *_scores(view), *_machines(view), *alarms(view)]
    return [printable(line, MAX_TOLD) for line in lines]


def alarms(view: View) -> list[str]:
    """A line for each alarm, or one that there are none."""
    return [
        printable(f"ALARM: {a.cause}: {a.evidence}. Try: {a.advice}.", MAX_TOLD)
        for a in view.alarms
    ] or ["No alarms."]


def event_line(event: dict) -> str:
    """One event on a line: its name and every single value."""
    shown = (
        f"{k} {figure(v, '.6g') if number(v) is not None else v}"
        for k, v in event.items()
        if k not in ("event", "time") and not isinstance(v, dict | list)
    )
    return printable("  ".join([event["event"], *shown]), MAX_LINE)


def _what(view: View) -> list[str]:
    start, state = view.history.start, view.state
    why = f": {state['reason']}" if state.get("reason") else ""
    held = ", but held (Ctrl-Z or SIGSTOP)" if state.get("is_stopped") else ""
    data = ", ".join(f"{name} {figure(n, ',.0f')}" for name, n in part(start, "data").items())
    model = view.history.setting("model.name") or MISSING
    return [
        f"Run {view.run.resolve().name}",
        f"Status: {state.get('status') or MISSING} on {state.get('host') or MISSING}{held}{why}",
        f"Model: {model}, {view.origin}",
        f"Texts: {data or MISSING}",
    ]


def _progress(view: View) -> list[str]:
    last, plan = view.history.last, view.history.plan
    done, total = view.history.reached(), plan("total_steps")
    share = f" ({done / total:.0%})" if done is not None and total else ""
    left = view.left_s() if view.is_running else None
    step = f"Step {figure(done, '.0f')} of {figure(total, '.0f')}{share}"
    step += f", epoch {figure(view.history.epoch(), '.2f')}"
    step += f", about {in_words(left)} left" if left is not None else ""
    return [
        step,
        f"Loss {figure(last('loss'), '.4g')}, learning rate {figure(last('lr'), '.3g')}, "
        f"gradient norm {figure(last('grad_norm'), '.3g')}",
        f"Speed: {figure(last('examples_per_s'), ',.0f')} examples/s, "
        f"{figure(last('tokens_per_s'), ',.0f')} tokens/s, "
        f"padding {figure(last('padding_share'), '.0%')}, "
        f"waiting for data {figure(last('data_wait_share'), '.0%')} of the time, "
        f"peak memory {figure(last('peak_memory_gib'), '.1f')} GiB",
    ]


def _scores(view: View) -> list[str]:
    rows = view.scores()
    names = dict.fromkeys([view.metric if view.metric in SCORES else "value", *SCORES[:5]])
    head = f"Validation scores, the best by {view.metric}:"
    lines = [head if view.history.evaluations() else f"{head} no evaluation yet"]
    for name, row in rows:
        told = ", ".join(f"{n} {figure(row.get(n), '.4f')}" for n in names)
        lines.append(f"{name[0].upper()}{name[1:]}: {told}")
    if shares := view.predicted():
        told = ", ".join(f"{name} {share:.0%}" for name, share in shares[:20])
        lines.append(f"Predicted classes at the last evaluation: {told}")
    saved = "; ".join(view.saved()[:5])
    return [*lines, f"Saved: {saved or 'nothing yet'}"]


def _machines(view: View) -> list[str]:
    lines = []
    for record, age in view.machines():
        host = record.get("host") or "machine"
        text = f"On {host}, {age}: CPU {figure(record.get('cpu_percent'), '.0f')} % of "
        text += f"{figure(record.get('cores'), '.0f')} cores, "
        text += f"load {figure(record.get('load'), '.1f')}, memory {memory(record)}"
        if "disk_free_gib" in record:
            text += f", disk {figure(record['disk_free_gib'], ',.1f')} GiB free"
        lines.append(text)
        lines += [_gpu(gpu) for gpu in gpus_of(record)]
        if not gpus_of(record) and record.get("no_gpu"):
            lines.append(f"No GPU: {record['no_gpu']}")
    return lines or ["Machine: nothing known yet"]


def _gpu(gpu: dict) -> str:
    util, heat, power = (
        figure(gpu.get(k), ".0f") for k in ("util_percent", "temperature_c", "power_w")
    )
    why = "; ".join(reasons(gpu))
    text = f"GPU {gpu.get('uuid')}, {gpu.get('name') or MISSING}: {util} % busy, "
    text += f"memory {memory(gpu)}, {heat} C, {power} W"
    return text + (f" (n/a {why})" if why else "")
