# SPDX-License-Identifier: Apache-2.0

"""Scores images as they arrive in a folder.

The folder is looked at again and again. An image is scored once it has stayed as it is from one look to the next, and a
file that cannot be read is tried again for a while before it counts as broken. The table of scores is also the memory:
what stands there is not scored again after a restart.
"""

from .command import make_parser, run
from .service import watch

__all__ = ["make_parser", "run", "watch"]
