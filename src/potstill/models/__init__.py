"""Hugging Face models: loading, structure, activation capture, design, initialisation, pruning and adapters."""
