"""Training only the rows in use gives the whole table's training; idle rows decay exactly."""

import copy

import numpy as np
import pytest
import tiny
import torch
from transformers import (
    AutoModelForSequenceClassification,
    BertConfig,
    GPT2Config,
    XLMRobertaForMaskedLM,
)

import checkpoint
import savings
import train
from ddp import process_group
from optimizer import make_optimizer, set_lr, update
from schedule import lr_factor
from vocabulary import ActiveEmbedding, is_reducible

STEPS, SKIPPED, RESUMED = 40, (5, 17, 18), 23
TABLE = "roberta.embeddings.word_embeddings.weight"


def arguments(folder, active: bool, **changes: object) -> list[str]:
    """Texts that leave many rows idle; the plain layers, whose masks do not depend on packing."""
    changes = {
        "data__limit": 20,
        "train__max_steps": STEPS,
        "train__max_grad_norm": "",
        "optimizer__weight_decay": 0.1,
        "speed__padding": "batch",
        "speed__active_vocabulary": str(active).lower(),
    } | changes
    return tiny.settings(folder, **changes)


def trained(folder, arguments, world=None, root=None) -> dict[str, np.ndarray]:
    """Parameters and tables after 40 steps, some without update; anew from a checkpoint at 23."""
    world = world or tiny.alone()
    job = tiny.make_job(arguments, world)
    optimizer = make_optimizer(job.model, job.cfg.optimizer)
    model = world.wrap(job.model)
    sampler, texts = job.sampler(world.rank), job.training_texts
    for step in range(STEPS):
        if step == RESUMED and root:
            held = checkpoint.tensors(job.model, optimizer, copy=False)
            saved = checkpoint.save(root / str(world.rank), held, {"step": step})
            job = tiny.make_job(arguments, world)
            optimizer = make_optimizer(job.model, job.cfg.optimizer)
            checkpoint.load(saved, job.model, optimizer)
            model = world.wrap(job.model)
        batches = [job.collate([texts[i] for i in m]) for m in sampler.micro_batches(step)]
        set_lr(optimizer, step, job.steps, job.cfg.schedule.min_lr_ratio)
        train.backward(model, batches, len(sampler.global_batch(step)), step, job, world)
        if step in SKIPPED:
            job.model.classifier.out_proj.bias.grad[0] = float("inf")
        update(optimizer, job.cfg.train.max_grad_norm)
    embedding = job.model.get_input_embeddings()
    active = embedding.active.numpy() if isinstance(embedding, ActiveEmbedding) else np.array([])
    savings.restore(job.model, job.base_model)
    result = {name: p.detach().numpy() for name, p in job.model.named_parameters()}
    return result | {"active": active, "base": job.base_model().state_dict()[TABLE].numpy()}


def of_ranks(folder, arguments, root=None) -> dict[str, np.ndarray]:
    with process_group("cpu") as world:
        return trained(folder, arguments, world, root)


def reference(base: np.ndarray, lr: float = 1e-3, decay: float = 0.1) -> np.ndarray:
    """Idle rows in fp64."""
    kept = 1.0
    for step in set(range(STEPS)) - set(SKIPPED):
        kept *= 1 - decay * lr * lr_factor(step, warmup_steps=4, total_steps=STEPS)
    return base.astype(np.float64) * kept


def idle_rows(result) -> np.ndarray:
    idle = np.setdiff1d(np.arange(len(result[TABLE])), result["active"])
    assert len(idle) > 20 and len(result["active"]) > 20
    return idle


@pytest.mark.dist
@pytest.mark.parametrize("ranks", [1, 2])
def test_trained_rows_and_all_else_are_bit_identical_without_clipping(small, tmp_path, ranks):
    if ranks == 1:
        ours = trained(small, arguments(small, True), root=tmp_path)
        whole = trained(small, arguments(small, False))
    else:
        ours = tiny.run_ranks(2, of_ranks, small, arguments(small, True), tmp_path)[0]
        whole = tiny.run_ranks(2, of_ranks, small, arguments(small, False))[0]
    active, idle = ours["active"], idle_rows(ours)
    for name in set(whole) - {TABLE, "active"}:
        assert np.array_equal(ours[name], whole[name]), name
    assert np.array_equal(ours[TABLE][active], whole[TABLE][active])
    expected = reference(ours["base"])[idle]
    unit = np.spacing(np.abs(expected).astype(np.float32))
    assert np.all(np.abs(ours[TABLE][idle] - expected) <= unit)
    assert not np.all(np.abs(ours["base"][idle] - expected) <= unit), "control: without the factor"
    assert np.abs(whole[TABLE][idle] - expected).max() < STEPS * unit.max()


def test_with_clipping_the_distance_is_far_below_the_distance_moved(small, tmp_path):
    changes = {"train__max_grad_norm": 0.5}
    ours = trained(small, arguments(small, True, **changes), root=tmp_path)
    whole = trained(small, arguments(small, False, **changes))
    start = tiny.make_job(arguments(small, False)).model.state_dict()
    for name in set(whole) - {"active", "base"}:
        if "key.bias" in name:  # its true gradient is zero
            continue
        rows = ours["active"] if name == TABLE else slice(None)
        apart = np.linalg.norm(ours[name][rows] - whole[name][rows])
        moved = np.linalg.norm(whole[name][rows] - start[name].numpy()[rows])
        assert apart < 1e-5 * moved, name


def test_idle_rows_are_untouched_without_decay(small):
    ours = trained(small, arguments(small, True, optimizer__weight_decay=0))
    idle = idle_rows(ours)
    assert np.array_equal(ours[TABLE][idle], ours["base"][idle])


def test_rows_of_evaluation_texts_are_scored_but_not_trained(small):
    job = tiny.make_job(arguments(small, True))
    embedding = job.model.get_input_embeddings()
    assert len(embedding.others) > 0, "validation has tokens of its own"
    embedding.kept.fill_(0.5)
    whole = copy.deepcopy(job.model)
    savings.restore(whole, job.base_model)
    ids = torch.cat([embedding.active[:5], torch.from_numpy(np.unique(job.corpus.validation.ids))])
    expected = whole.get_input_embeddings()(ids)
    assert torch.equal(embedding.eval()(ids), expected)


def test_the_exported_model_scores_tokens_never_seen(small):
    changes = {"run__name": "exported", "train__max_steps": 6, "speed__padding": "free"}
    assert tiny.run(arguments(small, True, **changes)) == 0
    best = AutoModelForSequenceClassification.from_pretrained(small / "runs" / "exported" / "best")
    assert best.config._attn_implementation == "sdpa"
    job = tiny.make_job(arguments(small, True))
    active = job.model.get_input_embeddings().active.numpy()
    base = job.base_model().get_input_embeddings().weight
    idle = np.setdiff1d(np.arange(len(base)), active)[:20]
    table = best.get_input_embeddings().weight
    assert table.shape == base.shape and torch.isfinite(table).all()
    ratio = (table / base)[idle].detach()
    assert 0.99 < ratio.min() <= ratio.max() < 1
    logits = best(torch.from_numpy(np.concatenate([[0], idle, [2]]))[None]).logits
    assert torch.isfinite(logits).all()


def test_which_tables_can_be_reduced():
    assert is_reducible(tiny.random_model())
    assert not is_reducible(XLMRobertaForMaskedLM(tiny.random_model().config)), (
        "its head uses it too"
    )


SHAPES = {
    "bert": (BertConfig, {"hidden_size": 32, "num_hidden_layers": 2, "intermediate_size": 64}),
    "gpt2": (GPT2Config, {"n_embd": 32, "n_layer": 2, "n_head": 4}),  # its table knows no padding
}


@pytest.mark.parametrize("kind", SHAPES)
def test_another_architecture_trains_padded_with_the_active_vocabulary(
    small, tmp_path, capsys, kind
):
    make, shape = SHAPES[kind]
    vocabulary = len(tiny.make_job(arguments(small, False)).tokenizer)
    heads = {"num_attention_heads": 4} if kind == "bert" else {}
    positions = {"max_position_embeddings": 66, "vocab_size": vocabulary, "pad_token_id": 1}
    cfg = make(**shape, **heads, **positions)
    for file in (small / "model").glob("tokenizer*"):
        (tmp_path / file.name).write_bytes(file.read_bytes())
    AutoModelForSequenceClassification.from_config(cfg).save_pretrained(tmp_path)
    name = {"run__name": kind, "model__name": tmp_path, "speed__padding": "free"}
    assert tiny.run(arguments(small, True, **name)) == 0
    said = capsys.readouterr().err
    assert "texts are padded" in said and "token embeddings are trained" in said
    folder = small / "runs" / kind
    assert "padding: batch" in (folder / "config.yaml").read_text()
    best = AutoModelForSequenceClassification.from_pretrained(folder / "best")
    assert best.get_input_embeddings().weight.shape == (vocabulary, 32)
