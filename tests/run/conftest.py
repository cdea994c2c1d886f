"""Runs of one config share what they compile."""

import json

import pytest

from mixer_jax.run import program, trainer

# Keys with which the programs are the same.
OTHERS = (
    *("dataset", "progress_every", "eval_every", "checkpoint_every", "evals"),
    "workers",
)


@pytest.fixture(scope="session", autouse=True)
def programs_are_built_once():
    """Most of a small run's time is the tracing and compilation of its programs.

    So a run that goes on here does so with the program that began it; see `built_anew`.
    """
    build, built = program.build_program, {}

    def build_once(config, mesh, num_classes, *, multilabel=False):
        values = json.loads(config.to_json())
        values = {key: values[key] for key in values if key not in OTHERS}
        key = (json.dumps(values), mesh, num_classes, multilabel)
        if key not in built:
            built[key] = build(config, mesh, num_classes, multilabel=multilabel)
        return built[key]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(program, "build_program", build_once)
        patch.setattr(trainer, "build_program", build_once)
        yield built


@pytest.fixture
def built_anew(programs_are_built_once):
    """Forgets programs when it is called, so that the next run builds its own.

    It traces and compiles all again, as a new process does.
    """
    kept = programs_are_built_once.copy()
    yield programs_are_built_once.clear
    programs_are_built_once.update(kept)
