"""Files and data sets to batches."""
