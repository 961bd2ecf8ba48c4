"""A load over HTTP on `examples/platform/serve.py` with Ray Serve on this machine, which `serving.py` measures."""

import random
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

USERS = 16  # each asks one question after another


def percentiles(seconds: list[float]) -> dict[str, float]:
    """Return the 50th and 99th percentile in milliseconds."""
    return {f"p{p}_ms": round(1000 * float(np.percentile(seconds, p)), 1) for p in (50, 99)}


def load_over_http(args: Any, questions: dict[str, list[str]], students: Path) -> list[dict[str, Any]]:
    """Load the service in turns with questions of all tenants and of one; return a row for each.

    Args:
        args: The arguments of the benchmark.
        questions: The questions of each tenant.
        students: The folder of the students.
    """
    import httpx

    port, names = 8765, list(questions)
    script = Path(__file__).parent.parent / "examples" / "platform" / "serve.py"
    command = [sys.executable, script, "--students", students, "--port", port, "--max_batch", max(args.batches)]
    command += ["--max_loaded", args.tenants, *(["--model", args.model] if args.model else [])]
    service = subprocess.Popen(list(map(str, command)), stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    try:
        assert any("Serving on" in line for line in service.stdout), "the service ended"
        waits: dict[str, list[float]] = {"all tenants": [], "one tenant": []}
        batched: dict[str, list[int]] = {kind: [] for kind in waits}
        spent = dict.fromkeys(waits, 0.0)
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=120) as client:

            def ask(tenant: str, text: str) -> Any:
                return client.post("/answer", json={"tenant": tenant, "question": text}).raise_for_status().json()

            def user(kind: str, seed: int, end: float) -> None:
                rng = random.Random(seed)
                while time.perf_counter() < end:
                    tenant = rng.choice(names) if kind == "all tenants" else names[0]
                    began = time.perf_counter()
                    answer = ask(tenant, rng.choice(questions[tenant]))
                    waits[kind].append(time.perf_counter() - began)
                    batched[kind].append(answer["batched"])

            with ThreadPoolExecutor(USERS) as users:
                list(users.map(lambda name: ask(name, "load the student"), names))
                for turn in range(4):
                    for kind in random.Random(turn).sample(list(waits), 2):
                        began = time.perf_counter()
                        end = began + args.seconds / 8
                        seeds = range(USERS * turn, USERS * (turn + 1))
                        list(users.map(lambda seed, kind=kind, end=end: user(kind, seed, end), seeds))
                        spent[kind] += time.perf_counter() - began
    finally:
        service.terminate()
        service.wait(60)
    rates = {kind: len(waits[kind]) / spent[kind] for kind in waits}
    return [
        {
            "asked": kind,
            "users": USERS,
            "queries_per_s": round(rates[kind], 2),
            "rate_ratio": round(rates[kind] / rates["one tenant"], 3),
            **percentiles(waits[kind]),
            "mean_batch": round(float(np.mean(batched[kind])), 1),
        }
        for kind in waits
    ]
