"""What is predicted is what the run's own evaluation gives, row by row, and nothing is lost."""

import contextlib
import csv
import dataclasses
import io
import itertools
import json
import os
import re
import shutil
import signal
import stat
import subprocess
import sys
import types
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import tiny
import torch
from pyarrow import parquet
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2ForSequenceClassification,
    PreTrainedTokenizerFast,
    XLMRobertaModel,
    pipeline,
)

import classifier
import decision
import predict
import tables
import train
import writers
from decision import PLAIN, Decision, Inference
from errors import Refusal
from signals import StopRequest

MAX_LENGTH = 24  # tokens; some texts below are longer
INFERENCE = Inference(["0", "1"], "1", MAX_LENGTH, "head_tail", "fp32", 1.0, None)
SENTENCES = [
    "goose",
    "the tram, late",
    " ".join(["my aunt argues politely"] * 30) + " goose!",
    *(row["text"] for row in tiny.rows(60, seed=3)),
    "zażółć gęślą jaźń 😀",
    " ".join(["soup"] * 11),
]


@pytest.fixture(scope="module")
def run(small, tmp_path_factory) -> Path:
    """A finished run on texts in a column called tweet."""
    folder = tmp_path_factory.mktemp("predict")
    for name in ("train", "validation"):
        with open(small / f"{name}.csv", encoding="utf-8", newline="") as file:
            rows = [{"tweet": r.pop("text")} | r for r in csv.DictReader(file)]
        tiny.write_csv(folder / f"{name}.csv", rows)
    changes = {"data__text_column": "tweet", "data__max_length": MAX_LENGTH, "run__name": "done"}
    changes |= {"model__name": small / "model", "evaluation__patience": ""}
    changes |= {"optimizer__lr": 3e-3, "train__epochs": 20}
    assert tiny.run(tiny.settings(folder, **changes)) == 0
    return folder / "runs" / "done"


@pytest.fixture
def best(run, tmp_path):
    """A function: a copy of the run's model with inference.json as told."""

    def copy(**changes: object) -> Path:
        folder = tmp_path / f"model-{len(list(tmp_path.iterdir()))}"
        shutil.copytree(run / "best", folder)
        stored = decision.as_json(dataclasses.replace(INFERENCE, **changes))
        (folder / decision.FILE).write_text(stored)
        return folder

    return copy


@pytest.fixture(scope="module")
def expected(run, tmp_path_factory) -> np.ndarray:
    """Logits of SENTENCES by `evaluate`."""
    return evaluate(run, tmp_path_factory.mktemp("expected"), SENTENCES)


def evaluate(run: Path, folder: Path, texts: list[str]) -> np.ndarray:
    """Logits by train.evaluate with every saving off."""
    labelled = [{"text": t, "label": i % 2} for i, t in enumerate(texts)]
    for name in ("train", "validation"):
        tiny.write_csv(folder / f"{name}.csv", labelled)
    changes = {"model__name": run / "best", "data__max_length": MAX_LENGTH, "data__leaks": "keep"}
    job = tiny.make_job(tiny.settings(folder, **changes, **tiny.PLAIN))
    return train.evaluate(job, job.corpus.validation, tiny.alone())


def main(*arguments: object) -> int:
    return predict.main([str(a) for a in arguments], StopRequest())


def difference(logits: np.ndarray, expected: np.ndarray) -> float:
    return float(np.abs(logits - expected).max())


# --- the same logits ------------------------------------------------------------------------------


@pytest.mark.parametrize("batch_tokens", [1, 13, 100, 4096])
def test_logits_are_those_of_the_runs_evaluation_in_any_batch_and_order(
    best, expected, batch_tokens
):
    ours = classifier.load(str(best()), device="cpu", batch_tokens=batch_tokens)
    assert ours.collate.padding == "free" and ours.dtype == torch.float32
    assert difference(ours.logits(SENTENCES), expected) < 1e-5
    order = np.random.default_rng(0).permutation(len(SENTENCES))
    assert difference(ours.logits([SENTENCES[i] for i in order]), expected[order]) < 1e-5
    alone = np.concatenate([ours.logits([text]) for text in SENTENCES])
    assert difference(alone, expected) < 1e-5


def test_control_another_truncation_and_other_positions_give_other_logits(best, expected):
    for truncation in ("head", "tail"):
        ours = classifier.load(str(best(truncation=truncation)), device="cpu")
        assert difference(ours.logits(SENTENCES), expected) > 1e-2
    longer = classifier.load(str(best(max_length=64)), device="cpu")
    assert difference(longer.logits(SENTENCES), expected) > 1e-2
    ours = classifier.load(str(best()), device="cpu")

    def shifted(texts):
        batch = ours.collate(texts)
        batch.inputs["position_ids"] -= 1
        return batch

    shifted.template, shifted.padding = ours.collate.template, "free"
    assert difference(dataclasses.replace(ours, collate=shifted).logits(SENTENCES), expected) > 1e-2


def test_in_bf16_logits_are_close_and_not_the_same(best, expected):
    ours = classifier.load(str(best()), device="cpu", precision="bf16")
    logits = ours.logits(SENTENCES)
    assert 1e-5 < difference(logits, expected) < 0.2
    with ours.autocast():
        assert np.array_equal(ours.logits(SENTENCES), logits)


def test_weights_are_cast_once_for_many_chunks(bert):
    """With one autocast around them, what is cast is found again; without, it is cast anew."""
    ours = classifier.load(str(bert), device="cpu", precision="bf16")
    counts = []
    for outer in (ours.autocast(), contextlib.nullcontext()):
        with torch.profiler.profile() as profile, outer:
            for text in SENTENCES[:3]:
                ours.logits([text])
        counts.append(sum(e.count for e in profile.key_averages() if e.key == "aten::_to_copy"))
    weights = sum(p.dim() == 2 for p in ours.model.parameters()) - 3  # but tables of embeddings
    assert counts[1] - counts[0] >= 2 * weights


def write(path: Path, column: str = "text") -> Path:
    """SENTENCES as a file of the kind that its name says."""
    with open(path, "w", encoding="utf-8", newline="") as file:
        if path.suffix == ".txt":
            file.writelines(f"{text}\n" for text in SENTENCES)
        elif path.suffix == ".jsonl":
            file.writelines(json.dumps({"n": 1, column: text}) + "\n" for text in SENTENCES)
        else:
            delimiter = tables.DELIMITERS[path.suffix[1:]]
            csv.writer(file, delimiter=delimiter).writerows([[column], *([t] for t in SENTENCES)])
    return path


@pytest.mark.parametrize("kind", ["csv", "tsv", "jsonl", "txt"])
@pytest.mark.parametrize("chunk", [1, 7, 8192])
def test_every_kind_of_file_gives_the_same_probabilities(
    best, expected, tmp_path, monkeypatch, kind, chunk
):
    monkeypatch.setattr(tables, "CHUNK", chunk)
    out = tmp_path / "out.jsonl"
    source = write(tmp_path / f"texts.{kind}")
    assert main(best(), "--file", source, "--out", out, "--device", "cpu") == 0
    check(out, PLAIN.probabilities(expected), expected.argmax(axis=1))


def test_of_a_huge_text_as_much_is_kept_as_in_training(run, best, tmp_path):
    texts = ["late " + "x" * (1 << 16) + " goose!", "soup"]
    expected = evaluate(run, tmp_path, texts)
    (tmp_path / "in.txt").write_text("\n".join(texts))
    assert main(best(), "--file", tmp_path / "in.txt", "--out", tmp_path / "out.jsonl") == 0
    check(tmp_path / "out.jsonl", PLAIN.probabilities(expected), expected.argmax(axis=1))
    whole = classifier.load(str(best()), device="cpu").logits(texts)
    assert difference(whole, expected) > 1e-2, "control: the rest of it would show"


def check(out: Path, probabilities: np.ndarray, predicted: np.ndarray) -> None:
    """A JSON Lines file has these probabilities and labels."""
    rows = [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()]
    found = np.array([[row["probability_0"], row["probability_1"]] for row in rows])
    assert difference(found, probabilities) < 1e-5
    assert [row["predicted"] for row in rows] == [str(label) for label in predicted]


def test_a_run_is_used_as_it_was_trained(run, tmp_path, expected):
    """By its directory or its best/, its text column known; predictions are those it stored."""
    for name, place in (("a", run), ("b", run / "best")):
        source = write(tmp_path / f"{name}.csv", column="tweet")
        assert main(place, "--file", source, "--out", tmp_path / f"{name}.jsonl") == 0
    assert (tmp_path / "a.jsonl").read_bytes() == (tmp_path / "b.jsonl").read_bytes()
    known = decision.read(run / "best")
    assert known is not None and known.max_length == MAX_LENGTH
    probabilities = known.decision.probabilities(expected)
    check(tmp_path / "a.jsonl", probabilities, known.decision.predict(probabilities))


# --- what is decided ------------------------------------------------------------------------------


def test_threshold_and_temperature_are_applied(best, expected, tmp_path):
    warm = Decision(2.5).probabilities(expected)
    between = np.sort(warm[:, 1])[[len(SENTENCES) // 4, len(SENTENCES) // 4 + 1]].mean()
    decided = Decision(2.5, float(between), 1)
    labels = decided.predict(warm)
    argmax = warm.argmax(axis=1)
    assert (labels != argmax).any(), "else the test shows nothing"
    source, out = write(tmp_path / "texts.csv"), tmp_path / "out.jsonl"
    model = best(temperature=2.5, threshold=float(between))
    assert main(model, "--file", source, "--out", out) == 0
    check(out, warm, labels)
    assert main(model, "--file", source, "--out", out, "--argmax") == 0
    check(out, warm, argmax)
    cold = PLAIN.probabilities(expected)
    assert difference(cold, warm) > 1e-2, "control: another temperature shows"


def test_at_temperature_one_probabilities_are_those_of_the_pipeline(best):
    model = best(max_length=64)
    ours = classifier.load(str(model), device="cpu")
    theirs = pipeline("text-classification", str(model), top_k=None, device="cpu")
    texts = SENTENCES[3:20]
    assert difference(ours.decision.probabilities(ours.logits(texts)), shares(theirs, texts)) < 1e-5


def shares(classify, texts: list[str], **options: object) -> np.ndarray:
    labels = list(classify.model.config.id2label.values())
    found = [{s["label"]: s["score"] for s in scores} for scores in classify(texts, **options)]
    return np.array([[scores[label] for label in labels] for scores in found])


@pytest.fixture(scope="module")
def bert(tmp_path_factory) -> Path:
    """A random classifier of another architecture, of three labels, one with a comma."""
    folder = tmp_path_factory.mktemp("bert")
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *tiny.WORDS, *"0123456789.!"]
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, "[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    dressed = [("[CLS]", 2), ("[SEP]", 3)]
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=dressed
    )
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]", model_max_length=20
    ).save_pretrained(folder)
    torch.manual_seed(0)
    size = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    size |= {"intermediate_size": 32, "max_position_embeddings": 20, "initializer_range": 0.5}
    names = {0: "dry, wry", 1: "slapstick", 2: "=none"}
    cfg = BertConfig(vocab_size=len(words), id2label=names, label2id={}, **size)
    BertForSequenceClassification(cfg).save_pretrained(folder)
    return folder


def test_another_architecture_agrees_with_the_pipeline(bert, tmp_path):
    ours = classifier.load(str(bert), device="cpu", precision="fp32", batch_tokens=64)
    assert ours.collate.padding == "batch" and ours.collate.template.max_length == 20
    theirs = pipeline("text-classification", str(bert), top_k=None, device="cpu")
    expected = shares(theirs, SENTENCES, truncation=True)
    assert difference(PLAIN.probabilities(ours.logits(SENTENCES)), expected) < 1e-5
    out = tmp_path / "out.csv"
    source = write(tmp_path / "a.csv")
    assert main(bert, "--file", source, "--out", out, "--precision", "fp32") == 0
    with open(out, encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    names = list(theirs.model.config.id2label.values())
    assert [r["text"] for r in rows] == SENTENCES
    assert [r["predicted"] for r in rows] == [names[i] for i in expected.argmax(axis=1)]
    assert [float(r["probability_dry, wry"]) for r in rows] == pytest.approx(
        expected[:, 0], abs=1e-5
    )


def a_decoder(folder: Path, bert: Path, **tokens: int | None) -> Path:
    """A random GPT-2 with the tokenizer of `bert` and such special tokens."""
    for name in ("tokenizer.json", "tokenizer_config.json"):
        folder.mkdir(exist_ok=True)
        shutil.copy(bert / name, folder)
    torch.manual_seed(0)
    size = {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 40, "vocab_size": 27}
    cfg = GPT2Config(**size, num_labels=3, initializer_range=0.5, **tokens)
    GPT2ForSequenceClassification(cfg).save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    "pad, at_once", [(0, 64), (5, 1), (None, 1)], ids=["like the tokenizer's", "another", "none"]
)
def test_a_model_that_pads_in_its_own_way_gets_a_text_at_a_time(
    bert, small, tmp_path, capsys, pad, at_once
):
    """A decoder finds its last token by the id that its config pads with."""
    folder = a_decoder(tmp_path / "decoder", bert, pad_token_id=pad)
    ours = classifier.load(str(folder), device="cpu", precision="fp32")
    assert ours.batch_texts == (classifier.EVAL_TEXTS if at_once > 1 else 1)
    texts = SENTENCES[3:30]
    with torch.no_grad():
        own = [ours.tokenizer(t, return_tensors="pt", truncation=True) for t in texts]
        expected = np.concatenate([ours.model(**e).logits.numpy() for e in own])
    assert difference(ours.logits(texts), expected) < 1e-5
    if at_once == 1:  # whoever trains it would have it learn nonsense
        assert tiny.run(tiny.settings(small, model__name=folder, data__max_length=32)) == 66
        assert "padding alters what it computes" in capsys.readouterr().err
    if pad == 5:
        together = dataclasses.replace(ours, batch_texts=64).logits(texts)
        assert difference(together, expected) > 1e-2, "control: it matters"


def test_a_model_that_reads_what_it_is_not_given_is_refused(bert, tmp_path, capsys):
    folder = shutil.copytree(bert, tmp_path / "typed")
    cfg = json.loads((folder / "tokenizer.json").read_text())
    for piece in cfg["post_processor"]["single"]:
        next(iter(piece.values()))["type_id"] = 1  # as XLNet has for its last token
    (folder / "tokenizer.json").write_text(json.dumps(cfg))
    assert main(folder, "goose") == 0, "control: it does not hand them on"
    cfg = json.loads((folder / "tokenizer_config.json").read_text())
    cfg["model_input_names"] = ["input_ids", "token_type_ids", "attention_mask"]
    (folder / "tokenizer_config.json").write_text(json.dumps(cfg))
    capsys.readouterr()
    assert main(folder, "goose") == 66
    shown = capsys.readouterr().err
    assert "reads more than ids and their mask" in shown and shown.count("\n") == 1


def test_texts_are_cut_where_and_on_the_side_that_the_tokenizer_says(bert, tmp_path):
    folder = shutil.copytree(bert, tmp_path / "left")
    cfg = json.loads((folder / "tokenizer_config.json").read_text())
    cfg |= {"model_max_length": 8, "truncation_side": "left"}
    (folder / "tokenizer_config.json").write_text(json.dumps(cfg))
    ours = classifier.load(str(folder), device="cpu", precision="fp32")
    assert (ours.collate.template.max_length, ours.collate.template.truncation) == (8, "tail")
    theirs = pipeline("text-classification", str(folder), top_k=None, device="cpu")
    expected = shares(theirs, SENTENCES, truncation=True)
    assert difference(PLAIN.probabilities(ours.logits(SENTENCES)), expected) < 1e-5


def test_no_pass_is_larger_than_told_and_each_is_of_like_lengths(best, monkeypatch):
    ours = classifier.load(str(best()), device="cpu", batch_tokens=30)
    sizes, model = [], ours.model

    def seen(**inputs):
        sizes.append(inputs["packing"].lengths)
        return model(**inputs)

    seen.config = model.config
    seen.parameters = model.parameters
    dataclasses.replace(ours, model=seen).logits(SENTENCES)
    assert all(sum(lengths) <= 30 or len(lengths) == 1 for lengths in sizes)
    in_order = [n for lengths in sizes for n in lengths]
    assert in_order == sorted(in_order, reverse=True) and len(sizes) > 5


# --- rows are passed on as they stand -------------------------------------------------------------

ADDED = r"{0}(0|1){0}[01]\.\d{{7}}{0}[01]\.\d{{7}}"
HEADER = "{0}predicted{0}probability_0{0}probability_1"
CELLS = {
    "csv": (
        "id,text,note\r\n",
        ['1,"a ""quoted"" goose, late"," x "\r\n', "2,soup,\n", '"3",x,"\n"'],
    ),
    "tsv": ('"text"\tn\n', ['"a\ttab"\t1e5\n', '"two\r\nlines"\t"007"\n', "goose\t\n"]),
}


@pytest.mark.parametrize("kind", CELLS)
def test_cells_are_kept_byte_for_byte_and_in_order(best, tmp_path, kind):
    header, rows = CELLS[kind]
    source, out = tmp_path / f"in.{kind}", tmp_path / f"out.{kind}"
    source.write_bytes((header + "".join(rows)).encode())
    assert main(best(), "--file", source, "--out", out) == 0
    delimiter, pattern = tables.DELIMITERS[kind], ""
    for row in (header, *rows):
        body = row.rstrip("\r\n")
        new = HEADER.format(delimiter) if row is header else ADDED.format(delimiter)
        pattern += re.escape(body) + new + re.escape(row[len(body) :] or "\n")
    assert re.fullmatch(pattern, out.read_bytes().decode())


def test_semicolons_stay_semicolons(best, tmp_path):
    source, out, other = tmp_path / "in.csv", tmp_path / "out.csv", tmp_path / "out.tsv"
    source.write_bytes(b'"n, or so";text\r\n1,5;"a ""goose""; late"\r\n2;tram\r\n')
    assert main(best(), "--file", source, "--out", out) == 0
    found = list(csv.reader(out.read_text(encoding="utf-8").splitlines(), delimiter=";"))
    assert [row[:2] for row in found[1:]] == [["1,5", 'a "goose"; late'], ["2", "tram"]]
    assert found[0][:3] == ["n, or so", "text", "predicted"] and len(found[1]) == 5
    assert main(best(), "--file", source, "--out", other) == 0
    with open(other, encoding="utf-8", newline="") as file:
        assert list(csv.reader(file, delimiter="\t")) == found


OBJECTS = [
    '{"text": "goose", "nested": {"a": [1, {"b": null}]}, "big": 12345678901234567890, "x": 1.0e5}',
    '  {"x":0.10,"text":"soup \\u00e9 \\ud83d\\ude00"}  ',
    '{"text": "late", "only here": true }',
]


def test_json_objects_are_kept_byte_for_byte_and_in_order(best, tmp_path):
    source, out = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text("\n".join(OBJECTS[:2]) + "\n\n" + OBJECTS[2], encoding="utf-8")
    assert main(best(), "--file", source, "--out", out) == 0
    lines = out.read_text(encoding="utf-8").splitlines()
    for line, given in zip(lines, OBJECTS, strict=True):
        assert line.startswith(given.rstrip()[:-1] + ', "predicted": ')
        record = json.loads(line)
        new = {name: record.pop(name) for name in list(record) if name.startswith("p")}
        assert record == json.loads(given)
        assert list(new) == ["predicted", "probability_0", "probability_1"]


def test_one_kind_becomes_another(best, tmp_path):
    source, out = tmp_path / "in.jsonl", tmp_path / "out.csv"
    source.write_text("\n".join(OBJECTS[:2]), encoding="utf-8")
    assert main(best(), "--file", source, "--out", out) == 0
    with open(out, encoding="utf-8", newline="") as file:
        first, second = csv.DictReader(file)
    assert list(first)[:4] == ["text", "nested", "big", "x"]
    assert json.loads(first["nested"]) == {"a": [1, {"b": None}]}
    assert (first["x"], second["nested"], second["text"]) == ("100000.0", "", "soup é 😀")
    back = tmp_path / "back.jsonl"
    source = tmp_path / "in.csv"
    source.write_text('text,n\n"a, b",01\n')
    assert main(best(), "--file", source, "--out", back) == 0
    record = json.loads(back.read_text())
    assert (record["text"], record["n"]) == ("a, b", "01")


def test_parquet_keeps_its_types(best, tmp_path):
    fields = {"text": pa.array(["goose", None, "soup"]), "n": pa.array([1, 2, None], pa.int16())}
    fields["when"] = pa.array([1, 2, 3], pa.timestamp("ns"))
    fields["list"] = pa.array([[1], [], None], pa.list_(pa.int8()))
    fields["word"] = pa.array(["a", "b", "a"]).dictionary_encode()
    given = pa.table(fields)
    source, out = tmp_path / "in.parquet", tmp_path / "out.parquet"
    parquet.write_table(given, source, row_group_size=2)
    assert main(best(), "--file", source, "--out", out) == 0
    found = parquet.read_table(out)
    assert found.select(given.column_names).equals(given)
    assert found.column("predicted").null_count == found.column("probability_0").null_count == 1
    assert str(found.schema.field("probability_1").type) == "double"
    assert main(best(), "--file", source, "--out", tmp_path / "out.jsonl") == 0
    records = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [r["n"] for r in records] == [1, 2, None] and records[0]["when"].endswith("000000001")


def test_a_row_without_text_gets_no_prediction_and_stops_nothing(best, tmp_path, capsys):
    source, out = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    empty = ["", "  ", None, ["x"], {"a": 1}]
    rows = [{"text": "goose"}, *({"text": t} for t in empty), {}, {"text": 7}]
    source.write_text("\n".join(map(json.dumps, rows)))
    assert main(best(), "--file", source, "--out", out) == 0
    found = [json.loads(line) for line in out.read_text().splitlines()]
    is_empty = [r["predicted"] is None and r["probability_0"] is None for r in found]
    assert is_empty == [False] + [True] * 6 + [False]
    assert "6 of 8 rows have no text" in capsys.readouterr().err
    source = tmp_path / "in.csv"
    source.write_text("text\n  \n")
    assert main(best(), "--file", source) == 0
    assert capsys.readouterr().out.splitlines()[1] == "  ,,,"


def test_a_table_without_rows_stays_one(best, tmp_path):
    (tmp_path / "in.csv").write_text("text,n\n")
    assert main(best(), "--file", tmp_path / "in.csv", "--out", tmp_path / "out.csv") == 0
    assert (tmp_path / "out.csv").read_text() == "text,n" + HEADER.format(",") + "\n"


def test_texts_are_answered_in_aligned_lines_that_cannot_steer_the_terminal(best, capsys, bert):
    assert main(best(), "goose! goose!", "a\x1b[31m\nred") == 0
    lines = capsys.readouterr().out.splitlines()
    assert [re.sub(r"0\.\d{4}", "P", line)[3:] for line in lines] == [
        "P  goose! goose!",
        r"P  a\x1b[31m\nred",
    ]
    assert main(bert, *SENTENCES[:9]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len({line.index(" 0.") for line in lines}) == 1
    assert len({line.split("  ")[0] for line in lines}) > 1, "else their width shows nothing"


def test_standard_input_is_a_text_a_line(best, capsys, monkeypatch):
    for arguments in ([], ["--file", "-"]):
        raw = io.BytesIO("goose\r\n\nsoup é".encode())
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(raw))
        assert main(best(), *arguments) == 0
        shown = capsys.readouterr()
        assert [line.split("  ")[-1] for line in shown.out.splitlines()] == ["goose", "-", "soup é"]
        assert "1 of 3 rows have no text" in shown.err


# --- the command line -----------------------------------------------------------------------------


def test_what_the_command_line_says_is_passed_on(monkeypatch, tmp_path, capsys):
    asked = {}
    stub(monkeypatch, lambda texts: np.tile(np.float32([2, 0]), (len(texts), 1)))
    load = classifier.load
    monkeypatch.setattr(classifier, "load", lambda n, **o: asked.update(o, name=n) or load(n, **o))
    source, out = write(tmp_path / "in.csv", column="words"), tmp_path / "out.csv"
    options = ["--text-column", "words", "--batch-tokens", 77, "--argmax"]
    options += ["--device", "cpu", "--precision", "fp32"]
    assert main("x", "--file", source, "--out", out, *options) == 0
    assert asked == {
        "name": "x",
        "device": "cpu",
        "precision": "fp32",
        "batch_tokens": 77,
        "is_argmax": True,
    }
    n = len(SENTENCES)
    assert capsys.readouterr().err.endswith(f"{n} rows in {out}: 0: {n}, 1: 0\n")


def test_each_probability_is_beside_its_label(monkeypatch, capsys):
    logits = {"a": [2.0, 0.0], "b": [0.0, 3.0]}
    stub(monkeypatch, lambda texts: np.float32([logits[t] for t in texts]))
    assert main("x", "a", "b", " ") == 0
    assert capsys.readouterr().out.splitlines() == ["0  0.8808  a", "1  0.9526  b", "-"]


def test_progress_is_told_pass_by_pass_and_comes_to_all_rows(best):
    ours = classifier.load(str(best()), device="cpu", batch_tokens=60)
    told: list[int] = []
    table = tables.of_texts([*SENTENCES, ""])
    predict.annotate(ours, table, "text", io.StringIO(), told.append)
    assert sum(told) == len(SENTENCES) + 1 and len(told) > 5


@pytest.mark.parametrize("where", ["text", "lines", "standard input"])
def test_a_column_of_what_has_none_is_refused(monkeypatch, tmp_path, capsys, where):
    stub(monkeypatch)
    (tmp_path / "in.txt").write_text("x")
    given = {"text": ["x"], "lines": ["--file", tmp_path / "in.txt"], "standard input": []}[where]
    monkeypatch.setattr(sys, "stdin", io.StringIO("x"))
    assert main("m", *given, "--text-column", "a") == 64
    assert "a text a line has no columns" in capsys.readouterr().err


def test_parquet_is_not_written_to_standard_output(monkeypatch, tmp_path, capsys):
    stub(monkeypatch)
    parquet.write_table(pa.table({"text": ["x"]}), tmp_path / "in.parquet")
    assert main("m", "--file", tmp_path / "in.parquet") == 64
    assert "give --out" in capsys.readouterr().err


def test_out_of_memory_is_one_line(monkeypatch, capsys):
    def exhausted(texts):
        raise MemoryError

    stub(monkeypatch, exhausted)
    assert main("m", "x") == 70
    assert capsys.readouterr().err == "out of memory; lower --batch-tokens\n"


def test_an_output_that_is_there_keeps_its_permissions_and_a_link_its_target(monkeypatch, tmp_path):
    stub(monkeypatch)
    target, link = tmp_path / "target.csv", tmp_path / "link.csv"
    target.write_text("text\nx\n")
    target.chmod(0o600)
    link.symlink_to(target)
    assert main("m", "--file", target, "--out", link) == 0  # which is its own input
    assert link.is_symlink() and "probability_1" in target.read_text()
    assert target.stat().st_mode & 0o777 == 0o600


def test_a_pipe_is_no_place_for_a_file(monkeypatch, tmp_path, capsys):
    stub(monkeypatch)
    os.mkfifo(tmp_path / "out.csv")
    assert main("m", "x", "--out", tmp_path / "out.csv") == 73
    assert "is no regular file" in capsys.readouterr().err
    assert stat.S_ISFIFO((tmp_path / "out.csv").stat().st_mode)


@pytest.mark.parametrize("closed", ["stdin", "stdout"])
def test_a_closed_stream_is_one_line(monkeypatch, tmp_path, capsys, closed):
    stub(monkeypatch)
    monkeypatch.setattr(sys, closed, None)
    given = [] if closed == "stdin" else ["x"]
    assert main("m", *given) == {"stdin": 64, "stdout": 73}[closed]
    assert "Traceback" not in capsys.readouterr().err


def test_a_refusal_where_nothing_can_be_written_is_still_that_refusal(tmp_path):
    """What is buffered does not fail once more when Python ends."""
    (tmp_path / "in.csv").write_text("text,n\ngoose,1\n" + "late\n")
    script = "import predict, sys, tests.test_predict as t; from unittest import mock\n"
    script = (
        "import sys, types, contextlib, numpy as np, predict, classifier\n"
        "from decision import PLAIN\n"
        "m = types.SimpleNamespace(labels=['0', '1'], decision=PLAIN,"
        " autocast=contextlib.nullcontext,"
        " logits=lambda t, p: np.zeros((len(t), 2), np.float32))\n"
        "classifier.load = lambda *a, **o: m\n"
        "import tables; tables.CHUNK = 1\n"
        f"sys.exit(predict.main(['m', '--file', {str(tmp_path / 'in.csv')!r}]))"
    )
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONUNBUFFERED"}
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, "-c", script],
            cwd=Path(predict.__file__).parent,
            env=environment,
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
        )
    assert done.returncode == 65 and "row 2" in done.stderr and done.stderr.count("\n") == 1


# --- in bounded memory ----------------------------------------------------------------------------


class Counted(str):
    """A line that counts how many there are."""

    alive = most = 0

    def __new__(cls, text: str):
        Counted.alive += 1
        Counted.most = max(Counted.most, Counted.alive)
        return super().__new__(cls, text)

    def __del__(self):
        Counted.alive -= 1


def stub(monkeypatch, logits=lambda texts: np.zeros((len(texts), 2), np.float32)) -> None:
    """A model of no cost in place of any."""
    opened = []

    @contextlib.contextmanager
    def autocast():
        opened.append("once")
        yield

    def within(texts, progressed):
        assert opened == ["once"], "weights are cast for each chunk"
        for _ in texts:
            progressed(1)
        return logits(texts)

    model = types.SimpleNamespace(labels=["0", "1"], decision=PLAIN, logits=within)
    model.autocast = autocast
    monkeypatch.setattr(classifier, "load", lambda name, **options: opened.clear() or model)


def rows_held(monkeypatch, tmp_path: Path, n: int, chunk: int) -> int:
    """The most lines of a file of n that are held at a time."""
    Counted.most = 0
    stream = (Counted(f'{{"text": "goose", "n": {i}}}\n') for i in range(n))
    monkeypatch.setattr(tables, "lines_of", lambda path, name: stream)
    monkeypatch.setattr(tables, "CHUNK", chunk)
    out = tmp_path / "out.jsonl"
    assert main("x", "--file", tmp_path / "in.jsonl", "--out", out) == 0
    with open(out) as file:
        last = next(itertools.islice(file, n - 1, None))
        assert json.loads(last)["n"] == n - 1 and not file.read()
    return Counted.most


def test_a_long_file_is_not_held(monkeypatch, tmp_path):
    stub(monkeypatch)
    assert rows_held(monkeypatch, tmp_path, 100_000, 1000) <= 2002
    assert rows_held(monkeypatch, tmp_path, 5000, 10**9) == 5000, "control: in one chunk it is"


def test_long_rows_of_parquet_make_short_chunks(tmp_path):
    def largest(length: int) -> int:
        texts = [f"{i} " + "x" * length for i in range(3000)]
        parquet.write_table(pa.table({"text": texts}), tmp_path / "in.parquet", compression=None)
        table = tables.read(tmp_path / "in.parquet", "text")
        sizes = [len(chunk.texts) for chunk in table.chunks]
        assert sum(sizes) == 3000
        return max(sizes)

    assert largest(10_000) <= 900 and largest(10) == 3000


ODD = {
    "beyond Python's times": (pa.array([1 << 62], pa.timestamp("us")), 0),
    "a zone that nobody knows": (pa.array([1], pa.timestamp("ns", "No/Where")), 65),
    "nanoseconds": (pa.array([1], pa.timestamp("ns")), 0),
    "NaN": (pa.array([float("nan")]), 0),
}


@pytest.mark.parametrize("what", ODD)
def test_odd_cells_of_parquet_are_read_or_refused_by_name(monkeypatch, tmp_path, capsys, what):
    stub(monkeypatch)
    cells, code = ODD[what]
    parquet.write_table(pa.table({"text": cells, "n": cells}), tmp_path / "in.parquet")
    assert main("m", "--file", tmp_path / "in.parquet", "--out", tmp_path / "o.jsonl") == code
    shown = capsys.readouterr().err
    if code:
        assert "in.parquet: column 'text' of timestamp" in shown and shown.count("\n") == 1
    elif what == "NaN":
        assert json.loads((tmp_path / "o.jsonl").read_text(), parse_constant=pytest.fail) == {
            "text": None,
            "n": None,
            "predicted": None,
            "probability_0": None,
            "probability_1": None,
        }


def test_long_rows_make_short_chunks(monkeypatch, tmp_path):
    stub(monkeypatch)
    monkeypatch.setattr(tables, "CHUNK_CHARACTERS", 1000)
    assert rows_held(monkeypatch, tmp_path, 2000, 10**9) < 150


# --- refusals -------------------------------------------------------------------------------------


def a_headless_model(folder: Path, small: Path) -> None:
    shutil.copytree(small / "model", folder)
    XLMRobertaModel(tiny.random_model().config).save_pretrained(folder)


def a_pickled_model(folder: Path, small: Path) -> None:
    shutil.copytree(small / "model", folder)
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def a_multi_label_model(folder: Path, small: Path) -> None:
    shutil.copytree(small / "model", folder)
    cfg = json.loads((folder / "config.json").read_text())
    cfg["problem_type"] = "multi_label_classification"
    (folder / "config.json").write_text(json.dumps(cfg))


def an_unfinished_run(folder: Path, small: Path) -> None:
    folder.mkdir()
    (folder / "run_state.json").write_text("{}")


def other_labels(folder: Path, small: Path) -> None:
    shutil.copytree(small / "model", folder)
    (folder / decision.FILE).write_text(decision.as_json(INFERENCE))


MODELS = {
    "no such folder": (None, "no run: there is no"),
    "an empty folder": (lambda folder, small: folder.mkdir(), "has no config.json\n"),
    "no head": (a_headless_model, "no trained classification head: lacks classifier."),
    "pickled": (a_pickled_model, "has no .safetensors file"),
    "several labels at once": (a_multi_label_model, "does not choose one of several labels"),
    "not finished": (an_unfinished_run, "the run is not finished"),
    "other labels": (other_labels, "inference.json and config.json name other labels"),
}


@pytest.mark.parametrize("what", MODELS)
def test_what_is_no_trained_classifier_is_66(small, tmp_path, capsys, what):
    make, message = MODELS[what]
    folder = tmp_path / "no hub name" if make is None else tmp_path / "model"
    if make:
        make(folder, small)
    assert main(folder, "goose") == 66
    shown = capsys.readouterr()
    assert message in shown.err and shown.err.count("\n") == 1 and not shown.out
    assert "model.name" not in shown.err


def test_scratch_is_no_trained_model(capsys):
    assert main("scratch", "goose") == 66


FILES = {
    "missing": (66, "a.csv", None, "no such data file"),
    "empty": (65, "a.csv", b"", "the file is empty"),
    "no column": (65, "a.csv", b"id,tweet\n1,x\n", "no column 'text' (--text-column); the file"),
    "twice": (65, "a.csv", b"text,n,n\nx,1,2\n", "two columns are called 'n'"),
    "predicted": (65, "a.csv", b"text,predicted\nx,1\n", "has a column 'predicted' already"),
    "later": (65, "a.jsonl", b'{"text": "x"}\n{"probability_1": 1}\n', "column 'probability_1'"),
    "fields": (65, "a.csv", b"text,n\nx,1\ny\n", "row 2 (line 3) has 1 fields, the header has 2"),
    "quotes": (65, "a.csv", b'text,n\n"x,1\n', "broken quoting"),
    "encoding": (
        65,
        "a.csv",
        b"text\nx\n\xe9\n",
        "not UTF-8: line 3 has byte 0xe9; is it Windows-1252? Save it as UTF-8",
    ),
    "JSON": (65, "a.jsonl", b'{"text": "x"}\n{"text"}\n', "line 2: not JSON"),
    "suffix": (64, "a.xlsx", b"", "unknown kind of file; expected .csv, .tsv"),
}


@pytest.mark.parametrize("what", FILES)
def test_a_file_that_cannot_be_used_is_refused_by_name(best, tmp_path, capsys, what):
    code, name, raw, message = FILES[what]
    if raw is not None:
        (tmp_path / name).write_bytes(raw)
    before = {"old": "content"}
    out = tmp_path / "out" / "old.jsonl"
    out.parent.mkdir()
    out.write_text(json.dumps(before))
    assert main(best(), "--file", tmp_path / name, "--out", out) == code
    shown = capsys.readouterr()
    assert f"{name}: " in shown.err and message in shown.err and shown.err.count("\n") == 1
    assert [p.name for p in out.parent.iterdir()] == ["old.jsonl"]
    assert json.loads(out.read_text()) == before


def test_a_key_that_the_first_object_lacks_is_not_lost_in_csv(best, tmp_path, capsys):
    (tmp_path / "a.jsonl").write_text('{"text": "x"}\n{"text": "y", "late": 1}\n')
    assert main(best(), "--file", tmp_path / "a.jsonl", "--out", tmp_path / "o.csv") == 65
    assert "'late' is not in its first object" in capsys.readouterr().err
    assert not (tmp_path / "o.csv").exists()


USAGE = {
    "nothing": ([], "name a RUN, a model's folder, or a hub name"),
    "no text": (["x"], "give texts, --file, or a text a line on standard input"),
    "both": (["x", "text", "--file", "a.csv"], "give texts or --file, not both"),
    "option": (["x", "text", "--nonsense"], "unrecognized arguments: --nonsense"),
    "tokens": (["x", "text", "--batch-tokens", "0"], "expected at least 1, found 0"),
    "device": (["x", "text", "--device", "tpu"], "invalid choice: 'tpu'"),
    "out": (["x", "text", "--out", "a.xlsx"], "unknown kind of file"),
    "types": (["x", "text", "--out", "a.parquet"], "Parquet is written from Parquet only"),
}


def test_a_run_that_is_not_there_is_not_looked_for_on_the_hub(best, monkeypatch, capsys):
    asked = []
    monkeypatch.setattr(classifier, "load", lambda name, **options: asked.append(name))
    run = best().parent
    assert main(run.parent / "nope", "a text") == 66 and not asked
    assert "no run: there is no" in capsys.readouterr().err
    assert predict.find_run("some/hub-name") is None, "control"


def test_its_threads_share_cores_before_torch_is_there():
    code = "import predict, sys, hardware; loaded = []; "
    code += "hardware.share_cores = lambda: loaded.append('torch' in sys.modules); "
    code += "predict.main(['no/such', 'text']); print(loaded)"
    environ = os.environ | {"HF_HUB_OFFLINE": "1", "PYTHONPATH": str(Path(predict.__file__).parent)}
    out = subprocess.run(
        [sys.executable, "-c", code], env=environ, capture_output=True, text=True, check=True
    )
    assert out.stdout.strip() == "[False]"


@pytest.mark.parametrize("what", USAGE)
def test_bad_usage_is_64(monkeypatch, capsys, tmp_path, what):
    arguments, message = USAGE[what]
    stub(monkeypatch)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "stdin", types.SimpleNamespace(isatty=lambda: True))
    assert main(*arguments) == 64
    assert message in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_usage_is_refused_before_torch_is_imported():
    script = (
        "import predict, sys; code = predict.main(['x', 'text', '--file', 'a.csv']);"
        "print(code, 'torch' in sys.modules)"
    )
    folder = Path(predict.__file__).parent
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=folder, capture_output=True, text=True, check=True
    )
    assert done.stdout == "64 False\n"


def test_where_nothing_can_be_written_is_73(monkeypatch, tmp_path, capsys):
    stub(monkeypatch)
    (tmp_path / "folder.csv").mkdir()
    for out in ("folder.csv", "nowhere/out.csv"):
        assert main("x", "text", "--out", tmp_path / out) == 73
        assert capsys.readouterr().err.startswith(f"{tmp_path / out}: ")
    with open("/dev/full", "w") as full:
        monkeypatch.setattr(sys, "stdout", full)
        assert main("x", "text") == 73  # and what is buffered does not fail once more
    assert "standard output: cannot be written: No space left" in capsys.readouterr().err


def test_a_text_that_is_not_utf8_and_logits_that_are_not_finite_are_refused(monkeypatch, capsys):
    stub(monkeypatch)
    assert main("x", "good", "bad \udce9") == 65
    assert "text 2 of the command line is not UTF-8" in capsys.readouterr().err
    stub(monkeypatch, lambda texts: np.array([[0, 1], [np.nan, 1]], np.float32))
    assert main("x", "", "a", "b") == 76
    assert "texts: row 3: what the model computes is not finite" in capsys.readouterr().err
    monkeypatch.setattr(tables, "CHUNK", 1)
    nan = lambda texts: np.full((len(texts), 2), np.nan if texts == ["b"] else 0, np.float32)  # noqa: E731
    stub(monkeypatch, nan)
    assert main("x", "a", "a", "b") == 76
    assert "texts: row 3: " in capsys.readouterr().err


# --- interruptions --------------------------------------------------------------------------------


def test_an_interruption_leaves_nothing_half_written(monkeypatch, tmp_path, capsys):
    stop, calls = StopRequest(), []

    def interrupted(texts):
        calls.append(len(texts))
        if len(calls) == 3:
            stop._note(signal.SIGINT, None)
        return np.zeros((len(texts), 2), np.float32)

    stub(monkeypatch, interrupted)
    monkeypatch.setattr(tables, "CHUNK", 5)
    source, out = write(tmp_path / "in.csv"), tmp_path / "out" / "out.csv"
    out.parent.mkdir()
    assert predict.main(["x", "--file", str(source), "--out", str(out)], stop) == 75
    assert len(calls) == 3 and list(out.parent.iterdir()) == []
    assert re.fullmatch(r"stopped by SIGINT; .*out.csv is as it was\n", capsys.readouterr().err)


@pytest.mark.fault
def test_ctrl_c_is_one_line_and_75(small, tmp_path):
    command = [sys.executable, predict.__file__, small / "model", "--out", tmp_path / "out.csv"]
    child = subprocess.Popen(command, stdin=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    while not list(tmp_path.iterdir()) and child.poll() is None:
        os.sched_yield()  # until the output is begun, when it waits for texts or the model
    child.send_signal(signal.SIGINT)
    _, told = child.communicate(timeout=60)
    assert child.returncode == 75 and told.count("\n") == 1
    assert told.startswith("stopped by SIGINT; ") and list(tmp_path.iterdir()) == []


def test_a_reader_that_has_seen_enough_is_no_error(monkeypatch, tmp_path, capsys):
    stub(monkeypatch)
    (tmp_path / "in.txt").write_text("goose late\n" * 20_000)
    reader, out = os.pipe()
    os.close(reader)
    with open(out, "w") as pipe:
        monkeypatch.setattr(sys, "stdout", pipe)
        assert main("x", "--file", tmp_path / "in.txt") == 0
    assert capsys.readouterr().err == ""


# --- writers --------------------------------------------------------------------------------------


def test_a_writer_refuses_a_column_of_the_table():
    table = tables.of_texts(["x"])
    with pytest.raises(Refusal, match="has a column 'text' already"):
        writers.writer("csv", io.StringIO(), table, {"text": str})
