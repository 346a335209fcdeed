#!/usr/bin/env bash
# Prints the newest Python at hand of those on which the newest jax is tested (on the path, or under pyenv); nothing
# where there is none.
for version in 3.13 3.12; do
    for python in "python$version" "${PYENV_ROOT:-$HOME/.pyenv}/versions/$version."*/bin/python; do
        if "$python" -c "import sys; sys.exit('%d.%d' % sys.version_info[:2] != '$version')" 2>/dev/null; then
            echo "$python"
            exit
        fi
    done
done
