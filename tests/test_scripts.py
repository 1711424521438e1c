"""The scripts start what they say, refuse by exit code, run no user text and lose no signal."""

import ast
import os
import shutil
import signal
import subprocess
import sys
import time
from importlib import metadata
from pathlib import Path

import pytest
import tiny

import environment
import launch
import runlog
from errors import BAD_CONFIG, MISSING, OK, STOPPED, UNAVAILABLE, USAGE, Refusal

ROOT = Path(environment.__file__).parent
RUN, MONITOR, TESTS = "run_xlm_roberta_v2.sh", "monitor_xlm_roberta_v2.sh", "run_tests.sh"
BIN = str(Path(sys.executable).parent)


def start(*command: object, **extra: str) -> subprocess.Popen:
    """A process in this interpreter's environment, as if it were activated."""
    environ = {**os.environ, "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}", **extra}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen([*map(str, command)], cwd="/", env=environ, **pipes)


def test_scripts_are_executable_and_shellcheck_clean():
    scripts = [ROOT / RUN, ROOT / MONITOR, ROOT / TESTS, ROOT / ".ci" / "run"]
    assert all(os.access(script, os.X_OK) for script in scripts)
    shellcheck = shutil.which("shellcheck", path=f"{BIN}{os.pathsep}{os.environ['PATH']}")
    subprocess.run([shellcheck, *scripts], check=True)


EVIL = "; $(touch {x}) `touch {x}` ' \" \n"


@pytest.mark.parametrize(
    ("script", "arguments", "variable", "code"),
    [
        (RUN, [EVIL], None, BAD_CONFIG),
        (RUN, [EVIL + ".yaml"], None, MISSING),
        (RUN, ["--" + EVIL], None, USAGE),
        (RUN, [], "NPROC", USAGE),
        (MONITOR, [EVIL, "--once"], None, MISSING),
        (TESTS, [EVIL], None, None),  # ruff or pytest refuses, each with a code of its own
    ],
)
def test_user_text_is_never_run(tmp_path, script, arguments, variable, code):
    evil = EVIL.format(x=tmp_path / "x")
    extra = {variable: evil} if variable else {}
    process = start(ROOT / script, *[a.format(x=tmp_path / "x") for a in arguments], **extra)
    output = process.communicate()[0]
    assert not (tmp_path / "x").exists()
    assert process.returncode == code or (code is None and process.returncode), output


def test_an_old_python_can_say_that_it_is_old():
    with pytest.raises(Refusal, match=r"Python 3.11 or newer is needed, but .* 3.6.8") as caught:
        environment.refuse_old_python((3, 6, 8))
    assert caught.value.exit_code == UNAVAILABLE
    environment.refuse_old_python((3, 11, 0))
    for name in ("environment.py", "errors.py"):
        tree = ast.parse((ROOT / name).read_text(), feature_version=(3, 7))
        for f in (n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef)):
            kinds = [a.annotation for a in [*f.args.args, *f.args.kwonlyargs]] + [f.returns]
            assert not any(isinstance(k, ast.Subscript | ast.BinOp) for k in kinds), f.name


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({}, ""),
        ({"torch": "2.11.0+cpu", "numpy": "10.1"}, ""),  # 10 > 2 as numbers, not as text
        ({"torch": "2.9.1"}, "torch >= 2.11 (found 2.9.1)"),
        ({"tqdm": None}, "tqdm >= 4.60 (found nothing)"),
    ],
)
def test_an_environment_is_used_if_it_meets_the_minimum(monkeypatch, capsys, changed, said):
    def version(name: str) -> str:
        found = {**environment.MINIMUM, **changed}[name]
        if found is None:
            raise metadata.PackageNotFoundError(name)
        return found

    monkeypatch.setattr(metadata, "version", version)
    monkeypatch.setattr(environment, "prepare_venv", lambda tests: "the venv")
    assert environment.unmet(environment.MINIMUM) == ([said] if said else [])
    assert environment.main([]) == OK
    assert capsys.readouterr().out.strip() == ("the venv" if said else sys.executable)


@pytest.fixture
def steps(monkeypatch, tmp_path) -> list[str]:
    """What a fresh .venv in tmp_path is made with: commands are noted, not run."""
    noted: list[str] = []
    for name in ("VENV", "MARKER", "CACHE"):
        monkeypatch.setattr(environment, name, tmp_path / name)
    monkeypatch.setattr(environment, "_run", lambda command, log: noted.append(" ".join(command)))
    monkeypatch.setattr(environment, "_runs", lambda *modules: bool(noted))
    monkeypatch.setattr(environment, "wants_cpu_build", lambda: True)
    return noted


def test_a_venv_is_made_once_and_completed_when_something_changes(steps, monkeypatch):
    environment.prepare_venv(tests=False)
    assert "-m venv" in steps[0] and "+cpu" in steps[1] and len(steps) == 3
    environment.prepare_venv(tests=False)
    assert len(steps) == 3
    environment.prepare_venv(tests=True)
    assert "requirements-dev.txt" in steps[3] and len(steps) == 4
    monkeypatch.setattr(environment, "wants_cpu_build", lambda: False)  # a GPU has appeared
    environment.prepare_venv(tests=True)
    assert "uninstall" in steps[4] and "+cpu" not in steps[5]


def test_without_a_cpu_build_the_usual_one_is_taken_and_said(steps, monkeypatch, capsys):
    def no_cpu_build(command: list[str], log: Path) -> None:
        steps.append(" ".join(command))
        if command[-1].endswith("+cpu"):
            raise Refusal(UNAVAILABLE, "nothing found")

    monkeypatch.setattr(environment, "_run", no_cpu_build)
    environment.prepare_venv(tests=False)
    assert "which holds CUDA" in capsys.readouterr().err and environment.made()["build"] != "cpu"


def test_a_failing_pip_is_told_in_one_line(tmp_path):
    code = "print('ERROR: no such thing\\n[notice] a new pip'); raise SystemExit(1)"
    with pytest.raises(Refusal, match=r"ERROR: no such thing; .*/log$") as caught:
        environment._run([sys.executable, "-c", code], tmp_path / "log")
    assert caught.value.exit_code == UNAVAILABLE


def test_the_plan_follows_the_gpus_unless_told_otherwise():
    assert launch.make_plan({}, gpus=0).processes == 1
    assert launch.make_plan({"NPROC": ""}, gpus=8).processes == 8
    nodes = {"NPROC": "2", "NNODES": "3", "NODE_RANK": "2", "RDZV_ENDPOINT": "[::1]:29400"}
    assert launch.make_plan(nodes, gpus=8) == launch.Plan(2, 3, 2, "[::1]:29400")
    wrong = [("NPROC", w) for w in ("0", "-1", "x", "2.5", "1e1", " 2", "\u0663", "1" * 7)]
    wrong += [
        ("NPROC", "9"),
        ("MAX_RESTARTS", "-1"),
        ("NODE_RANK", "3"),
        ("RDZV_ENDPOINT", ""),
        ("RDZV_ENDPOINT", "host"),
        ("RDZV_ENDPOINT", "host:65536"),
    ]
    for name, text in wrong:
        with pytest.raises(Refusal, match=f"^{name}: ") as caught:
            launch.make_plan(nodes | {name: text}, gpus=8)
        assert caught.value.exit_code == USAGE


def test_the_settings_file_may_stand_anywhere():
    rest = ["--check", "a.b=c.yaml"]
    for at in range(3):
        argv = [*rest[:at], "my.yml", *rest[at:]]
        assert launch.parse(argv) == ("my.yml", ["--check"], ["a.b=c.yaml"])
    with pytest.raises(Refusal, match="expected one settings file") as caught:
        launch.parse(["a.yaml", "b.yaml"])
    assert caught.value.exit_code == USAGE


def test_a_check_plans_for_as_many_processes_as_the_run_would_have(monkeypatch):
    ran = []
    monkeypatch.setattr(os, "execv", lambda path, words: ran.append(os.environ["CHECK_WORLD_SIZE"]))
    monkeypatch.setattr(launch, "launch_ranks", lambda plan, words: OK)
    monkeypatch.setattr(launch.signals, "hold", lambda: None)
    for name in ("CHECK_WORLD_SIZE", "OMP_NUM_THREADS", "GOMP_SPINCOUNT", "RDZV_ENDPOINT"):
        monkeypatch.setenv(name, "")
    monkeypatch.setenv("NPROC", "3")
    launch.main(["run.device=cpu", "--check"])
    for name, value in (("NNODES", "2"), ("RDZV_ENDPOINT", "a:29400")):
        monkeypatch.setenv(name, value)
    launch.main(["run.device=cpu", "--check"])
    assert ran[0::2] == ["3"] and ran[-1] == "6"


def test_machines_are_numbered_as_the_user_says():
    command = " ".join(launch.torchrun(launch.Plan(2, 3, 2, "[::1]:29400")))
    assert "--nproc-per-node 2 --nnodes 3 --node-rank 2" in command
    assert "--master-addr ::1 --master-port 29400" in command and "rdzv" not in command
    assert "--standalone" in launch.torchrun(launch.Plan(2))


def test_one_process_is_train_py_itself_with_the_words_as_they_were(monkeypatch):
    ran = []
    monkeypatch.setattr(os, "execv", lambda path, words: ran.append(words))
    monkeypatch.setattr(launch, "launch_ranks", lambda plan, words: OK)
    monkeypatch.setattr(launch.signals, "hold", lambda: ran.append("signals held"))
    unset = ("OMP_NUM_THREADS", "OMP_WAIT_POLICY", "GOMP_SPINCOUNT")
    for name in ("RANK", "NPROC", *unset):
        monkeypatch.setenv(name, "1")
    for name in unset:
        monkeypatch.delenv(name)
    monkeypatch.setenv("CHECK_WORLD_SIZE", "5")
    launch.main(["run.device=cpu", "--strict", "data.train=" + EVIL])
    assert "CHECK_WORLD_SIZE" not in os.environ
    assert ran[0] == "signals held"
    assert ran[1][1:4] == [launch.TRAIN, "--config", "config.yaml"]
    assert ran[1][4:] == ["--strict", "run.device=cpu", "data.train=" + EVIL]
    assert "RANK" not in os.environ and os.environ["OMP_NUM_THREADS"] == str(
        launch.hardware.usable_cores()
    )
    assert os.environ["GOMP_SPINCOUNT"] == "10000"


@pytest.mark.parametrize("name", ["GOMP_SPINCOUNT", "OMP_WAIT_POLICY"])
def test_how_threads_wait_is_left_to_who_says_it(monkeypatch, name):
    for other in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY"):
        monkeypatch.delenv(other, raising=False)
    monkeypatch.setenv(name, "5")
    launch.hardware.share_cores()
    assert os.environ[name] == "5" and os.environ.get("GOMP_SPINCOUNT", "5") == "5"


# Like torchrun: the rank is in a session of its own, and a signal would end us with an error.
TORCHRUN = """
import signal, subprocess, sys
rank = "import signal; print('up', flush=True); sys.exit(signal.sigwait([signal.SIGUSR1]) != 10)"
block = "import sys, signal; signal.pthread_sigmask(0, [2, 10]);"
sys.exit(subprocess.call([sys.executable, "-c", block + rank], start_new_session=True))
"""
LAUNCH = "import sys, launch; print(launch.Supervisor().run(sys.argv[1:], is_torchrun=True))"

INTERRUPT_TWICE = ([signal.SIGINT, signal.SIGINT], -signal.SIGKILL)


@pytest.mark.parametrize(("signals", "code"), [([signal.SIGUSR1], 0), INTERRUPT_TWICE])
def test_signals_reach_the_ranks_and_a_second_interrupt_ends_them(signals, code):
    command = [sys.executable, "-c", LAUNCH, sys.executable, "-c", TORCHRUN]
    process = start(*command, PYTHONPATH=str(ROOT))
    assert process.stdout.readline() == "up\n"
    for number in signals:
        process.send_signal(number)
        time.sleep(0.2)  # two of a kind that come together are delivered as one
    output = process.communicate()[0]  # comes to an end only when no process holds the pipe
    assert output.splitlines()[-1] == str(int(code))


@pytest.mark.dist
def test_two_ranks_stop_at_a_signal_and_finish_when_run_again(tmp_path):
    tiny.write_csv(tmp_path / "train.csv", tiny.rows(32))
    changes = {"run__name": "two", "model__name": "scratch", "data__validation": ""}
    changes |= {"train__epochs": 20, "evaluation__every": 80, "checkpoint__every": 80}
    command = [ROOT / RUN, *tiny.settings(tmp_path, **changes)]
    log = tmp_path / "runs" / "two" / "metrics.jsonl"
    process = start(*command, NPROC="2")
    while process.poll() is None and not (log.exists() and log.read_text().endswith("\n")):
        time.sleep(0.05)
    process.terminate()
    output = process.communicate()[0]
    assert process.returncode == STOPPED and "run the same command" in output, output
    process = start(*command, NPROC="2")
    output = process.communicate()[0]
    assert process.returncode == OK, output
    end = [e for e in runlog.read(log) if e["event"] == "end"][-1]
    assert end["status"] == "completed" and (log.parent / "best" / "model.safetensors").exists()
