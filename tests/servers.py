"A server on this machine that does what servers do, and what asking it must give."
import contextlib
import http.server
import os
import threading
import time


class StrangeServer(http.server.BaseHTTPRequestHandler):
    "Answers /200, /404, /403; noise to /noise; nothing to /silent; a letter every tenth of a second to /drip; for 3 s."
    def do_HEAD(self):
        what = self.path.rpartition("/")[2]
        if what.isdigit():
            self.send_response(int(what))
            return self.end_headers()
        if what == "noise": return self.wfile.write(b"hello\r\n")
        if what == "drip": self.wfile.write(b"HTTP/1.1 200 OK\r\nServer: ")
        end = time.monotonic() + 3
        with contextlib.suppress(OSError): # whoever asked has gone
            while time.monotonic() < end:
                if what == "drip": self.wfile.write(b".")
                time.sleep(.1)

    def log_message(self, *args): pass


@contextlib.contextmanager
def strange_server(): # -> its address
    "A server of this kind on this machine, asked without a proxy."
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), StrangeServer)
    before = os.environ.get("no_proxy")
    server.daemon_threads, server.block_on_close = True, False
    threading.Thread(target=server.serve_forever, args=(.05,), daemon=True).start()
    os.environ["no_proxy"] = "*"
    try: yield f"http://127.0.0.1:{server.server_port}"
    finally:
        os.environ.pop("no_proxy") if before is None else os.environ.update(no_proxy=before)
        server.shutdown()
        server.server_close()


def check_url_error(f):
    "Assert that `f(url, seconds)` says why a file cannot be had, or nothing where it can, and keeps the time."
    with strange_server() as at:
        def said(what, seconds):
            start = time.monotonic()
            try: answer = f(f"{at}/{what}", seconds)
            except Exception as error: raise AssertionError(f"/{what} raised {type(error).__name__}") from error
            took = time.monotonic() - start
            assert took < seconds + 1.5, f"/{what} took {took:.1f} s instead of {seconds} s"
            return answer
        assert said("200", 2.) == "", "a file that is there"
        for code in ("404", "403"): assert code in said(code, 2.), f"the answer {code} is not named"
        assert said("noise", 2.) != "", "noise is no file"
        for what in ("silent", "drip"): assert said(what, .3) != "", f"/{what} is no file"
    assert said("200", 2.) != "", "a server that is gone"
