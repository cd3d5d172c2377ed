"""What every test starts from: threads that wait give their core away (on a busy machine, spinning ones make small
steps a hundred times slower), Ctrl-C is heard by the processes that tests start (in a background job a shell
switches it off), and
what names no device runs on the CPU, also where there is a GPU (whose driver does not survive a fork)."""
import os, signal

os.environ |= {"FINESSL_DEVICE": "cpu", "PYTORCH_NVML_BASED_CUDA_CHECK": "1"}
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
if "PYTEST_XDIST_WORKER" in os.environ: os.environ.setdefault("OMP_NUM_THREADS", "1")    # a worker, a thread
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN: signal.signal(signal.SIGINT, signal.default_int_handler)
