"""`python -m perpo COMMAND …` is `perpo COMMAND …`, also for torchrun's `-m perpo`."""

import sys

from perpo.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
