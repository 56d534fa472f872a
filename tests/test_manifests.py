"""rayjob.yaml, skypilot.yaml and Containerfile: against the fields of what reads them, and against the files of this project that they lean on.

The fields are stated here as far as the files use them, and no other field passes: those of KubeRay 1.7's `RayJobSpec`, `RayClusterSpec`,
`HeadGroupSpec`, `WorkerGroupSpec`, `AutoscalerOptions` and `AuthOptions` (its CRD API reference), those of a pod and of a claim of the Kubernetes API
(core/v1), and those of a task of SkyPilot 0.14 ("SkyPilot YAML"). Beside that, the autoscaler of the pinned Ray reads the cluster, and SkyPilot the task where
it is installed. Left out: a cluster of Kubernetes, and a cloud.
"""

import copy
import importlib.util
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from hatchling.build import build_editable
from jsonschema import Draft202012Validator, ValidationError
from ray.autoscaler._private.kuberay.autoscaling_config import _derive_autoscaling_config_from_ray_cr
from ray.runtime_env import RuntimeEnv

from raysim import __version__
from raysim.cli import _parser
from raysim.config import load
from tests.conftest import ROOT

CONTAINERFILE = (ROOT / "Containerfile").read_text()
RAYJOB, CLAIM = yaml.safe_load_all((ROOT / "rayjob.yaml").read_text())
SKYPILOT = yaml.safe_load((ROOT / "skypilot.yaml").read_text())
CLUSTER = yaml.safe_load((ROOT / "cluster.yaml").read_text())

TEXT, WHOLE, YES_NO = {"type": "string"}, {"type": "integer", "minimum": 0}, {"type": "boolean"}
NAME = {"type": "string", "pattern": "^[a-z0-9]([-a-z0-9]*[a-z0-9])?$", "maxLength": 63}
TEXTS = {"type": "object", "additionalProperties": TEXT}
QUANTITY = {"type": "string", "pattern": r"^[0-9]+(\.[0-9]+)?(m|k|M|G|T|Ki|Mi|Gi|Ti)?$"}
QUANTITIES = {"type": "object", "additionalProperties": QUANTITY}


def exactly(required: dict[str, Any], **optional: Any) -> dict[str, Any]:
    """An object that has these fields and no others."""
    return {"type": "object", "properties": required | optional, "required": list(required), "additionalProperties": False}


def each(item: dict[str, Any], *, least: int = 0) -> dict[str, Any]:
    """A list of such items."""
    return {"type": "array", "items": item, "minItems": least}


PORT = exactly({"containerPort": {"type": "integer", "minimum": 1, "maximum": 65535}}, name={**NAME, "maxLength": 15})
CONTAINER = exactly(
    {"name": NAME, "image": TEXT},
    ports=each(PORT),
    resources=exactly({}, limits=QUANTITIES, requests=QUANTITIES),
    volumeMounts=each(exactly({"name": NAME, "mountPath": {"type": "string", "pattern": "^/"}}, readOnly=YES_NO)),
)
VOLUME = {
    "oneOf": [
        exactly({"name": NAME, "persistentVolumeClaim": exactly({"claimName": NAME}, readOnly=YES_NO)}),
        exactly({"name": NAME, "emptyDir": exactly({}, medium={"enum": ["", "Memory"]}, sizeLimit=QUANTITY)}),
    ]
}
POD = exactly(
    {"spec": exactly({"containers": each(CONTAINER, least=1)}, volumes=each(VOLUME))}, metadata=exactly({}, annotations=TEXTS, labels=TEXTS)
)
GROUP = {"rayStartParams": TEXTS, "template": POD}
WORKERS = exactly({"groupName": NAME, **GROUP}, replicas=WHOLE, minReplicas=WHOLE, maxReplicas=WHOLE, numOfHosts=WHOLE)
RAY_CLUSTER = exactly(
    {"headGroupSpec": exactly(GROUP), "rayVersion": TEXT},
    workerGroupSpecs=each(WORKERS),
    authOptions=exactly({}, mode={"enum": ["disabled", "token"]}, secretName=NAME),
    enableInTreeAutoscaling=YES_NO,
    autoscalerOptions=exactly({}, idleTimeoutSeconds=WHOLE, upscalingMode={"enum": ["Default", "Aggressive", "Conservative"]}),
)
RAY_JOB = exactly(
    {
        "apiVersion": {"const": "ray.io/v1"},
        "kind": {"const": "RayJob"},
        "metadata": exactly({"name": {**NAME, "maxLength": 47}}, namespace=NAME, labels=TEXTS),
        "spec": exactly(
            {"entrypoint": TEXT, "rayClusterSpec": RAY_CLUSTER},
            backoffLimit=WHOLE,
            shutdownAfterJobFinishes=YES_NO,
            ttlSecondsAfterFinished=WHOLE,
            activeDeadlineSeconds=WHOLE,
            runtimeEnvYAML=TEXT,
            submissionMode={"enum": ["K8sJobMode", "HTTPMode", "SidecarMode", "InteractiveMode"]},
        ),
    }
)
"""KubeRay refuses the name of a RayJob that is longer than 47 characters, since it names others after it."""
STORAGE_CLAIM = exactly(
    {
        "apiVersion": {"const": "v1"},
        "kind": {"const": "PersistentVolumeClaim"},
        "metadata": exactly({"name": NAME}),
        "spec": exactly(
            {
                "accessModes": each({"enum": ["ReadWriteOnce", "ReadOnlyMany", "ReadWriteMany", "ReadWriteOncePod"]}, least=1),
                "resources": exactly({"requests": exactly({"storage": QUANTITY})}),
            },
            storageClassName=TEXT,
        ),
    }
)
AMOUNT = {"type": ["string", "number"], "pattern": r"^[0-9]+(\.[0-9]+)?\+?$"}
SKY_TASK = exactly(
    {
        "resources": exactly(
            {},
            image_id={"type": "string", "pattern": "^docker:"},
            accelerators={"type": "string", "pattern": "^[A-Za-z0-9-]+(:[0-9]+)?$"},
            cpus=AMOUNT,
            memory=AMOUNT,
            disk_size=WHOLE,
            use_spot=YES_NO,
            infra=TEXT,
            job_recovery=exactly({}, strategy={"enum": ["FAILOVER", "EAGER_NEXT_REGION"]}, max_restarts_on_errors=WHOLE),
        )
    },
    name=NAME,
    workdir=TEXT,
    num_nodes=WHOLE,
    envs={"type": "object", "propertyNames": {"pattern": "^[A-Za-z_][A-Za-z0-9_]*$"}, "additionalProperties": {"type": ["string", "null"]}},
    setup=TEXT,
    run=TEXT,
)


def checked(document: Any, schema: dict[str, Any]) -> None:
    """Raises what is wrong with a document."""
    Draft202012Validator.check_schema(schema)
    Draft202012Validator(schema).validate(document)


@pytest.mark.parametrize(
    ("document", "schema"), [(RAYJOB, RAY_JOB), (CLAIM, STORAGE_CLAIM), (SKYPILOT, SKY_TASK)], ids=["rayjob", "claim", "skypilot"]
)
def test_each_file_has_the_fields_that_are_read_and_no_others(document: Any, schema: dict[str, Any]) -> None:
    checked(document, schema)


SPOILT: list[tuple[Any, dict[str, Any], Callable[[Any], Any]]] = [
    (RAYJOB, RAY_JOB, lambda d: d.update(kind="RayCluster")),
    (RAYJOB, RAY_JOB, lambda d: d["spec"].pop("rayClusterSpec")),
    (RAYJOB, RAY_JOB, lambda d: d["spec"].update(shutdownAfterJobFinish=True)),
    (RAYJOB, RAY_JOB, lambda d: d["spec"]["rayClusterSpec"]["authOptions"].update(mode="tokens")),
    (RAYJOB, RAY_JOB, lambda d: d["spec"]["rayClusterSpec"]["headGroupSpec"]["rayStartParams"].update({"num-cpus": 0})),
    (RAYJOB, RAY_JOB, lambda d: d["spec"]["rayClusterSpec"]["workerGroupSpecs"][0].update(minReplicas="1")),
    (RAYJOB, RAY_JOB, lambda d: d["spec"]["rayClusterSpec"]["workerGroupSpecs"][0]["template"]["spec"]["containers"].clear()),
    (CLAIM, STORAGE_CLAIM, lambda d: d["spec"].update(accessModes="ReadWriteMany")),
    (CLAIM, STORAGE_CLAIM, lambda d: d["spec"]["resources"]["requests"].update(storage="100 GB")),
    (SKYPILOT, SKY_TASK, lambda d: d["resources"].update(accelerator="A10G:4")),
    (SKYPILOT, SKY_TASK, lambda d: d["resources"].update(use_spot="yes")),
    (SKYPILOT, SKY_TASK, lambda d: d["envs"].update({"MY-OUT": "x"})),
    (SKYPILOT, SKY_TASK, lambda d: d.update(command="true")),
]


@pytest.mark.parametrize(("document", "schema", "spoil"), SPOILT)
def test_the_check_refuses_a_spoilt_file(document: Any, schema: dict[str, Any], spoil: Callable[[Any], Any]) -> None:
    spoilt = copy.deepcopy(document)
    spoil(spoilt)
    with pytest.raises(ValidationError):
        checked(spoilt, schema)


def test_rays_autoscaler_reads_the_same_cluster_as_the_launcher_makes() -> None:
    spec = RAYJOB["spec"]["rayClusterSpec"]
    read = _derive_autoscaling_config_from_ray_cr({"metadata": {"name": "raysim", "namespace": "default"}, "spec": spec})
    types = read["available_node_types"]
    head = types[read["head_node_type"]]
    (worker,) = [t for name, t in types.items() if name != read["head_node_type"]]
    assert head["resources"]["CPU"] == 0, "the driver runs there, and no trial"
    ours = CLUSTER["available_node_types"]["gpu-worker"]
    assert (worker["min_workers"], worker["max_workers"]) == (ours["min_workers"], ours["max_workers"])
    assert {key: worker["resources"][key] for key in ("CPU", "GPU")} == ours["resources"]
    assert read["idle_timeout_minutes"] == CLUSTER["idle_timeout_minutes"]


@pytest.mark.skipif(importlib.util.find_spec("sky") is None, reason="SkyPilot is not installed: pip install skypilot")
def test_skypilot_itself_takes_the_task() -> None:
    sky = importlib.import_module("sky")
    assert sky.Task.from_yaml(str(ROOT / "skypilot.yaml")).name == SKYPILOT["name"]


def test_all_three_use_the_image_that_the_container_file_says_how_to_build() -> None:
    pods = [RAYJOB["spec"]["rayClusterSpec"]["headGroupSpec"], *RAYJOB["spec"]["rayClusterSpec"]["workerGroupSpecs"]]
    images = {c["image"] for pod in pods for c in pod["template"]["spec"]["containers"]}
    images |= {SKYPILOT["resources"]["image_id"].removeprefix("docker:"), CLUSTER["docker"]["image"]}
    (image,) = images
    assert image.endswith(f"/raysim:{__version__}")
    assert f"docker build -f Containerfile -t {image} ." in CONTAINERFILE
    assert f"docker push {image} " in CONTAINERFILE


def test_the_images_ray_and_python_are_those_of_the_lock_file_and_of_the_cluster() -> None:
    version = re.search(r"^ray==(\S+) ", (ROOT / "requirements.lock").read_text(), re.MULTILINE)
    assert version is not None
    bases = re.findall(r"BASE=(\S+)", CONTAINERFILE)
    assert {base.rpartition("-")[0] for base in bases} == {f"rayproject/ray:{version[1]}-py311"}
    assert {base.rpartition("-")[2] for base in bases} == {"gpu", "cpu"}
    assert RAYJOB["spec"]["rayClusterSpec"]["rayVersion"] == version[1]


def instructions() -> list[tuple[str, str]]:
    """The instructions of the container file: each its word and its arguments."""
    lines = [line for line in CONTAINERFILE.splitlines() if line and not line.startswith("#")]
    return [(word, rest) for word, _, rest in (line.partition(" ") for line in lines)]


def test_every_line_of_the_container_file_is_an_instruction_and_every_command_parses() -> None:
    assert {word for word, _ in instructions()} == {"ARG", "FROM", "ENV", "RUN", "WORKDIR", "COPY"}
    for command in [rest for word, rest in instructions() if word == "RUN"]:
        assert subprocess.run(["bash", "-n", "-c", command], check=False).returncode == 0, command
    (environment,) = [rest for word, rest in instructions() if word == "ENV"]
    given = dict(pair.split("=") for pair in environment.split())
    asked = yaml.safe_load((ROOT / "runtime_env.yaml").read_text())["env_vars"]
    assert RuntimeEnv(env_vars=given)["env_vars"].items() >= asked.items(), "a command in the image has what a job brings along"


def test_what_the_image_copies_is_enough_to_install_the_tree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for copied in [rest.split() for word, rest in instructions() if word == "COPY"]:
        *sources, target = [part for part in copied if not part.startswith("--")]
        for source in sources:
            if (ROOT / source).is_dir():
                shutil.copytree(ROOT / source, tmp_path / target, ignore=shutil.ignore_patterns("__pycache__"))
            else:
                shutil.copy(ROOT / source, tmp_path / target)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "wheels").mkdir()
    assert __version__ in build_editable(str(tmp_path / "wheels"))
    assert {path.name for path in (tmp_path / "tools").iterdir()} >= {"install.py", "installer.lock", "torch-cpu.lock", "torch-cuda.lock"}
    assert "python -m tools.install" in CONTAINERFILE


def test_their_commands_are_ones_that_raysim_takes() -> None:
    entrypoint = RAYJOB["spec"]["entrypoint"].split()
    run = SKYPILOT["run"].strip()
    for name, value in SKYPILOT["envs"].items():
        run = run.replace(f'"${name}"', value).replace(f'"out=${name}"', f"out={value}")
    assert "$" not in run
    for command in (entrypoint, run.removeprefix("python -m ").split()):
        assert command[0] == "raysim"
        arguments = _parser(command[1]).parse_args(command[1:])
        assert load(arguments.config, arguments.overrides).sweep.space
    (mount,) = RAYJOB["spec"]["rayClusterSpec"]["headGroupSpec"]["template"]["spec"]["containers"][0]["volumeMounts"]
    assert f"out={mount['mountPath']}/" in RAYJOB["spec"]["entrypoint"]
    (volume,) = RAYJOB["spec"]["rayClusterSpec"]["headGroupSpec"]["template"]["spec"]["volumes"]
    assert volume["persistentVolumeClaim"]["claimName"] == CLAIM["metadata"]["name"]
    assert CLAIM["spec"]["accessModes"] == ["ReadWriteMany"]
