# SPDX-License-Identifier: Apache-2.0

"""Which student is kept: held-out images judge it, and one record holds all that its verdicts are made of."""
