# SPDX-License-Identifier: Apache-2.0

"""The choice of the student to keep: held-out images judge it, and one record holds all that its verdicts depend on."""
