# SPDX-License-Identifier: Apache-2.0

"""Faster inference with the same features: the inference copy, and both networks at the same time."""
