"""tests of the judge: the generated cases reach every branch of the reference router."""

import json
import subprocess
import sys

SCRIPT = """
from conformance.judge import CHECKS, LAYOUT_METHODS, Judge
from conformance.subjects.reference import Reference
from conformance.trial import accuse, load_suite
load_suite()
# Layouts have the router of one rank.
ids = [id for id, check in CHECKS.items() if check.method not in LAYOUT_METHODS]
accuse(Judge(Reference()), seed=0, examples=40, ids=ids)
"""


def test_generated_cases_reach_every_branch_of_the_reference(tmp_path):
    rc = tmp_path / "rc"
    # A refusal is reached by the tests of errors, never by a generated case.
    rc.write_text(
        "[run]\nbranch = true\ninclude = */moe_ref/routing.py\n[report]\nexclude_also =\n    raise ValueError\n"
    )
    script = tmp_path / "generate.py"
    script.write_text(SCRIPT)
    data = tmp_path / "data"
    coverage = [sys.executable, "-m", "coverage"]
    subprocess.run([*coverage, "run", f"--rcfile={rc}", f"--data-file={data}", script], check=True)
    subprocess.run(
        [*coverage, "json", f"--rcfile={rc}", f"--data-file={data}", "-o", tmp_path / "c.json", "-q"], check=True
    )
    found = json.loads((tmp_path / "c.json").read_text())["files"]
    (file,) = found.values()
    assert file["missing_lines"] == []
    assert file["missing_branches"] == []
