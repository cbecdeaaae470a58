"""``python -m vtprune`` is the command line."""

from .cli.main import main

raise SystemExit(main())
