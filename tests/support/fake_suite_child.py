"""In place of `benchmarks.gpu_suite.child`: does as its options and requests say, without vLLM."""

import json
import subprocess
import sys
import time


def say(reply: dict[str, object]) -> None:
    print(json.dumps(reply), flush=True)


options = json.loads(sys.argv[1])
print("a line of the log", file=sys.stderr, flush=True)
time.sleep(options.get("start_s", 0))
if "fails" in options:
    say({"error": options["fails"]})
    sys.exit(1)
# What vLLM starts, too, must end with it.
grandchild = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
say({"result": {"grandchild": grandchild.pid}})
for line in sys.stdin:
    request = json.loads(line)
    if request["do"] == "sleep":
        time.sleep(request["seconds"])
    elif request["do"] == "die":
        print("the last words", file=sys.stderr, flush=True)
        grandchild.kill()
        sys.exit(3)
    elif request["do"] == "fail":
        say({"error": "ValueError: no"})
        continue
    say({"result": request})
grandchild.kill()
