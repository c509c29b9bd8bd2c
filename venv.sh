# Sourced by the scripts: a virtual environment that holds what a lock file holds, each package checked by its hash.
# Usage: need_venv run|dev. Sets $PY. PYTHON chooses the interpreter that the environment is made with.
#        need_tools. Sets $TOOLS, the folder of the programs that locks/tools.in names.

need_venv() {
    local lock=$1 stamp
    PY=.venv/bin/python
    stamp=$(stamp_of .venv build run dev)
    # what the tests need holds what a run needs
    [ -e "$stamp-$lock" ] || [ -e "$stamp-dev" ] || set_up .venv "$lock" "$stamp-$lock"
}

need_tools() {
    local stamp
    TOOLS=.venv-tools/bin
    stamp=$(stamp_of .venv-tools build tools)
    [ -e "$stamp" ] || set_up .venv-tools tools "$stamp"
}

# A file that is there when a folder holds what these locks hold.
stamp_of() {
    local folder=$1
    shift
    echo "$folder/.installed-$(cd locks && cat ../requirements.txt install.sh "${@/%/.txt}" | sha256sum | cut -c1-16)"
}

set_up() {
    local folder=$1 lock=$2 stamp=$3 python=${PYTHON:-python3}
    "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || {
        echo "Python 3.11 or newer is needed; '$python' is: $("$python" --version 2>&1). Set PYTHON to another." >&2
        return 1
    }
    echo "setting up $folder (once, some minutes; log: $folder/install.log)"
    [ -x "$folder/bin/python" ] || "$python" -m venv "$folder" || {
        rm -rf "$folder"
        echo "'$python -m venv' failed: on Debian and Ubuntu, install python3-venv." >&2
        return 1
    }
    locks/install.sh "$folder/bin/python" "$lock" >"$folder/install.log" 2>&1 || {
        tail -n 20 "$folder/install.log" >&2
        echo "installing locks/$lock.txt failed: see $folder/install.log" >&2
        return 1
    }
    touch "$stamp"
}
