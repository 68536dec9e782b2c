"""Verilog of a network of integers: a library of modules in `library/`, and what is written for a network's weights."""

from .top import STYLES, Design, design

__all__ = ['STYLES', 'Design', 'design']
