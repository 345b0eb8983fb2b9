"""`python -m fastgpt2` is the `fastgpt2` command."""

import sys

from fastgpt2.cli import main

if __name__ == "__main__":
    sys.exit(main())
