#!/usr/bin/env bash
# Makes an environment what the checkout asks for, and does nothing where it already is.
#
# Usage: environment.sh core|dev|newest|aot-tpu|aot-cuda PYTHON ORIGIN
#
#   core dev           the package, or it and the tools of its developers, in .venv
#   newest             the same as dev with the newest versions that the package supports, in .venv-newest
#   aot-tpu aot-cuda   the package and the compiler for TPUs (2 GB) or for GPUs (5 GB), in .venv-aot-*: they compile for
#                      devices that are not there
#   ORIGIN "file"      nobody chose PYTHON, so an existing environment decides
#
# A stamp in the environment holds a digest of pyproject.toml, of the constraints and of the place of the checkout. It
# is removed before an install and written after it, so that an interrupted install is taken up again by the next call.
set -euo pipefail
cd "$(dirname "$0")/.."

profile=$1 python=$2 origin=$3
venv=.venv
case $profile in
    core) extra= ;;
    dev) extra=[dev] ;;
    newest) extra=[dev] venv=.venv-newest ;;
    aot-tpu) extra=[tpu] venv=.venv-$profile ;;
    aot-cuda) extra=[cuda13] venv=.venv-$profile ;;
    *) echo "environment.sh: no environment is called '$profile'" >&2 && exit 2 ;;
esac
stamp=$venv/.stamp-$profile

fail() {
    echo "make: $*" >&2
    exit 2
}

version_of() {
    "$1" -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null
}

digest() {
    $venv/bin/python -I -c '
import hashlib, pathlib, sys
parts = [sys.prefix.encode(), *(pathlib.Path(name).read_bytes() for name in sys.argv[1:])]
print(hashlib.sha256(b"\0".join(parts)).hexdigest())' pyproject.toml "$constraints"
}

found=$(version_of $venv/bin/python) || found=
wanted=$found
if [ -z "$found" ] || [ "$origin" != file ]; then
    wanted=$(version_of "$python") || fail "no Python at '$python': glm_jax needs 3.11 or newer (make PYTHON=python3.12)"
fi
constraints=constraints/newest.txt
case $profile:$wanted in
    *:2.* | *:3.? | *:3.10) fail "glm_jax needs Python 3.11 or newer, not $wanted: choose one, as in make PYTHON=python3.12" ;;
    aot-*:3.12) constraints=constraints/py312.txt ;;
    aot-*) fail "the environments of make aot are of Python 3.12, not $wanted: make aot AOT_PYTHON=python3.12" ;;
    newest:3.11) fail "the newest versions need Python 3.12 or 3.13, not $wanted: make test-newest NEWEST_PYTHON=python3.13" ;;
    *:3.11) constraints=constraints/py311.txt ;;
    newest:3.12) ;;
    *:3.12) constraints=constraints/py312.txt ;;
    *:3.13) ;;
    *) echo "glm_jax is tested on Python 3.11 to 3.13; on $wanted it gets the versions tested on 3.13." ;;
esac
if [ -n "$found" ] && [ "$found" != "$wanted" ]; then
    fail "$venv holds Python $found and '$python' is $wanted: run make clean first, or leave PYTHON out"
fi

key=
[ -z "$found" ] || key=$(digest)
if [ -n "$key" ] && [ "$(cat "$stamp" 2>/dev/null)" = "$key" ]; then
    exit 0
fi

echo "Installing glm_jax ($profile) on Python $wanted into $venv; the first time takes a few minutes."
if [ -z "$found" ]; then
    "$python" -m venv --clear "$venv"
elif ! "$venv/bin/python" -m pip --version >/dev/null 2>&1; then
    "$venv/bin/python" -m ensurepip --default-pip >/dev/null
fi
rm -f "$venv"/.stamp-*
"$venv/bin/python" -m pip install -qq --disable-pip-version-check -c "$constraints" -e ".$extra"
key=$(digest)
[ "$venv" != .venv ] || echo "$key" >.venv/.stamp-core
[ "$profile" = core ] || echo "$key" >"$stamp"
