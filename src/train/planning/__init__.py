"""Plans of a config: what it would run, and what that would take."""
