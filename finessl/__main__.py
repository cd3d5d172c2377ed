"`python -m finessl`, what `torchrun` starts, and the command `finessl`; written by hand, since it is a program."
import os, signal, sys


def start() -> int: # exit code
    "Run the command line; a Ctrl-C has its one line from the first moment on, also while modules are imported."
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, lambda *_: (os.write(2, b"finessl: stopped\n"), os._exit(130)))
    from finessl.cli.main import main
    return main()


if __name__ == "__main__": sys.exit(start())
