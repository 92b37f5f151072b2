"""Federated tuning over Flower alone."""
