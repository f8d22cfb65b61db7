"""The command line: results on stdout, one line per error, exit codes that scripts can rely on."""

import errno
import json
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from expunge import cli
from expunge.commands import console
from expunge.errors import ExpungeError, ParameterError, RowError

DOC = (Path(__file__).parent.parent / "docs" / "cli.md").read_text(encoding="utf-8")


def expunge(*arguments: str, **options) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-m", "expunge", *arguments], capture_output=True, text=True, **options)


def walk(command, path=()):
    """Every command with its path, groups left out."""
    if hasattr(command, "commands"):
        for name, inner in command.commands.items():
            yield from walk(inner, (*path, name))
    else:
        yield path, command


def commands():
    import typer

    return list(walk(typer.main.get_command(cli.app)))


# --- results -------------------------------------------------------------------------------------------------------


def test_help_names_every_command(capsys) -> None:
    assert cli.main([]) == cli.DONE
    shown = capsys.readouterr().out
    for path, _ in commands():
        assert re.search(rf"^  {path[0]} ", shown, re.MULTILINE)
    assert "..." not in shown.partition("Commands:")[2], (
        "the first sentence of a command's docstring is too long for the list"
    )


@pytest.mark.parametrize(("path", "command"), [pytest.param(*c, id=" ".join(c[0])) for c in commands()])
def test_every_command_and_option_has_help_and_is_documented(path, command) -> None:
    assert command.help
    section = next(part for part in re.split(r"\n(?=###? |- `)", DOC) if f"{' '.join(path)}" in part or path[0] in part)
    for parameter in command.params:
        if parameter.name == "help":
            continue
        assert parameter.help, f"{' '.join(path)}: {parameter.name} has no help"
        if parameter.param_type_name == "option":
            assert parameter.opts[0] in DOC[DOC.index(section[:40]) :], (
                f"docs/cli.md: {' '.join(path)} {parameter.opts[0]}"
            )


def test_version(capsys) -> None:
    assert cli.main(["--version"]) == cli.DONE
    assert re.fullmatch(r"expunge \d+\.\d+\.\d+\n", capsys.readouterr().out)


@pytest.mark.parametrize("room", ["methods", "attacks", "metrics", "benchmarks", "subjects"])
def test_list_prints_names_or_one_json_document(room: str, capsys) -> None:
    assert cli.main(["list", room, "--json"]) == cli.DONE
    found = json.loads(capsys.readouterr().out)
    assert cli.main(["list", room]) == cli.DONE
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[2:]] == [part["name"] for part in found]


def test_card_shows_paper_weaknesses_and_parameters(capsys) -> None:
    assert cli.main(["card", "npo"]) == cli.DONE
    shown = capsys.readouterr().out
    for word in ("arXiv:2404.05868", "relearn", "beta", "0.1", "none | nll | kl"):
        assert word in shown
    assert cli.main(["card", "npo", "--json"]) == cli.DONE
    card = json.loads(capsys.readouterr().out)
    assert (card["room"], card["kind"]) == ("methods", "optimise")
    assert card["parameters"][0] == {"name": "beta", "type": "float", "default": 0.1}


def test_a_plugin_is_listed(tmp_path: Path, capsys) -> None:
    file = tmp_path / "from_a_file.py"
    file.write_text(
        "from expunge.registry import optimise\n"
        "@optimise(paper='mine', intention='removal', known_weaknesses=('not studied',))\n"
        "def from_a_file(step):\n    '''Mine.'''\n    return 0\n"
    )
    done = expunge("card", "from_a_file", "--plugin", str(file))
    assert done.returncode == cli.DONE, done.stderr
    assert "Mine." in done.stdout


def test_schema_is_json(capsys) -> None:
    assert cli.main(["schema"]) == cli.DONE
    assert "forget" in capsys.readouterr().out


# --- errors --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["lst"], r"error E010: No such command 'lst'\. Did you mean 'list'\? See `expunge --help`\."),
        (["ledger"], r"error E010: Missing command\. See `expunge ledger --help`\."),
        (["card"], r"error E010: Missing argument 'name'\. See `expunge card --help`\."),
        (
            ["card", "npoo"],
            r"error E310: nothing in the catalogue is called 'npoo'\. Did you mean npo or simnpo or dpo\?",
        ),
        (["list", "method"], r"error E310: there is no room 'method'\. Did you mean methods or metrics\?"),
        (["list", "methods", "--plugin", "absent.py"], r"error E310: plug-in file absent\.py does not exist"),
        (["run", "absent.yaml"], r"error E100: .*absent\.yaml.*"),
        (["plan", "absent.yaml"], r"error E100: .*absent\.yaml.*"),
        (["audit", "m", "--request", "absent.yaml"], r"error E100: .*absent\.yaml.*"),
        (["run", "r.yaml", "--set", "beta"], r"error E320: --set 'beta' is not of the form name=value.*"),
        (["run", "r.yaml", "--set", "beta=[1"], r"error E320: --set .* is not a YAML value.*"),
        (["run", "r.yaml", "--require", "removed"], r"error E310: --require: no verdict is called 'removed'.*"),
        (["audit", "m", "--request", "r.yaml", "--set", "beta=1"], r"error E320: --set beta: an audit sets.*"),
        (["compare", "one"], r"error E010: .*at least two runs.*"),
        (["compare", "absent-1", "absent-2"], r"error E500: absent-1/evidence\.json does not exist.*"),
        (["delta", "show", "absent"], r"error E420: .*absent.*"),
    ],
)
def test_a_mistake_is_one_line_and_status_2(arguments, line, capsys, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert cli.main(arguments) == cli.MISTAKE
    shown = capsys.readouterr()
    assert shown.out == ""
    assert re.fullmatch(line, shown.err.rstrip("\n").split("\n")[-1]), shown.err
    assert shown.err.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (RowError("a.jsonl, row 3:\n  no answer"), cli.MISTAKE, "error E110: a.jsonl, row 3: no answer"),
        (OSError(errno.ENOSPC, "No space left on device", "/out/x"), 2, "error E500: No space left on device: /out/x"),
        (PermissionError(errno.EACCES, "Permission denied", "/out"), 2, "error E500: Permission denied: /out"),
        (MemoryError(), 2, "error E520: out of memory.*"),
        (RuntimeError("[enforce fail] can't allocate memory: you tried ..."), 2, "error E520: out of memory.*"),
        (RuntimeError("I/O error: No space left on device (os error 28)"), 2, "error E500: No space left on device.*"),
        (ZeroDivisionError("division by zero"), 1, "error E999: ZeroDivisionError: division by zero. This is a bug.*"),
    ],
)
def test_what_goes_wrong_becomes_one_line(error, code, line, capsys, monkeypatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr("expunge.registry.parts", fail)
    assert cli.main(["list", "methods"]) == code
    assert re.fullmatch(line + "\n", capsys.readouterr().err)
    with pytest.raises(type(error)):
        cli.main(["list", "methods", "--debug"])


def test_ctrl_c_says_how_to_go_on(capsys, monkeypatch) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("expunge.registry.parts", interrupt)
    assert cli.main(["list", "methods", "--json"]) == cli.INTERRUPTED
    assert "goes on: expunge list methods --json\n" in capsys.readouterr().err


def test_a_reader_that_has_seen_enough_is_no_error() -> None:
    command = f"{sys.executable} -m expunge list metrics --json"
    done = subprocess.run(["bash", "-c", f"set -o pipefail; {command} | true"], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


def test_exit_codes_are_documented() -> None:
    documented = dict(re.findall(r"^\| (\d+) \| (.*?) \|$", DOC, re.MULTILINE))
    assert set(map(int, documented)) == {cli.DONE, cli.BUG, cli.MISTAKE, cli.NOT_MET, cli.INTERRUPTED}


def test_every_error_code_is_used_once_and_documented() -> None:
    classes = [ExpungeError, *(c for c in ExpungeError.__subclasses__() if "code" in vars(c))]
    page = (Path(__file__).parent.parent / "docs" / "errors.md").read_text(encoding="utf-8")
    documented = dict(re.findall(r"^\| (E\d+) \| (\S+) \|", page, re.MULTILINE))
    own = dict.fromkeys(("E010", "E520", "E999"), "-")
    assert documented == {**own, **{c.code: f"`{c.__name__}`" for c in classes}}
    assert len({c.code for c in classes}) == len(classes)


# --- small helpers -------------------------------------------------------------------------------------------------


def test_assignments_are_read_as_yaml() -> None:
    given = console.assignments(["beta=0.2", "retain=kl", "rates=[1, 2]", "training.steps=3", "text=a=b"])
    assert given == {"beta": 0.2, "retain": "kl", "rates": [1, 2], "training.steps": 3, "text": "a=b"}
    with pytest.raises(ParameterError):
        console.assignments(["=3"])


def test_numbers_are_readable() -> None:
    assert [console.duration(s) for s in (0.5, 59, 61, 3700)] == ["0.5 s", "59 s", "1 min 1 s", "1 h 1 min"]


def test_progress_without_a_terminal_is_a_line_per_phase(capsys, monkeypatch) -> None:
    progress = console.Progress()
    for done in range(1, 4):
        progress("train", done, 3)
    progress.phase("audit")(5, 5)
    progress.phase("audit")(5, 5)
    progress.close()
    lines = capsys.readouterr().err.splitlines()
    assert [re.sub(r" in .*", "", line) for line in lines] == [
        "train ...",
        "train: 3 of 3",
        "audit: 5 of 5",
    ]


def test_progress_tells_the_time_left(capsys, monkeypatch) -> None:
    clock = iter([0.0, 20.0])
    monkeypatch.setattr(console.time, "monotonic", lambda: next(clock))
    progress = console.Progress()
    progress("train", 1, 40)
    progress("train", 10, 40)
    assert capsys.readouterr().err.splitlines()[-1] == "train: 10 of 40, 1 min 0 s left"


# --- ledger, deltas, comparison, plan on small things --------------------------------------------------------------


def test_ledger_commands(tmp_path: Path, capsys) -> None:
    from expunge.ledger import Ledger

    file = tmp_path / "ledger.sqlite"
    assert cli.main(["ledger", "list", "--ledger", str(file)]) == cli.MISTAKE
    assert "error E510: there is no ledger" in capsys.readouterr().err
    Ledger(file).append("request_received", method="npo", kind="change")
    Ledger(file).append("finished", verdict="suppressed")
    assert cli.main(["ledger", "list", "--ledger", str(file)]) == cli.DONE
    lines = capsys.readouterr().out.splitlines()[2:]
    assert [line.split()[0] for line in lines] == ["1", "2"]
    assert lines[1].endswith("suppressed")
    assert cli.main(["ledger", "list", "--ledger", str(file), "--json"]) == cli.DONE
    assert [entry["event"] for entry in json.loads(capsys.readouterr().out)] == ["request_received", "finished"]
    assert cli.main(["ledger", "show", "1", "--ledger", str(file)]) == cli.DONE
    assert json.loads(capsys.readouterr().out)["body"]["method"] == "npo"
    assert cli.main(["ledger", "verify", "--ledger", str(file)]) == cli.DONE
    assert capsys.readouterr().out.startswith("2 entries, whole; head ")
    assert cli.main(["ledger", "export", "--ledger", str(file), "--out", str(tmp_path / "export.jsonl")]) == cli.DONE
    assert len((tmp_path / "export.jsonl").read_text().splitlines()) == 3


def test_a_broken_ledger_is_status_2(tmp_path: Path, capsys) -> None:
    import sqlite3

    from expunge.ledger import Ledger

    file = tmp_path / "ledger.sqlite"
    for _ in range(2):
        Ledger(file).append("started")
    with sqlite3.connect(file) as connection:
        connection.execute("DROP TRIGGER no_update")
        connection.execute("UPDATE entry SET time = '1999' WHERE number = 1")
    assert cli.main(["ledger", "verify", "--ledger", str(file)]) == cli.MISTAKE
    assert "error E510: entry 1 was changed" in capsys.readouterr().err


def test_delta_commands(tmp_path: Path, capsys) -> None:
    import torch
    from tiny import tiny

    from expunge.deltas import Delta
    from expunge.subjects.language import LanguageModel

    model, tokenizer = tiny("llama")
    base = LanguageModel(model, tokenizer)
    base.save(tmp_path / "base")
    base = LanguageModel.load(tmp_path / "base")
    changed, again = base.copy(), base.copy()
    with torch.no_grad():
        changed.model.lm_head.weight += 1
        again.model.lm_head.weight += 3
    Delta.from_models(base, changed).save(tmp_path / "delta")
    Delta.from_models(changed, again).save(tmp_path / "second")

    assert cli.main(["delta", "show", str(tmp_path / "delta"), "--json"]) == cli.DONE
    shown = json.loads(capsys.readouterr().out)
    assert (shown["kind"], shown["base"], list(shown["tensors"])) == ("dense", base.fingerprint, ["lm_head.weight"])
    assert cli.main(["delta", "show", str(tmp_path / "delta")]) == cli.DONE
    assert "lm_head.weight" in capsys.readouterr().out

    command = ["delta", "apply", str(tmp_path / "delta"), "--base", str(tmp_path / "base"), "--out"]
    assert cli.main([*command, str(tmp_path / "made")]) == cli.DONE
    made = LanguageModel.load(tmp_path / "made")
    assert torch.equal(made.model.lm_head.weight, changed.model.lm_head.weight)
    assert cli.main([*command, str(tmp_path / "half"), "--scale", "0.5"]) == cli.DONE
    half = LanguageModel.load(tmp_path / "half").model.lm_head.weight
    assert torch.allclose(half, base.model.lm_head.weight + 0.5)

    assert cli.main(["delta", "negate", str(tmp_path / "delta"), "--out", str(tmp_path / "back")]) == cli.DONE
    assert torch.allclose(Delta.load(tmp_path / "back").difference("lm_head.weight"), torch.tensor(-1.0))

    pair = [str(tmp_path / "delta"), str(tmp_path / "second")]
    assert cli.main(["delta", "stack", *pair, "--out", str(tmp_path / "both")]) == cli.DONE
    assert torch.allclose(Delta.load(tmp_path / "both").difference("lm_head.weight"), torch.tensor(3.0))
    capsys.readouterr()
    assert cli.main(["delta", "apply", *pair[1:], "--base", str(tmp_path / "base"), "--out", str(tmp_path / "no")]) == 2
    assert "error E210: the delta was made on a base with fingerprint" in capsys.readouterr().err
    assert not (tmp_path / "no").exists()


def test_compare_prints_a_table_or_json(tmp_path: Path, capsys) -> None:
    from evidence_factory import evidence

    for name in ("one", "two"):
        evidence().save(tmp_path / name / "evidence.json")
    runs = [str(tmp_path / name) for name in ("one", "two")]
    assert cli.main(["compare", *runs, "--out", str(tmp_path / "out")]) == cli.DONE
    shown = capsys.readouterr().out
    assert "one" in shown
    assert "two" in shown
    assert (tmp_path / "out" / "compare.html").is_file()
    assert cli.main(["compare", *runs, "--out", str(tmp_path / "out"), "--json"]) == cli.DONE
    assert json.loads(capsys.readouterr().out)


# --- the whole road on a random model ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A request that takes seconds: a random model, ten entities, one attack."""
    from tiny import tiny

    from expunge.subjects.language import LanguageModel

    place = tmp_path_factory.mktemp("road")
    LanguageModel(*tiny("llama")).save(place / "model")
    for side, start in (("forget", 0), ("retain", 100)):
        rows = [
            {"id": f"{side}-{i}", "question": f"where was {i} born?", "answer": f"Tivin {i}", "entity": f"person {i}"}
            for i in range(start, start + 10)
        ]
        (place / f"{side}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (place / "request.yaml").write_text(
        "model: model\n"
        "data: {forget: forget.jsonl, retain: retain.jsonl}\n"
        "training: {steps: 2, batch_size: 4}\n"
        "audit: {attacks: [direct], bootstrap: 100, self_test: false}\n"
    )
    return place


@pytest.fixture
def at(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("EXPUNGE_LEDGER", str(tmp_path / "ledger.sqlite"))
    monkeypatch.chdir(tmp_path)
    return folder


def test_run_then_audit_then_compare(at: Path, capsys) -> None:
    command = ["run", str(at / "request.yaml")]
    assert cli.main([*command, "--out", "one", "--save-model", "--set", "beta=0.3"]) == cli.DONE
    shown = capsys.readouterr()
    assert shown.out.startswith("verdict: inconclusive")
    assert "report: one/report.html" in shown.out
    assert "change: npo: 2 of 2 in " in shown.err
    assert Path("one/report.html").is_file()
    assert json.loads(Path("one/method.json").read_text())["settings"]["beta"] == 0.3

    # Done already: nothing is done again, and the result is the same.
    assert cli.main([*command, "--out", "one", "--set", "beta=0.3", "--json", "--require", "suppressed"]) == cli.NOT_MET
    shown = capsys.readouterr()
    assert json.loads(shown.out)["verdict"]["verdict"] == "inconclusive"
    assert shown.err == "--require not met: the verdict is inconclusive, wanted suppressed\n"

    # The saved model is base + delta: an audit of either says the same.
    audits = []
    for number, suspect in enumerate(("one", "one/model")):
        call = ["audit", suspect, "--request", str(at / "request.yaml"), "--out", f"audit-{number}", "--json"]
        assert cli.main(call) == cli.DONE
        audits.append(json.loads(capsys.readouterr().out))
    assert audits[0]["metrics"] == audits[1]["metrics"]

    assert cli.main([*command, "--out", "two", "--method", "grad_diff", "--scope", "layers:-1-", "--json"]) == cli.DONE
    capsys.readouterr()
    assert cli.main(["compare", "one", "two", "--out", "both"]) == cli.DONE
    assert "two" in capsys.readouterr().out
    assert cli.main(["ledger", "verify"]) == cli.DONE


def test_python_says_the_same_as_the_command_line(at: Path, capsys) -> None:
    import expunge as package

    request = at / "request.yaml"
    evidence = package.forget(request, out="from-python", settings={"beta": 0.3}, overrides={"proof": "quick"})
    line = ["run", str(request), "--out", "from-cli", "--json", "--set", "beta=0.3", "--set", "proof=quick"]
    assert cli.main(line) == cli.DONE
    shown = json.loads(capsys.readouterr().out)
    assert shown["verdict"]["because"] == evidence.verdict.because
    assert shown["models"] == evidence.models
    audited = package.audit("from-python", request=request)
    assert audited.models == evidence.models
    assert Path("runs/request-audit/report.html").is_file()
    assert package.load(at / "model").tokenizer.eos_token == "</s>"


def test_set_reaches_the_method_and_every_field_of_the_request(at: Path, capsys) -> None:
    command = ["plan", str(at / "request.yaml"), "--json"]
    assert cli.main([*command, "--set", "training.steps=5", "--set", "scope=lora(r=1)", "--set", "beta=1"]) == cli.DONE
    planned = json.loads(capsys.readouterr().out)
    assert (planned["tokens"]["steps"], planned["scope"]) == (5, "lora(r=1)")
    assert cli.main([*command, "--set", "modle=x"]) == cli.MISTAKE
    assert "error E320: optimise npo has no parameter 'modle'" in capsys.readouterr().err
    assert cli.main([*command, "--set", "training.step=5"]) == cli.MISTAKE
    assert "there is no field 'training.step'. Did you mean steps" in capsys.readouterr().err


def test_plan_says_what_the_run_will_do(at: Path, capsys) -> None:
    assert cli.main(["plan", str(at / "request.yaml"), "--json", "--scope", "lora(r=2)"]) == cli.DONE
    planned = json.loads(capsys.readouterr().out)
    assert planned["tokens"]["steps"] == 2
    assert planned["audit"]["models"] == 2
    assert 0 < planned["parameters"]["share"] < 0.2
    assert cli.main(["plan", str(at / "request.yaml")]) == cli.DONE
    shown = capsys.readouterr().out
    for word in ("trainable parameters", "peak memory", "time on this machine", "questions asked per model"):
        assert word in shown
    assert not list(Path().iterdir()), "a plan writes nothing"


def test_ctrl_c_leaves_a_run_that_goes_on(at: Path) -> None:
    command = [sys.executable, "-m", "expunge", "run", str(at / "request.yaml"), "--out", "run"]
    many = [*command, "--set", "training.steps=60", "--set", "training.guard=false"]
    process = subprocess.Popen(many, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    for line in process.stderr:
        if line.startswith("change: npo"):
            break
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=120)
    assert (process.returncode, out) == (cli.INTERRUPTED, "")
    assert "goes on: expunge run" in err.splitlines()[-1]
    assert "Traceback" not in err
    assert not Path("run/evidence.json").exists()
    done = subprocess.run([*many, "--json"], capture_output=True, text=True, timeout=280)
    assert done.returncode == cli.DONE, done.stderr
    assert json.loads(done.stdout)["method"]["steps"] == 60
    events = [entry["event"] for entry in json.loads(expunge("ledger", "list", "--json").stdout)]
    assert events == ["request_received", "started", "interrupted", "resumed", "finished"]
