# SPDX-License-Identifier: Apache-2.0

"""Images: how files become pixels, what transforms do to them, and which images data sets and loaders hold."""
