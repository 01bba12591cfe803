"""`python -m cacheflow`: the `cacheflow` command."""

from cacheflow.cli import main

if __name__ == "__main__":
    main()
