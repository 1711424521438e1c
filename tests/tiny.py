"""What tests run on: a two-layer random XLM-R with its tokenizer, a few rows, several ranks."""

import csv
import multiprocessing
import os
import random
import socket
import traceback
from collections.abc import Callable
from pathlib import Path

import torch
from transformers import XLMRobertaConfig, XLMRobertaForSequenceClassification

import config
import model as models
import runlog
import train
from ddp import World
from prepare import Job, prepare
from signals import StopRequest

WORDS = ("the", "a", "goose", "tram", "soup", "argues", "politely", "late", "ticket", "my", "aunt")


# What two runs of the same bytes may differ in: clocks, and what the machine did meanwhile.
VOLATILE = {"time", "step_s", "examples_per_s", "tokens_per_s", "data_wait_share"}
VOLATILE |= {"peak_memory_gib", "seconds", "paused_s"}

PLAIN = {"speed__padding": "batch", "speed__active_vocabulary": "false"}
PLAIN |= {"speed__first_position": "false"}
SAVINGS = {
    "all": {},
    "none": PLAIN,
    "padding-free": PLAIN | {"speed__padding": "free"},
    "active vocabulary": PLAIN | {"speed__active_vocabulary": "true"},
    "first position": PLAIN | {"speed__first_position": "true"},
}


def rows(n: int, *, seed: int = 0, positives: float = 0.25) -> list[dict[str, str]]:
    """n different texts of 3 to 14 words; label 1, for about a quarter, has a word of its own."""
    rng = random.Random(seed)
    texts: dict[str, str] = {}
    while len(texts) < n:
        label = "1" if rng.random() < positives else "0"
        words = rng.choices(WORDS, k=rng.randint(1, 12))
        words.insert(rng.randrange(len(words) + 1), "goose!" if label == "1" else "tram.")
        texts.setdefault(" ".join([*words, str(rng.randrange(1000))]), label)
    return [
        {"text": text, "label": label, "lang": "ab"[i % 2]}
        for i, (text, label) in enumerate(texts.items())
    ]


def write_csv(path: Path, records: list[dict[str, str]]) -> Path:
    """Records as a CSV file."""
    with open(path, "w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, records[0].keys())
        writer.writeheader()
        writer.writerows(records)
    return path


def write_model(folder: Path, *, dropout: float = 0.1, positions: int = 66) -> Path:
    """A checkpoint as `from_pretrained` takes it: 32 wide, 2 layers, random weights, seed 0."""
    texts = [r["text"] for r in rows(200, seed=9)]
    models._train_tokenizer(texts, folder)
    vocabulary = len(models.load_tokenizer(models.Source("", folder), list, folder))
    random_model(vocabulary, dropout=dropout, positions=positions).save_pretrained(folder)
    return folder


def random_model(
    vocabulary: int = 60, *, dropout: float = 0.1, positions: int = 66
) -> XLMRobertaForSequenceClassification:
    """A classifier 32 wide with 2 layers; random weights, seed 0."""
    torch.manual_seed(0)
    cfg = XLMRobertaConfig(
        vocab_size=vocabulary,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=64,
        max_position_embeddings=positions,
        type_vocab_size=1,
        pad_token_id=1,
        hidden_dropout_prob=dropout,
        attention_probs_dropout_prob=dropout,
        initializer_range=0.1,
    )
    return XLMRobertaForSequenceClassification(cfg)


def settings(folder: Path, **changes: object) -> list[str]:
    """Command-line settings of a tiny run on files in `folder`; `data__limit=3` is data.limit=3."""
    values = {
        "run.dir": folder / "runs",
        "run.device": "cpu",
        "data.cache_dir": folder / "cache",
        "data.train": folder / "train.csv",
        "data.validation": folder / "validation.csv",
        "data.test": "",
        "data.max_length": 64,
        "model.name": folder / "model",
        "train.epochs": 2,
        "train.precision": "fp32",  # auto would depend on the processor
        "train.global_batch_size": 8,
        "optimizer.lr": 1e-3,
        "log.every": 1,
    } | {name.replace("__", "."): value for name, value in changes.items()}
    return [f"{name}={value}" for name, value in values.items()]


def make_job(arguments: list[str], world: World | None = None) -> Job:
    """A prepared job, quietly."""
    return prepare(config.load(None, arguments), world or alone(), lambda line: None)


def alone() -> World:
    """The world of a single process on the CPU."""
    return World(0, 0, 1, torch.device("cpu"))


def outcome(folder: Path) -> dict[str, object]:
    """What two runs must share: the bytes of the model and of the last state, and the metrics."""
    best = (folder / "best" / "model.safetensors").read_bytes()
    kept = sorted((folder / "checkpoints").glob("step-*"))
    last = {p.name: p.read_bytes() for p in sorted(kept[-1].glob("*.safetensors"))}
    events = [
        {name: value for name, value in event.items() if name not in VOLATILE}
        for event in runlog.read(folder / "metrics.jsonl")
        if event["event"] in ("step", "eval")
    ]
    predictions = (folder / "predictions" / "validation.jsonl").read_bytes()
    return {"best": best, "last": last, "events": events, "predictions": predictions}


class StopAfter(StopRequest):
    """Asks to stop after certain steps, as a signal would at that moment."""

    def __init__(self, *steps: int):
        super().__init__()
        self.steps = steps

    def is_set(self, step: int) -> bool:
        return step in self.steps


def run(arguments: list[str], *stops: int) -> int:
    """The exit code of train.py with the default configuration and these settings."""
    return train.main(["--config", os.devnull, *arguments], StopAfter(*stops))


def run_ranks(size: int, function: Callable, *arguments: object) -> list[object]:
    """function(*arguments) in `size` gloo processes at once; their results by rank.

    It may form one process group: a second one in the same processes can hang in the rendezvous,
    while a rank is still taking the first one down.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "transformers.models.xlm_roberta", "train", "sklearn"])
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    queue = context.Queue()
    children = [
        context.Process(target=_rank, args=(rank, size, port, queue, function, arguments))
        for rank in range(size)
    ]
    for child in children:
        child.start()
    results: dict[int, object] = {}
    while len(results) < size:
        rank, result = queue.get(timeout=300)
        if isinstance(result, _Failure):
            for child in children:
                child.kill()  # they would wait for the one that failed
            raise AssertionError(f"rank {rank}: {result.trace}")
        results[rank] = result
    for child in children:
        child.join()
    return [results[rank] for rank in range(size)]


class _Failure:
    def __init__(self, trace: str):
        self.trace = trace


def _rank(rank: int, size: int, port: int, queue, function: Callable, arguments: tuple) -> None:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(size)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    try:
        queue.put((rank, function(*arguments)))
    except BaseException:
        queue.put((rank, _Failure(traceback.format_exc())))


def make_config(*arguments: str, **changes: object) -> config.Config:
    """The default configuration with changes; `data__limit=3` is data.limit=3."""
    named = [f"{name.replace('__', '.')}={value}" for name, value in changes.items()]
    return config.load(None, [*arguments, *named])
