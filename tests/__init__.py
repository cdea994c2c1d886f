"""The environment of the tests, and of the programs that they start."""

import os
import tempfile

# All compile the same programs again and again. The first process makes a cache for
# all. JAX locks it while it writes, but only if it has a maximum size.
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    COMPILED = tempfile.TemporaryDirectory(prefix="mixer_jax_tests")
    os.environ |= {
        "JAX_COMPILATION_CACHE_DIR": COMPILED.name,
        "JAX_COMPILATION_CACHE_MAX_SIZE": str(2**32),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.1",
    }
# Most of the tests' time is compilation, and the compiled programs are small. So XLA
# optimizes them little, which takes a fifth of the time. Set XLA_FLAGS, also to
# nothing, to compile as users do.
os.environ.setdefault(
    "XLA_FLAGS",
    "--xla_backend_optimization_level=0 --xla_cpu_use_fusion_emitters=false",
)
