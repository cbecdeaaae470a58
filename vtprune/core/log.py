"""The log ``vtprune``: at INFO what was attached, taken out and refused, at DEBUG what every prefill kept. A script
that configures no logging still sees warnings, through Python's handler of last resort."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager

LOG = logging.getLogger("vtprune")  # those of our modules that have one of their own are below it


@contextmanager
def shown() -> Iterator[None]:
    """Within it everything goes to stderr, as the command line's ``--verbose`` asks."""
    handler, level = logging.StreamHandler(sys.stderr), LOG.level
    LOG.addHandler(handler)
    LOG.setLevel(logging.DEBUG)
    try:
        yield
    finally:
        LOG.removeHandler(handler)
        LOG.setLevel(level)
