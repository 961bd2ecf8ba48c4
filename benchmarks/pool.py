"""A pool of saved adapters: the time to choose teachers from it, beside the training of one student, and the memory.

The tenants of the examples but one train an adapter each on the packaged MiniLM. The rest of the
pool has random weights with the norms of theirs. The new tenant's student chooses its teachers from the pool and
trains. Times are CPU seconds, which other programs on the machine hardly change. The memory is the resident set of the
process, read many times a second, against its size before the choice.

    python benchmarks/pool.py
    python benchmarks/pool.py --sizes 20 --steps 4 --teacher_steps 2 --layers 2
    python benchmarks/report.py pool benchmarks/results/pool.json
"""

import os
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from datasets import Dataset
from measure import check_output, environment, write
from pools import adapter_parameters, randomize
from transformers import HfArgumentParser

import hf_adapter_distillation as had
from hf_adapter_distillation.training import preparation

sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))

from faq_data import BUNDLED, Tenant, load_tenants  # noqa: E402
from faq_embeddings import ADAPTER, EmbeddingPlatform, labelled_queries  # noqa: E402

NEW, PLAIN, RANDOM = "new", "plain", "random"


@dataclass
class Arguments:
    """Arguments of the benchmark."""

    sizes: list[int] = field(default_factory=lambda: [1000], metadata={"help": "Adapters in the pool."})
    k: int = field(default=8, metadata={"help": "Teachers that are chosen."})
    tenant: str = field(default="bank", metadata={"help": "The new tenant."})
    relative: str = field(default="credit_union", metadata={"help": "The tenant with some of its FAQs."})
    shots: int = field(default=3, metadata={"help": "Training queries per FAQ of the new tenant."})
    steps: int = field(default=60, metadata={"help": "Optimizer steps of the student, and of a plain adapter."})
    teacher_queries: int = field(default=10, metadata={"help": "Training queries per FAQ of the others."})
    teacher_steps: int = field(default=30, metadata={"help": "Optimizer steps of each teacher."})
    batch_size: int = field(default=16, metadata={"help": "Queries in a batch."})
    model: str | None = field(default=None, metadata={"help": "Encoder id or path. Default: the packaged MiniLM."})
    layers: int = field(default=6, metadata={"help": "Layers of the encoder that are kept."})
    output: str = field(default="benchmarks/results/pool.json", metadata={"help": "The JSON file."})


@contextmanager
def resident_set() -> Iterator[list[int]]:
    """Yield a list that gets the bytes of the resident set of this process at the start, and then its peak."""
    page, done = os.sysconf("SC_PAGE_SIZE"), threading.Event()

    def now() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * page

    found = [now(), now()]

    def watch() -> None:
        while not done.wait(0.03):
            found[1] = max(found[1], now())

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield found
    finally:
        done.set()
        thread.join()


class Choice:
    """Measures of the choices from a pool that a training makes."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self.bytes = 0
        self.scores: dict[str, float] = {}
        self._choose = preparation.choose_from_pool

    def __call__(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Choose as the trainer does, and measure it."""
        with resident_set() as found:
            began = time.process_time()
            self.scores = self._choose(*args, **kwargs)
            self.seconds = time.process_time() - began
        self.bytes = found[1] - found[0]
        return self.scores


def cpu_seconds(platform: EmbeddingPlatform, tenant: Tenant, queries: Dataset, settings: dict[str, Any]) -> float:
    """Train the active adapter; return the CPU seconds, those before the first step included."""
    began = time.process_time()
    platform.train(tenant, queries, **settings)
    return time.process_time() - began


def fill_pool(platform: EmbeddingPlatform, tenants: list[Tenant], folder: Path, args: Arguments) -> list[str]:
    """Train and save an adapter for each tenant, and random ones up to the largest size; return the former's names."""
    model = platform.model
    folder.mkdir()
    settings: dict[str, Any] = {"max_steps": args.teacher_steps, "per_device_train_batch_size": args.batch_size}
    for tenant in tenants:
        platform.new_adapter(tenant.name)
        queries = labelled_queries(tenant, "train", args.teacher_queries)
        platform.train(tenant, queries, learning_rate=1e-3, **settings)
        model.save_adapter(str(folder / tenant.name), tenant.name, use_safetensors=True)
    norms = {tenant.name: [p.detach().clone() for p in adapter_parameters(model, tenant.name)] for tenant in tenants}
    model.set_active_adapters(None)
    for tenant in tenants:
        model.delete_adapter(tenant.name)
    model.add_adapter(RANDOM, config=ADAPTER)
    for number in range(max(args.sizes) - len(tenants)):
        parameters = adapter_parameters(model, RANDOM)
        for parameter, like in zip(parameters, norms[tenants[number % len(tenants)].name], strict=True):
            parameter.data.copy_(like)
        randomize(parameters, f"{RANDOM}{number}")
        model.save_adapter(str(folder / f"{RANDOM}{number:04}"), RANDOM, use_safetensors=True)
    model.delete_adapter(RANDOM)
    return [tenant.name for tenant in tenants]


def pool_of(folder: Path, trained: list[str], size: int) -> Path:
    """Return a pool of links: the trained adapters, and random ones up to a size."""
    pool = folder.parent / f"pool{size}"
    pool.mkdir()
    names = trained + sorted(path.name for path in folder.glob(f"{RANDOM}*"))[: size - len(trained)]
    for name in names:
        (pool / name).symlink_to(folder / name)
    return pool


def main() -> None:
    """Measure each size of the pool, print its row, and write all of them."""
    (args,) = HfArgumentParser(Arguments).parse_args_into_dataclasses()
    check_output(args.output)
    tenants = {tenant.name: tenant for tenant in load_tenants(str(BUNDLED), seed=0)}
    new = tenants.pop(args.tenant)
    rows = []
    with tempfile.TemporaryDirectory() as temporary:
        platform = EmbeddingPlatform(args.model, output_dir=temporary)
        layers = platform.model.encoder.layer
        del layers[args.layers :]
        platform.model.config.num_hidden_layers = len(layers)
        trained = fill_pool(platform, list(tenants.values()), Path(temporary, "adapters"), args)
        queries = labelled_queries(new, "train", args.shots)
        settings: dict[str, Any] = {
            "max_steps": args.steps, "per_device_train_batch_size": args.batch_size, "learning_rate": 1e-3
        }  # fmt: skip
        for size in sorted(args.sizes):
            platform.new_adapter(PLAIN)
            plain = cpu_seconds(platform, new, queries, settings)
            adapter = sum(parameter.nbytes for parameter in adapter_parameters(platform.model, PLAIN))
            platform.model.delete_adapter(PLAIN)
            choice = preparation.choose_from_pool = Choice()
            pool = pool_of(Path(temporary, "adapters"), trained, size)
            began = time.process_time()
            config = had.DistillationConfig(teachers=str(pool), teacher_selection=args.k)
            platform.new_adapter(NEW, config)
            adding = time.process_time() - began
            whole = cpu_seconds(platform, new, queries, settings)
            preparation.choose_from_pool = choice._choose
            rows.append(
                {
                    "adapters": size,
                    "adding": adding,
                    "ranking": choice.seconds,
                    "training": whole - choice.seconds,
                    "plain": plain,
                    "ranking_bytes": choice.bytes,
                    "loaded_bytes": adapter * args.k,
                    "all_bytes": adapter * size,
                    "place_of_relative": list(choice.scores).index(args.relative) + 1,
                    "trained_among_best": sum(name in trained for name in list(choice.scores)[: args.k]),
                    "best": {name: round(choice.scores[name], 4) for name in list(choice.scores)[: args.k + 2]},
                }
            )
            print(rows[-1], flush=True)
            for name in [NEW, *had.distillation_of(platform.model, NEW).config.teachers]:
                platform.model.delete_adapter(name)
    write(Path(args.output), {"environment": environment("cpu"), "arguments": asdict(args), "rows": rows})


if __name__ == "__main__":
    main()
