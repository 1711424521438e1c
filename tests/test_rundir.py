"""An automatic name is readable, and the same exactly where the result is."""

import errno
import os
import re

import pytest
import tiny

from errors import CANNOT_WRITE, Refusal
from rundir import identity, name_run, open_run


def name(data_key: str = "d", model_key: str = "m", **changes: object) -> str:
    cfg = tiny.make_config(**changes)
    return name_run(cfg, identity(cfg, data_key=data_key, model_key=model_key))


def test_it_tells_data_model_and_up_to_three_settings():
    told = name(
        data__train="sets/My Jokes/train.csv",
        data__text_column="the joke",  # tells nothing that the data does not
        optimizer__lr=1e-5,
        train__epochs=3,
        data__max_length=64,
        train__label_smoothing=0.1,
    )
    assert re.fullmatch(
        r"myjokes-xlm-roberta-base-maxlength64-epochs3-labelsmoothing0.1-s42-[0-9a-f]{6}", told
    )
    assert name(run__name="mine", optimizer__lr=1e-5) == "mine"


@pytest.mark.parametrize("file", ["данные/train.csv", "_train.csv", ".data/train.csv", "笑.csv"])
def test_files_of_any_name_give_a_name_that_begins_with_a_letter(file):
    for model in ("xlm-roberta-base", "модель"):
        told = name(data__train=file, model__name=model)
        assert re.fullmatch(r"[a-z0-9][\w.-]{0,99}", told, flags=re.ASCII)


def test_a_lock_that_cannot_be_made_is_73_and_no_endless_loop(tmp_path, monkeypatch):
    (tmp_path / "x").mkdir()
    cfg = tiny.make_config(run__name="x", run__dir=tmp_path)
    who, opened = identity(cfg, data_key="d", model_key="m"), os.open

    def full(path, flags, *rest, **options):
        if flags & os.O_CREAT and not os.path.lexists(path):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return opened(path, flags, *rest, **options)

    monkeypatch.setattr(os, "open", full)
    with pytest.raises(Refusal, match="No space left on device") as caught:
        open_run(cfg, who)
    assert caught.value.exit_code == CANNOT_WRITE
    monkeypatch.undo()
    open_run(cfg, who).close()  # control


def test_a_long_name_keeps_seed_and_hash():
    long = {"model__name": "m" * 200, "optimizer__lr": 1e-5}
    names = {name(**long, run__seed=seed, model_key=key) for seed in (1, 2) for key in "ab"}
    assert len(names) == 4 and max(map(len, names)) <= 100


def test_it_changes_with_what_alters_the_result_and_with_nothing_else():
    plain = name()
    same = {"run__dir": "elsewhere", "log__every": 3, "checkpoint__every": 7}
    same |= {"train__micro_batch_size": 4, "data__workers": 2, "run__device": "cpu"}
    assert {name(**{key: value}) for key, value in same.items()} == {plain}
    other = {"run__seed": 1, "optimizer__lr": 1e-5, "data__text_column": "joke"}
    changed = {name(**{key: value}) for key, value in other.items()}
    changed |= {name(data_key="e"), name(model_key="n"), plain}
    assert len(changed) == 6
