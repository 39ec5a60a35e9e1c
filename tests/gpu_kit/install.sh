#!/usr/bin/env bash
# Installs what lies beside it, for a GPU machine without a network: joins the parts, checks them, and installs them into
# venv/ beside them, over what this machine's Python has.  Run in a clone of kvferry, whose build/gpu-kit this is:
#   build/gpu-kit/install.sh              PYTHON=python3 is the one that has torch
# A second run checks what the first installed.
set -euo pipefail
kit=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
root=$(cd "$kit/../.." && pwd)
python=${PYTHON:-python3}
venv=$kit/venv

fail() { echo "gpu-kit: $*" >&2; exit 1; }

[ -f "$kit/manifest" ] || fail "$kit/manifest is missing: it travels with the parts"
[ -f "$root/tests/gpu_kit/check.py" ] || fail "$kit does not lie in a clone of kvferry, as its build/gpu-kit"

expected=$(sed -n 's/^python //p' "$kit/manifest")
found=$("$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])') || fail "there is no $python: name one with PYTHON="
[ "$found" = "$expected" ] || fail "these wheels are for Python $expected, $python is $found: make gpu-kit ARGS='--python $found'"

"$python" -c 'import importlib.util, sys; sys.exit(importlib.util.find_spec("torch") is None)' \
  || fail "$python has no torch: name the Python that has it with PYTHON="

# Sets ``parts`` to their paths, in order.
find_parts() {
  local word name nbytes digest
  local problems=()
  parts=()
  while read -r word name nbytes digest; do
    [ "$word" = part ] || continue
    if [ ! -f "$kit/$name" ]; then
      problems+=("$name is missing, $nbytes bytes")
    elif [ "$(stat -c %s "$kit/$name")" != "$nbytes" ]; then
      problems+=("$name has $(stat -c %s "$kit/$name") bytes instead of $nbytes")
    elif [ "$(sha256sum <"$kit/$name")" != "$digest  -" ]; then
      problems+=("$name is damaged, or of another kit")
    fi
    parts+=("$kit/$name")
  done <"$kit/manifest"
  [ ${#problems[@]} = 0 ] || fail "$(printf '%s; ' "${problems[@]}")bring these again; ${#parts[@]} parts make the kit"
}

# Not --system-site-packages: where this Python is of a venv itself, that would leave out what the venv holds.
make_venv() {
  "$python" -m venv --clear --without-pip "$venv" || fail "$python cannot make $venv: on Debian, apt-get install python3-venv"
  local packages
  packages=$("$venv/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
  echo "$root" >"$packages/kvferry.pth"
  "$python" -c 'import sys
for path in sys.path:
    if path.endswith(("site-packages", "dist-packages")):
        print(f"import site; site.addsitedir({path!r})")' >"$packages/machine.pth"
}

installed=$venv/installed
if cmp -s "$kit/manifest" "$installed"; then
  echo "installed already in $venv"
else
  find_parts
  rm -rf "$kit/unpacked" && mkdir "$kit/unpacked"
  cat "${parts[@]}" | tar -x -C "$kit/unpacked"
  make_venv
  echo "installing $(find "$kit/unpacked/wheels" -name '*.whl' | wc -l) packages into $venv"
  # pip's own settings on this machine, such as constraints, are for other installs.
  PIP_CONFIG_FILE=/dev/null "$python" -m pip --python "$venv/bin/python" --isolated --disable-pip-version-check install \
    --quiet --no-index --no-deps --no-compile --no-cache-dir --ignore-installed "$kit"/unpacked/wheels/*.whl \
    || fail "pip could not install the wheels, for the reason above"
  rm -rf "$kit/modules"
  [ ! -d "$kit/unpacked/modules" ] || mv "$kit/unpacked/modules" "$kit/modules"
  rm -r "$kit/unpacked"
  cp "$kit/manifest" "$installed"
fi

cd "$root"
"$venv/bin/python" -m tests.gpu_kit.check "$kit"
cat <<END
Ready:
  . ${venv#"$root"/}/bin/activate
  make test-gpu PYTHON=${venv#"$root"/}/bin/python
  make bench-gpu PYTHON=${venv#"$root"/}/bin/python
END
