"""`python -m unigrpo` is the `unigrpo` command."""

import sys

from unigrpo.cli import main

sys.exit(main())
