"""Rank-aware logging: ``[RANK r] time LEVEL name: message``."""

from __future__ import annotations

import logging
import sys
from pathlib import Path

_ROOT = "everyrank"
_TIME = "%Y-%m-%d %H:%M:%S"


class _ConsoleHandler(logging.Handler):
    """Write to whatever ``sys.stderr`` is now, so that redirections made later are honoured."""

    def emit(self, record: logging.LogRecord) -> None:
        try:
            print(self.format(record), file=sys.stderr, flush=True)
        except Exception:
            self.handleError(record)


def get_logger(name: str) -> logging.Logger:
    """Return the logger ``everyrank.<name>`` (or ``name`` itself if it is already below ``everyrank``)."""
    return logging.getLogger(name if name == _ROOT or name.startswith(f"{_ROOT}.") else f"{_ROOT}.{name}")


def setup_logging(rank: int, level: int | str | None = None, log_file: str | Path | None = None) -> logging.Logger:
    """Send everyrank's log records to the console and, if asked, to a file; the root logger is not touched.

    Calling it again replaces what an earlier call set up.

    Args:
        rank: This process's rank, shown in each line.
        level: Level of the console, such as ``"DEBUG"``; by default INFO on rank 0 and WARNING on the others.
        log_file: File that gets everything from INFO (or ``level``, if lower) on, appended; its folder is made.

    Returns:
        The logger ``everyrank``.
    """
    logger = logging.getLogger(_ROOT)
    for handler in list(logger.handlers):
        logger.removeHandler(handler)
        handler.close()
    console_level = logging.getLevelName(level.upper()) if isinstance(level, str) else level
    if console_level is None:
        console_level = logging.INFO if rank == 0 else logging.WARNING
    formatter = logging.Formatter(f"[RANK {rank}] %(asctime)s %(levelname)s %(name)s: %(message)s", _TIME)
    console: logging.Handler = _ConsoleHandler(console_level)
    handlers = [console]
    if log_file is not None:
        Path(log_file).parent.mkdir(parents=True, exist_ok=True)
        handlers.append(logging.FileHandler(log_file, encoding="utf-8"))
        handlers[-1].setLevel(min(logging.INFO, console_level))
        if getattr(sys.stderr, "log_file", None) == Path(log_file).resolve():
            # The console's lines reach this file by ``tee_output``: only those the console leaves out are missing.
            handlers[-1].addFilter(lambda record: record.levelno < console_level)
    for handler in handlers:
        handler.setFormatter(formatter)
        logger.addHandler(handler)
    logger.setLevel(min(handler.level for handler in handlers))
    logger.propagate = False
    return logger
