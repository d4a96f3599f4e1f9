"""`python -m tokenprune.cli`: the command line where no script is installed."""

from tokenprune.cli.main import main

if __name__ == "__main__":
    main()
