"""What every test starts from: threads that wait give their core away (on a busy machine, spinning ones make small steps
a hundred times slower), and Ctrl-C is heard by the processes that tests start (in a background job a shell switches it off)."""
import os, signal

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN: signal.signal(signal.SIGINT, signal.default_int_handler)
