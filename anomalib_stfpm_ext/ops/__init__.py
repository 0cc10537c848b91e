# SPDX-License-Identifier: Apache-2.0

"""The fused operators: arguments are checked, csrc/ is called, plain torch operations state the same formulas."""
