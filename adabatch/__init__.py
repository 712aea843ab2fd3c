"""AdaBatch: batch sizes that grow during training."""
__version__ = "0.1.0"

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .loader import Plan
    from .record import load
    from .schedule import Schedule, Stage, adabatch, fixed, from_batch_sizes, from_lr_schedule
    from .trainer import Trainer

__all__ = ["Plan", "Schedule", "Stage", "Trainer", "adabatch", "fixed", "from_batch_sizes", "from_lr_schedule", "load"]

_ROOMS = {"Plan": "loader", "Trainer": "trainer", "load": "record"}  # of the others: schedule


class Rejected(Exception):
    "Input that cannot be used. The message is one line, all that a reader needs; a command shows nothing else."


class WrongValue(Rejected, ValueError): pass


class WrongType(Rejected, TypeError): pass


def __getattr__(name):
    "Imported when first used: PyTorch takes seconds, and every room imports the errors above."
    if name not in __all__: raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module
    return getattr(import_module(f".{_ROOMS.get(name, 'schedule')}", __name__), name)


def __dir__(): return sorted({*globals(), *__all__})
