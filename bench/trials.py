"""Trainings whose logits are kept after each epoch, so that any choice can be judged afterwards.

A trial is one training with one seed, by our loop or by Hugging Face Trainer, in a process of one
thread; what a folder has of trials already is not run again. Nothing that is decided within a trial
depends on the test texts, which are scored after each epoch too.

Shapes: E epochs, N validation texts, M test texts, K classes.
"""

import contextlib
import csv
import json
import multiprocessing
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

SEEDS = (42, 43, 44, 45, 46)
SCORES = "scores.jsonl"
BATCH, MAX_LENGTH, WARMUP, DECAY = 32, 128, 0.1, 0.01


@dataclass(frozen=True)
class Trial:
    """What is trained: `name` tells the settings, `idea` what else than settings is changed."""

    data: str
    name: str
    seed: int
    settings: Mapping[str, object] = field(default_factory=dict)
    idea: Callable[[], "Idea"] | None = None
    by: str = "ours"  # or trainer
    epochs: float | None = None  # None: as all others

    @property
    def key(self) -> str:
        """What tells it from other trials."""
        return f"{self.data}/{self.by}/{self.name}/{self.seed}"


def named(weights: str, lr: float) -> str:
    """What a trial that differs in these alone is called."""
    return f"{weights}-lr{lr:g}"


class Idea:
    """What a try changes of a training; this one nothing."""

    def begin(self, job) -> None:
        """Before the first step, and before the optimizer is made."""

    def backward(self, model, micro_batches, n: int, step: int, job, world) -> object:
        """Leave the step's gradient in the parameters."""
        import train

        return train.backward(model, micro_batches, n, step, job, world)

    def after(self, model, step: int, total_steps: int) -> None:
        """After the update of a step."""

    def others(self, model) -> dict[str, contextlib.AbstractContextManager]:
        """Within each, `model` has other weights that are to be scored, too; by name."""
        return {}


# --- one trial ------------------------------------------------------------------------------------


def of_ours(
    trial: Trial, data: Path, model: str, epochs: float, clock: Callable = time.process_time
) -> dict[str, object]:
    """Train with the parts of train.py: its loader, backward, update, schedule and evaluation."""
    import torch

    import config
    import train
    from ddp import World
    from optimizer import make_optimizer, set_lr, update
    from prepare import prepare

    values = {
        "run.seed": trial.seed,
        "run.device": "cpu",
        "data.cache_dir": data.parent / "cache",
        "data.train": data / "train.csv",
        "data.validation": data / "dev.csv",
        "data.test": data / "test.csv",
        "data.max_length": MAX_LENGTH,
        "data.leaks": "keep",
        "model.name": model,
        "train.epochs": epochs,
        "train.global_batch_size": BATCH,
        "optimizer.weight_decay": DECAY,
        "schedule.warmup_ratio": WARMUP,
    } | trial.settings
    shape = values.pop("schedule", "cosine")
    cfg = config.load(None, [f"{name}={value}" for name, value in values.items()])
    world = World(0, 0, 1, torch.device("cpu"))
    job = prepare(cfg, world, lambda line: None)
    idea = trial.idea() if trial.idea else Idea()
    idea.begin(job)
    optimizer = make_optimizer(job.model, cfg.optimizer)
    model, splits = job.model.train(), job.corpus.evaluated()
    sampler, kept = job.sampler(0), {}
    began = clock()
    for step, micro_batches, _ in train.batches_by_step(job, sampler, world.device):
        lr = set_lr(optimizer, step, job.steps, cfg.schedule.min_lr_ratio)
        if shape != "cosine":
            _reshape(optimizer, lr, shape, step, job.steps)
        n = len(sampler.global_batch(step))
        idea.backward(model, micro_batches, n, step, job, world)
        update(optimizer, cfg.train.max_grad_norm)
        idea.after(model, step + 1, job.steps.total_steps)
        if train.due(step + 1, "epoch", job):
            for other, weights in ({"": contextlib.nullcontext()} | idea.others(model)).items():
                with weights:
                    for name, split in splits.items():
                        logits = train.evaluate(job, split, world)
                        kept.setdefault(f"{name}{other}", []).append(logits)
    labels = {f"{name}_labels": split.labels for name, split in splits.items()}
    spent = {"cpu_s": clock() - began}
    return {name: np.stack(logits) for name, logits in kept.items()} | labels | spent


def _reshape(optimizer, lr: float, shape: str, step: int, steps) -> None:
    """A constant or linear schedule after the same warm-up, where train.py has a cosine."""
    left = (steps.total_steps - step) / max(1, steps.total_steps - steps.warmup_steps)
    factor = min(1.0, (step + 1) / max(1, steps.warmup_steps))
    factor = min(factor, left) if shape == "linear" else factor
    for group in optimizer.param_groups:
        group["lr"] = group["peak_lr"] * factor


def of_trainer(
    trial: Trial, data: Path, model: str, epochs: float, clock: Callable = time.process_time
) -> dict[str, object]:
    """Train with Hugging Face Trainer as its documentation shows it.

    With the setting speed.padding=free its model has our padding-free forward, which computes the
    same function and draws other dropout masks (--check of against_trainer.py).
    """
    import tempfile

    import torch
    import transformers as tf

    tf.set_seed(trial.seed)
    tokenizer = tf.AutoTokenizer.from_pretrained(model)
    classifier = tf.AutoModelForSequenceClassification.from_pretrained(model, num_labels=2)
    classifier.classifier.apply(classifier._init_weights)  # a head of this seed, as ours is
    splits = {n: rows(data / f"{n}.csv", tokenizer) for n in ("train", "dev", "test")}
    counts = np.bincount([row["labels"] for row in splits["train"]])
    balanced = torch.tensor(counts.sum() / (2 * counts), dtype=torch.float)

    class Weighted(tf.Trainer):
        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            labels = inputs.pop("labels")
            outputs = model(**inputs)
            loss = torch.nn.functional.cross_entropy(outputs.logits, labels, weight=balanced)
            return (loss, outputs) if return_outputs else loss

    is_timed = "padding" in trial.settings  # as a run is that scores validation only
    evaluated = {"validation": splits["dev"]} | ({} if is_timed else {"test": splits["test"]})
    kept, labels = {name: [] for name in evaluated}, {}
    padding = {"padding": trial.settings.get("padding", True), "max_length": MAX_LENGTH}
    is_packed = trial.settings.get("speed.padding") == "free"
    collate = packed(classifier) if is_packed else None

    def keep(prediction) -> dict[str, float]:
        name = "validation" if len(prediction.label_ids) == len(splits["dev"]) else "test"
        kept[name].append(prediction.predictions.astype(np.float32))
        labels[f"{name}_labels"] = prediction.label_ids
        return {}

    with tempfile.TemporaryDirectory() as folder:
        arguments = tf.TrainingArguments(
            folder,
            num_train_epochs=epochs,
            per_device_train_batch_size=BATCH,
            per_device_eval_batch_size=BATCH,
            learning_rate=trial.settings["optimizer.lr"],
            lr_scheduler_type=trial.settings.get("schedule", "cosine"),
            warmup_steps=WARMUP,
            weight_decay=DECAY,
            bf16=trial.settings["train.precision"] == "bf16",
            eval_strategy="epoch",
            save_strategy="no",
            seed=trial.seed,
            use_cpu=True,
            report_to=[],
            disable_tqdm=True,
        )
        weights = trial.settings["train.class_weights"]
        peer = (Weighted if weights == "balanced" else tf.Trainer)(
            classifier,
            arguments,
            data_collator=collate or tf.DataCollatorWithPadding(tokenizer, **padding),
            train_dataset=splits["train"],
            eval_dataset=evaluated,
            compute_metrics=keep,
        )
        began = clock()
        peer.train()
    spent = {"cpu_s": clock() - began}
    return {name: np.stack(logits) for name, logits in kept.items()} | labels | spent


def packed(classifier) -> Callable[[Sequence[dict]], dict[str, object]]:
    """Give a model of Trainer's our padding-free forward; a collate function for it."""
    from batches import Collate, Template
    from encoder import install

    install(classifier, packed=True, first_position=True)
    pad_id = classifier.config.pad_token_id
    collate = Collate(Template([], [], pad_id, MAX_LENGTH, "head"), "free")  # rows are dressed

    def gather(texts: Sequence[dict]) -> dict[str, object]:
        batch = collate([(t["input_ids"], t["labels"], 1.0, False) for t in texts])
        return batch.inputs | {"labels": batch.labels}

    return gather


def rows(file: Path, tokenizer) -> list[dict[str, object]]:
    """The texts of a CSV file as Trainer takes them."""
    with open(file, encoding="utf-8", newline="") as opened:
        records = list(csv.DictReader(opened))
    encoded = tokenizer([r["text"] for r in records], truncation=True, max_length=MAX_LENGTH)
    keys = ("input_ids", "attention_mask")
    return [
        {k: encoded[k][i] for k in keys} | {"labels": int(r["label"])}
        for i, r in enumerate(records)
    ]


# --- many -----------------------------------------------------------------------------------------


def prepare_data(folders: Sequence[Path], out: Path, language: str | None) -> list[str]:
    """Copies of the data below `out`, of one language where a column lang tells it; their names."""
    for folder in folders:
        target = out / "data" / folder.name
        target.mkdir(parents=True, exist_ok=True)
        for split in ("train", "dev", "test"):
            with open(folder / f"{split}.csv", encoding="utf-8", newline="") as file:
                records = [r for r in csv.DictReader(file) if r.get("lang", language) == language]
            with open(target / f"{split}.csv", "w", encoding="utf-8", newline="") as file:
                writer = csv.DictWriter(file, ("text", "label"), extrasaction="ignore")
                writer.writeheader()
                writer.writerows(records)
    return [folder.name for folder in folders]


def scores_of(labels: np.ndarray, logits: np.ndarray, decision) -> dict[str, object]:
    """What is kept of a split after an epoch; `decision` says how labels follow from logits."""
    import metrics

    predicted = decision.predict(decision.probabilities(logits))
    plain = metrics.score(labels, logits, 1)
    tuned = metrics.score(labels, np.eye(2)[predicted], 1)
    names = ("f1_macro", "f1_positive", "confusion")
    kept = {name: plain[name] for name in ("loss", *names, "calibration_error")}
    calibrated = metrics.calibration_error(decision.probabilities(logits), labels)
    kept["tuned"] = {name: tuned[name] for name in names} | {"calibration_error": calibrated}
    return kept


def summarise(found: Mapping[str, np.ndarray], other: str = "") -> list[dict[str, object]]:
    """The scores of both splits after each epoch; thresholds are fitted on validation."""
    from decision import fit

    epochs = []
    splits = (found[f"{name}{other}"] for name in ("validation", "test"))
    for validation, test in zip(*splits, strict=True):
        decision = fit(found["validation_labels"], validation, 1)
        scores = {
            "validation": scores_of(found["validation_labels"], validation, decision),
            "test": scores_of(found["test_labels"], test, decision),
        }
        epochs.append(scores | {"threshold": decision.threshold})
    return epochs


def run(trials: Sequence[Trial], out: Path, model: str, epochs: float, jobs: int) -> None:
    """Run those trials that `out` lacks, so many at a time, and say how each went."""
    done = outcomes(out)
    missing = [t for t in trials if t.key not in done]
    print(f"{len(trials)} trials, {len(missing)} of them to be run", flush=True)
    _import_all()
    context = multiprocessing.get_context("fork")  # imports once; there is no thread yet
    with context.Pool(jobs, maxtasksperchild=1) as pool:
        asked = [(t, out, model, epochs) for t in missing]
        for lines in pool.imap_unordered(_run, asked):
            with open(out / SCORES, "a", encoding="utf-8") as file:
                file.writelines(json.dumps(line) + "\n" for line in lines)
            for line in lines:
                macro = [round(e["validation"]["f1_macro"], 3) for e in line["epochs"]]
                told = f"{line['cpu_s']:.0f} s, validation macro-F1 {macro}"
                print(f"{line['key']}: {told}", flush=True)


def _import_all() -> None:
    import scipy.optimize  # noqa: F401
    import sklearn.metrics  # noqa: F401
    import torch
    import transformers.trainer  # noqa: F401

    import train  # noqa: F401

    torch.set_num_threads(1)


def _run(asked: tuple) -> list[dict[str, object]]:
    """A line for the trial, and one for each of its other weights."""
    trial, out, model, epochs = asked
    one = of_ours if trial.by == "ours" else of_trainer
    with (
        open(os.devnull, "w") as quiet,
        contextlib.redirect_stdout(quiet),
        contextlib.redirect_stderr(quiet),
    ):
        found = one(trial, out / "data" / trial.data, model, trial.epochs or epochs)
    path = out / "logits" / f"{trial.key.replace('/', '-')}.npz"
    path.parent.mkdir(exist_ok=True)
    np.savez(path, **found)
    precision = trial.settings.get("train.precision")
    spent = {"cpu_s": float(found["cpu_s"]), "precision": precision}
    others = [name.removeprefix("test") for name in found if name.startswith("test")]
    return [
        {"key": replace(trial, name=trial.name + other).key, **spent}
        | {"epochs": summarise(found, other)}
        for other in others
        if other != "_labels"
    ]


def outcomes(out: Path) -> dict[str, dict[str, object]]:
    """What the trials that have run left, by key."""
    path = out / SCORES
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    return {line["key"]: line for line in map(json.loads, lines)}
