import logging
import os

import jax
import jax.numpy as jnp
import pytest
from jax.experimental.compilation_cache import compilation_cache

from mixer_jax.run import compiled

SETTINGS = [
    "jax_compilation_cache_dir",
    "jax_compilation_cache_max_size",
    "jax_enable_compilation_cache",
    "jax_persistent_cache_min_compile_time_secs",
]


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """The user's folder of compiled programs, as when a process starts."""
    old = {name: getattr(jax.config, name) for name in SETTINGS}
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
    monkeypatch.delenv("JAX_COMPILATION_CACHE_MAX_SIZE", raising=False)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jnp.ones(3)  # a program too
    yield tmp_path / "mixer_jax" / "compiled"
    for name, value in old.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()


def compile_as_a_new_process(factor, own_cache=None):
    """Compiles a program, and returns whether it came from the cache."""
    jax.config.update("jax_compilation_cache_dir", own_cache)
    compilation_cache.reset_cache()
    compiled.keep_compiled_programs()
    events = []
    listen = lambda name, **_: events.append(name.rpartition("/")[2])
    jax.monitoring.register_event_listener(listen)
    try:
        assert jax.jit(lambda x: factor * x + 1)(jnp.ones(3))[0] == factor + 1
    finally:
        jax.monitoring.unregister_event_listener(listen)
    return "cache_hits" in events


def test_a_program_is_compiled_once_for_all_processes(cache):
    assert not compile_as_a_new_process(2)
    assert cache.stat().st_mode & 0o77 == 0  # it holds code: for its owner alone
    assert compile_as_a_new_process(2)
    assert not compile_as_a_new_process(3)
    assert jax.config.jax_compilation_cache_max_size == compiled.MAX_BYTES


def test_a_program_whose_writing_was_cut_off_is_compiled_again(cache):
    assert not compile_as_a_new_process(2)
    (path,) = cache.glob("*lambda*-cache")
    path.write_bytes(path.read_bytes()[:100])
    path.with_name(path.name.removesuffix("cache") + "atime").unlink()
    assert not compile_as_a_new_process(2)
    assert compile_as_a_new_process(2)


def test_jaxs_variables_come_first(cache, tmp_path):
    jax.config.update("jax_enable_compilation_cache", False)
    assert not compile_as_a_new_process(2)
    jax.config.update("jax_enable_compilation_cache", True)
    own = str(tmp_path / "own")
    assert not compile_as_a_new_process(2, own)
    assert compile_as_a_new_process(2, own)
    assert not cache.exists()


@pytest.mark.skipif(not hasattr(os, "getuid"), reason="has no owners of files")
@pytest.mark.parametrize("reason", ["mode", "owner"])
def test_a_folder_that_others_can_write_to_is_not_used(
    cache, reason, monkeypatch, caplog
):
    cache.mkdir(parents=True)
    if reason == "mode":
        cache.chmod(0o777)
    else:
        other = os.getuid() + 1
        monkeypatch.setattr(os, "getuid", lambda: other)
    with caplog.at_level(logging.WARNING):
        assert not compile_as_a_new_process(2)
        assert not compile_as_a_new_process(2)
    assert not list(cache.iterdir())
    assert f"other users can write to {cache}. Remove the folder" in caplog.text


def test_without_a_folder_to_write_to_all_is_compiled(cache):
    cache.parent.write_text("a file, no folder")
    assert not compile_as_a_new_process(2)
    assert not compile_as_a_new_process(2)
