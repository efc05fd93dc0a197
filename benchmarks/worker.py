"""A floor in a process of its own, told what to do in JSON lines: `python -m benchmarks.worker --kind ours …`."""

from __future__ import annotations

import argparse
import json
import os
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any


def main() -> int:
    """Answer each line of standard input with one of standard output, until it ends."""
    parser = argparse.ArgumentParser(prog="benchmarks.worker")
    parser.add_argument("--kind", required=True)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--device", required=True)
    parser.add_argument("--dtype", required=True)
    parser.add_argument("--threads", type=int, required=True)
    args = parser.parse_args()
    # What libraries print must not end up among the answers.
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)

    import torch

    from benchmarks.floors import open_floor

    torch.set_num_threads(args.threads)
    floor = open_floor(args.kind, args.model, args.device, args.dtype)
    print(json.dumps({"ready": True}), file=answers)
    for line in sys.stdin:
        print(json.dumps(_obey(floor, json.loads(line))), file=answers)
    return 0


def _obey(floor: Any, command: dict[str, Any]) -> dict[str, Any]:
    operation = command.pop("do")
    try:
        if operation == "measure":
            return asdict(floor.measure(**command))
        if operation == "best":
            return dict(floor.best(command["what"], tuple(command["batches"]), command["seconds"]))
        return dict(getattr(floor, operation)(**command))
    except Exception as error:
        # One size that doesn't fit must not end the others.
        return {"error": f"{type(error).__name__}: {error}".splitlines()[0]}


if __name__ == "__main__":
    sys.exit(main())
