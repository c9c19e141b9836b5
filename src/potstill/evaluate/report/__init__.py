"""Report pages, model cards and their plots."""
