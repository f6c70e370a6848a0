"""Checks of the family trainer."""
