"""Teacher targets on disk: written once, read by every student, keyed by document and position."""

from kdlib.cache.collator import TargetCollator, TargetLoss
from kdlib.cache.dataset import DatasetTargets, cache_targets
from kdlib.cache.external import FileTeacher, ServerTeacher, export_cache
from kdlib.cache.kinds import Kind
from kdlib.cache.reader import TargetCache
from kdlib.cache.teachers import DenseTeacher, ModelTeacher
from kdlib.cache.writer import write_targets

__all__ = [
    "DatasetTargets",
    "DenseTeacher",
    "FileTeacher",
    "Kind",
    "ModelTeacher",
    "ServerTeacher",
    "TargetCache",
    "TargetCollator",
    "TargetLoss",
    "cache_targets",
    "export_cache",
    "write_targets",
]
