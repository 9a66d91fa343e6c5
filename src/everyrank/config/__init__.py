"""Reading configurations: YAML tags, resolving, validation with suggestions."""
