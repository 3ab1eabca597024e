"""``python -m convmixer_fast`` is ``convmixer-fast``."""

import sys

from .cli import main

if __name__ == "__main__":
    sys.exit(main())
