# SPDX-License-Identifier: Apache-2.0

"""Scores images as they arrive in a folder.

The service looks into the folder again and again. It scores an image that has not changed between two looks. A file
that cannot be read is tried again for a while before it counts as broken. The table of scores is also the memory: what
is in it is not scored again after a restart.
"""

from .command import make_parser, run
from .service import watch

__all__ = ["make_parser", "run", "watch"]
