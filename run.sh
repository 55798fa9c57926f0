#!/bin/sh
# The two commands behind `make demo` and `make test`, for machines without make: sh run.sh demo | test.
# Needs Python 3.11 or newer (PYTHON=... names another one than python3); everything else goes into .venv.
set -eu
cd "$(dirname "$0")"
python=${PYTHON:-python3}
bin=.venv/bin

# install NAME WHAT: install the project into .venv, again only when pyproject.toml has changed.
install() {
    if [ ! -x "$bin/python" ]; then
        "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || {
            echo "error: moeplan needs Python 3.11 or newer, '$python' is not; try PYTHON=python3.11 $0" >&2
            exit 2
        }
        "$python" -m venv .venv
    fi
    if ! cmp -s pyproject.toml ".venv/installed-$1.toml"; then
        echo "installing moeplan into .venv" >&2
        "$bin/python" -m pip install -qq --disable-pip-version-check --editable "$2"
        cp pyproject.toml ".venv/installed-$1.toml"
    fi
}

demo() {
    install demo .
    "$bin/moeplan" optimize --model moeplan-20m --trace moeplan/data/moeplan-20m.npz --ranks 8 --nodes 2 --out out/demo
    "$bin/moeplan" export out/demo/plan.json --format sglang --out out/demo-sglang.json
}

# Every check runs, whatever the one before it found; the exit code is 1 when any failed.
run_tests() {
    install test '.[dev,torch,hf]'
    failed=
    check() {
        echo "== $1"
        label=$1
        shift
        "$@" || failed="$failed $label"
    }
    check ruff "$bin/ruff" check .
    check mypy "$bin/mypy"
    check import-linter "$bin/lint-imports"
    check reference "$bin/python" docs/generate.py --check
    check pytest "$bin/pytest" -n auto
    [ -z "$failed" ] || {
        echo "failed:$failed" >&2
        exit 1
    }
}

case ${1-} in
demo) demo ;;
test) run_tests ;;
*)
    echo "usage: sh run.sh demo | test" >&2
    exit 2
    ;;
esac
