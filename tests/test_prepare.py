"""What does not fit a GPU is cut finer, with room for gradients and moments; the update stays."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import tiny
import torch

import config
import prepare
from batches import EVAL_TOKENS
from errors import Refusal


@pytest.fixture
def fit(small, monkeypatch):
    """`_fit_memory` of a job whose passes fit below so many tokens; what was tried, and the job."""
    for name in ("empty_cache", "reset_peak_memory_stats"):
        monkeypatch.setattr(torch.cuda, name, lambda: None)

    def fit(fits: int):
        tried, job = [], tiny.make_job(tiny.settings(small))

        def try_pass(job, texts, device):
            assert all(p.grad is not None for p in job.model.parameters()), "as in a later pass"
            tried.append(job.cfg.train.micro_batch_tokens)
            if tried[-1] > fits:
                raise torch.OutOfMemoryError
            job.model.zero_grad(set_to_none=True)

        monkeypatch.setattr(prepare, "try_pass", try_pass)
        return tried, prepare._fit_memory(job, tiny.alone(), lambda line: None)

    return fit


def test_the_cut_is_halved_until_the_longest_pass_fits(fit):
    tried, job = fit(3000)
    assert tried == [8192, 4096, 2048] and job.cfg.train.micro_batch_tokens == 2048
    assert job.steps.global_batch_size == 8
    assert all(p.grad is None for p in job.model.parameters()), "nothing is left of the trial"
    assert fit(10_000)[0] == [8192], "control: what fits is not cut"


def test_less_than_one_text_is_refused(fit):
    with pytest.raises(Refusal, match="not even one text fits") as caught:
        fit(10)
    assert caught.value.exit_code == 78


def test_a_resume_keeps_the_smaller_cut_and_says_so(small):
    job, said = tiny.make_job(tiny.settings(small)), []
    assert prepare.keep_cut(job, 8192, said.append) is job and not said
    assert prepare.keep_cut(job, 1024, said.append).cfg.train.micro_batch_tokens == 1024
    assert prepare.keep_cut(job, 65536, said.append).cfg.train.micro_batch_tokens == 8192
    assert "this run had 65,536 before" in said[1] and "1,024" in said[0]


def test_passes_padded_to_the_maximum_keep_the_cap_of_tokens(small, monkeypatch):
    def job(padding: str):
        changes = {"speed__padding": padding, "data__max_length": 64}
        return tiny.make_job(tiny.settings(small, train__micro_batch_tokens=127, **changes))

    full, own = job("max"), job("batch")
    passes = full.sampler(rank=0).micro_batches(0)
    assert [len(texts) for texts in passes] == [1] * 8, "127 tokens are one text of 64"
    assert len(prepare.longest_micro_batch(full)) == 1
    assert len(prepare.longest_micro_batch(own)) == 2, "control: of those that are shorter two"
    monkeypatch.setitem(EVAL_TOKENS, "cpu", 127)
    assert len(full.evaluation_batches(full.corpus.validation)) == len(full.corpus.validation)
    assert len(own.sampler(rank=0)) < len(full.sampler(rank=0)), "control: the texts are shorter"


def test_a_slice_with_few_texts_that_decides_is_named(small, tmp_path):
    said, many = [], tiny.rows(200, seed=3)
    few = [r | {"lang": "few", "label": "0"} for r in tiny.rows(9, seed=4)]
    path = tiny.write_csv(tmp_path / "v.csv", [*many, *few])
    worst = {"evaluation__metric": "f1_macro/worst:lang", "data__validation": path}
    cfg = config.load(None, tiny.settings(small, data__leaks="keep", **worst))
    prepare.prepare(cfg, tiny.alone(), said.append)
    assert not any("evaluation.metric" in line for line in said), "few have one label, so no score"
    for metric in ("f1_macro/worst:lang", "f1_macro/mean:lang", "f1_macro"):
        cfg = config.load(None, tiny.settings(small, evaluation__metric=metric))
        prepare.prepare(cfg, tiny.alone(), said.append)
    told = [line for line in said if "evaluation.metric" in line]
    assert len(told) == 1 and "validation texts; where so few decide" in told[0]


def test_check_does_not_import_scikit_learn_once_the_data_is_cached(small):
    tiny.make_job(tiny.settings(small))  # fills the cache: the baseline is scikit-learn's
    code = (
        "import sys, train\n"
        "code = train.main(sys.argv[1:])\n"
        "print(code, 'sklearn' in sys.modules)\n"
    )
    arguments = ["--config", os.devnull, "--check", *tiny.settings(small)]
    command = [sys.executable, "-c", code, *arguments]
    root = Path(prepare.__file__).parent
    done = subprocess.run(command, cwd=root, capture_output=True, text=True)
    assert done.stdout.splitlines()[-1] == "0 False", done.stdout + done.stderr
    assert "positive label '1'\n" in done.stdout + done.stderr
