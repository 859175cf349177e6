"""`python -m cinecat.cli` is `cinecat`."""

from cinecat.cli import main

if __name__ == "__main__":
    main()
