"""`python -m evla_compile`: the command line where the command `evla` is not on the path."""

from evla_compile.cli import main

if __name__ == "__main__":
    main()
