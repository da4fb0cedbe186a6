"""`python -m tokengate`, which is the command `tokengate`."""

import sys

from tokengate.command_line import main

sys.exit(main())
