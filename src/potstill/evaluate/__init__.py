"""What was kept: quality, speed, and the report."""
