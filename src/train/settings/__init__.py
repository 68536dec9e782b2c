"""Configs: their defaults, their ranges, and changes from the command line."""
