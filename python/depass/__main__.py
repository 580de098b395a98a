"""``python -m depass`` is the command ``depass``."""

import sys

from .cli import main

sys.exit(main())
