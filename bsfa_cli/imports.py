"""Heavy imports in less time: `with importing(): from .models.load import load_model`.

torch and transformers make some hundreds of thousands of objects that stay. Python's garbage collector looks through
all of them again and again while they are made, and once more when the process ends, and never finds any garbage:
together a third of what start-up takes. And where scikit-learn and SciPy are installed, transformers imports them, and
with them pandas, for one function of each that no command calls; those are put off until somebody does.
"""

from __future__ import annotations

import gc
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from types import ModuleType

# Of sklearn.metrics transformers takes roc_curve, for assisted generation; of scipy.optimize linear_sum_assignment, for
# the losses of object detection.
PUT_OFF = ("sklearn.metrics", "scipy.optimize")
MANY = 100  # modules that come with torch, transformers or a large part of them


@contextmanager
def importing() -> Iterator[None]:
    """Import within this without garbage collection, and with PUT_OFF put off. Where MANY modules were imported, what
    there is then is not looked through later either; where they were there before, nothing is kept from collection,
    since models may be among it. It may be nested.
    """
    collects, known = gc.isenabled(), len(sys.modules)
    gc.disable()
    absent = [name for name in PUT_OFF if name not in sys.modules]
    sys.modules.update({name: _PutOff(name) for name in absent})
    try:
        yield
    finally:
        for name in absent:
            del sys.modules[name]
        if collects:
            if len(sys.modules) - known >= MANY:
                gc.freeze()
            gc.enable()


class _PutOff(ModuleType):
    """Stands for a module of functions: each imports the module when it is called, and calls its namesake there."""

    def __getattr__(self, name: str):
        if name.startswith("__"):
            raise AttributeError(f"module {self.__name__!r} has no attribute {name!r}")

        def function(*arguments, **options):
            return getattr(import_module(self.__name__), name)(*arguments, **options)

        function.__name__, function.__module__ = name, self.__name__
        return function
