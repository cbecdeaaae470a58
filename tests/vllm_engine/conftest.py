"""These tests need vLLM (``make vllm``); elsewhere they are not collected."""

from __future__ import annotations

import sys
from importlib.util import find_spec
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
collect_ignore_glob = [] if find_spec("vllm") else ["test_*.py"]
