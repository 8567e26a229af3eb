"""Teacher targets on disk: written once, read by every student, keyed by document and position."""

from kdlib.cache.external import FileTeacher, ServerTeacher, export_cache
from kdlib.cache.kinds import Kind
from kdlib.cache.reader import TargetCache
from kdlib.cache.teachers import DenseTeacher, ModelTeacher
from kdlib.cache.writer import write_targets

__all__ = [
    "DenseTeacher",
    "FileTeacher",
    "Kind",
    "ModelTeacher",
    "ServerTeacher",
    "TargetCache",
    "export_cache",
    "write_targets",
]
