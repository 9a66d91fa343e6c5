"""Option files of legacy video-restoration codebases: reading, checking, completing."""

from everyrank.apps.video_restoration.options.loader import load_options

__all__ = ["load_options"]
