"""Somebody's own program as an app."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from omegaconf import DictConfig


class Script:
    """A script, a module or an executable: the words of ``app.command``."""

    def build_command(self, cfg: DictConfig) -> list[str]:
        """The words."""
        return list(cfg.app.command)
