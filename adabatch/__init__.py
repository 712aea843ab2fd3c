"""AdaBatch: batch sizes that grow during training."""
__version__ = "0.1.0"

from typing import TYPE_CHECKING


class Rejected(Exception):
    "Input that cannot be used. The message is one line, all that a reader needs; a command shows nothing else."


class WrongValue(Rejected, ValueError): pass


class WrongType(Rejected, TypeError): pass


# The rooms raise what stands above.
from .schedule import Schedule, Stage, adabatch, fixed, from_batch_sizes, from_lr_schedule  # noqa: E402

if TYPE_CHECKING:
    from .loader import Plan
    from .record import load
    from .trainer import Trainer

__all__ = ["Plan", "Schedule", "Stage", "Trainer", "adabatch", "fixed", "from_batch_sizes", "from_lr_schedule", "load"]

_LATER = {"Plan": "loader", "Trainer": "trainer", "load": "record"}  # imported when first used: PyTorch takes seconds


def __getattr__(name):
    if name not in _LATER: raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module
    return getattr(import_module(f".{_LATER[name]}", __name__), name)


def __dir__(): return sorted({*globals(), *__all__})
