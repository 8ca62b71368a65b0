"""What all tests share: programs that were compiled once in a session are not compiled again."""

import jax
import pytest

pytest.register_assert_rewrite("processes", "tiny")  # so that their assertions show values too


@pytest.fixture(scope="session", autouse=True)
def compilation_cache(tmp_path_factory):
    """Most runs of the tests have the same few steps; JAX_COMPILATION_CACHE_DIR keeps them between sessions too."""
    if jax.config.jax_compilation_cache_dir is None:
        jax.config.update("jax_compilation_cache_dir", str(tmp_path_factory.mktemp("compiled")))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
