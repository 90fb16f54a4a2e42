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
from importlib.util import find_spec
from types import ModuleType

# {module: its function}: for assisted generation, and for the losses of object detection.
PUT_OFF = {"sklearn.metrics": "roc_curve", "scipy.optimize": "linear_sum_assignment"}
MANY = 100  # modules that come with torch, transformers or a large part of them


@contextmanager
def importing() -> Iterator[None]:
    """Import within this without garbage collection, and with PUT_OFF put off. Where MANY modules were imported, what
    there is then is not looked through later either; where they were there before, nothing is kept from collection,
    since models may be among it. It may be nested.
    """
    collects, known = gc.isenabled(), len(sys.modules)
    gc.disable()
    for name, function in PUT_OFF.items():
        if name not in sys.modules and find_spec(name.partition(".")[0]) is not None:
            sys.modules[name] = _PutOff(name, function)
    try:
        yield
    finally:
        if collects:
            for name in PUT_OFF:
                if isinstance(sys.modules.get(name), _PutOff):
                    del sys.modules[name]
            if len(sys.modules) - known >= MANY:
                gc.freeze()
            gc.enable()


class _PutOff(ModuleType):
    """Stands for a module of which one function is wanted, which imports it when it is called. Whoever wants anything
    else of it by `from`, a module inside it too, has it imported at once.
    """

    def __init__(self, name: str, function: str):
        super().__init__(name)

        def late(*arguments, **options):
            return getattr(self._imported(), function)(*arguments, **options)

        late.__name__, late.__module__ = function, name
        setattr(self, function, late)

    def _imported(self) -> ModuleType:
        if sys.modules.get(self.__name__) is self:
            del sys.modules[self.__name__]
        return import_module(self.__name__)

    def __getattr__(self, name: str):
        # `from module import function` looks for a __path__ too, and does without; the import of a module inside not.
        inside = name == "__path__" and sys._getframe(1).f_code.co_name == "_find_and_load_unlocked"
        if name.startswith("__") and not inside:
            raise AttributeError(f"module {self.__name__!r} has no attribute {name!r}")
        return getattr(self._imported(), name)
