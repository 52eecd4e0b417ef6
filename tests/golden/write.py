"""Records the golden values of cases again:  PYTHONPATH=.:tests python -m golden.write NAME…

Golden values say what the code computes, and are to stay what they are. They are written for two reasons only: a case
is new, or a result was changed on purpose; then for those cases by name, with the reason in the commit. ``--all``
writes every case, which is for another machine: values of two machines never stand in one file.
"""

import sys
import tempfile
from pathlib import Path

from golden.cases import CASES
from golden.runs import differences, load_golden, machine, make_stand_ins, run_case, save_golden


def write(names: list[str]) -> None:
    made_on, recorded = load_golden()
    whole = set(names) >= set(CASES)
    if unknown := set(names) - set(CASES):
        sys.exit(f"there is no case {', '.join(sorted(unknown))}; there are\n  " + "\n  ".join(CASES))
    if made_on != machine() and not whole:
        sys.exit(f"the other cases are from another machine, {made_on}: write all of them, on one")
    with tempfile.TemporaryDirectory() as folder:
        make_stand_ins(Path(folder))
        for name in names:
            outcome = run_case(name, Path(folder), Path(folder) / "run")
            changed = differences(recorded[name], outcome, exact=True) if name in recorded else {"": "new"}
            print(f"{name}: {len(changed)} differences" if changed else f"{name}: as it was", file=sys.stderr)
            recorded[name] = outcome
    save_golden(machine(), {name: recorded[name] for name in CASES if name in recorded})


if __name__ == "__main__":
    given = sys.argv[1:]
    if not given:
        sys.exit(__doc__)
    write(list(CASES) if given == ["--all"] else given)
