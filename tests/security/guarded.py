"""Run by `whole_run.py` in a process of its own: commands of the command line, with every connection forbidden and noted.

    guarded.py LOG COMMANDS     LOG gets a line for everything that was asked of the network, for every process that was started, for
                                every object that was unpickled, and for every exit code
                                COMMANDS is a JSON file: a list of lists of words

Imports nothing but the standard library before the hook is in place, and it cannot be taken away again (PEP 578).
"""

import json
import os
import socket
import sys
from pathlib import Path

# What Python tells of before it does it: https://docs.python.org/3/library/audit_events.html
NETWORK = ("socket.", "http.client.", "urllib.", "ftplib.", "imaplib.", "nntplib.", "poplib.", "smtplib.", "telnetlib.")
NETWORK_SOURCES = ("asyncio.", "webbrowser.")
PROCESSES = ("subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "os.spawn", "pty.spawn")
HARMLESS = ("socket.gethostname",)  # asks the kernel


class Forbidden(BaseException):
    """Not an Exception, so that no library takes it for a connection that failed and goes on."""


def forbid(log: int) -> None:
    """From now on whatever asks for a connection ends with Forbidden. It stands in the file `log`, and so do processes and pickles."""

    def hook(event: str, arguments: tuple[object, ...]) -> None:
        if event.startswith(PROCESSES):
            os.write(log, f"process {event} {arguments!r:.200}\n".encode())
        if event == "pickle.find_class":
            os.write(log, f"pickle {event} {arguments!r:.200}\n".encode())
        if not event.startswith((*NETWORK, *NETWORK_SOURCES)) or event in HARMLESS or _is_local(event, arguments):
            return
        os.write(log, f"network {event} {arguments!r:.200}\n".encode())
        raise Forbidden(f"{event} {arguments!r}")

    sys.addaudithook(hook)


def _is_local(event: str, arguments: tuple[object, ...]) -> bool:
    """A socket between two processes of this machine, which has a path and no address."""
    return event.startswith("socket.") and socket.AF_UNIX in (getattr(arguments[0], "family", None), *arguments[1:2])


def main() -> None:
    log = os.open(sys.argv[1], os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    commands = json.loads(Path(sys.argv[2]).read_text(encoding="utf-8"))
    forbid(log)
    from qlora_lite.cli import main as qlora_lite

    for command in commands:
        code: object = 0
        print(f"--- {command[0]}", file=sys.stderr, flush=True)
        try:
            qlora_lite(command)
        except SystemExit as end:
            code = end.code or 0
        os.write(log, f"exit {command[0]} {code}\n".encode())


if __name__ == "__main__":
    main()
