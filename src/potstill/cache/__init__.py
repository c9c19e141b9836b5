"""Teacher signals on disk."""
