"""`python -m elastic_lsopt COMMAND …`: the command line as a module, for launchers."""

import sys

from elastic_lsopt.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
