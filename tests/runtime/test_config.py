from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from pathlib import Path

import pytest

from services.runtime.config import load, option


class Colour(Enum):
    RED = "red"
    BLUE = "blue"


@dataclass(frozen=True, slots=True)
class Settings:
    """What the test service can be told: 100 % of it."""

    name: str = option(help="a name")
    num_things: int = option(3, help="how many; 50 % is fine", minimum=1, maximum=9)
    ratio: float = option(0.5, help="a ratio")
    verbose: bool = option(False, help="say more")
    colour: Colour = option(Colour.RED, help="a colour")
    peers: tuple[str, ...] = option((), help="who else")
    limit: int | None = option(None, help="a limit", minimum=0)
    path: Path | None = option(None, help="a place")

    def __post_init__(self) -> None:
        if self.name == "nobody":
            raise ValueError("--name must be somebody")


def get(*argv: str, file: Path | None = None, **environ: str) -> Settings:
    arguments = [*argv, *(["--config", str(file)] if file else [])]
    return load(Settings, arguments, "test", environ)


def test_defaults() -> None:
    assert get("--name", "x") == Settings(name="x")


def test_every_kind_from_flags() -> None:
    settings = get(
        "--name=x", "--num-things=4", "--ratio=2", "--verbose", "--colour=blue", "--peers=a,b", "--peers=c", "--limit=0",
        "--path=/p",
    )  # fmt: skip
    assert settings == Settings("x", 4, 2.0, True, Colour.BLUE, ("a", "b", "c"), 0, Path("/p"))
    assert get("--name=x", "--no-verbose", "--limit=none", KVFERRY_VERBOSE="1", KVFERRY_LIMIT="5") == Settings("x")


def test_every_kind_from_the_environment() -> None:
    settings = get(
        KVFERRY_NAME="x", KVFERRY_NUM_THINGS="4", KVFERRY_RATIO="2", KVFERRY_VERBOSE="yes", KVFERRY_COLOUR="blue",
        KVFERRY_PEERS="a, b", KVFERRY_LIMIT="0", KVFERRY_PATH="/p", KVFERRY_OF_ANOTHER_SERVICE="1",
    )  # fmt: skip
    assert settings == Settings("x", 4, 2.0, True, Colour.BLUE, ("a", "b"), 0, Path("/p"))


def test_every_kind_from_a_file(tmp_path: Path) -> None:
    file = tmp_path / "c.toml"
    file.write_text(
        'name = "x"\nnum_things = 4\nratio = 2\nverbose = true\ncolour = "blue"\npeers = ["a", "b"]\nlimit = 0\npath = "/p"'
    )
    assert get(file=file) == Settings("x", 4, 2.0, True, Colour.BLUE, ("a", "b"), 0, Path("/p"))


def test_flags_over_environment_over_file_over_defaults(tmp_path: Path) -> None:
    file = tmp_path / "c.toml"
    file.write_text('name = "file"\nnum_things = 7\nratio = 0.1')
    settings = get("--name=flag", file=file, KVFERRY_NAME="environment", KVFERRY_NUM_THINGS="8")
    assert (settings.name, settings.num_things, settings.ratio, settings.limit) == ("flag", 8, 0.1, None)


@pytest.mark.parametrize(
    ("argv", "environ", "says"),
    [
        ([], {}, "--name is required; give the flag, KVFERRY_NAME, or name in the --config file"),
        (["--name=x", "--nmae=y"], {}, "--nmae"),
        (["--name=x", "--num=4"], {}, "--num"),
        (["--name=x", "stray"], {}, "stray"),
        (["--name=x", "--num-things=many"], {}, "--num-things must be a whole number, not 'many'"),
        (["--name=x", "--num-things=0"], {}, "--num-things must be at least 1, not 0"),
        (["--name=x", "--num-things=10"], {}, "--num-things must be at most 9, not 10"),
        (["--name=x", "--ratio=nan"], {}, "--ratio must be a number"),
        (["--name=x", "--colour=green"], {}, "--colour must be one of red, blue, not 'green'"),
        (["--name=nobody"], {}, "--name must be somebody"),
        (["--name=x"], {"KVFERRY_VERBOSE": "perhaps"}, "KVFERRY_VERBOSE must be true or false, not 'perhaps'"),
        (["--name=x"], {"KVFERRY_NUM_THINGS": "1.5"}, "KVFERRY_NUM_THINGS must be a whole number"),
        (["--name=x", "--config=/nowhere.toml"], {}, "cannot read the --config file /nowhere.toml"),
    ],
)
def test_rejects(argv: list[str], environ: dict[str, str], says: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        load(Settings, argv, "test", environ)
    assert caught.value.code == 2
    err = capsys.readouterr().err
    assert err.startswith("test: ")
    assert says in err
    assert err.count("\n") == 1


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("nmae = 1", "unknown key nmae"),
        ("num_things = true", "must be a whole number"),
        ("num_things = 1.0", "must be a whole number"),
        ("name = 5", "must be text"),
        ('peers = ["a", 1]', "must be a list of texts"),
        ("verbose = 1", "must be true or false"),
        ("name = ", "not valid TOML"),
        ("num_things = " + "9" * 5000, "not valid TOML"),
        ("name = " + "[" * 5000, "not valid TOML"),
    ],
)
def test_rejects_of_a_file(content: str, says: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "c.toml"
    file.write_text(content)
    with pytest.raises(SystemExit) as caught:
        get(file=file) if "name" in content else get("--name=x", file=file)
    assert caught.value.code == 2
    err = capsys.readouterr().err
    assert says in err
    assert str(file) in err


def test_help_shows_defaults_and_variables(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        load(Settings, ["--help"], "test", {})
    assert caught.value.code == 0
    out = capsys.readouterr().out
    for text in (
        "100 % of it",
        "50 % is fine",
        "[3; KVFERRY_NUM_THINGS]",
        "red|blue",
        "[required; KVFERRY_NAME]",
        "--no-verbose",
    ):
        assert text in " ".join(out.split())
