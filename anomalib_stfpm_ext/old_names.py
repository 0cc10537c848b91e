# SPDX-License-Identifier: Apache-2.0

"""Former places of modules. Exports for torch are pickles, which name the place that a class had in their time."""

import sys
from importlib import import_module
from types import ModuleType

_PACKAGE = __package__
MOVED = {
    "images": "data.images",
    "post_processing": "inference.post_processing",
    "teacher_cache": "callbacks.teacher_cache",
    "threshold": "inference.threshold",
}


class _Moved(ModuleType):
    """A module that finds its names in the new place, which is imported on first use."""

    def __getattr__(self, name: str) -> object:
        if name.startswith("__"):  # what tools ask of any module
            raise AttributeError(name)
        return getattr(import_module(f"{_PACKAGE}.{MOVED[self.__name__.removeprefix(f'{_PACKAGE}.')]}"), name)


for _old in MOVED:
    sys.modules[f"{_PACKAGE}.{_old}"] = _Moved(f"{_PACKAGE}.{_old}")
