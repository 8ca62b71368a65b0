"""What all tests share: quick compilation, and programs that were compiled once are not compiled again."""

import jax
import pytest

pytest.register_assert_rewrite("processes", "tiny")  # so that their assertions show values too


@pytest.fixture(scope="session", autouse=True)
def compilation_cache(tmp_path_factory):
    """Most runs of the tests have the same few steps; JAX_COMPILATION_CACHE_DIR keeps them between sessions too."""
    if jax.config.jax_compilation_cache_dir is None:
        jax.config.update("jax_compilation_cache_dir", str(tmp_path_factory.mktemp("compiled")))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


@pytest.fixture(scope="module", autouse=True)
def compilation(request):
    """Compiling is most of the time of the tests, so it leaves out what makes programs fast, here and in the processes
    that a test starts; a module marked `optimized` compiles as users do, and on a GPU all do."""
    quick = request.node.get_closest_marker("optimized") is None and jax.default_backend() == "cpu"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("JAX_DISABLE_MOST_OPTIMIZATIONS", str(int(quick)))
        before = jax.config.values["jax_disable_most_optimizations"]
        jax.config.update("jax_disable_most_optimizations", quick)
        yield
        jax.config.update("jax_disable_most_optimizations", before)
    jax.clear_caches()  # modules share few programs, and all of them together take gigabytes
