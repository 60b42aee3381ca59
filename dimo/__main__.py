"""The `dimo` command, also as `python -m dimo`."""

import signal
import sys

from dimo.output import lasting_output


def main() -> int:
    """The command; Ctrl-C while PyTorch is imported, which takes seconds, ends the process without a traceback."""
    with lasting_output():  # from here on, so that no file takes the number of a stderr that is closed
        before = signal.signal(signal.SIGINT, signal.SIG_DFL)
        from dimo.commands import cli

        signal.signal(signal.SIGINT, before)
        return cli.main()


if __name__ == "__main__":
    sys.exit(main())
