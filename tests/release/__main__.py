"""make release-check: what must hold before a version is tagged.

One version everywhere, protos that break nothing that was there before, a wheel that holds the client alone, licences that
go with Apache-2.0, known vulnerabilities, a Dockerfile without faults, and a list of parts (SBOM, CycloneDX) in dist/.  A
check that cannot be made is told, never passed.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import subprocess
import sys
import tempfile
import tomllib
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
DIST = ROOT / "dist"
_BUF = "@bufbuild/buf@1.75.0"
# Copyleft that reaches whoever links it; LGPL and MPL do not.
_FORBIDDEN = re.compile(r"(?<!L)(?<!Lesser )\bA?GPL|(?<!Lesser )General Public License", re.IGNORECASE)
_TIMEOUT_S = 300.0


class Failed(Exception):
    """The message says what to mend."""


class NotMade(Exception):
    """The message says why the check could not be made."""


def main() -> int:
    checks: dict[str, Callable[[], str]] = {
        "version": version, "protos": protos, "wheel": wheel, "licences": licences, "vulnerabilities": vulnerabilities,
        "dockerfile": dockerfile, "parts": parts,
    }  # fmt: skip
    parser = argparse.ArgumentParser(prog="python -m tests.release", description=__doc__)
    parser.add_argument("--only", choices=checks, nargs="+", default=list(checks), help="make these checks alone")
    asked = parser.parse_args().only
    DIST.mkdir(exist_ok=True)
    failed = False
    for name, check in ((name, checks[name]) for name in asked):
        try:
            said = f"ok        {check()}"
        except Failed as problem:
            said, failed = f"FAILED    {problem}", True
        except NotMade as problem:
            said = f"NOT MADE  {problem}"
        print(f"{name:16} {said}", flush=True)
    return 1 if failed else 0


def version() -> str:
    found = the_version()
    chart = (ROOT / "docker/chart/Chart.yaml").read_text()
    for field in ("version", "appVersion"):
        if f"\n{field}: {found}\n" not in chart:
            raise Failed(f"docker/chart/Chart.yaml: {field} is not {found}, which kvferry/_version.py says")
    if "dynamic" not in tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]:
        raise Failed("pyproject.toml gives a version of its own")
    if f"## {found}" not in (ROOT / "CHANGELOG.md").read_text():
        raise Failed(f"CHANGELOG.md has no section {found}: give what is Unreleased its name")
    return found


def the_version() -> str:
    found = re.search(r'__version__ = "([^"]+)"', (ROOT / "kvferry/_version.py").read_text())
    if found is None:
        raise Failed("kvferry/_version.py names no version")
    return found[1]


def protos() -> str:
    """Held against the last version that was tagged; before the first, against the main branch."""
    if (npm := shutil.which("npm")) is None:
        raise NotMade("npm, which brings buf, is not installed")
    before = earlier()
    archive = subprocess.run(["git", "archive", before, "protos"], capture_output=True, check=False, cwd=ROOT)
    if archive.returncode != 0:
        raise NotMade(f"{before} has no protos")
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run(["tar", "-x", "-C", folder], input=archive.stdout, check=True, timeout=_TIMEOUT_S)
        buf = (npm, "exec", "--yes", "--loglevel=error", "--", _BUF)
        if subprocess.run([*buf, "--version"], capture_output=True, check=False, timeout=_TIMEOUT_S).returncode != 0:
            raise NotMade(f"npm cannot fetch {_BUF}")
        run(*buf, "breaking", "protos", "--against", f"{folder}/protos")
    return f"nothing of {before} is broken"


def earlier() -> str:
    """Raises NotMade."""
    tag = ("describe", "--tags", "--abbrev=0", "--match", "v*")
    branches = (("rev-parse", "--abbrev-ref", "--verify", name) for name in ("origin/main", "main"))
    for question in (tag, *branches):
        told = subprocess.run(["git", *question], capture_output=True, text=True, check=False, cwd=ROOT)
        if told.returncode == 0:
            return told.stdout.strip()
    raise NotMade("no tag and no main branch to compare with")


def dockerfile() -> str:
    if (hadolint := shutil.which("hadolint", path=Path(sys.executable).parent)) is None:
        raise NotMade("hadolint is not installed: pip install '.[release]'")
    run(hadolint, "docker/Dockerfile")
    return "hadolint has nothing to say"


def wheel() -> str:
    run(sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(DIST), str(ROOT))
    (built,) = DIST.glob(f"kvferry-{the_version()}-*.whl")
    with zipfile.ZipFile(built) as archive:
        names = archive.namelist()
    if foreign := {name.partition("/")[0] for name in names} - {"kvferry", f"kvferry-{the_version()}.dist-info"}:
        raise Failed(f"{built.name} holds {', '.join(sorted(foreign))} besides kvferry")
    if not any(name.endswith("LICENSE") for name in names):
        raise Failed(f"{built.name} has no LICENSE")
    return f"{built.name}, {built.stat().st_size >> 10} KiB"


def licences() -> str:
    command = ("--python", sys.executable, "--format", "json", "--ignore-packages", *lookers())
    found = json.loads(tool("piplicenses", "pip-licenses", *command))
    bad = [f"{each['Name']} ({each['License']})" for each in found if forbidden(each["License"])]
    if bad:
        raise Failed(f"not for use with Apache-2.0: {', '.join(bad)}")
    unknown = [each["Name"] for each in found if each["License"].upper() == "UNKNOWN"]
    return f"{len(found)} packages" + (f"; licence not stated: {', '.join(unknown)}" if unknown else "")


def lookers() -> list[str]:
    """Packages that these checks look with, which nothing is linked with, whatever their licence."""
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    return [re.split(r"[><=~,;\[ ]", line)[0] for line in extras["release"]]


def forbidden(licence: str) -> bool:
    """Of several to choose from, one that is not suffices."""
    return all(_FORBIDDEN.search(choice) for choice in re.split(r"\bOR\b|;", licence))


def vulnerabilities() -> str:
    constraints = str(ROOT / "constraints.txt")
    text = tool(
        "pip_audit", "pip-audit", "-r", constraints, "--no-deps", "--disable-pip", "--format", "json", ok=(0, 1)
    )
    try:
        found = json.loads(text)["dependencies"]
    except ValueError as error:
        raise NotMade("pip-audit's database cannot be reached") from error
    bad = [f"{each['name']} {v['id']}" for each in found for v in each.get("vulns", ())]
    if bad:
        raise Failed(", ".join(bad))
    skipped = [each["name"] for each in found if "skip_reason" in each]
    if skipped:
        raise NotMade(f"the database knows nothing of {len(skipped)} of {len(found)} packages, {skipped[0]} among them")
    return f"none known of {len(found)} packages"


def parts() -> str:
    out = DIST / f"kvferry-{the_version()}.cdx.json"
    constraints = str(ROOT / "constraints.txt")
    tool("cyclonedx_py", "cyclonedx-bom", "requirements", constraints, "--output-format", "JSON", "-o", str(out))
    return f"{len(json.loads(out.read_text())['components'])} in {out.relative_to(ROOT)}"


def tool(module: str, package: str, *arguments: str, ok: Sequence[int] = (0,)) -> str:
    known = subprocess.run([sys.executable, "-c", f"import {module}"], capture_output=True, check=False)
    if known.returncode != 0:
        raise NotMade(f"{package} is not installed: pip install '.[release]'")
    return run(sys.executable, "-m", module, *arguments, ok=ok)


def run(*command: str, ok: Sequence[int] = (0,)) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=_TIMEOUT_S, cwd=ROOT)
    except subprocess.TimeoutExpired as error:
        raise NotMade(f"{' '.join(command[1:4])} took longer than {_TIMEOUT_S:.0f} s") from error
    if done.returncode not in ok:
        raise Failed((done.stderr or done.stdout).strip()[-500:] or f"{command[2]} ended with {done.returncode}")
    return done.stdout


if __name__ == "__main__":
    sys.exit(main())
