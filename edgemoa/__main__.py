"""``python -m edgemoa`` is the command ``edgemoa``."""

import sys

from edgemoa.cli import main

sys.exit(main())
