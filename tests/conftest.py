"""Files that tests share, made once: `small` has train.csv, validation.csv and model/."""

import signal
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))

import tiny


@pytest.fixture(scope="session", autouse=True)
def one_thread():
    torch.set_num_threads(1)  # tiny tensors; and ranks share the cores
    # A shell's `&` has its children ignore it, and so what tests start would.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    yield


@pytest.fixture(scope="session")
def small(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("small")
    records = tiny.rows(43)
    tiny.write_csv(folder / "train.csv", records[:33])
    tiny.write_csv(folder / "validation.csv", records[33:])
    tiny.write_model(folder / "model")
    tiny.write_model(folder / "model-without-dropout", dropout=0.0)
    return folder
