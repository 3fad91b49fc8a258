"""The logger `fastres`, and FASTRES_LOG: the level from which its records go to stderr; nothing changes if unset."""

import logging
import os

logger = logging.getLogger("fastres")
LEVELS = ("debug", "info", "warning", "error")


def configure_from_environment() -> None:
    """Read FASTRES_LOG once, at import. An unknown level is reported and otherwise ignored."""
    level = os.environ.get("FASTRES_LOG", "").strip().lower()
    if not level:
        return
    if level not in LEVELS:
        logger.warning("FASTRES_LOG: got %r, expected one of %s", level, ", ".join(LEVELS))
        return
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("fastres %(levelname)s: %(message)s"))
    logger.addHandler(handler)
    logger.setLevel(level.upper())


def first_line(error: BaseException) -> str:
    """The first line of an error's message, or its type where it has none: messages of ours are one line."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
