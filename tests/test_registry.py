"""The registry: a typed function is a part, found by its file's name, validated from its signature."""

import ast
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import pytest

import expunge
from expunge import registry
from expunge.errors import CardError, ParameterError, UnknownNameError

CARD = {"paper": "arXiv:0000.00000", "intention": "removal", "known_weaknesses": ("not studied",)}


@pytest.fixture(autouse=True)
def no_traces() -> Iterator[None]:
    """Parts made by a test are gone after it."""
    yield
    for found in registry._parts.values():
        for name in [name for name, part in found.items() if not part.function.__module__.startswith("expunge.")]:
            del found[name]


def test_signature_is_validation() -> None:
    @registry.optimise(**CARD)
    def pushed(step: object, *, beta: float = 0.1, retain: Literal["none", "nll"] = "nll") -> float:
        """Push."""
        return 0.0

    part = registry.get("methods", "pushed")
    assert part.resolve({"beta": "0.5"}) == {"beta": 0.5, "retain": "nll"}
    assert part.describe() == [
        {"name": "beta", "type": "float", "default": 0.1},
        {"name": "retain", "type": "none | nll", "default": "nll"},
    ]
    with pytest.raises(ParameterError, match=r"optimise pushed has no parameter 'betta'\. Did you mean beta"):
        part.resolve({"betta": 1})
    with pytest.raises(ParameterError, match="parameter beta = 'much'"):
        part.resolve({"beta": "much"})
    with pytest.raises(ParameterError, match="parameter retain = 'kl'"):
        part.resolve({"retain": "kl"})
    with pytest.raises(ParameterError, match="parameter beta = inf"):
        part.resolve({"beta": float("inf")})


def test_an_alias_is_the_same_part_with_other_defaults() -> None:
    @registry.optimise(**CARD, aliases={"strongly": {"beta": 9.0}})
    def pushed(step: object, *, beta: float = 0.1) -> float:
        """Push."""
        return 0.0

    assert registry.get("methods", "strongly").resolve() == {"beta": 9.0}
    assert registry.get("methods", "strongly").resolve({"beta": 2})["beta"] == 2.0
    assert registry.get("methods", "strongly").card.name == "strongly"


def test_a_bad_signature_is_refused_when_it_is_registered() -> None:
    with pytest.raises(CardError, match="beta must be keyword-only"):

        @registry.optimise(**CARD)
        def positional(step: object, beta: float = 0.1) -> float:
            """Push."""
            return 0.0

    with pytest.raises(CardError, match="beta has no type annotation"):

        @registry.optimise(**CARD)
        def untyped(step: object, *, beta=0.1) -> float:
            """Push."""
            return 0.0

    with pytest.raises(CardError, match="beta has no default"):

        @registry.optimise(**CARD)
        def required(step: object, *, beta: float) -> float:
            """Push."""
            return 0.0

    with pytest.raises(CardError, match="has no docstring"):

        @registry.optimise(**CARD)
        def silent(step: object) -> float:
            return 0.0


def test_unknown_names_answer_with_the_nearest() -> None:
    with pytest.raises(UnknownNameError, match=r"no method is called 'npoo'\. Did you mean npo"):
        registry.get("methods", "npoo")
    with pytest.raises(UnknownNameError, match=r"no attack is called '\.\./x'"):
        registry.get("attacks", "../x")
    with pytest.raises(UnknownNameError, match=r"there is no room 'metric'\. Did you mean metrics"):
        registry.parts("metric")


def test_a_plugin_file_brings_parts(tmp_path: Path) -> None:
    file = tmp_path / "mine.py"
    file.write_text(
        "from expunge.registry import optimise\n"
        "@optimise(paper='mine', intention='removal', known_weaknesses=('not studied',))\n"
        "def mine(step, *, strength: int = 3):\n    '''Mine.'''\n    return 0\n"
    )
    registry.load_plugin(file)
    assert registry.get("methods", "mine").resolve({}) == {"strength": 3}
    with pytest.raises(UnknownNameError, match="does not exist"):
        registry.load_plugin(tmp_path / "absent.py")


def test_a_name_taken_by_another_file_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "thief.py"
    file.write_text(
        "from expunge.registry import optimise\n"
        "@optimise(paper='mine', intention='removal', known_weaknesses=('not studied',))\n"
        "def npo(step):\n    '''Mine.'''\n    return 0\n"
    )
    registry.get("methods", "npo")
    with pytest.raises(CardError, match=r"'npo' is registered by expunge\.methods\.optimise\.npo already"):
        registry.load_plugin(file)


def test_no_module_imports_the_file_of_a_part() -> None:
    """Parts are found by the registry, so a part can be taken out without touching anything else.

    A reproduction is about parts and may name them: it is taken out with them, and nothing else imports it. Subjects
    are what parts work on.
    """
    source = Path(expunge.__file__).parent
    rooms = [room for room in registry.ROOMS if room != "subjects"]
    files = {part.function.__module__ for room in rooms for part in registry.parts(room)}
    files = {name for name in files if name.split(".")[0] == "expunge"}
    assert len(files) > 5
    for path in (path for path in source.rglob("*.py") if path.parent.name != "reproductions"):
        inside = ".".join(("expunge", *path.relative_to(source).with_suffix("").parts))
        package = inside.removesuffix(".__init__") if inside.endswith("__init__") else inside.rpartition(".")[0]
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.ImportFrom):
                continue
            at = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            module = ".".join([*at, *([node.module] if node.module else [])])
            for target in (module, *(f"{module}.{name.name}" for name in node.names)):
                assert target not in files, f"{inside} imports {target}"
