"""Docstrings as Markdown, for the API reference: roles of Sphinx become code."""

from __future__ import annotations

import re
from typing import Any

import griffe


class Roles(griffe.Extension):
    """``:class:`~vtprune.Handle``` is shown as ``Handle``."""

    def on_object(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        if obj.docstring is not None:
            obj.docstring.value = re.sub(
                r":\w+:`~?([^`]+)`", lambda m: f"`{m[1].rpartition('.')[2]}`", obj.docstring.value
            )
