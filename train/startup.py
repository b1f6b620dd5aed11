"""What a command does before anything heavy is imported: Ctrl-C in those seconds is one line, not a traceback."""

import os
import signal


def quit_on_interrupt(prog: str) -> None:
    """Until `train.cli.run_command` takes over, Ctrl-C ends the process with one line and exit code 2."""
    line = f"{prog}: error: interrupted\n".encode()

    def leave(_signum: int, _frame: object) -> None:
        os.write(2, line)
        os._exit(2)  # nothing has been made yet; a SystemExit would unwind through half-imported modules

    signal.signal(signal.SIGINT, leave)
