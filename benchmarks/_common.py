"""What the benchmark scripts share: arguments and the results file.

How they measure is in `attnlab.lab.bench_measure`, which `attnlab bench` uses too.
"""

import argparse
import platform
import sys
from pathlib import Path

from attnlab.lab.bench_measure import alone as alone
from attnlab.lab.bench_measure import extra_memory as extra_memory
from attnlab.lab.bench_measure import machine
from attnlab.lab.bench_measure import seconds as seconds
from attnlab.lab.bench_measure import table as table
from attnlab.lab.files import write_json

RESULTS = Path(__file__).parent / "results"


def arguments(doc: str, quick: str = "tiny sizes, to see that it runs") -> argparse.ArgumentParser:
    """The options of every benchmark; set `torch.set_num_threads(args.threads)` from them."""
    parser = argparse.ArgumentParser(description=doc.splitlines()[0])
    parser.add_argument("--machine", default=platform.node() or "unknown", help="names the file")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--quick", action="store_true", help=quick)
    return parser


def write(name: str, args: argparse.Namespace, results: dict) -> None:
    """`results` with the command and the machine, to benchmarks/results/NAME-MACHINE.json."""
    path = RESULTS / f"{name}-{args.machine}{'-quick' if args.quick else ''}.json"
    command = " ".join(["python", *sys.argv])
    place = machine(args.machine, args.device)
    write_json(path, {"command": command, "machine": place, **results})
    print(f"\n{path}")
