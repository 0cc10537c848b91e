# SPDX-License-Identifier: Apache-2.0

"""What makes scoring fast: copies of the networks, their precision, pooling, threads, and post-processing."""
