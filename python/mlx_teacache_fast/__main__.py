"""``python -m mlx_teacache_fast``: the same as the command ``mlx-teacache-fast``."""

from .cli import main

raise SystemExit(main())
