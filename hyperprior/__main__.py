"""`python -m hyperprior` and the `hyperprior` command."""

from hyperprior.cli import main

if __name__ == "__main__":
    main()
