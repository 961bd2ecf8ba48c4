"""The engine on Ray Serve: HTTP in one deployment, the model in another, whose replicas batch what arrives together.

Ray's multiplexing (`serve.multiplexed`) would also load models on demand and evict them, but it cuts each batch into
one for each model. Here the questions of many tenants share a forward pass, so each replica has a pool of its own. The
front has no torch.
"""

import asyncio
import os
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

os.environ["RAY_USAGE_STATS_ENABLED"] = "0"  # before ray is imported

import ray
from ray import serve
from ray.exceptions import RayError
from ray.serve.exceptions import BackPressureError, RayServeException
from ray.util.metrics import Counter

sys.path.insert(0, str(Path(__file__).parent))

from http_app import FULL, make_app  # noqa: E402
from metrics import HELP, Metrics  # noqa: E402
from ray_cluster import join  # noqa: E402
from student_folder import BUSY, Answer, Failure, Question  # noqa: E402

APP = "tenants"
DOWN = Failure(BUSY, "The model starts anew; ask again in a moment.")
OBJECT_STORE_BYTES = 100 * 2**20  # questions and answers are small


class RayMetrics(Metrics):
    """Counters of a replica, which Ray exports with its own."""

    def __init__(self) -> None:
        super().__init__()
        self.counters: dict[str, Counter] = {}

    def add(self, name: str, value: float = 1, labels: str = "") -> None:
        """Add to a counter."""
        if name not in self.counters:
            self.counters[name] = Counter(name, description=HELP[name])
        if value:
            self.counters[name].inc(value)


@serve.deployment(health_check_period_s=10, health_check_timeout_s=60)
class Model:
    """A replica: the encoder once, a pool of students, and one thread that runs them.

    Args:
        settings: The arguments of the service.
    """

    def __init__(self, settings: dict[str, Any]) -> None:
        from tenant_service import load_service  # here, so that the front has no torch

        names = ("students", "model", "max_loaded", "device")
        self.service = load_service(*(settings[name] for name in names), metrics=RayMetrics())
        self.thread = ThreadPoolExecutor(1, "model")
        self.answer.set_max_batch_size(settings["max_batch"])
        self.answer.set_batch_wait_timeout_s(settings["wait_ms"] / 1000)

    @serve.batch
    async def answer(self, questions: list[Question]) -> list[Answer | Failure]:
        """Answer the questions that arrived together."""
        return await asyncio.get_running_loop().run_in_executor(self.thread, self.service.answer, questions)

    async def check_health(self) -> None:
        """Run the encoder; a replica whose GPU or memory fails is replaced."""
        await asyncio.get_running_loop().run_in_executor(self.thread, self.service.check_health)


def make_front(settings: dict[str, Any]) -> Any:
    """Return the deployment that speaks HTTP: it refuses what needs no model, and what finds the queue full."""

    def build() -> Any:
        model = serve.get_deployment_handle("Model", app_name=APP)

        async def ask(question: Question) -> Answer | Failure:
            try:
                return await model.answer.remote(question)
            except BackPressureError:
                return FULL
            except (RayError, RayServeException):  # the replica died, or is not there yet
                return DOWN

        return make_app(ask, Path(settings["students"]), Metrics())

    limits = {"max_ongoing_requests": 10_000, "ray_actor_options": {"num_cpus": 0}}
    return serve.deployment(serve.ingress(build)(), name="Front", **limits)


def deployments(settings: dict[str, Any]) -> Any:
    """Return the application: Ray adds replicas of the model while more questions wait than fill a batch."""
    model = Model.options(
        max_ongoing_requests=2 * settings["max_batch"],  # one batch runs, one collects
        max_queued_requests=settings["max_waiting"],
        autoscaling_config={
            "min_replicas": 1,
            "max_replicas": settings["max_replicas"],
            "target_ongoing_requests": settings["max_batch"],
        },
        ray_actor_options={"num_cpus": 1, "num_gpus": int(settings["device"] == "cuda")},
    )
    return make_front(settings).bind(model.bind(settings))


def start(settings: dict[str, Any]) -> None:
    """Start Ray on this machine, or join a cluster, and serve until the application is ready.

    Args:
        settings: The arguments of the service.

    Raises:
        ValueError: If the cluster at the address does not take this process.
        RuntimeError: If the deployment fails.
    """
    path = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep)
    quiet = {"log_to_driver": False, "logging_level": "warning"}
    if settings["address"]:
        join(settings["address"], runtime_env={"env_vars": {"PYTHONPATH": path}}, **quiet)
    else:
        os.environ["PYTHONPATH"] = path  # of the processes that Ray starts
        store = {"object_store_memory": OBJECT_STORE_BYTES, "_node_ip_address": "127.0.0.1"}
        ray.init("local", include_dashboard=False, **store, **quiet)
    serve.start(http_options={"host": settings["host"], "port": settings["port"]})
    serve.run(deployments(settings), name=APP, route_prefix="/")


def stop() -> None:
    """Take the application down, and end the Ray that `start` started."""
    serve.delete(APP)
    ray.shutdown()
