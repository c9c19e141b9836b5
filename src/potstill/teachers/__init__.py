"""Teachers: each gives targets for a batch."""
