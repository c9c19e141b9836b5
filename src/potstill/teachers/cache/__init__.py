"""Teacher signals precomputed on disk."""
