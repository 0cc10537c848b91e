# SPDX-License-Identifier: Apache-2.0

"""The paper's table, measured anew, on MVTec AD or VisA.

Trains and evaluates a model for every category and seed, on raw scores. Finished runs are not repeated, interrupted
ones go on from their last epoch, and the tables are written anew after every run.
"""

from .command import make_parser, reproduce, run

__all__ = ["make_parser", "reproduce", "run"]
