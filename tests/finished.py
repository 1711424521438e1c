"""A finished run written by hand, with a word of the caller's in every place that holds words."""

import csv
import json
from pathlib import Path

import numpy as np
from logs import START, as_lines, evaluation, make_run, step

import config
import metrics

N = 60  # texts of a split
BASELINES = {"majority": {"f1_macro": 0.4013, "f1_positive": 0.0}}
DECIDED = {"temperature": 1.37, "threshold": 0.412, "f1_macro": 0.8123, "f1_positive": 0.7345}
DECIDED |= {"calibration_error": 0.0517, "intervals": {"f1_macro": [0.7, 0.9]}}
BASELINES |= {"tfidf": {"f1_macro": 0.6127, "f1_positive": 0.5029}}


def make(root: Path, word: str = "word", *, name: str = "some", classes: int = 2) -> Path:
    """The directory of a run, its data beside it."""
    rng = np.random.default_rng(0)
    labels = [f"{word} {k}" for k in range(classes)]
    positive = 1 if classes == 2 else None
    names = [f"{word} en", f"{word} pt", f"{word} rare"]
    codes = np.array([0, 1] * (N // 2))
    codes[0] = 2
    run = make_run(root, b"", name, status="completed", reason=f"{word}\0", time=0)
    results: dict = {"best_step": 10, "reason": word}
    (run / "predictions").mkdir()
    for split in ("validation", "test"):
        true = rng.permutation(np.arange(N) % classes)
        logits = rng.normal(size=(N, classes)) + 1.2 * np.eye(classes)[true]
        score = metrics.score(true, logits, positive)
        slices = metrics.score_slices(true, logits, positive, {f"{word} lang": (codes, names)})
        decided = DECIDED if classes == 2 else {"temperature": 1.37, "threshold": None}
        results[split] = score | {"slices": slices, "baselines": BASELINES, "decided": decided}
        lines = [
            {
                "row": i + 1,
                "label": labels[true[i]],
                "predicted": labels[int(logits[i].argmax())],
                "probabilities": metrics.softmax(logits[i : i + 1])[0].round(7).tolist(),
                "tokens": int(rng.integers(0, 200)),
                "slices": {f"{word} lang": names[codes[i]]},
            }
            for i in range(N)
        ]
        text = "".join(json.dumps(line) + "\n" for line in lines)
        (run / "predictions" / f"{split}.jsonl").write_text(text)
        if split == "validation":
            columns = (f"{word} text", f"{word} label", f"{word} lang")
            rows = [(f"{word} {i}", line["label"], names[codes[i]]) for i, line in enumerate(lines)]
            with open(root / "validation.csv", "w", newline="") as file:
                csv.writer(file).writerows([columns, *rows])
    (run / "results.json").write_text(json.dumps(results))
    report = {"validation": {"file": str(root / "validation.csv")}, "findings": [word]}
    (run / "data_report.json").write_text(json.dumps(report | {"held_out": N}))
    changes = {"text_column": columns[0], "label_column": columns[1], "slice_columns": columns[2:]}
    settings = {f"data.{key}": value for key, value in changes.items()}
    cfg = config.build(settings | {"model.name": word})
    (run / "config.yaml").write_text(config.dump(cfg))
    (run / "best").mkdir()
    (run / "best" / "model.safetensors").write_bytes(b"weights")
    (run / "best" / "manifest.json").write_text(json.dumps({"model.safetensors": {"sha256": word}}))
    (run / "metrics.jsonl").write_bytes(as_lines(*_events(word, cfg, labels, positive), began=1e9))
    return run


def _events(word: str, cfg: config.Config, labels: list[str], positive: int | None) -> list[dict]:
    """A log of forty steps on two GPUs."""
    gpus = [{"uuid": f"{i} {word}", "name": word, "util_percent": 90.0 + i} for i in range(2)]
    gpus[0]["unavailable"] = {word: word}
    machine = {"host": word, "cpu_percent": 50.0, "memory_gib": 3.0, "cores": 4, "gpus": gpus}
    start = START | {
        "labels": labels,
        "positive_label": None if positive is None else labels[positive],
        "config": config.flatten(cfg) | {word: word, "optimizer.lr": 1e-3},
        "environment": {"versions": {word: word}, "commit": word, "device": word, "threads": 2}
        | {"command": [word, word], "world_size": 1},
        "data": {"train": 320, "validation": N, "test": N, word: 3},
        "class_weights": dict.fromkeys(labels, 1.0),
        "baselines": BASELINES,
        "host": word,
    }
    events = [start, {"event": "warning", "code": word, "message": word}]
    for i in range(10, 41, 10):
        events += [step(i), evaluation(i, 0.5 + i / 100, best=i == 10, f1_positive=0.4)]
        events.append({"event": "hardware"} | machine)
    events.append({"event": "end", "status": "completed", "reason": word, "seconds": 93.0})
    return events
