"""The command line in a subprocess: what it refuses and how it says so, its help, and the same from Python."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

import raysim as package
from raysim.config import CHOICES, load, to_yaml
from tests.small_runs import environment, overrides, raysim, warm_raysim

# Refused before torch is imported: a fraction of a second each.
AT_ONCE = {
    "unknown key": (["lora.rnk=8"], ["lora.rnk", "did you mean lora.rank?"]),
    "unknown section": (["lorra.rank=8"], ["lorra.rank"]),
    "no concentration": (["partition.alpha=0"], ["partition.alpha=0", "at least 1e-06"]),
    "negative concentration": (["partition.alpha=-1"], ["partition.alpha=-1", "at least 1e-06"]),
    "more clients than examples": (["partition.num_clients=13"], ["partition.num_clients=13", "data.num_train=12"]),
    "rank 0": (["lora.rank=0"], ["lora.rank=0", "at least 1"]),
    "negative noise": (["privacy.noise_multiplier=-0.5"], ["privacy.noise_multiplier=-0.5", "at least 0"]),
    "not a number": (["train.lr=fast"], ["train.lr", "fast"]),
    "no such method": (["method.name=fedti"], ["method.name='fedti'", "did you mean 'fedit'?"]),
    "no value": (["lora.rank"], ["'lora.rank'", "key=value"]),
    "weights by size under client privacy": (["privacy.unit=client", "server.weighting=examples"], ["server.weighting='examples'"]),
    "no file named": (["data.source=jsonl"], ["data.path", "jsonl"]),
}


@pytest.mark.parametrize("case", AT_ONCE)
def test_a_setting_out_of_bounds_is_one_line_that_names_it(tmp_path: Path, case: str) -> None:
    settings, named = AT_ONCE[case]
    assert_refused(raysim("run", "quickstart", *overrides("fedit", *settings, out=tmp_path / "run"), cwd=tmp_path), named)
    assert not any(tmp_path.iterdir())


def test_an_unknown_configuration_is_refused_with_those_there_are(tmp_path: Path) -> None:
    assert_refused(raysim("run", "quickstrat", cwd=tmp_path), ["quickstrat", "quickstart"])
    assert_refused(raysim("compare", str(tmp_path / "none.yaml"), cwd=tmp_path), ["none.yaml"])
    assert not any(tmp_path.iterdir())


def test_a_configuration_file_that_is_none_is_refused(tmp_path: Path) -> None:
    (tmp_path / "broken.yaml").write_text("lora: {rank: [")
    (tmp_path / "list.yaml").write_text("- lora\n")
    assert_refused(raysim("run", "broken.yaml", cwd=tmp_path), ["broken.yaml", "not valid YAML"])
    assert_refused(raysim("run", "list.yaml", cwd=tmp_path), ["list.yaml", "key: value"])


def test_a_comparison_of_nothing_is_refused(tmp_path: Path) -> None:
    (tmp_path / "plain.yaml").write_text("lora: {rank: 4}\n")
    assert_refused(raysim("compare", "plain.yaml", cwd=tmp_path), ["compare is empty"])


# Found by reading data or model: one process refuses all of these in turn, through the same entry point as the command.
IN_TURN = {
    "missing file": (["data.source=jsonl", "data.path=none.jsonl"], ["none.jsonl"]),
    "empty file": (["data.source=jsonl", "data.path=empty.jsonl"], ["empty.jsonl"]),
    "not JSON": (["data.source=jsonl", "data.path=text.jsonl"], ["text.jsonl", "line 2"]),
    "no such field": (["data.source=jsonl", "data.path=lacks.jsonl"], ["lacks.jsonl", "line 3", "response"]),
    "too few records": (["data.num_train=100000"], ["data.num_train=100000"]),
    "prompts too long": (["data.max_length=20"], ["data.max_length=20", "12 of 12 prompts", "longest"]),
    "beyond the context": (["data.max_length=20000"], ["data.max_length=20000", "16384"]),
    "modules that match nothing": (["lora.target_modules=[q_prj]"], ["lora.target_modules", "q_prj", "q_proj"]),
    "no such model": (["model.name=no-such-model"], ["model.name='no-such-model'", "smollm2-135m-instruct"]),
    "out is a file": (["out=text.jsonl"], ["out='text.jsonl' is a file"]),
    "out is a foreign folder": (["out=foreign"], ["out='foreign'", "not a run's folder"]),
    "out is another run's": (["out=other"], ["out='other'", "lora.rank", "another configuration"]),
    "more CPUs than any node has": (["resources.backend=ray", "resources.client.num_cpus=64000"], ["64000 CPUs", "1 node"]),
    "more GPUs than a client trains on": (["resources.client.num_gpus=64"], ["resources.client.num_gpus=64", "one device"]),
}
TURNS = """
import json, sys
from raysim.cli import main
for arguments in json.load(open(sys.argv[1])):
    status = main(arguments)
    print("status", json.dumps(status), flush=True)
    print("--", file=sys.stderr, flush=True)
"""


@pytest.fixture(scope="module")
def refusals(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[int, str]]:
    """For each case of IN_TURN the exit status and what was written to standard error."""
    folder = tmp_path_factory.mktemp("refusals")
    good = [{"instruction": f"What is {i} plus {i}?", "response": f"It is {2 * i}."} for i in range(40)]
    lines = [json.dumps(row) for row in good]
    (folder / "empty.jsonl").write_text("")
    (folder / "text.jsonl").write_text("\n".join([lines[0], "It is 4.", *lines[2:]]))
    (folder / "lacks.jsonl").write_text("\n".join([*lines[:2], json.dumps({"instruction": "And 2 plus 2?"}), *lines[3:]]))
    (folder / "foreign").mkdir()
    (folder / "foreign" / "thesis.tex").write_text("mine")
    (folder / "other").mkdir()
    theirs = load("quickstart", overrides("fedit", "lora.rank=3", out=Path("other")))
    (folder / "other" / "config.yaml").write_text(to_yaml(theirs))
    before = sorted(folder.rglob("*"))
    turns = [["run", "quickstart", *overrides("fedit", *settings, out=Path("new"))] for settings, _ in IN_TURN.values()]
    (folder.parent / "turns.json").write_text(json.dumps(turns))
    done = subprocess.run(
        [sys.executable, "-c", TURNS, str(folder.parent / "turns.json")],
        cwd=folder,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert sorted(folder.rglob("*")) == before, "a refusal writes nothing"
    said = done.stderr.split("--\n")[:-1]
    statuses = [line.removeprefix("status ") for line in done.stdout.splitlines() if line.startswith("status ")]
    return {case: (int(status), text) for case, status, text in zip(IN_TURN, statuses, said, strict=True)}


@pytest.mark.parametrize("case", IN_TURN)
def test_what_data_model_or_cluster_cannot_give_is_one_line_that_names_it(refusals: dict[str, tuple[int, str]], case: str) -> None:
    status, said = refusals[case]
    assert_refused(subprocess.CompletedProcess([], status, "", said), IN_TURN[case][1])


def assert_refused(done: subprocess.CompletedProcess[str], named: list[str]) -> None:
    """Exit status 2, and exactly one line on standard error that names what is wrong."""
    assert done.returncode == 2, done.stderr
    assert done.stderr.startswith("raysim: "), done.stderr
    assert done.stderr.count("\n") == 1, done.stderr
    for part in named:
        assert part in done.stderr, (part, done.stderr)


@pytest.mark.parametrize(("server_lr", "named"), [("1e38", "the new adapter is not finite"), ("1e33", "held-out loss")])
def test_a_run_that_fails_exits_1_names_the_round_and_leaves_a_folder_to_continue(tmp_path: Path, server_lr: str, named: str) -> None:
    settings = overrides("fedit", "train.lr=1e3", f"server.lr={server_lr}", out=Path("run"))
    done = warm_raysim("run", "quickstart", *settings, "--quiet", cwd=tmp_path)
    assert done.returncode == 1, done.stderr
    assert done.stderr.startswith("raysim: round ")
    assert named in done.stderr
    assert "Traceback" not in done.stderr
    assert "continues" in done.stderr
    assert (tmp_path / "run" / "config.yaml").is_file()
    assert not (tmp_path / "run" / "summary.json").exists()


def test_clients_that_diverge_are_dropped_and_counted_and_the_run_ends(tmp_path: Path) -> None:
    wild = ["train.optimizer=sgd", "train.lr=1e38", "train.max_grad_norm=0", "train.num_epochs=2"]
    done = warm_raysim("run", "quickstart", *overrides("fedit", *wild, out=Path("run")), "--quiet", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    rounds = [json.loads(line) for line in (tmp_path / "run" / "rounds.jsonl").read_text().splitlines()]
    assert [(record["num_dropped"], record["num_contributed"], record["empty_round"]) for record in rounds] == [(3, 0, True)] * 2
    assert summary["num_dropped"] == 6


def test_every_command_explains_itself(tmp_path: Path) -> None:
    whole = raysim("--help", cwd=tmp_path)
    assert whole.returncode == 0
    for name in ("run", "compare", "report", "configs"):
        assert f"\n    {name} " in whole.stdout
        helped = raysim(name, "--help", cwd=tmp_path)
        assert helped.returncode == 0
        assert f"usage: raysim {name}" in helped.stdout
        assert helped.stderr == ""
    assert "raysim run quickstart" in whole.stdout


def test_no_command_is_told_which_there_are(tmp_path: Path) -> None:
    done = raysim(cwd=tmp_path)
    assert done.returncode == 2
    assert "usage: raysim" in done.stderr
    assert "Traceback" not in done.stderr


def test_the_version_is_the_packages(tmp_path: Path) -> None:
    assert raysim("--version", cwd=tmp_path).stdout == f"raysim {package.__version__}\n"


def test_configs_lists_what_is_shipped_and_every_key(tmp_path: Path) -> None:
    listed = raysim("configs", cwd=tmp_path)
    assert listed.returncode == 0
    assert "  quickstart " in listed.stdout
    for key in CHOICES:
        assert f"  {key}=" in listed.stdout


def test_a_report_of_no_run_is_refused(tmp_path: Path) -> None:
    assert_refused(raysim("report", str(tmp_path), cwd=tmp_path), [str(tmp_path), "rounds.jsonl"])


def test_reading_a_configuration_imports_neither_torch_nor_ray(tmp_path: Path) -> None:
    script = "import sys, raysim; raysim.load('quickstart', ['lora.rank=3']); print(sorted({'torch', 'ray'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, env=environment(), capture_output=True, text=True, check=False)
    assert done.stdout == "[]\n", done.stderr


def test_a_run_from_python_gives_its_records_as_objects(tmp_path: Path) -> None:
    finished = package.run(package.load("quickstart", overrides("fedit", "server.num_rounds=1", out=tmp_path / "run")), display=False)
    assert [record["round_index"] for record in finished.records] == [0]
    assert finished.summary["method"] == "fedit"
    assert finished.ledger["epsilon"] is None
    assert finished.out == tmp_path / "run"
