"""What is being made: the student's shape and its first weights."""
