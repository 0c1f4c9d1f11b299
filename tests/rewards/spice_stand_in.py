"""Speaks SpiceServer's protocol without Java: the score is the share of equal words. Some captions make it fail."""

import json
import sys
import time
from pathlib import Path

log = Path(sys.argv[1])
mode = sys.argv[2] if len(sys.argv) > 2 else ""
with log.open("a") as file:
    print("start", file=file)
starts = log.read_text().count("start")
if mode == "no start":
    sys.exit("Could not load the parser\nout of memory")
if mode == "slow start":
    time.sleep(60)
print("loading models", file=sys.stderr)
print(json.dumps({"ready": True}), flush=True)


def score(reference: str, candidate: str) -> float | None:
    words, others = set(reference.split()), set(candidate.split())
    return len(words & others) / max(len(words), len(others)) if words else None


for line in sys.stdin:
    pairs = json.loads(line)["pairs"]
    with log.open("a") as file:
        print("batch", len(pairs), file=file)
    said = {caption for pair in pairs for caption in pair}
    if "die" in said or ("die once" in said and starts == 1):
        sys.exit("java.lang.OutOfMemoryError: Java heap space")
    if "hang" in said or ("hang once" in said and starts == 1):
        time.sleep(60)
    if "babble" in said:
        print("WARNING: something", flush=True)
    elif "refuse" in said:
        print(json.dumps({"error": "java.lang.NullPointerException"}), flush=True)
    else:
        scores = [score(*pair) for pair in pairs]
        print(json.dumps({"scores": scores[1:] if "short" in said else scores}), flush=True)
