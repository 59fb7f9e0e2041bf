"""Our own sampler: continuous batching over the very modules that train."""
