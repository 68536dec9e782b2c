"""Reads a program: finds which parameters meet data, where, and by which rules."""
