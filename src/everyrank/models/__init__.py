"""Models that are described by a configuration."""
