"""Is it right and fast on this GPU? Four parts, six minutes, one JSON line a result: ``python -m benchmarks.gpu``."""
