"""``python -m tether`` is the ``tether`` command."""

import sys

from tether.experiments.cli import main

sys.exit(main())
