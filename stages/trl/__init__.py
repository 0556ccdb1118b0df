"""Our narrow hooks into TRL 1.16, one per file. Every private name of TRL or of transformers' Trainer that switchback
touches is in this package, pinned by the version range in pyproject.toml and held by the tests that compare with TRL
itself."""
