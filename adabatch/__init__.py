"""AdaBatch: batch sizes that grow during training. What is named here is imported when it is first used."""
__version__ = "0.1.0"

_MODULES = {
    "schedule": ("Schedule", "Stage", "adabatch", "fixed", "from_lr_schedule"),  # these need no PyTorch
    "loader": ("Plan",),
    "trainer": ("Trainer",),
    "record": ("load",),
}


def __getattr__(name):
    from importlib import import_module
    for module, names in _MODULES.items():
        if name in names: return getattr(import_module(f"{__name__}.{module}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__(): return [*globals(), *(name for names in _MODULES.values() for name in names)]
