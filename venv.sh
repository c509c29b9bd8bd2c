# Sourced by run.sh and test.sh: a virtual environment in .venv that holds what a requirements file asks for.
# Usage: need_venv requirements.txt. Sets $PY. PYTHON chooses the interpreter that the environment is made with.

need_venv() {
    local requirements=$1 stamp
    PY=.venv/bin/python
    stamp=.venv/.installed-$(cat requirements*.txt constraints.txt | sha256sum | cut -c1-16)-${requirements%.txt}
    # what the tests need holds what a run needs
    [ -e "$stamp" ] || [ -e "${stamp%requirements*}requirements-dev" ] && return
    local python=${PYTHON:-python3}
    "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || {
        echo "Python 3.11 or newer is needed; '$python' is: $("$python" --version 2>&1). Set PYTHON to another." >&2
        return 1
    }
    echo "setting up .venv (once, some minutes; log: .venv/install.log)"
    [ -x "$PY" ] || "$python" -m venv .venv || {
        rm -rf .venv
        echo "'$python -m venv' failed: on Debian and Ubuntu, install python3-venv." >&2
        return 1
    }
    "$PY" -m pip install --disable-pip-version-check -r "$requirements" >.venv/install.log 2>&1 || {
        tail -n 20 .venv/install.log >&2
        echo "installing $requirements failed: see .venv/install.log" >&2
        return 1
    }
    touch "$stamp"
}
