"""Checks of the family learning."""
