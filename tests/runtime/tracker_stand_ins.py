"""Stand-ins for wandb and trackio: the parts that trackers call, with the signatures of wandb 0.31 and trackio 0.43.

test_trackers.py compares the signatures with the packages' own where these are installed.
"""

from importlib.machinery import ModuleSpec
from types import ModuleType


class Image:
    def __init__(self, value, caption=None):
        self.value, self.caption = value, caption


class WandbImage(Image):
    def __init__(self, data_or_path, mode=None, caption=None):
        super().__init__(data_or_path, caption)


class Run:
    """What was logged, as (values, step); W&B drops what is logged at a step before its own."""

    def __init__(self, kept: list):
        self.logged, self.finished, self.defined = kept, None, {}

    def finish(self):
        self.finished = True


class WandbRun(Run):
    def log(self, data, step=None, commit=None):
        assert step is None
        self.logged.append((data, step))

    def finish(self, exit_code=None):
        self.finished = exit_code

    def define_metric(self, name, step_metric=None, step_sync=None, hidden=None, summary=None, overwrite=None):
        self.defined[name] = step_metric


class TrackioRun(Run):
    def log(self, metrics, step=None):
        self.logged.append((metrics, step))


class StandIn(ModuleType):
    """`runs` are those begun, oldest first; `store` what is kept of each identity; `failure` is raised by `init`."""

    def __init__(self, name: str):
        super().__init__(name)
        self.__spec__ = ModuleSpec(name, None, origin="a stand-in")
        self.runs, self.arguments, self.store, self.failure = [], [], {}, None

    def begin(self, kind: type[Run], identity: str, resume: str, arguments: dict) -> Run:
        if self.failure:
            raise self.failure
        assert resume == "allow"
        self.arguments.append(arguments)
        self.runs.append(kind(self.store.setdefault(identity, [])))
        return self.runs[-1]


def make_wandb() -> StandIn:
    module = StandIn("wandb")

    def init(
        entity=None,
        project=None,
        dir=None,
        id=None,
        name=None,
        notes=None,
        tags=None,
        config=None,
        config_exclude_keys=None,
        config_include_keys=None,
        allow_val_change=None,
        group=None,
        job_type=None,
        mode=None,
        force=None,
        reinit=None,
        resume=None,
        resume_from=None,
        fork_from=None,
        save_code=None,
        tensorboard=None,
        sync_tensorboard=None,
        monitor_gym=None,
        settings=None,
    ):
        arguments = {"project": project, "name": name, "id": id, "dir": dir, "config": config}
        return module.begin(WandbRun, id, resume, arguments)

    module.init, module.Image, module.Run = init, WandbImage, WandbRun
    return module


def make_trackio() -> StandIn:
    module = StandIn("trackio")

    def init(
        project,
        name=None,
        group=None,
        space_id=None,
        server_url=None,
        dataset_id=None,
        bucket_id=None,
        config=None,
        resume="never",
        settings=None,
        private=None,
        embed=True,
        auto_log_gpu=None,
        gpu_log_interval=10.0,
        auto_log_cpu=None,
        cpu_log_interval=10.0,
        webhook_url=None,
        webhook_min_level=None,
    ):
        arguments = {"project": project, "name": name, "config": config}
        return module.begin(TrackioRun, f"{project}/{name}", resume, arguments)

    module.init, module.Image, module.Run = init, Image, TrackioRun
    return module
