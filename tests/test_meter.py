"""The estimate of a run's length: soon, once, and right where cost goes with padded tokens."""

import pytest
import tiny

from meter import Estimate, Workload, in_words
from prepare import workload


def told(step_s: float, *, steps: int = 60, cells: int = 100) -> list[tuple[float, float]]:
    """(seconds after the first step, estimate) of each telling; every step costs the same."""
    estimate = Estimate(Workload(cells * steps, 3.0 * cells, saving_s=5.0))
    answers = [(i * step_s, estimate.add(cells, step_s)) for i in range(steps)]
    return [(moment, answer) for moment, answer in answers if answer is not None]


@pytest.mark.parametrize("step_s", [0.001, 0.1, 1.0, 4.0, 9.9, 14.9, 19.5, 29.0])
def test_it_is_told_once_and_within_30_seconds_of_the_first_step(step_s):
    answers = told(step_s, steps=round(max(60, 20 / step_s)))
    steps = round(max(60, 20 / step_s))
    assert len(answers) == 1 and answers[0][0] <= 30
    assert answers[0][1] == pytest.approx((steps + 1) * step_s + 5)


def test_the_first_step_is_not_counted():
    estimate = Estimate(Workload(1000, 0))
    assert estimate.add(10, 500.0) is None
    assert [estimate.add(10, 5.0) for _ in range(3)] == [None, None, pytest.approx(500)]
    assert estimate.add(10, 5.0) is None, "only once"


def test_the_workload_is_what_the_loader_hands_out(small):
    job = tiny.make_job(tiny.settings(small, checkpoint__every=4))
    sampler, texts = job.sampler(rank=0), job.training_texts
    handed = [job.collate([texts[i] for i in rows]).inputs["input_ids"] for rows in sampler]
    work = workload(job, sampler)
    assert work.training_cells == pytest.approx(sum(ids.numel() for ids in handed))
    assert work.saving_s == pytest.approx(3 * 12 * job.model.num_parameters() / 300e6)
    rest = workload(job, job.sampler(rank=0, first_step=6))
    assert rest.training_cells < work.training_cells


def test_times_are_read_at_a_glance():
    shown = {8.6: "9 s", 89: "89 s", 100: "1.7 min", 598: "10 min", 12_000: "3 h 20 min"}
    assert {seconds: in_words(seconds) for seconds in shown} == shown
