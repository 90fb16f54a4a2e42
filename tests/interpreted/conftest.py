"""These tests run Triton kernels on the CPU; Triton decides on that when it is imported, hence a run of their own."""

import functools
import os
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent.parent))
collect_ignore_glob = [] if os.environ.get("TRITON_INTERPRET") == "1" else ["test_*"]


@pytest.fixture(scope="session", autouse=True)
def language_is_patched_once_a_launch():
    """Triton's interpreter patches triton.language at a launch and, to no effect but a third of the time, again at
    every call of one of the kernel's functions.
    """
    import triton.language as tl
    from triton.runtime import interpreter

    original, patched = interpreter._patch_lang, []

    def patch_lang(function):
        modules = [module for module in function.__globals__.values() if module is tl or module is tl.core]
        if patched and all(module in patched for module in modules):
            return None
        scope = original(function)
        if not patched:  # a launch, which restores what it patched when it ends
            restore = scope.restore
            scope.restore = lambda: (patched.clear(), restore())
        patched.extend(modules)
        return scope

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(interpreter, "_patch_lang", patch_lang)
        yield


@pytest.fixture(scope="session", autouse=True)
def nothing_is_computed_in_vain():
    """Triton's interpreter works out whether sums and products of integers overflow, and looks at it in debug mode
    only; and it makes its table of NumPy's types at every question. Together half of its time.
    """
    import triton.language as tl
    from triton.runtime import interpreter

    builder, np_dtype = interpreter.interpreter_builder, interpreter._get_np_dtype
    assert not builder.options.debug
    known = functools.cache(np_dtype)

    def get_np_dtype(dtype):
        return np_dtype(dtype) if isinstance(dtype.scalar, tl.pointer_type) else known(dtype.scalar)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(builder, "options", interpreter.InterpreterOptions(sanitize_overflow=False))
        patch.setattr(interpreter, "_get_np_dtype", get_np_dtype)
        yield
