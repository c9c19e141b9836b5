"""A first recipe for one's own models and data: what the teacher's config and the data's first rows tell."""

from potstill.runs.init.draft import Wish, draft

__all__ = ["Wish", "draft"]
