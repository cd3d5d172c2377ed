"""What every test starts from: threads that wait give their core away (on a busy machine, spinning ones make small
steps a hundred times slower), Ctrl-C is heard by the processes that tests start (in a background job a shell
switches it off), and
what names no device runs on the CPU, also where there is a GPU (whose driver does not survive a fork)."""
import atexit, os, shutil, signal, tempfile

os.environ |= {"FINESSL_DEVICE": "cpu", "PYTORCH_NVML_BASED_CUDA_CHECK": "1"}
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
if "PYTEST_XDIST_WORKER" in os.environ: os.environ.setdefault("OMP_NUM_THREADS", "1")    # a worker, a thread
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN: signal.signal(signal.SIGINT, signal.default_int_handler)
if hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) is signal.SIG_IGN:     # as nohup leaves it
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
# features are computed once a run of the tests, by whichever worker asks first
if "FINESSL_CACHE" not in os.environ:
    os.environ["FINESSL_CACHE"] = tempfile.mkdtemp(prefix="finessl-tests-")
    atexit.register(shutil.rmtree, os.environ["FINESSL_CACHE"], True)
