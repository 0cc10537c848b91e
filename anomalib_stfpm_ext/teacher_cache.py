# SPDX-License-Identifier: Apache-2.0

"""The former place of the teacher cache, which the exports of version 0.1 name."""

from .callbacks.teacher_cache import TeacherCache

__all__ = ["TeacherCache"]
