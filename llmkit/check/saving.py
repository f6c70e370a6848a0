"""Checks of the family saving."""
