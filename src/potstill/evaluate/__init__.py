"""Quality, speed and diagnosis of trained models."""
