"""The registry's public face."""

from pipeline.registry.artifact import Artifact, File, Source
from pipeline.registry.registry import Registry, UnsafeFile

__all__ = ["Artifact", "File", "Registry", "Source", "UnsafeFile"]
