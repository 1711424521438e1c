"""Weights load whole or are refused in one line; heads, groups and rates are as stated."""

import contextlib
import json
import re
import shutil
import socket
import threading

import numpy as np
import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file

import model as models
from errors import Refusal
from optimizer import layer_depths, make_optimizer, set_lr
from prepare import _with_scratch_settings
from schedule import lr_factor


@pytest.fixture
def folder(small, tmp_path):
    """A copy of the tiny checkpoint that a test may damage."""
    return shutil.copytree(small / "model", tmp_path / "model")


def load(folder, names=("0", "1"), seed=0, **options):
    source = models.find_source(str(folder))
    tokenizer = models.load_tokenizer(source, list, folder)
    return models.load_model(source, list(names), tokenizer, max_length=32, seed=seed, **options)


def refused(small, capsys, **changes) -> tuple[int, str]:
    """Exit code and last line of a start with these settings; never a traceback."""
    code = tiny.run(tiny.settings(small, **{"run__name": "refused"} | changes))
    lines = capsys.readouterr().err.strip().splitlines()
    assert not any("Traceback" in line for line in lines)
    return code, lines[-1]


def without(folder, name):
    (folder / name).unlink()


def pickled(folder):
    without(folder, "model.safetensors")
    torch.save({"canary": 1}, folder / "pytorch_model.bin")


def misshapen(folder):
    tensors = load_file(folder / "model.safetensors")
    tensors["roberta.encoder.layer.0.output.dense.weight"] = torch.zeros(3, 3)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def incomplete(folder):
    tensors = load_file(folder / "model.safetensors")
    tensors = {n: t for n, t in tensors.items() if "layer.1." not in n}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def own_code(folder):
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "unheard", "auto_map": {"AutoConfig": "canary.Config"}}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "canary.py").write_text("raise SystemExit('executed')")


DAMAGE = {
    "no config.json": lambda f: without(f, "config.json"),
    "no .safetensors": lambda f: without(f, "model.safetensors"),
    "no tokenizer": lambda f: without(f, "tokenizer.json"),
    "pickled weights (.bin) are not loaded": pickled,
    "cannot be loaded: SafetensorError": lambda f: (f / "model.safetensors").write_bytes(b"\0" * 9),
    "has in another shape the tensor roberta.encoder.layer.0": misshapen,
    "lacks the tensor roberta.encoder.layer.1": incomplete,
    "custom code": own_code,
}


@pytest.mark.parametrize("message", DAMAGE)
def test_weights_that_cannot_be_had_are_66_in_one_line(small, folder, capsys, message):
    DAMAGE[message](folder)
    code, line = refused(small, capsys, model__name=folder)
    assert code == 66 and message in line and str(folder)[:60] in line


def test_a_name_that_is_no_folder_needs_the_hub(small, capsys, monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")  # the discard port: nobody answers
    code, line = refused(small, capsys, model__name="nobody/nothing")
    assert code == 66 and "'nobody/nothing' is no folder and not in the cache" in line
    code, line = refused(small, capsys, model__name="../../etc/passwd")
    assert code == 66 and "no hub name either" in line


@pytest.mark.parametrize("answer", [b"SSH-2.0-OpenSSH_9.6\r\n", b""])
def test_what_answers_but_is_no_hub_is_66(small, capsys, monkeypatch, answer):
    with socket.create_server(("127.0.0.1", 0)) as server:

        def serve() -> None:
            with contextlib.suppress(OSError):
                while True:
                    connection, _ = server.accept()
                    with connection:
                        connection.recv(1 << 16)
                        connection.sendall(answer)

        threading.Thread(target=serve, daemon=True).start()
        monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.getsockname()[1]}")
        code, line = refused(small, capsys, model__name="nobody/nothing")
        server.shutdown(socket.SHUT_RDWR)
    assert code == 66 and "the hub cannot be reached" in line


def test_weights_in_the_cache_that_are_never_loaded_are_named(small, capsys, monkeypatch, tmp_path):
    folder = tmp_path / "models--a--b" / "snapshots" / ("0" * 40)
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    (folder / "pytorch_model.bin").write_bytes(b"")
    (tmp_path / "models--a--b" / "refs").mkdir()
    (tmp_path / "models--a--b" / "refs" / "main").write_text("0" * 40)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    code, line = refused(small, capsys, model__name="a/b")
    assert code == 66 and "pickled weights (.bin) are not loaded" in line


def test_scratch_replaces_unreachable_weights_only_for_the_first_look(small, capsys, monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    code, line = refused(small, capsys, model__name="FacebookAI/xlm-roberta-base")
    assert code == 66 and "put its files into a folder" in line


@pytest.mark.parametrize(
    "changes, code, message",
    [
        ({"data__max_length": 65}, 78, "65 is beyond the model's 64 positions"),
        ({"run__device": "cuda"}, 69, "sees no usable GPU"),
        ({"evaluation__metric": "f1"}, 78, "evaluation.metric: expected one of"),
        ({"train__class_weights": "{0: 1, 2: 3}"}, 78, "one weight for each of 0, 1"),
        ({"train__class_weights": "balanced:town"}, 78, "'town' is not among data.slice_columns"),
        (  # before any data is read
            {"evaluation__metric": "f1_macro/worst:town", "data__train": "/nowhere.csv"},
            78,
            "'town' is not among data.slice_columns (lang, language)",
        ),
        ({"run__name": "../elsewhere"}, 78, "'../elsewhere' is no directory name"),
        ({"run__dir": "/dev/null/runs"}, 73, "cannot be written"),
    ],
)
def test_other_settings_that_cannot_be_meant(small, capsys, changes, code, message):
    if changes.get("run__device") == "cuda" and torch.cuda.is_available():
        changes, code, message = {"run__device": "gpu"}, 78, "expected auto or cpu or cuda"
    assert refused(small, capsys, **changes)[0] == code
    assert message in refused(small, capsys, **changes)[1]


def test_a_score_over_slices_of_which_none_has_each_label_is_refused(small, tmp_path, capsys):
    rows = [r | {"lang": "ab"[int(r["label"])]} for r in tiny.rows(30, seed=9)]
    changes = {"evaluation__metric": "f1_macro/worst:lang", "data__leaks": "keep"}
    changes["data__validation"] = tiny.write_csv(tmp_path / "parted.csv", rows)
    code, line = refused(small, capsys, **changes)
    assert code == 65 and "has no value of lang with a text of each label" in line
    rows[0]["lang"], rows[1]["lang"] = "cc"  # control: one value will do
    rows[0]["label"], rows[1]["label"] = "01"
    tiny.write_csv(tmp_path / "parted.csv", rows)
    tiny.make_job(tiny.settings(small, **changes))


def test_64_positions_are_enough_for_a_length_of_64(small):
    assert tiny.make_job(tiny.settings(small, data__max_length=64)).template.max_length == 64


def test_the_head_is_kept_for_the_same_labels_and_drawn_anew_for_others(folder):
    first = load(folder, ["no", "yes"])
    first.save_pretrained(folder)
    saved = first.classifier.out_proj.weight
    said = []
    load(folder, ["no", "yes"], say=said.append)
    assert said == ["  its head is kept, as it was trained for the same labels"]
    load(folder, ["a", "b"], say=said.append)
    assert said[1:] == ["  its head is drawn anew, as it was trained for other labels"]
    load(folder, ["a", "b", "c"], say=said.append)
    assert said[2:] == said[1:2]
    first.roberta.save_pretrained(folder / "encoder")  # its config.json still names the labels
    shutil.copy(folder / "tokenizer.json", folder / "encoder")
    shutil.copy(folder / "tokenizer_config.json", folder / "encoder")
    load(folder / "encoder", ["no", "yes"], say=said.append)
    assert len(said) == 3, "control: no head"
    assert torch.equal(load(folder, ["no", "yes"], seed=5).classifier.out_proj.weight, saved)
    assert not torch.equal(load(folder, ["a", "b"], seed=5).classifier.out_proj.weight, saved)
    three = load(folder, ["a", "b", "c"])
    assert three.config.id2label == {0: "a", 1: "b", 2: "c"}
    assert three.classifier.out_proj.weight.shape[0] == 3
    encoder = [n for n, p in three.named_parameters() if n.startswith("roberta.")]
    same = dict(first.named_parameters())
    assert all(torch.equal(dict(three.named_parameters())[n], same[n]) for n in encoder)


def test_biases_and_norms_are_not_decayed_and_lower_layers_move_less(folder):
    model = load(folder)
    cfg = tiny.make_config(optimizer__layer_decay=0.5, optimizer__weight_decay=0.1)
    optimizer = make_optimizer(model, cfg.optimizer)
    group_of = {id(p): g for g in optimizer.param_groups for p in g["params"]}
    expected = {"classifier": 0, "layer.1": 1, "layer.0": 2, "embeddings": 3}
    for name, parameter in model.named_parameters():
        group = group_of.pop(id(parameter))
        exempt = name.endswith("bias") or "LayerNorm" in name
        assert group["weight_decay"] == (0.0 if exempt else 0.1), name
        depth = next(d for part, d in expected.items() if part in name)
        assert group["peak_lr"] == cfg.optimizer.lr * 0.5**depth, name
    assert not group_of, "every parameter is in one group"


def test_every_group_follows_the_schedule_from_its_own_peak(small):
    job = tiny.make_job(tiny.settings(small, optimizer__layer_decay=0.5))
    optimizer = make_optimizer(job.model, job.cfg.optimizer)
    for step in range(job.steps.total_steps):
        head = set_lr(optimizer, step, job.steps, 0.0)
        factor = lr_factor(
            step, warmup_steps=job.steps.warmup_steps, total_steps=job.steps.total_steps
        )
        assert head == 1e-3 * factor
        assert [g["lr"] for g in optimizer.param_groups] == [
            g["peak_lr"] * factor for g in optimizer.param_groups
        ]


def test_depths_of_other_architectures():
    class Named(torch.nn.Module):
        base_model_prefix = "distilbert"

        def named_parameters(self):
            names = "embeddings.w transformer.layer.0.w transformer.layer.5.w"
            return [(f"distilbert.{n}", None) for n in names.split()] + [("pre_classifier.w", None)]

    assert list(layer_depths(Named()).values()) == [7, 6, 1, 0]


def test_the_template_is_read_off_the_tokenizer(folder):
    tokenizer = models.load_tokenizer(models.find_source(str(folder)), list, folder)
    template = models.template(tokenizer, 16, "head_tail")
    assert (template.prefix, template.suffix, template.pad_id, template.room) == ([0], [2], 1, 14)
    ids = np.array(tokenizer("a tram", add_special_tokens=False)["input_ids"])
    assert len(ids) <= 14 and template.dress(ids) == tokenizer("a tram")["input_ids"]
    with pytest.raises(Refusal, match=re.escape("data.max_length: 2 leaves no room")):
        models.template(tokenizer, 2, "head")


@pytest.mark.parametrize(
    "changes, expected",
    [
        ({}, (5e-4, 600, 5.0)),
        ({"train__epochs": 7}, (5e-4, None, 7.0)),  # or the steps would go before them
        ({"optimizer__lr": 1e-3, "train__max_steps": 9}, (1e-3, 9, 5.0)),
    ],
)
def test_scratch_changes_only_settings_left_at_their_defaults(changes, expected):
    cfg = _with_scratch_settings(tiny.make_config(**changes), lambda line: None)
    assert (cfg.optimizer.lr, cfg.train.max_steps, cfg.train.epochs) == expected


def test_a_tokenizer_from_scratch_is_a_function_of_its_texts(tmp_path):
    texts = [r["text"] for r in tiny.rows(300)]
    for name in ("one", "two"):
        models._train_tokenizer(texts, tmp_path / name)
    models._train_tokenizer(texts[:150], tmp_path / "half")
    one, two, half = (
        (tmp_path / n / "tokenizer.json").read_bytes() for n in ("one", "two", "half")
    )
    assert one == two and one != half
