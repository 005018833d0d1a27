"""attnlab: visual attention, taught by building it."""

__version__ = "0.1.0"
