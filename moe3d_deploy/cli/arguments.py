"""Texts of the command line that several commands read alike."""


def comma_list(text: str) -> tuple[str, ...]:
    """The names in `text`, separated by commas, without the spaces around them; empty ones do not count."""
    return tuple(name.strip() for name in text.split(",") if name.strip())
