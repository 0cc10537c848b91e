# SPDX-License-Identifier: Apache-2.0

"""What happens in a fit, a validation, a test or a prediction besides the steps."""

from .allocator import AllocatorTuning
from .checks import Checks
from .distributed import DistributedSetup
from .finite_loss import FiniteLoss
from .image_reading import ImageReading
from .learning_rate import LearningRate
from .precise_batch_norm import PreciseBatchNorm
from .scoring_dtype import ScoringDtype
from .student_selection import StudentSelection
from .teacher_cache import TeacherCache
from .unchanged_student import UnchangedStudent

__all__ = [
    "AllocatorTuning",
    "Checks",
    "DistributedSetup",
    "FiniteLoss",
    "ImageReading",
    "LearningRate",
    "PreciseBatchNorm",
    "ScoringDtype",
    "StudentSelection",
    "TeacherCache",
    "UnchangedStudent",
]
