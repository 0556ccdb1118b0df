"""The registry's public face."""

from pipeline.errors import UnsafeFile
from pipeline.registry.artifact import Artifact, File, Source
from pipeline.registry.registry import Published, Registry

__all__ = ["Artifact", "File", "Published", "Registry", "Source", "UnsafeFile"]
