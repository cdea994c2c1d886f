"""Damaged files are refused with a clear error, or read right: the short form."""

import functools
import subprocess
import sys

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from .fuzzing import READERS, harness


@pytest.fixture(scope="module")
def fuzzer_of(tmp_path_factory):
    folder = tmp_path_factory.mktemp
    return functools.cache(lambda name: harness.Fuzzer(READERS[name], folder(name)))


@pytest.mark.parametrize("name", READERS)
@settings(
    max_examples=150,
    derandomize=True,
    database=None,
    deadline=None,
    suppress_health_check=list(HealthCheck),
)
@given(rng=st.randoms(use_true_random=False))
def test_damaged_files_are_refused_or_read_right(fuzzer_of, name, rng):
    fuzzer = fuzzer_of(name)
    finding = fuzzer.attempt(fuzzer.make(rng))
    assert finding is None, finding.details


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="memory is measured in /proc")
@pytest.mark.parametrize("name", READERS)
def test_damaged_files_take_no_memory_and_no_time(name):
    """The long form, and that sound files are read: it begins with them."""
    args = ["--inputs", "1000", "--seed", "1", "--hang", "60"]
    command = [sys.executable, "-m", "tests.fuzzing", name, *args]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
