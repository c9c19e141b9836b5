"""Drafts of recipes for a user's own models and data, from the teacher's config and the first rows of the data."""
