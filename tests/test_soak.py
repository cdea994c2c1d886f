"""The short form of tests/soak.py: a few signals and damages instead of many."""

import collections

import numpy as np
import pytest

from . import soak


@pytest.mark.slow
@pytest.mark.parametrize(
    "plan",
    [
        soak.Plan(kills=1, terms=1, damages=1, processes=1, steps=100, seed=0),
        soak.Plan(kills=1, terms=0, damages=0, processes=2, steps=60, seed=0),
    ],
)
def test_a_run_that_is_killed_ends_as_one_that_is_not(tmp_path, plan):
    counts = collections.Counter()
    for what, count in soak.soak(tmp_path, plan).items():
        counts[what.split()[0]] += count
    planned = {"SIGKILL": plan.kills, "SIGTERM": plan.terms, "damaged": plan.damages}
    assert counts == collections.Counter(planned)


def test_a_difference_of_one_bit_is_found(tmp_path, monkeypatch):
    parameters = {"parameters": soak.READERS["parameters"]}
    monkeypatch.setattr(soak, "READERS", parameters)
    for name, value in (("whole", 0.0), ("same", 0.0), ("other", -0.0)):
        (tmp_path / name).mkdir()
        bias = np.array([1, value], np.float32)
        np.savez(tmp_path / name / "final.npz", bias=bias)
    soak.compare(tmp_path / "whole", tmp_path / "same")
    with pytest.raises(AssertionError, match=r"parameters: \['bias'\] differ"):
        soak.compare(tmp_path / "whole", tmp_path / "other")
