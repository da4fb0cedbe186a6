"""`python -m tokengate`, which is the command `tokengate`."""

import sys

from tokengate.command_line import main

if __name__ == "__main__":
    sys.exit(main())
