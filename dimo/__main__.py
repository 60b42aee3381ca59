"""The `dimo` command, also as `python -m dimo`."""

import signal
import sys


def main() -> int:
    """`dimo.cli.main`; Ctrl-C while PyTorch is imported, which takes seconds, ends the process without a traceback."""
    before = signal.signal(signal.SIGINT, signal.SIG_DFL)
    from dimo import cli

    signal.signal(signal.SIGINT, before)
    return cli.main()


if __name__ == "__main__":
    sys.exit(main())
