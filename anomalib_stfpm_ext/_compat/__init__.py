# SPDX-License-Identifier: Apache-2.0

"""Names of torch, Lightning and anomalib that are private or not in all releases, each in one function, with reasons.

A new release may rename them. Then ``tests/test_compat.py`` fails, and the vendor's file here is the one to mend.
"""
