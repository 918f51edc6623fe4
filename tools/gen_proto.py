"""Generate the Python stubs of `proto/` into the server and the client distribution.

usage: gen_proto.py [--check]

`--check` writes nothing and exits 1 when the checked-in stubs differ from what the protos give.
"""

import re
import sys
import tempfile
from pathlib import Path

import grpc_tools
from grpc_tools import protoc

ROOT = Path(__file__).resolve().parent.parent
PROTO = ROOT / "proto"
TARGETS = (
    ROOT / "src/kvrouter_grpc/_gen",
    ROOT / "clients/python/src/kvrouter_client/_gen",
)
PACKAGE = "kvrouter.v1"
DOC = '"""Generated from proto/ by tools/gen_proto.py; do not edit."""\n'


def generate(out: Path) -> dict[str, str]:
    """Run protoc into `out` and return the stubs: file name to text, imports made relative."""
    protos = sorted(str(path.relative_to(PROTO)) for path in PROTO.glob("kvrouter/v1/*.proto"))
    well_known = Path(grpc_tools.__file__).parent / "_proto"
    options = [f"--{kind}_out={out}" for kind in ("python", "grpc_python", "mypy", "mypy_grpc")]
    if protoc.main(["protoc", f"-I{PROTO}", f"-I{well_known}", *options, *protos]) != 0:
        raise SystemExit("protoc failed")
    stubs = {"__init__.py": DOC}
    for path in sorted((out / "kvrouter/v1").iterdir()):
        text = path.read_text()
        # The stubs live inside a package of ours, so that two distributions never fight over a top-level `kvrouter`.
        text = re.sub(rf"^from {re.escape(PACKAGE)} import (\w+)", r"from . import \1", text, flags=re.MULTILINE)
        text = re.sub(rf"^import {re.escape(PACKAGE)}\.(\w+)$", r"from . import \1", text, flags=re.MULTILINE)
        text = re.sub(rf"\b{re.escape(PACKAGE)}\.(\w+_pb2)\b", r"\1", text)
        stubs[path.name] = text
    return stubs


def main() -> int:
    """Write the stubs, or compare them."""
    check = sys.argv[1:] == ["--check"]
    with tempfile.TemporaryDirectory() as folder:
        stubs = generate(Path(folder))
    stale = []
    for target in TARGETS:
        target.mkdir(parents=True, exist_ok=True)
        there = {path.name for path in target.iterdir() if path.suffix in {".py", ".pyi"}}
        for name in sorted(there | stubs.keys()):
            path = target / name
            if name in there and name in stubs and path.read_text() == stubs[name]:
                continue
            stale.append(str(path.relative_to(ROOT)))
            if not check:
                if name in stubs:
                    path.write_text(stubs[name])
                else:
                    path.unlink()
    if check and stale:
        print("stale, run `make proto`:", *stale, sep="\n  ")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
