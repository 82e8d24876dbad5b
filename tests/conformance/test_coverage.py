"""tests of the judge: the generated cases reach every branch of the reference router."""

import json
import subprocess
import sys

SCRIPT = """
from conformance.core.judge import Judge
from conformance.core.register import of_stage
from conformance.core.trial import accuse
from conformance.run.kinds import KINDS
from conformance.subjects.reference import Reference

router = next(kind for kind in KINDS if kind.name == "router")
# Given weights are those of a replay.
accuse(Judge(Reference()), examples=8, ids=of_stage(*router.stages, "replay"))
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
