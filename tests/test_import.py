"""Importing the package and asking for help must cost next to nothing."""

import resource
import subprocess
import sys

import pytest

HEAVY = ("torch", "transformers", "numpy", "scipy", "pyarrow", "peft", "sklearn", "datasets")


def python(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout


@pytest.mark.parametrize("module", ["expunge", "expunge.cli", "expunge.errors", "expunge.registry", "expunge.request"])
def test_heavy_libraries_are_not_imported(module: str) -> None:
    loaded = python(f"import sys, {module}; print(*sys.modules)").split()
    assert not [name for name in HEAVY if name in loaded]


def best_seconds(command: list[str]) -> float:
    """Processor time, best of five: the machine may be shared, and waiting for it is not the command's doing."""

    def once(command: list[str]) -> float:
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime

    return min(once(command) for _ in range(5))


def test_import_is_fast() -> None:
    assert best_seconds([sys.executable, "-c", "import expunge"]) < 0.3


def test_help_is_fast() -> None:
    assert best_seconds([sys.executable, "-m", "expunge", "--help"]) < 0.5


def test_public_names() -> None:
    import expunge

    assert callable(expunge.forget)
    assert callable(expunge.load)
    assert expunge.__version__[0].isdigit()
    with pytest.raises(AttributeError, match="no attribute 'forgett'"):
        expunge.forgett  # noqa: B018


def test_audit_stays_a_function_when_the_module_of_that_name_is_imported() -> None:
    code = (
        "import expunge, expunge.audit as module, sys; print(callable(expunge.audit), 'expunge.audit' in sys.modules)"
    )
    assert python(code).split() == ["True", "True"]
