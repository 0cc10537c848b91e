# SPDX-License-Identifier: Apache-2.0

"""What happens during a fit beside the steps: student selection, teacher cache, allocator tuning, processes."""
