"""Checks of the family template."""
