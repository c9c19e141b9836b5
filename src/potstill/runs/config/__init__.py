"""Recipes: typed records of runs, read from strict YAML."""
