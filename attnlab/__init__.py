"""attnlab: visual attention, taught by building it."""

from attnlab import models  # registers our factories with timm
from attnlab.probe import Probe, record

__all__ = ["Probe", "models", "record"]
__version__ = "0.1.0"
