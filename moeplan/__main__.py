"""``python -m moeplan``: the command line where the script is not on the path, as under torchrun."""

from moeplan.cli import main

if __name__ == "__main__":
    main()
