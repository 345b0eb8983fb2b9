"""`python -m fastgpt2` is the `fastgpt2` command."""

from fastgpt2.cli import run

if __name__ == "__main__":
    run()
