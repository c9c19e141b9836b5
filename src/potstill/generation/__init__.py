"""Training data written by a teacher: requests, reasoning, verification and filters."""
