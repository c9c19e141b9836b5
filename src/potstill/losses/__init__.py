"""Losses, targets and divergences as pure functions of tensors. They need torch alone."""
