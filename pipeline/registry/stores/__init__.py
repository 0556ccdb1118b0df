"""Where a registry's bytes lie: a local disk, or an object store."""
