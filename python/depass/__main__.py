"""``python -m depass`` is the command ``depass``."""

import sys

from .cli.main import main

sys.exit(main())
