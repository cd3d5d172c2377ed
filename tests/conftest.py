"Threads that wait give their core away: on a busy machine, spinning ones make small steps a hundred times slower."
import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
