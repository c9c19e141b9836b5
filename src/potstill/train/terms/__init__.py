"""Terms of the objective, one file for each family."""
