"""Stands in for torch, gigabytes on Linux, which this project's environments leave out.

mflux 0.20 imports it at the top of modules that all of its pipelines need, and uses it only to read weights of
PyTorch's format; later versions import it where they use it. Any name in here is an empty class: enough for the
annotations in mflux and safetensors.
"""

from typing import Any

__version__ = "0"  # transformers finds it too old to use


class _Anything(type):
    def __getattr__(cls, name: str) -> Any:
        return __getattr__(name)


def __getattr__(name: str) -> Any:
    if name.startswith("__"):
        raise AttributeError(name)
    return _Anything(name, (), {})
