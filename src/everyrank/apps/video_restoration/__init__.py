"""Video restoration (VRT) from JSON option files."""
