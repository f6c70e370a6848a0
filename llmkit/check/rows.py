"""Checks of training rows."""

from .subject import LabelledRow, Subject


def label_rows(subject: Subject, count: int) -> list[LabelledRow]:
    """Raw rows tokenised and labelled as TRL's SFT would."""
    return []
