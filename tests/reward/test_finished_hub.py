"""What a hub answers to the name of a model is told in one line, with the remedy; the hub here is a local server."""

import json
import os
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

ANSWERS = {  # by name: status, code, words that are told
    "o/missing": (404, "RepoNotFound", "the hub knows no such model"),
    "o/private": (401, "RepoNotFound", "give your token in HF_TOKEN"),
    "o/gated": (403, "GatedRepo", "ask on its page"),
    "o/moved": (404, "RevisionNotFound", "no revision"),
    "o/broken": (500, "", "check the name and the network"),
}
SCRIPT = """
import json, sys
from safer_ray.errors import UserError
from safer_ray.reward.finished import model_path
told = {}
for name in sys.argv[1:]:
    try:
        told[name] = str(model_path(f"hub:{name}@rev" if name == "o/moved" else f"hub:{name}"))
    except UserError as error:
        told[name] = f"UserError {error}"
print(json.dumps(told))
"""


class Hub(BaseHTTPRequestHandler):
    def do_GET(self):
        name = next((name for name in ANSWERS if f"/{name}" in self.path), None)
        status, code, _ = ANSWERS[name] if name else (404, "RepoNotFound", "")
        self.send_response(status)
        self.send_header("X-Error-Code", code)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def do_HEAD(self):
        self.do_GET()

    def log_message(self, *args):
        pass


@pytest.fixture(scope="module")
def told(tmp_path_factory):
    """What `model_path` says of each name, in a process that knows this hub alone."""
    with ThreadingHTTPServer(("127.0.0.1", 0), Hub) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        hub = {"HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}", "HF_HUB_OFFLINE": "0"}
        home = {"HF_HOME": str(tmp_path_factory.mktemp("hub")), "HF_TOKEN": "hf_secretsecretsecret"}
        command = [sys.executable, "-c", SCRIPT, *ANSWERS]
        known = os.environ | hub | home
        done = subprocess.run(command, capture_output=True, text=True, env=known, timeout=120, check=True)
        server.shutdown()
    assert "secret" not in done.stdout + done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("name", ANSWERS)
def test_each_answer_is_told_in_a_line_with_its_remedy(told, name):
    assert told[name].startswith("UserError ")
    assert f"hub:{name}" in told[name]
    assert ANSWERS[name][2] in told[name]
    assert "\n" not in told[name]
