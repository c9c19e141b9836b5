"""The offline demonstration: a small teacher, its tokenizer, a recipe, and the standard library's source as data."""
