"""Segment ischemic stroke lesions in DWI, ADC and FLAIR with an ensemble of networks.

The names below are the public API, documented in docs/api.md. They keep their meaning until a release says otherwise. Each is imported when
it is first used, so that `import ensemble` is fast and has no side effect.
"""

import importlib

__version__ = "0.2.0"

#: The stable names, and the module that each comes from. `__init__.pyi` tells type checkers the same.
_PUBLIC = {
    "read_case": "ensemble.api",
    "load_ensemble": "ensemble.api",
    "segment": "ensemble.api",
    "Volume": "ensemble.volume",
    "Grid": "ensemble.geometry",
    "Modality": "ensemble.types",
    "RawCase": "ensemble.readers.base",
    "Ensemble": "ensemble.pipeline",
    "Result": "ensemble.pipeline",
    "UserError": "ensemble.errors",
    "UsageError": "ensemble.errors",
    "InputRefused": "ensemble.errors",
    "WeightsBroken": "ensemble.errors",
    "MembersFailed": "ensemble.errors",
    "OutOfMemory": "ensemble.errors",
}
__all__ = ["__version__", *_PUBLIC]


def __getattr__(name):
    if name in _PUBLIC:
        return getattr(importlib.import_module(_PUBLIC[name]), name)
    raise AttributeError(f"module 'ensemble' has no attribute {name!r}")


def __dir__():
    return sorted({*globals(), *_PUBLIC})
