"""examples, vectors: a router in plain Python (router.py), judged by stored cases; nothing is installed.

    moe-conformance vectors write DIR    # once, anywhere
    python reader.py DIR

It takes the cases of `route` whose spec it knows, and says which requirement each wrong answer violates.
"""

import array
import json
import math
import sys
from pathlib import Path

from router import KNOWN, route

CODES = {"float32": "f", "float64": "d", "int32": "i", "int64": "q", "bool": "b"}


def rows(case, data, name):
    """A tensor of a case as a list of rows."""
    entry = case["tensors"][name]
    kind, size, start = CODES[entry["dtype"]], math.prod(entry["shape"]), entry["offset"]
    values = array.array(kind, data[start : start + size * array.array(kind).itemsize])
    if sys.byteorder == "big":
        values.byteswap()
    width = entry["shape"][-1]
    return [values[i : i + width].tolist() for i in range(0, size, width)]


def wrong(case, data):
    """Sentences about the tokens that are routed otherwise."""
    spec, names = case["arguments"]["spec"], ("in.logits_TE", "out.expert_ids_TK", "out.weights_TK")
    tolerances = rows(case, data, "out.weights_TK.tolerance")
    tokens = zip(*(rows(case, data, name) for name in names), tolerances, strict=True)
    for t, (logits, ids, weights, tolerance) in enumerate(tokens):
        found = sorted(zip(*route(logits, spec), strict=True))  # the order of the slots is free: compare by id
        for (e, w), (own, weight, within) in zip(found, sorted(zip(ids, weights, tolerance, strict=True)), strict=True):
            if e != own or not abs(w - weight) <= within:
                yield f"{case['name']}, token {t}: expert {e} weighs {w:.7g}; right is expert {own}, {weight:.7g}"
                break


def main(folder):
    index, judged, failed = json.loads((folder / "index.json").read_text()), 0, set()
    for name in (name for name, entry in index["cases"].items() if entry["method"] == "route"):
        case = json.loads((folder / f"{name}.json").read_text())
        given = case["arguments"]
        if given.keys() == {"logits_TE", "spec"} and given["spec"].keys() <= KNOWN and case["axes"].get("T"):
            judged += 1
            if sentences := list(wrong(case, (folder / f"{name}.bin").read_bytes())):
                print(sentences[0])
                failed |= set(case["requirements"].items())
    print(*(f"one of: {requirement}  {sentence}" for requirement, sentence in sorted(failed)), sep="\n")
    print(f"{judged} cases, {'wrong' if failed else 'right'}")
    return 1 if failed or not judged else 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
