"""From a configuration to all that training needs: data, model, and every `auto` made a number."""

import dataclasses
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import nn

import checkpoint
import config
import metrics
import model as models
import savings
from batches import Collate, StepSampler, Template, Texts, cut, evaluation_batches
from config import Config
from corpus import Corpus, TokenisedSplit, content_key, load_corpus, training_texts
from data import SLICE_WORDS
from ddp import World
from errors import BAD_CONFIG, BAD_DATA, MISSING, Refusal, printable
from meter import Workload
from schedule import StepPlan, plan_steps

# Tokens of one pass, padding included, where train.micro_batch_tokens is auto; halved until a
# pass fits the GPU. On a CPU larger passes are no faster and only take memory.
AUTO_TOKENS = {"cpu": 8192, "cuda": 65536}

OF_ANY_LABELS = ("loss", "accuracy", "calibration_error")  # need not an example of each
MIN_DECIDING = 30  # texts of a slice that chooses the best checkpoint
SAVED_BYTES_PER_S = 300e6  # of a checkpoint, written, hashed and flushed to a cloud disk


@dataclass(frozen=True)
class Job:
    """A run made ready: `cfg` has no `auto` left, the model is on its device."""

    cfg: Config
    corpus: Corpus
    template: Template
    source: models.Source
    tokenizer: object
    model: nn.Module
    steps: StepPlan
    weights: np.ndarray  # (N,) float32, of each training text in the loss
    dtype: torch.dtype  # of matrix products

    @property
    def collate(self) -> Collate:
        """How texts become a batch."""
        rounded = next(self.model.parameters()).device.type == "cpu"
        return Collate(self.template, self.cfg.speed.padding, rounded)

    @property
    def training_texts(self) -> Texts:
        """The training split as a dataset with its weights."""
        return Texts(self.corpus.train, self.template, self.weights)

    @property
    def is_packed(self) -> bool:
        """Whether the texts of a pass are one row without padding."""
        return self.cfg.speed.padding == "free"

    @property
    def positive(self) -> int | None:
        """Index of the positive label."""
        return self.corpus.positive

    def lengths(self, split: TokenisedSplit) -> np.ndarray:
        """Tokens that each text takes in a pass where no other is longer, (N,)."""
        lengths = self.template.lengths(split)
        is_filled = self.cfg.speed.padding == "max"
        return np.full_like(lengths, self.template.max_length) if is_filled else lengths

    def evaluation_batches(self, split: TokenisedSplit) -> list[list[int]]:
        """The texts of each forward when a split is scored."""
        device = next(self.model.parameters()).device.type
        return evaluation_batches(self.lengths(split), is_packed=self.is_packed, device=device)

    def base_model(self) -> nn.Module:
        """The model that training began with, loaded anew."""
        return models.load_model(
            self.source,
            self.corpus.label_names,
            self.tokenizer,
            max_length=self.cfg.data.max_length,
            seed=self.cfg.run.seed,
        )

    def sampler(self, rank: int, first_step: int = 0) -> StepSampler:
        """The order of this run's texts from `first_step` on, for one rank."""
        return StepSampler(
            self.lengths(self.corpus.train),
            self.steps,
            rank=rank,
            seed=self.cfg.run.seed,
            micro_batch_tokens=self.cfg.train.micro_batch_tokens,
            is_packed=self.is_packed,
            first_step=first_step,
        )


def prepare(cfg: Config, world: World, say: Callable[[str], None], *, strict: bool = False) -> Job:
    """Everything that can be checked before the first step is; every refusal is on all ranks."""
    world.together(lambda: check_metric(cfg, None))
    set_determinism(cfg.run.deterministic, world.device)
    source = _settle_source(cfg, world, say)
    if source.is_scratch:
        cfg = _with_scratch_settings(cfg, say)
    world.together(lambda: models.check_positions(source, cfg.data.max_length))
    precision = world.share(pick_precision(cfg.train.precision, world.device))
    cfg = config.replace(cfg, model__name=source.name, train__precision=precision)
    tokenizer, corpus = _tokenise(cfg, source, world, say)
    for finding in corpus.findings:
        say(f"  {finding}")
    others = len(corpus.findings) - 1
    told = f"--strict: {corpus.findings[0]}" if strict and corpus.findings else None
    told = f"{told} (and {others:,} more, above)" if told and others else told
    world.agree(Refusal(BAD_DATA, told) if told else None)
    if corpus.report["held_out"]:
        say(
            f"  no data.validation: {corpus.report['held_out']:,} training rows are held out for it"
        )
    world.require_same(BAD_DATA, data=corpus.key)
    world.together(lambda: check_metric(cfg, corpus))
    world.together(lambda: _check_known_labels(cfg, corpus))
    if told := few_decide(cfg, corpus):
        say(f"  {told}")
    cut_text = (cfg.data.max_length, cfg.data.truncation)
    template = world.together(lambda: models.template(tokenizer, *cut_text))
    say(f"loading the model {source.name}")
    classifier = world.together(
        lambda: models.load_model(
            source,
            corpus.label_names,
            tokenizer,
            max_length=cfg.data.max_length,
            seed=cfg.run.seed,
            say=say,
        )
    )
    is_asked = world.size > 1 and world.local_rank == 0
    of_machine = world.together(lambda: models.weights_key(source) if is_asked else None)
    world.require_same(MISSING, weights=of_machine)
    speed = savings.install(classifier, cfg.speed, corpus, template, say)
    cfg = dataclasses.replace(cfg, speed=speed)
    classifier.to(world.device)
    is_cut_given = cfg.train.micro_batch_tokens != "auto"
    cfg, steps = plan(cfg, corpus, world)
    job = Job(
        cfg=cfg,
        corpus=corpus,
        template=template,
        source=source,
        tokenizer=tokenizer,
        model=classifier,
        steps=steps,
        weights=weigh(cfg, corpus),
        dtype=torch.bfloat16 if cfg.train.precision == "bf16" else torch.float32,
    )
    return job if is_cut_given or world.device.type == "cpu" else _fit_memory(job, world, say)


def set_determinism(deterministic: bool, device: torch.device) -> None:
    """Same bytes on the same hardware: deterministic kernels, no TF32 behind the user's back."""
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False
    torch.backends.cudnn.benchmark = False
    if device.type == "cuda":
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(deterministic)
    torch.utils.deterministic.fill_uninitialized_memory = False  # a debugging aid that costs time


def pick_precision(wanted: str, device: torch.device) -> str:
    """bf16 where the hardware multiplies it natively, if left to us; weights stay fp32."""
    if wanted != "auto":
        return wanted
    if device.type == "cuda":
        return "bf16" if torch.cuda.get_device_capability(device) >= (8, 0) else "fp32"
    try:
        flags = Path("/proc/cpuinfo").read_text(encoding="ascii", errors="replace")
    except OSError:
        return "fp32"
    return "bf16" if "avx512_bf16" in flags or "amx_bf16" in flags else "fp32"


def check_metric(cfg: Config, corpus: Corpus | None) -> None:
    """Refusal 78 if evaluation.metric is no score, or one that this corpus does not have.

    Or if class weights are by a column that it does not have.
    """
    try:
        base, _, column = metrics.parse_metric(cfg.evaluation.metric)
    except ValueError as error:
        raise Refusal(BAD_CONFIG, f"evaluation.metric: {error}") from None
    _check_column("evaluation.metric", column, cfg, corpus)
    _check_column("train.class_weights", weighted_column(cfg), cfg, corpus)
    if corpus is None:
        return
    if base not in OF_ANY_LABELS:
        _check_all_labels(corpus, base, column)
    if base == "f1_positive" and corpus.positive is None:
        raise Refusal(BAD_CONFIG, "evaluation.metric: f1_positive needs data.positive_label")


def _check_column(key: str, column: str | None, cfg: Config, corpus: Corpus | None) -> None:
    """Refusal 78 for a column that is no slice column; without a corpus, if none can have it."""
    named = cfg.data.slice_columns
    is_open = corpus is None and named == "auto" and (column or "").casefold() in SLICE_WORDS
    if column is None or is_open:
        return
    columns = corpus.validation.slices if corpus else SLICE_WORDS if named == "auto" else named
    if column not in columns:
        has = ", ".join(printable(c, 30) for c in columns) or "none"
        raise Refusal(
            BAD_CONFIG, f"{key}: '{printable(column)}' is not among data.slice_columns ({has})"
        )


def few_decide(cfg: Config, corpus: Corpus) -> str | None:
    """That the metric is of a slice with few texts, which then choose the best checkpoint."""
    base, how, column = metrics.parse_metric(cfg.evaluation.metric)
    if how != "worst":
        return None
    labels, (codes, values) = corpus.validation.labels, corpus.validation.slices[column]
    needed = 1 if base in OF_ANY_LABELS else len(corpus.label_names)  # to be scored at all
    counts = {
        value: int((codes == code).sum())
        for code, value in enumerate(values)
        if len(np.unique(labels[codes == code])) >= needed
    }
    few = min(counts, key=counts.get)
    if counts[few] >= MIN_DECIDING:
        return None
    return (
        f"evaluation.metric: '{printable(few, 30)}' of {printable(column, 30)} has {counts[few]:,} "
        "validation texts; where so few decide, the best checkpoint is mostly chance"
    )


def _check_all_labels(corpus: Corpus, base: str, column: str | None) -> None:
    """Refusal 65 if a score is undefined for validation, or for each value of a slice column."""
    labels, classes = corpus.validation.labels, len(corpus.label_names)
    codes = corpus.validation.slices[column][0] if column else np.zeros_like(labels)
    if any(len(np.unique(labels[codes == code])) == classes for code in np.unique(codes)):
        return
    where = f"has no value of {printable(column)} with" if column else "has not"
    raise Refusal(
        BAD_DATA,
        f"data.validation: {where} a text of each label, so {base} is undefined; the labels are: "
        f"{', '.join(printable(n, 30) for n in corpus.label_names[:10])}",
    )


def weigh(cfg: Config, corpus: Corpus) -> np.ndarray:
    """The weight of each training text in the loss, (N,) float32, by train.class_weights."""
    wanted, train = cfg.train.class_weights, corpus.train
    if isinstance(wanted, dict):
        return np.array([wanted[name] for name in corpus.label_names], np.float32)[train.labels]
    if wanted == "none":
        return np.ones(len(train), np.float32)
    weights, column = np.zeros(len(train)), weighted_column(cfg)
    groups = train.slices[column][0] if column else np.zeros(len(train), np.int32)
    for group in np.unique(groups):  # balanced within each value of the column
        members = groups == group
        weights[members] = metrics.balanced_weights(train.labels[members])
    return weights.astype(np.float32)


def weighted_column(cfg: Config) -> str | None:
    """The slice column of train.class_weights=balanced:COLUMN."""
    wanted = cfg.train.class_weights
    return wanted.partition(":")[2] or None if isinstance(wanted, str) else None


def named_weights(job: Job) -> dict[str, float]:
    """The weights in the loss by label, or by the value of a slice column and label."""
    train, names = job.corpus.train, job.corpus.label_names
    column = weighted_column(job.cfg)
    codes, values = train.slices[column] if column else (np.zeros_like(train.labels), [""])
    cells, first = np.unique(codes * len(names) + train.labels, return_index=True)
    places = zip(cells.tolist(), job.weights[first].tolist(), strict=True)
    return {f"{values[c // len(names)]} {names[c % len(names)]}".strip(): w for c, w in places}


def _check_known_labels(cfg: Config, corpus: Corpus) -> None:
    wanted = cfg.train.class_weights
    if isinstance(wanted, dict) and set(wanted) != set(corpus.label_names):
        odd = sorted(set(wanted) - set(corpus.label_names))
        told = f"'{printable(odd[0])}' is none of them" if odd else "one has none"
        raise Refusal(
            BAD_CONFIG,
            f"train.class_weights: needs one weight for each of {', '.join(corpus.label_names)}; "
            f"{told}",
        )


def plan(cfg: Config, corpus: Corpus, world: World) -> tuple[Config, StepPlan]:
    """The step arithmetic, and the configuration with its micro-batch made numbers."""
    t = cfg.train
    # A check in one process plans for the many that will follow it.
    ranks = int(os.environ.get("CHECK_WORLD_SIZE", world.size))
    accumulation = None if t.accumulation_steps == "auto" else t.accumulation_steps
    micro = t.micro_batch_size
    if micro == "auto":
        passes = ranks * (accumulation or 1)
        micro = max(1, -(-t.global_batch_size // passes))
    tokens = t.micro_batch_tokens
    if tokens == "auto":
        tokens = AUTO_TOKENS[world.device.type]
    steps = plan_steps(
        len(corpus.train),
        world_size=ranks,
        global_batch_size=t.global_batch_size,
        micro_batch_size=micro,
        accumulation_steps=accumulation,
        epochs=t.epochs,
        max_steps=t.max_steps,
        warmup_ratio=cfg.schedule.warmup_ratio,
    )
    resolved = config.replace(
        cfg,
        train__global_batch_size=steps.global_batch_size,
        train__micro_batch_size=steps.micro_batch_size,
        train__micro_batch_tokens=tokens,
    )
    return resolved, steps


def longest_micro_batch(job: Job) -> list[int]:
    """The texts of the most demanding pass that the caps allow."""
    lengths = job.lengths(job.corpus.train)
    longest = np.argsort(-lengths, kind="stable")[: job.steps.micro_batch_size]
    caps = (job.steps.micro_batch_size, job.cfg.train.micro_batch_tokens)
    return cut(longest, lengths, *caps, is_packed=job.is_packed)[0]


def try_pass(job: Job, texts: list[int], device: torch.device) -> None:
    """Forward, backward and evaluation of some texts; no weight changes, no gradient stays."""
    dataset = job.training_texts
    batch = job.collate([dataset[i] for i in texts]).to(device)
    with torch.autocast(device.type, torch.bfloat16, enabled=job.dtype == torch.bfloat16):
        job.model(**batch.inputs).logits.float().sum().backward()
        job.model.zero_grad(set_to_none=True)
        with torch.no_grad():
            job.model.eval()(**batch.inputs)
        job.model.train()
    if device.type == "cuda":
        torch.cuda.synchronize(device)  # it is timed, and out of memory must show here


def workload(job: Job, sampler: StepSampler) -> Workload:
    """What is left of a run from the sampler's first step on, on this rank."""
    total, first = job.steps.total_steps, sampler.first_step
    some = np.unique(np.linspace(first, max(first, total - 1), 50).astype(int))
    lengths, collate = sampler.lengths, job.collate

    def cells(step: int) -> int:
        passes = [texts for texts in sampler.micro_batches(step) if texts[0] >= 0]
        return sum(collate.cells(lengths[texts]) for texts in passes)

    mean = np.mean([cells(int(step)) for step in some]) if first < total else 0.0

    def times(every: int | str) -> int:
        return -(-(total - first) // (job.steps.steps_per_epoch if every == "epoch" else every))

    counts = {"validation": times(job.cfg.evaluation.every) + 1, "test": 1}
    scored = 0.0
    for name, split in job.corpus.evaluated().items():
        of_split = job.lengths(split)
        total_cells = sum(collate.cells(of_split[rows]) for rows in job.evaluation_batches(split))
        scored += counts[name] * total_cells / sampler.num_replicas
    parameters = sum(p.numel() for p in job.model.parameters())
    saved = times(job.cfg.checkpoint.every) * parameters * checkpoint.BYTES_PER_PARAMETER
    return Workload(float(mean) * (total - first), scored, saved / SAVED_BYTES_PER_S)


def cut_to(job: Job, micro_batch_tokens: int) -> Job:
    """The same job in passes of at most so many tokens, padding included."""
    cfg = config.replace(job.cfg, train__micro_batch_tokens=micro_batch_tokens)
    return dataclasses.replace(job, cfg=cfg)


def keep_cut(job: Job, before: int, say: Callable[[str], None]) -> Job:
    """The job in the passes of the run's last start, if they fit: another cut draws other masks."""
    fitted = job.cfg.train.micro_batch_tokens
    if before == fitted:
        return job
    kept = min(before, fitted)
    say(f"passes of at most {kept:,} tokens; this run had {before:,} before")
    return cut_to(job, kept)


def _fit_memory(job: Job, world: World, say: Callable[[str], None]) -> Job:
    """Halve the token cap until the longest pass fits every rank's GPU; only the cut changes."""
    parameters, moments = list(job.model.parameters()), []
    while True:
        try:
            moments = moments or [torch.empty_like(p) for p in parameters for _ in range(2)]
            for p in parameters:  # gradients and AdamW's moments are there in every pass but one
                p.grad = torch.zeros_like(p)
            try_pass(job, longest_micro_batch(job), world.device)
            failed = 0
        except torch.OutOfMemoryError:
            job.model.zero_grad(set_to_none=True)
            failed = 1
        torch.cuda.empty_cache()
        tokens = job.cfg.train.micro_batch_tokens
        if not world.largest(failed):
            break
        if tokens // 2 < job.cfg.data.max_length:
            raise Refusal(BAD_CONFIG, "not even one text fits the GPU; lower data.max_length")
        job = cut_to(job, tokens // 2)
    del moments
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    say(f"passes of at most {job.cfg.train.micro_batch_tokens:,} tokens fit the GPU")
    return job


def _settle_source(cfg: Config, world: World, say: Callable[[str], None]) -> models.Source:
    """The model's files on every machine; `scratch` on a first launch that cannot reach the hub."""
    default = Config()
    is_first_launch = (cfg.model.name, cfg.data.train) == (default.model.name, default.data.train)

    def look() -> str:
        try:
            return models.find_source(cfg.model.name).name
        except models.HubUnreachable as error:
            if not is_first_launch:
                raise
            say(f"{error.message}")
            say("for this first look a small model is trained from scratch on the bundled sample")
            return models.SCRATCH

    name = world.share(world.one_at_first(look, every_host=True))
    return world.together(lambda: models.find_source(name))


def _with_scratch_settings(cfg: Config, say: Callable[[str], None]) -> Config:
    """Settings left at their defaults take those that suit random weights."""
    flat, defaults = config.flatten(cfg), config.flatten(Config())
    given = {name for name, value in flat.items() if value != defaults[name]}
    if "train.epochs" in given:
        given.add("train.max_steps")  # which would go before it
    changes = {n: value for n, value in models.SCRATCH_SETTINGS.items() if n not in given}
    listed = ", ".join(f"{name}={value}" for name, value in changes.items())
    say(f"from scratch, without pretrained weights: {listed or 'settings as given'}")
    return config.replace(cfg, **{n.replace(".", "__"): v for n, v in changes.items()})


def _tokenise(
    cfg: Config, source: models.Source, world: World, say: Callable[[str], None]
) -> tuple[object, Corpus]:
    """Tokenizer and corpus, made on one process of each machine and opened by all."""
    seed = cfg.run.seed

    def load() -> tuple[object, Corpus]:
        key = content_key(cfg.data, seed, "tokenizer") if source.is_scratch else ""
        cache = Path(cfg.data.cache_dir) / "tokenizer" / key
        tokenizer = models.load_tokenizer(
            source, lambda: training_texts(cfg.data, seed=seed), cache
        )
        return tokenizer, load_corpus(cfg.data, tokenizer, seed=seed, say=say)

    made = world.one_at_first(load, every_host=True)
    return world.together(lambda: made or load())
